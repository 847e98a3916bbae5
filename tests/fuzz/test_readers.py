"""Every reader of small files on damaged ones: a tether error or a result, soon, and never a traceback.

200 cases a reader; `TETHER_FUZZ=4000` for more. A case that fails is named by its number, which is its seed.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import tiny
from damage import damaged
from tether.causal.checkpoint import save_checkpoint
from tether.causal.description import check_description
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.causal.pairs import read_pairs
from tether.delta.adapter import Adapter, Attached, is_adapter, lora_config
from tether.delta.certificate import certify, read
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import Gate
from tether.delta.record import check_fields
from tether.delta.verification import verify
from tether.errors import TetherError
from tether.reading import read_json, read_yaml
from tether.store.documents import read_documents, write_documents
from tether.store.manifest import Manifest, read_manifest, write_manifest
from tether.store.reader import CheckpointReader
from tether.store.signing import private_key, public_key
from tether.store.writer import ShardWriter

CASES = int(os.environ.get("TETHER_FUZZ", "200"))
SECONDS = 10.0
"""Of processor time that a case may take."""


@dataclass(frozen=True)
class Reader:
    """A reader, the files that are damaged for it, one at a time, and the share of cases that it must refuse."""

    read: Callable[[Path], object]
    files: dict[str, str]
    refused: float


def _delta(folder):
    Delta.load(folder / "a.delta").save(folder / "again.delta")


def _adapter(folder):
    if is_adapter(folder):
        shutil.rmtree(folder.parent / "again", ignore_errors=True)
        Adapter.load(folder).save(folder.parent / "again")
    else:
        Adapter.load(folder)


def _certificate(folder):
    certificate = read(folder / "cert.json")
    certificate.digest()
    check_fields(certificate)


def _keys(folder):
    for name in ("key", "id"):
        private_key(folder / name)
        public_key(folder / f"{name}.pub")


def _sharded(folder):
    reader = CheckpointReader(folder)
    reader.fingerprint()
    for name in reader.names:
        reader.tensor(name)


READERS = {
    "delta": Reader(_delta, {"a.delta": "safetensors"}, 0.7),
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
    "certificate": Reader(_certificate, {"cert.json": "json"}, 0.3),
    "fusion": Reader(lambda folder: check_description(read_json(folder / "fusion")), {"fusion": "json"}, 0.5),
    "documents": Reader(lambda folder: read_documents(folder / "text.jsonl"), {"text.jsonl": "lines"}, 0.3),
    "pairs": Reader(lambda folder: read_pairs(folder / "pairs.jsonl"), {"pairs.jsonl": "lines"}, 0.3),
    "manifest": Reader(read_manifest, {"tether.json": "json"}, 0.5),
    "shards": Reader(
        _sharded,
        {"model.safetensors.index.json": "json", "model-00001-of-00002.safetensors": "safetensors"},
        0.3,
    ),
    "keys": Reader(_keys, {"key": "text", "key.pub": "text", "id": "text", "id.pub": "text"}, 0.5),
    "yaml": Reader(lambda folder: read_yaml(folder / "o.yaml"), {"o.yaml": "text"}, 0.1),
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
        "budget": 0.1,
        "metric": "softmax",
        "latent_base": 0.4,
        "strengths": [0.5, 1.0],
        "curve": [{"nll": 1.5}],
    }
    delta = Delta(
        name="law", chart="symmetric", first=drawn(32, 32), second=drawn(32, 32), gate=gate,
        base=model.config.base_fingerprint, record=record, sample=("One text.", "Another: café."),
    )  # fmt: skip
    for name in (
        "delta",
        "noise",
        "fusion",
        "documents",
        "pairs",
        "manifest",
        "shards",
        "yaml",
        "certificate",
        "keys",
    ):
        folders[name].mkdir()
    delta.save(folders["delta"] / "a.delta")
    Noise.of(torch.rand(2, 3, 4, generator=generator).clamp(0.01, 0.99)).save(folders["noise"] / "noise")
    attached = Attached(model, "law", lora_config(2, 4), generator)
    Adapter(
        name="law", config=attached.peft.peft_config[attached.slot("law")],
        tensors={key: value.detach().clone() for key, value in attached.weights("law").items()}, gate=gate,
        base=model.config.base_fingerprint, record={"budget": 0.1, "metric": "softmax"}, sample=("One text.",),
    ).save(folders["adapter"], inputs={"domain": "0" * 64})  # fmt: skip
    by_evidence = fuse(model, {delta: 1.0})
    (folders["fusion"] / "fusion").write_text(json.dumps(by_evidence.config.fusion))
    write_documents(folders["documents"] / "text.jsonl", tiny.documents("words", 4))
    pairs = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(4)]
    (folders["pairs"] / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    listed = {"outputs": {"a.txt": "0" * 64}, "recipe": {"chart": "symmetric", "weights": [1.0, 0.5]}}
    write_manifest(folders["manifest"], Manifest(kind="merge", **listed))
    with ShardWriter(folders["shards"], shard_bytes=64) as writer:
        writer.add("a", drawn(4, 4))
        writer.add("b", drawn(4, 4))
    (folders["yaml"] / "o.yaml").write_text(
        "epochs: 2\nlr: 1e-3\nparts:\n  - a\n  - {b: [1, 2.5]}\nmode: softmax\n"
    )
    encoding, secret = serialization.Encoding, Ed25519PrivateKey.generate()
    for name, form in (
        ("key", serialization.PrivateFormat.PKCS8),
        ("id", serialization.PrivateFormat.OpenSSH),
    ):
        text = secret.private_bytes(encoding.PEM, form, serialization.NoEncryption())
        (folders["keys"] / name).write_bytes(text)
    public = secret.public_key()
    for name, form in (
        ("key.pub", (encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)),
        ("id.pub", (encoding.OpenSSH, serialization.PublicFormat.OpenSSH)),
    ):
        (folders["keys"] / name).write_bytes(public.public_bytes(*form))
    save_checkpoint(fuse(model, {delta: 1.0}, by="sum"), tiny.tokenizer(), folders["certificate"] / "fused")
    fused = CausalQwenForCausalLM.from_pretrained(folders["certificate"] / "fused")
    write_documents(folders["certificate"] / "words.jsonl", tiny.documents("words", 6))
    options = {"window": 48, "continuations": 2, "continuation_tokens": 4}
    made = certify(model, fused, tiny.tokenizer(), folders["certificate"] / "words.jsonl", **options)
    made.save(folders["certificate"] / "cert.json")
    return folders


def cases(name, whole, folder):
    """Put one damaged file after another in place; gives the seed of each."""
    reader = READERS[name]
    shutil.copytree(whole[name], folder)
    contents = {file: (folder / file).read_bytes() for file in reader.files}
    for seed in range(CASES):
        draw = random.Random(f"{name} {seed}")
        file = draw.choice(list(contents))
        changed = damaged(reader.files[file], contents[file], draw)
        if changed == contents[file]:
            continue
        (folder / file).write_bytes(changed)
        yield seed
        (folder / file).write_bytes(contents[file])


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_and_never_a_fault(name, whole, tmp_path):
    reader, refused, count = READERS[name], 0, 0
    reader.read(whole[name])  # undamaged, it is read
    for seed in cases(name, whole, tmp_path / "read"):
        count += 1
        before = time.process_time()
        try:
            reader.read(tmp_path / "read")
        except TetherError:
            refused += 1
        except Exception as error:
            pytest.fail(f"case {seed} of {name}: {type(error).__name__}: {error}")
        assert time.process_time() - before < SECONDS, seed
    assert refused >= reader.refused * count
    assert {path.name for path in tmp_path.iterdir()} <= {"read", "again"}


def test_no_damaged_certificate_holds(whole, tmp_path):
    undamaged = json.loads((whole["certificate"] / "cert.json").read_text())
    for seed in cases("certificate", whole, tmp_path / "read"):
        path = tmp_path / "read" / "cert.json"
        try:
            same = json.loads(path.read_bytes()) == undamaged  # a space more, or 1.0 for 1: it says the same
        except (ValueError, RecursionError):
            same = False
        try:
            holds = same or verify(path) == []
        except TetherError:
            holds = False
        assert holds == same, seed
