"""What carries a domain, and what certifies it: deltas, adapters, fusions, noise, certificates, keys."""

import functools
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import foreign_adapters
import tiny
from fuzzing import Reader, cases, devices, refuse_devices, survive, within
from tether.causal.checkpoint import save_checkpoint
from tether.causal.description import check_description
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.delta.adapter import Adapter, is_adapter, lora_config
from tether.delta.attached import Attached
from tether.delta.certificate import certify, read
from tether.delta.delta import Delta
from tether.delta.foreign import amounts_to, open_foreign
from tether.delta.fusion import fuse
from tether.delta.gate import Gate
from tether.delta.low_rank import Factors
from tether.delta.record import check_fields
from tether.delta.verification import verify
from tether.errors import TetherError
from tether.reading import read_json
from tether.store.documents import write_documents
from tether.store.signing import private_key, public_key


def _delta(folder):
    Delta.load(folder / "a.delta").save(folder / "again.delta")


def _adapter(folder):
    if is_adapter(folder):
        shutil.rmtree(folder.parent / "again", ignore_errors=True)
        Adapter.load(folder).save(folder.parent / "again")
    else:
        Adapter.load(folder)


@functools.cache
def _base():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone())


def _foreign(folder):
    amounts_to(open_foreign(folder), _base())


def _certificate(folder):
    certificate = read(folder / "cert.json")
    certificate.digest()
    check_fields(certificate)


def _keys(folder):
    for name in ("key", "id"):
        private_key(folder / name)
        public_key(folder / f"{name}.pub")


READERS = {
    "delta": Reader(_delta, {"a.delta": "safetensors"}, 0.7),
    "delta of low rank": Reader(_delta, {"a.delta": "safetensors"}, 0.7),
    "noise": Reader(lambda folder: Noise.load(folder / "noise"), {"noise": "safetensors"}, 0.5),
    "adapter": Reader(
        _adapter,
        {
            "tether.json": "json",
            "adapter_config.json": "json",
            "adapter_model.safetensors": "safetensors",
            "gate.safetensors": "safetensors",
        },
        0.5,
    ),
    "adapter made elsewhere": Reader(
        _foreign, {"adapter_config.json": "json", "adapter_model.safetensors": "safetensors"}, 0.5
    ),
    "certificate": Reader(_certificate, {"cert.json": "json"}, 0.3),
    "fusion": Reader(lambda folder: check_description(read_json(folder / "fusion")), {"fusion": "json"}, 0.5),
    "keys": Reader(_keys, {"key": "text", "key.pub": "text", "id": "text", "id.pub": "text"}, 0.5),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One folder a reader with undamaged files, written by tether itself."""
    top = tmp_path_factory.mktemp("whole")
    folders = {name: top / name for name in READERS}
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator) / 32

    gate = Gate(torch.zeros(32), drawn(4, 32), torch.full((6,), 120.0))
    record = {
        "budget": 0.1, "metric": "softmax", "latent_base": 0.4, "strengths": [0.5, 1.0], "curve": [{"nll": 1.5}],
    }  # fmt: skip
    delta = Delta(
        name="law", chart="symmetric", first=drawn(32, 32), second=drawn(32, 32), gate=gate,
        base=model.config.base_fingerprint, record=record, sample=("One text.", "Another: café."),
    )  # fmt: skip
    for name in READERS.keys() - {"adapter", "adapter made elsewhere"}:
        folders[name].mkdir()
    delta.save(folders["delta"] / "a.delta")
    factors = {name: Factors(drawn(32, 2), drawn(2, 32)) for name in ("first", "second")}
    heads = {name: both.whole() for name, both in factors.items()}
    replace(delta, **heads, factors=factors).save(folders["delta of low rank"] / "a.delta")
    Noise.of(torch.rand(2, 3, 4, generator=generator).clamp(0.01, 0.99)).save(folders["noise"] / "noise")
    attached = Attached(model, "law", lora_config(2, 4), generator)
    Adapter(
        name="law", config=attached.peft.peft_config[attached.slot("law")],
        tensors={key: value.detach().clone() for key, value in attached.weights("law").items()}, gate=gate,
        base=model.config.base_fingerprint, record={"budget": 0.1, "metric": "softmax"}, sample=("One text.",),
    ).save(folders["adapter"], inputs={"domain": "0" * 64})  # fmt: skip
    foreign_adapters.write(
        foreign_adapters.TAKEN["patterns"], folders["adapter made elsewhere"], base="llama"
    )
    by_evidence = fuse(model, {delta: 1.0})
    (folders["fusion"] / "fusion").write_text(json.dumps(by_evidence.config.fusion))
    _write_keys(folders["keys"])
    save_checkpoint(fuse(model, {delta: 1.0}, by="sum"), tiny.tokenizer(), folders["certificate"] / "fused")
    fused = CausalQwenForCausalLM.from_pretrained(folders["certificate"] / "fused")
    write_documents(folders["certificate"] / "words.jsonl", tiny.documents("words", 6))
    options = {"window": 48, "continuations": 2, "continuation_tokens": 4}
    made = certify(model, fused, tiny.tokenizer(), folders["certificate"] / "words.jsonl", **options)
    made.save(folders["certificate"] / "cert.json")
    return folders


def _write_keys(folder):
    encoding, secret = serialization.Encoding, Ed25519PrivateKey.generate()
    for name, form in (
        ("key", serialization.PrivateFormat.PKCS8),
        ("id", serialization.PrivateFormat.OpenSSH),
    ):
        text = secret.private_bytes(encoding.PEM, form, serialization.NoEncryption())
        (folder / name).write_bytes(text)
    public = secret.public_key()
    for name, form in (
        ("key.pub", (encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)),
        ("id.pub", (encoding.OpenSSH, serialization.PublicFormat.OpenSSH)),
    ):
        (folder / name).write_bytes(public.public_bytes(*form))


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_and_never_a_fault(name, whole, tmp_path):
    survive(name, READERS[name], whole[name], tmp_path)


@devices
@pytest.mark.parametrize("name", READERS)
def test_devices_and_pipes_are_refused(name, whole, tmp_path):
    refuse_devices(READERS[name], whole[name], tmp_path)


def test_no_damaged_certificate_holds(whole, tmp_path):
    undamaged = json.loads((whole["certificate"] / "cert.json").read_text())
    reader = READERS["certificate"]
    for seed in cases("certificate", reader, whole["certificate"], tmp_path / "read"):
        path = tmp_path / "read" / "cert.json"
        try:
            # A space more, 1.0 for 1, or no signature where it is empty: it says the same.
            same = {"signature": ""} | json.loads(path.read_bytes()) == undamaged
        except (ValueError, RecursionError, TypeError):
            same = False
        try:
            holds = same or verify(path) == []
        except TetherError:
            holds = False
        assert holds == same, seed


@devices
def test_a_certificate_that_names_a_device_does_not_hold(whole, tmp_path):
    text = (whole["certificate"] / "cert.json").read_text()
    for name, device in (("words.jsonl", "/dev/zero"), ("words.jsonl", "pipe")):
        folder = tmp_path / device.strip("/").replace("/", "-")
        shutil.copytree(whole["certificate"], folder)
        (folder / name).unlink()
        (folder / name).symlink_to(device) if device[0] == "/" else os.mkfifo(folder / name)
        (folder / "cert.json").write_text(text.replace(str(whole["certificate"]), str(folder)))
        with within(5, device):
            try:
                assert verify(folder / "cert.json") != []
            except TetherError:
                continue
