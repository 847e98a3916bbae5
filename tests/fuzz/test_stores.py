"""What tether keeps for itself: manifests, shards, caches of states, runs, the state of a training."""

import hashlib

import pytest
import torch

import tiny
from fuzzing import Reader, devices, equal, refuse_devices, survive
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.resume import load_state, save_state
from tether.delta.shards import cache_shards, load_shards
from tether.delta.windows import window_text
from tether.errors import CheckpointError
from tether.runs.record import read_record
from tether.runs.run import Run, read_run
from tether.store.manifest import Manifest, read_manifest, write_manifest
from tether.store.reader import CheckpointReader
from tether.store.writer import ShardWriter


def _sealed(folder):
    manifest = read_manifest(folder)
    if manifest.changed or not manifest.outputs:
        raise CheckpointError("changed")  # as tether.merge.result has it
    return manifest


def _sharded(folder):
    reader = CheckpointReader(folder)
    for name in reader.names:
        reader.tensor(name)
        reader.array(name)
    return reader.fingerprint()


def _states(folder):
    cache = load_shards(folder)
    digest = hashlib.sha256(cache.states[:].numpy().tobytes())
    for values in cache.windows:
        digest.update(b"" if values is None else values.numpy().tobytes())
    return digest.hexdigest(), cache.base, cache.layers


def _record(folder):
    record = read_record(folder / "learn.json")
    if record is None:
        raise CheckpointError("no record")  # the stage is done again
    return record


def _run(folder):
    history = read_run(folder)
    with Run(folder, history.config) as run:
        run.done("learn")
    return history.config


def _training(folder):
    parameters, optimizer = _trained()
    state = load_state(folder, parameters, optimizer)
    parameters["w"].grad = torch.ones(2, 2)
    optimizer.step()
    return state


def _trained():
    parameters = {"w": torch.nn.Parameter(torch.ones(2, 2))}
    return parameters, torch.optim.AdamW(parameters.values())


PART = "part-00000-of-00002.safetensors"
READERS = {
    "manifest": Reader(read_manifest, {"tether.json": "json"}, 0.5),
    "sealed": Reader(_sealed, {"tether.json": "json"}, 0.8, equal),
    "shards": Reader(
        _sharded,
        {"model.safetensors.index.json": "json", "model-00001-of-00002.safetensors": "safetensors"},
        0.3,
    ),
    "states": Reader(_states, {PART: "safetensors"}, 0.7, equal),
    "record": Reader(_record, {"learn.json": "json"}, 0.4),
    "run": Reader(_run, {"run.json": "json"}, 0.6, equal),
    "metrics": Reader(lambda folder: read_run(folder).metrics, {"metrics.jsonl": "lines"}, 0.1),
    "training": Reader(
        _training,
        {"state.json": "json", "weights.safetensors": "safetensors", "optimizer.safetensors": "safetensors"},
        0.3,
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One folder a reader with undamaged files, written by tether itself."""
    top = tmp_path_factory.mktemp("whole")
    folders = {name: top / name for name in READERS}
    generator = torch.Generator().manual_seed(0)
    listed = {"outputs": {"a.txt": "0" * 64}, "recipe": {"chart": "symmetric", "weights": [1.0, 0.5]}}
    for name in ("manifest", "sealed"):
        folders[name].mkdir()
        write_manifest(folders[name], Manifest(kind="merge", **listed))
    with ShardWriter(folders["shards"], shard_bytes=64) as writer:
        writer.add("a", torch.randn(4, 4, generator=generator))
        writer.add("b", torch.randn(4, 4, generator=generator))
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    windows = window_text(tiny.documents("words", 2), tiny.tokenizer(), length=16)
    cache_shards(model, windows, folders["states"], tokens=100)
    for name in ("run", "metrics"):
        with Run(folders[name], {"seed": 0, "lr": 0.1, "texts": ["a", "b"]}) as run:
            (run.folder / "out.txt").write_text("x")
            run.log({"step": 1, "loss": 0.5})
            run.stage(
                "learn", lambda run=run: ([run.folder / "out.txt"], {"nll": 2.5}), [run.folder / "run.json"]
            )
            run.log({"step": 2, "loss": float("nan")})
    folders["record"].mkdir()
    record = (folders["run"] / "stages" / "learn.json").read_bytes()
    (folders["record"] / "learn.json").write_bytes(record)
    parameters, optimizer = _trained()
    parameters["w"].grad = torch.ones(2, 2)
    optimizer.step()
    save_state(folders["training"], parameters, optimizer, {"step": 2, "curve": [1.5, float("nan")]})
    return folders


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_and_never_a_fault(name, whole, tmp_path):
    survive(name, READERS[name], whole[name], tmp_path)


@devices
@pytest.mark.parametrize("name", READERS)
def test_devices_and_pipes_are_refused(name, whole, tmp_path):
    refuse_devices(READERS[name], whole[name], tmp_path)
