"""`tether export` as a user meets it."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse


@pytest.fixture
def fused(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    for chart in ("linear", "symmetric"):
        head = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
        delta = Delta(
            name="a",
            chart=chart,
            first=head / 32,
            second=head,
            gate=None,
            base=model.config.base_fingerprint,
        )
        save_checkpoint(fuse(model, {delta: 1.0}, chart=chart), tiny.tokenizer(), tmp_path / chart)
    return tmp_path


def test_export_writes_a_plain_checkpoint(fused, tether, monkeypatch):
    monkeypatch.chdir(fused)
    code, out, err = tether("export", "linear", "--out", "plain", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["folded"] == "head"
    assert result["difference"] <= 1e-4
    assert json.loads((fused / "plain" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    ids = torch.arange(30).reshape(1, -1)
    with torch.no_grad():
        got, expected = (
            AutoModelForCausalLM.from_pretrained(name).eval()(input_ids=ids).logits
            for name in ("plain", "linear")
        )
    assert_close(got, expected, rtol=0, atol=1e-4)
    code, out, _ = tether("export", "linear", "--out", "again")
    assert code == 0
    assert out.startswith("again: plain LlamaModel with the fusion folded into its head; logits within")


def test_what_cannot_be_exported_is_one_message_with_exit_2(fused, tether, monkeypatch):
    monkeypatch.chdir(fused)
    code, out, err = tether("export", "symmetric", "--out", "plain")
    assert (code, out) == (2, "")
    assert "w exp(x/2)" in err
    assert err.count("tether:") == 1
    assert not (fused / "plain").exists()


def test_a_folder_with_content_is_kept(fused, tether, monkeypatch):
    monkeypatch.chdir(fused)
    (fused / "mine").mkdir()
    (fused / "mine" / "precious").write_text("keep")
    code, _, err = tether("export", "linear", "--out", "mine")
    assert code == 2
    assert "not empty" in err
    assert [path.name for path in (fused / "mine").iterdir()] == ["precious"]


def test_matrices_are_fused_added_to_and_exported_whatever_the_scale_depends_on(
    tmp_path, tether, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    with torch.no_grad():
        model.abduction.log_scale.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    renew_fingerprint(model)
    save_checkpoint(model, tiny.tokenizer(), "model")
    heads = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(1)) / 60
    for name, chart, (first, second) in zip("abc", ("matrix", "matrix", "linear"), heads, strict=True):
        Delta(
            name=name, chart=chart, first=first, second=second, gate=None, base=model.config.base_fingerprint
        ).save(f"{name}.delta")
    code, out, err = tether("fuse", "model", "a.delta", "--by", "sum", "--chart", "matrix", "--out", "one")
    assert code == 0, err
    assert "1 a, chart matrix, ungated" in out
    # The chart stays with the fusion, and what is no matrix is not added to it.
    code, _, err = tether("fuse", "one", "c.delta", "--out", "mixed")
    assert code == 2
    assert "chart 'matrix' with 'c' (linear)" in err
    assert tether("fuse", "one", "b.delta=-0.5", "--out", "two")[0] == 0
    assert tether("export", "two", "--out", "plain")[0] == 0
    head = AutoModelForCausalLM.from_pretrained("plain").lm_head.weight.double()
    moved = torch.eye(32).double() + heads[0, 1] - 0.5 * heads[1, 1]
    assert_close(head, model.action.weight.detach().double() @ moved, rtol=0, atol=1e-6)
