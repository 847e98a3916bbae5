"""`certify` and `verify` against a dishonest sender: what is false gives exit 1, what cannot be used exit 2."""

import json
import shutil

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.certificate import certify
from tether.delta.delta import Delta
from tether.delta.fusion import fuse, unfuse
from tether.delta.record import Certificate
from tether.store.documents import text_hash, write_documents
from tether.store.hashing import sha256_file

GENERAL = tiny.documents("words", 8, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two bases, a fusion of the first, text, two pairs of keys."""
    folder = tmp_path_factory.mktemp("certificates")
    for name, seed in (("base", 0), ("other", 1)):
        tiny.backbone(seed=seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    for name in ("mine", "yours"):
        key = Ed25519PrivateKey.generate()
        forms = (
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (folder / name).write_bytes(key.private_bytes(*forms))
        public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(*public))
    write_documents(folder / "general.jsonl", GENERAL)
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    delta = Delta(
        name="law",
        chart="symmetric",
        first=None,
        second=torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 4,
        gate=None,
        base=base.config.base_fingerprint,
        record={"metric": "softmax", "budget": 5.0, "texts": {"base": text_hash(GENERAL)}},
    )
    save_checkpoint(fuse(base, {delta: 1.0}, by="sum"), tiny.tokenizer(), folder / "fused")
    return folder


CERTIFY = [
    "certify",
    "base",
    "fused",
    "--text",
    "general.jsonl",
    "--continuations",
    "0",
    "--out",
    "cert.json",
]


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def reseal(folder, change=lambda content: None):
    content = json.loads((folder / "cert.json").read_text())
    files = content["model"]["files"]
    files |= {name: sha256_file(folder / "fused" / name) for name in files}
    change(content)
    forged = Certificate(**content).sealed()
    (folder / "cert.json").write_text(json.dumps(forged.model_dump(mode="json")))


def edit_config(folder, change):
    path = folder / "fused" / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def poison(folder):
    path = folder / "fused" / "model.safetensors"
    tensors = load_file(path)
    tensors["backbone.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(tensors, path, {"format": "pt"})


def test_signed_with_the_base_given_everything_is_checked(copy, tether):
    code, out, err = tether(*CERTIFY, "--sign", "mine")
    assert code == 0, err
    assert "general: law alone drifts by" in out
    assert tether("verify", "cert.json", "--base", "base", "--key", "mine.pub")[:2] == (
        0,
        "cert.json: holds\n",
    )
    code, out, _ = tether("verify", "cert.json")
    assert code == 0
    (_, line) = out.splitlines()
    assert "which model the base sha256:" in line
    assert "settings (--base BASE); who made the certificate (--key KEY)" in line
    content = json.loads(tether("verify", "cert.json", "--json")[1])
    assert content["holds"]
    assert line == f"not checked: {'; '.join(content['not_checked'])}"
    # Of what is signed, nothing is left out: any other content under the same signature is found.
    reseal(copy, lambda content: content["versions"].update(tether="0.0.0"))
    code, out, _ = tether("verify", "cert.json", "--key", "mine.pub")
    assert code == 1
    assert "edited after it was signed" in out


def test_another_key_or_no_signature_is_exit_1(copy, tether):
    assert tether(*CERTIFY, "--sign", "mine")[0] == 0
    code, out, _ = tether("verify", "cert.json", "--key", "yours.pub")
    assert code == 1
    assert out.startswith("the signature is not of the key given")
    # Nor is a damaged signature passed over where nobody asks for one.
    content = json.loads((copy / "cert.json").read_text())
    (copy / "cert.json").write_text(json.dumps(content | {"signature": "A" + content["signature"]}))
    assert tether("verify", "cert.json")[0] == 1
    assert tether(*CERTIFY)[0] == 0
    code, out, _ = tether("verify", "cert.json", "--key", "mine.pub")
    assert code == 1
    assert "has no signature" in out


def test_keys_that_cannot_be_used_are_exit_2_before_anything_is_measured(copy, tether):
    for command in ([*CERTIFY, "--sign", "mine.pub"], [*CERTIFY, "--sign", "absent"]):
        code, out, err = tether(*command)
        assert (code, out) == (2, "")
        assert f"{command[-1]}" in err
        assert not (copy / "cert.json").exists()
    for key in ("mine", "general.jsonl", "absent.pub"):
        code, out, err = tether("verify", "cert.json", "--key", key)
        assert (code, out) == (2, "")
        assert f"{key}" in err


def test_what_is_false_is_exit_1(copy, tether):
    assert tether(*CERTIFY)[0] == 0
    assert tether("verify", "cert.json", "--base", "base")[0] == 0
    code, out, _ = tether("verify", "cert.json", "--base", "other")
    assert code == 1
    assert "another model" in out

    made_up = f"sha256:{'0' * 64}"
    reseal(copy, lambda content: content["model"].update(base_fingerprint=made_up))
    code, out, _ = tether("verify", "cert.json")
    assert code == 1
    assert made_up[:19] in out

    alone = json.loads((copy / "cert.json").read_text())["figures"]["general"]["alone"]
    less = alone["law"]["budget"]["mean"] / 10
    edit_config(copy, lambda content: content["fusion"]["budgets"][0].update(budget=less))
    fused = CausalQwenForCausalLM.from_pretrained(copy / "fused")
    certify(unfuse(fused)[0], fused, tiny.tokenizer(), copy / "general.jsonl").save(copy / "cert.json")
    code, out, _ = tether("verify", "cert.json")
    assert code == 1
    assert f"budget of law is declared as {less:.4g} nats" in out
    (copy / "cert.json").unlink()
    code, out, err = tether(*CERTIFY)
    assert (code, out) == (1, "")
    assert f"budget of law is declared as {less:.4g} nats" in err
    assert not (copy / "cert.json").exists()


def test_a_poisoned_base_is_exit_1_in_each_command(copy, tether):
    assert tether(*CERTIFY)[0] == 0
    poison(copy)
    reseal(copy)
    code, out, _ = tether("verify", "cert.json")
    assert code == 1
    assert "its weights have the fingerprint" in out
    for command in (
        [*CERTIFY[:-1], "again.json"],
        ["certify", "fused", *CERTIFY[2:-1], "again.json"],
        ["fuse", "fused", "--leash", "0.5", "--out", "again"],
        ["ledger", "fused", "--text", "general.jsonl"],
    ):
        code, out, err = tether(*command)
        # A fusion is no base at all, whatever is in it.
        assert code == (2 if command[1] == "fused" and command[0] == "certify" else 1), err
        assert ("fused deltas itself" if code == 2 else "its weights have the fingerprint") in err
        assert out == ""
    assert not list(copy.glob("again*"))
