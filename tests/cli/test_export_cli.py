"""`tether export` as a user meets it."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
from tether.causal.checkpoint import save_checkpoint
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
