"""The base is what is served, whatever files say of it: poisoned weights, made-up fingerprints, swapped bases."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.fingerprint import fingerprint, served_fingerprint, weights_fingerprint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.vocabulary import wake_numbers
from tether.delta.certificate import certify
from tether.delta.delta import Delta
from tether.delta.fusion import fuse, unfuse
from tether.delta.ledger import keep_ledger
from tether.delta.record import Certificate
from tether.delta.verification import not_checked, verify
from tether.errors import CertificateError, CheckpointError, IdentityError
from tether.store.documents import write_documents

MADE_UP = f"sha256:{'0' * 64}"


def delta_of(base, name="a"):
    heads = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    return Delta(
        name=name, chart="symmetric", first=heads[0] / 64, second=heads[1] / 32, gate=None, base=base
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base with a head of its own, another one, a fusion, a text, and the certificate."""
    folder = tmp_path_factory.mktemp("identity")
    for name, seed in (("base", 0), ("other", 1)):
        tiny.backbone("qwen2", seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    write_documents(folder / "words.jsonl", tiny.documents("words", 4))
    base, tokenizer = load(str(folder / "base"))
    fused = fuse(base, {delta_of(fingerprint(base)): 1.0}, by="sum")
    save_checkpoint(fused, tokenizer, folder / "fused")
    certify(base, fused, tokenizer, folder / "words.jsonl", window=48).save(folder / "cert.json")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def poison(folder, name):
    path = folder / "fused" / "model.safetensors"
    tensors = load_file(path)
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    tensors[name] += 0.1 * noise
    save_file(tensors, path, {"format": "pt"})


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reseal(folder, change=lambda content: None):
    """What a forger does: all hashes of files as they are now, and a new seal."""
    from tether.store.hashing import sha256_file

    content = json.loads((folder / "cert.json").read_text())
    files = content["model"]["files"]
    files |= {name: sha256_file(folder / "fused" / name) for name in files}
    change(content)
    forged = Certificate(**content).sealed()
    (folder / "cert.json").write_text(json.dumps(forged.model_dump(mode="json")))


@pytest.mark.parametrize(
    "part", ["backbone.layers.1.mlp.up_proj.weight", "action.weight", "abduction.loc.bias"]
)
def test_a_poisoned_base_is_found_by_every_command_that_stands_on_it(copy, part):
    poison(copy, part)
    reseal(copy)
    base, tokenizer = load(str(copy / "base"))
    uses = (
        lambda fused: certify(base, fused, tokenizer, copy / "words.jsonl", window=48),
        lambda fused: certify(unfuse(fused)[0], fused, tokenizer, copy / "words.jsonl", window=48),
        lambda fused: fuse(unfuse(fused)[0], {delta_of(fingerprint(base), "b"): 1.0}, by="sum"),
        lambda fused: keep_ledger(fused, tokenizer, copy / "words.jsonl", window=48),
    )
    for use in uses:
        with pytest.raises(IdentityError, match="its weights have the fingerprint"):
            use(load(str(copy / "fused"))[0])
    (wrong,) = verify(copy / "cert.json")
    assert "its weights have the fingerprint" in wrong


@pytest.mark.parametrize("where", ["certificate", "checkpoint", "both"])
def test_a_made_up_fingerprint_is_found(copy, where):
    if where != "certificate":
        edit(copy / "fused" / "config.json", lambda content: content.update(base_fingerprint=MADE_UP))
    reseal(copy, lambda c: where != "checkpoint" and c["model"].update(base_fingerprint=MADE_UP))
    (wrong,) = verify(copy / "cert.json")
    assert MADE_UP[:19] in wrong


def test_a_delta_of_another_base_or_of_none_is_not_fused(copy):
    base, _ = load(str(copy / "base"))
    other, _ = load(str(copy / "other"))
    for said in (fingerprint(other), MADE_UP):
        with pytest.raises(CheckpointError, match="was learnt on base"):
            fuse(base, {delta_of(said): 1.0}, by="sum")
    # Nor does a base that claims to be the delta's become it.
    save_checkpoint(other, tiny.tokenizer(), copy / "claims")
    edit(copy / "claims" / "config.json", lambda c: c.update(base_fingerprint=fingerprint(base)))
    with pytest.raises(IdentityError, match="claims"):
        fuse(load(str(copy / "claims"))[0], {delta_of(fingerprint(base)): 1.0}, by="sum")


def test_a_swapped_base_is_found_where_the_real_one_is_given(copy):
    other, tokenizer = load(str(copy / "other"))
    fused = fuse(other, {delta_of(fingerprint(other)): 1.0}, by="sum")
    shutil.rmtree(copy / "fused")
    save_checkpoint(fused, tokenizer, copy / "fused")
    certify(other, fused, tokenizer, copy / "words.jsonl", window=48).save(copy / "cert.json")
    assert verify(copy / "cert.json") == verify(copy / "cert.json", base=str(copy / "other")) == []
    (said,) = not_checked(copy / "cert.json", base=False, key=True)
    assert said.startswith(f"which model the base {fingerprint(other)[:19]}... is")
    assert not_checked(copy / "cert.json", base=True, key=True) == []
    (wrong,) = verify(copy / "cert.json", base=str(copy / "base"))
    assert "another model" in wrong
    with pytest.raises(CertificateError, match="a fusion itself"):
        verify(copy / "cert.json", base=str(copy / "fused"))
    with pytest.raises(CertificateError, match="has fused deltas itself"):
        certify(fused, fused, tokenizer, copy / "words.jsonl", window=48)


def test_other_settings_under_the_same_weights_are_found_where_the_base_is_given(copy):
    def change(content):
        content["backbone_config"]["rms_norm_eps"] = 0.1

    edit(copy / "fused" / "config.json", change)
    base, tokenizer = load(str(copy / "base"))
    fused, _ = load(str(copy / "fused"))
    certify(unfuse(fused)[0], fused, tokenizer, copy / "words.jsonl", window=48).save(copy / "cert.json")
    assert verify(copy / "cert.json") == []
    (wrong,) = verify(copy / "cert.json", base=str(copy / "base"))
    assert "rms_norm_eps (1e-06, fused 0.1) differ" in wrong
    with pytest.raises(CertificateError, match="rms_norm_eps"):
        certify(base, fused, tokenizer, copy / "words.jsonl", window=48)


def test_what_lies_between_backbone_and_head_is_compared_with_the_base_given(copy):
    # Scales of U and the direction of numbers are no part of the fingerprint: softmax does not read them.
    poison(copy, "abduction.log_scale.bias")
    poison(copy, "numeric.direction")
    fused, tokenizer = load(str(copy / "fused"))
    certify(unfuse(fused)[0], fused, tokenizer, copy / "words.jsonl", window=48).save(copy / "cert.json")
    assert verify(copy / "cert.json") == []
    (wrong,) = verify(copy / "cert.json", base=str(copy / "base"))
    assert "numeric, abduction differ" in wrong


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_fingerprint_of_a_wrapper_is_that_of_the_plain_model(tmp_path, kind):
    plain = tiny.backbone(kind)
    expected = weights_fingerprint(plain)
    model = CausalQwenForCausalLM.from_backbone(plain)
    assert model.config.base_fingerprint == served_fingerprint(model) == expected
    # An added row for <NUM> sleeps, and is no part of the plain model.
    model.add_numbers(tiny.tokenizer())
    save_checkpoint(model, tiny.tokenizer(), tmp_path / "numbers")
    assert fingerprint(load(str(tmp_path / "numbers"))[0]) == expected
    # Awake, it is written in place of what the plain model writes.
    wake_numbers(model, torch.ones(4, 32), 0.5)
    save_checkpoint(model, tiny.tokenizer(), tmp_path / "awake")
    assert fingerprint(load(str(tmp_path / "awake"))[0]) == fingerprint(model) != expected


def test_buffers_that_are_saved_are_weights_too(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(families.model("deepseek_v3"))
    model.save_pretrained(tmp_path)
    assert fingerprint(CausalQwenForCausalLM.from_pretrained(tmp_path)) == model.config.base_fingerprint
    tensors = load_file(tmp_path / "model.safetensors")
    (name, *_) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors[name] += 1.0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IdentityError):
        fingerprint(CausalQwenForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("part", ["abduction.loc.bias", "action.weight", "backbone.norm.weight"])
def test_a_model_trained_by_hand_is_written_with_a_fingerprint_of_its_own(tmp_path, part):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"))
    save_checkpoint(model, tiny.tokenizer(), tmp_path / "before")
    model, _ = load(str(tmp_path / "before"))
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(part).add_(1.0)
    save_checkpoint(model, tiny.tokenizer(), tmp_path / "after")
    again, _ = load(str(tmp_path / "after"))
    assert fingerprint(again) == model.config.base_fingerprint != before
