"""`tether route` as a user meets it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.store.documents import write_documents


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base, two deltas and three texts."""
    monkeypatch.chdir(tmp_path)
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    save_checkpoint(model, tiny.tokenizer(), tmp_path / "base")
    for number, name in enumerate(("digits", "capitals")):
        head = torch.randn(32, 32, generator=torch.Generator().manual_seed(number))
        Delta(
            name=name,
            chart="symmetric",
            first=None,
            second=head / 8,
            gate=None,
            base=model.config.base_fingerprint,
        ).save(tmp_path / f"{name}.delta")
    write_documents(tmp_path / "digits.jsonl", tiny.documents("digits", 8, 1))
    write_documents(tmp_path / "capitals.jsonl", [t.upper() for t in tiny.documents("words", 8, 2)])
    # One context a document is 256 tokens: documents are joined to reach it.
    write_documents(
        tmp_path / "general.jsonl", [" ".join(tiny.documents("words", 4, seed)) for seed in range(6)]
    )
    return tmp_path


TEXTS = ("--text", "digits.jsonl", "--text", "capitals.jsonl")


def test_routes_among_deltas_and_writes_a_checkpoint_that_generates(folder, tether):
    code, out, err = tether(
        "route", "base", "digits.delta", "capitals.delta", *TEXTS, "--base-text", "general.jsonl",
        "--budget", "0.02", "--out", "routed", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert 0 <= result["drift_base"] <= 0.02
    assert set(result["shares"]) == {"digits", "capitals", "base text"}
    code, out, err = tether("generate", "routed", "12.0 11.3")
    assert code == 0, err
    assert out.strip()
    manifest = json.loads((folder / "routed" / "tether.json").read_text())
    assert [entry["role"] for entry in manifest["inputs"]] == ["digits", "capitals"]


def test_a_routed_model_cannot_be_folded_into_plain_weights(folder, tether):
    code, _, err = tether(
        "route", "base", "digits.delta", "--text", "digits.jsonl", "--base-text", "general.jsonl",
        "--out", "routed",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = tether("export", "routed", "--out", "plain")
    assert code == 2
    assert not (folder / "plain").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "digits.delta", "capitals.delta", "--text", "digits.jsonl"), "2 parts and 1 texts"),
        (("base", "digits.delta", "--text", "digits.jsonl"), "no --base-text"),
        (("base", "digits.delta", "--text", "absent.jsonl", "--base-text", "general.jsonl"), "no such text"),
        (("base", "absent.delta", "--text", "digits.jsonl", "--base-text", "general.jsonl"), "absent.delta"),
        (
            (
                "base",
                "digits.delta",
                "--text",
                "digits.jsonl",
                "--base-text",
                "general.jsonl",
                "--budget",
                "0",
            ),
            "budget=0",
        ),
        (("base", "a", "--moe", "--text", "digits.jsonl", "--form", "fars"), "expected one of tax"),
        (("base", "a", "--moe", "--text", "digits.jsonl", "--form", "bias"), "choose without it"),
        (("base", "a", "--moe", "--text", "digits.jsonl", "--form", "switch"), "all 2 experts"),
        (("base", "a", "--moe", "--steps", "3"), "--steps: no meaning with --moe and no --text"),
        (("base", "a", "--moe", "--budget", "1"), "--budget: no meaning"),
        (
            ("base", "digits.delta", "--text", "digits.jsonl", "--form", "tax"),
            "--form: no meaning without --moe",
        ),
        (("base", "capitals.delta", "--moe"), "no config.json"),
    ],
)
def test_unusable_input_is_refused_with_one_message(folder, tether, arguments, message):
    code, _, err = tether("route", *arguments, "--out", "routed")
    assert code == 2
    assert message in " ".join(err.split())
    assert not (folder / "routed").exists()


def test_makes_a_mixture_of_fine_tunes_and_teaches_its_routers(folder, tether, monkeypatch):
    for seed in range(3):
        with torch.random.fork_rng():
            torch.random.manual_seed(seed)
            dense = AutoModelForCausalLM.from_config(Qwen3Config(**(tiny.SIZES | {"head_dim": 8})))
        dense.save_pretrained(folder / f"dense-{seed}")
        tiny.tokenizer().save_pretrained(folder / f"dense-{seed}")
    asked = ("route", "dense-0", "dense-1", "dense-2", "--moe", *TEXTS, "--steps", "5", "--out", "mixture")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    before = sorted(folder.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr("tether.router.training.train_routers", stopped)
        code, out, err = tether(*asked)
    # Stopped while it is taught, nothing stands under its name that was not taught.
    assert (code, out) == (130, "")
    assert "start the same command again" in err
    assert sorted(folder.iterdir()) == before
    code, out, err = tether(*asked)
    assert code == 0, err
    assert "a mixture of 3 experts" in out
    assert "dead experts a layer" in out
    mixture = AutoModelForCausalLM.from_pretrained(folder / "mixture")
    assert mixture.config.model_type == "qwen3_moe"
    assert json.loads((folder / "mixture" / "tether.json").read_text())["kind"] == "mixture"
    assert mixture.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
