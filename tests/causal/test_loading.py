import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from tether.causal import loading
from tether.causal.fingerprint import weights_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    tiny.backbone().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_plain_checkpoint_is_wrapped_and_a_converted_one_is_loaded(folder, tmp_path):
    plain, _ = loading.load(str(folder), preset="paper")
    assert plain.config.preset == "paper"
    plain.save_pretrained(tmp_path / "converted")
    tiny.tokenizer().save_pretrained(tmp_path / "converted")
    again, tokenizer = loading.load(str(tmp_path / "converted"))
    assert isinstance(again, CausalQwenForCausalLM)
    assert again.config.base_fingerprint == plain.config.base_fingerprint
    assert tokenizer("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]
    backbone, _ = loading.load_backbone(str(folder))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, backbone(input_ids=ids).logits)


def test_the_fingerprint_is_of_the_weights_not_of_their_precision(folder):
    exact = AutoModelForCausalLM.from_pretrained(folder)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert weights_fingerprint(exact) == weights_fingerprint(half)
    with torch.no_grad():
        exact.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    assert weights_fingerprint(exact) != weights_fingerprint(half)


def test_what_cannot_be_loaded_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no/such-model.*smollm2-135m"):
        loading.load("no/such-model")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        loading.load(str(tmp_path))
    monkeypatch.setitem(
        loading.ALIASES, "gone", loading.PackagedBase(package="no_such_package", file="x.gguf")
    )
    with pytest.raises(CheckpointError, match="no_such_package"):
        loading.load("gone")


def test_a_missing_tokenizer_is_found_before_the_weights_are_read(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match="tokenizer"):
        loading.load(str(folder))


@pytest.mark.parametrize("damage", ["truncated", "header", "missing"])
def test_damaged_weights_give_one_message(folder, damage):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(
            content[: len(content) // 2] if damage == "truncated" else b"\xff" * 64 + content[64:]
        )
    with pytest.raises(CheckpointError, match="base"):
        loading.load(str(folder))


def test_unknown_fields_in_a_config_are_refused(folder, tmp_path):
    model, tokenizer = loading.load(str(folder))
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    path = tmp_path / "converted" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_scale": "wide"}))
    with pytest.raises(CheckpointError, match="latent_scale"):
        loading.load(str(tmp_path / "converted"))
