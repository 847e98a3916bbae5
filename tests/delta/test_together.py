"""Two gloo processes learn, leash and certify what one does, and both have it; one of them writes."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import tiny
from processes import run_two
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.adapter import Adapter
from tether.delta.adapter_learning import learn_adapter
from tether.delta.adapter_training import AdapterFit
from tether.delta.budget import Budget
from tether.delta.certificate import certify
from tether.delta.dealt import deal
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.leashing import leash_adapter
from tether.delta.windows import window_text
from tether.processes import ALONE, Group, alone, current, joined, writes
from tether.reading import finite

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_together as here
from pathlib import Path
here.flows(Path(sys.argv[1]))
"""
TEXTS = {"digits": tiny.documents("digits", 30, 1), "words": tiny.documents("words", 30, 2)}
FITS = {
    # An odd batch and a quantile: means of means, and quantiles of shares, would show.
    "quantile": AdapterFit(
        budget=Budget(value=0.2, quantile=0.9), batch=3, base_batch=3, lr=5e-3, gate=False
    ),
    # Fewer windows than processes in a step.
    "single": AdapterFit(budget=Budget(value=0.05), batch=1, rank=4, lr=2e-3),
}


def flows(folder):
    """Do everything, and put down what this process has of it."""
    model, tokenizer = CausalQwenForCausalLM.from_backbone(tiny.backbone()), tiny.tokenizer()
    common = {"base_texts": TEXTS["words"], "window": 64, "cache_folder": folder / "cache", "name": "digits"}
    delta = learn_delta(model, tokenizer, TEXTS["digits"], budget=0.05, epochs=1, **common)
    delta.save(folder / "digits.delta")
    held = {"delta": [delta.record, [values.tolist() for values in (delta.first, delta.second)]]}
    for name, fit in FITS.items():
        adapter = learn_adapter(model, tokenizer, TEXTS["digits"], fit=fit, **common)
        adapter.save(folder / name)
        held[name] = [adapter.record, {key: values.tolist() for key, values in adapter.tensors.items()}]
    with joined() as group:
        group.wait()  # what one of them has written, all read
    leashed = leash_adapter(
        model,
        tokenizer,
        folder / "single",
        base_texts=TEXTS["words"],
        budget=0.001,
        texts=TEXTS["digits"],
        window=64,
    )
    held["leashed"] = [leashed.record, leashed.gate.center.tolist()]
    for by in ("evidence", "sum"):
        made = certify(
            model, fuse(model, {delta: 1.0}, by=by), tokenizer, TEXTS, window=64, continuations=2,
            continuation_tokens=24,
        )  # fmt: skip
        held[by] = made.model_dump()["figures"]
    rank = os.environ.get("RANK", "alone")
    (folder / f"held-{rank}.json").write_text(json.dumps(finite(held)))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the store lives in rank 0
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What one process has, and what each of two have."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    flows(one)
    run_two(SCRIPT.format(tests=str(Path(__file__).parent)), two, two, timeout=300)
    held = [one / "held-alone.json", two / "held-0.json", two / "held-1.json"]
    return one, two, [json.loads(path.read_text()) for path in held]


def close(one, two, path=""):
    """Compare figures to 1e-5 of their size, and everything else exactly."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one.keys() - {"cpu_seconds"}:
            close(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for at, (own, its) in enumerate(zip(one, two, strict=True)):
            close(own, its, f"{path}/{at}")
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-7), path
    else:
        assert one == two, path


@pytest.mark.parametrize("flow", ["delta", *FITS, "leashed", "evidence", "sum"])
def test_two_processes_have_the_figures_of_one(made, flow):
    alone, first, second = (held[flow] for held in made[2])
    assert first == second
    tolerant = {"delta": 1, **dict.fromkeys(FITS, 1)}.get(flow)
    if tolerant is None:
        close(alone, first)
        return
    close(alone[0], first[0])
    # Weights of size 1e-3 that come of hundreds of steps: rounding is told apart from a wrong step by their scale.
    own, its = (
        weights if isinstance(weights, dict) else dict(enumerate(weights)) for weights in (alone[1], first[1])
    )
    assert own.keys() == its.keys()
    for name, values in own.items():
        expected = torch.tensor(values)
        assert_close(torch.tensor(its[name]), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_one_of_them_writes_once(made):
    one, two, _ = made
    names = {path.name for path in one.iterdir()} - {"held-alone.json"}
    assert names == {path.name for path in two.iterdir()} - {"held-0.json", "held-1.json", "run.py"}
    assert not [path for path in two.rglob("*") if path.name.startswith(".")]
    # Reading is shared in parts that are those of one process; the fit is of one process.
    own, its = Delta.load(one / "digits.delta"), Delta.load(two / "digits.delta")
    assert torch.equal(own.first, its.first)
    assert torch.equal(own.second, its.second)
    assert Adapter.load(two / "single").sample == Adapter.load(one / "single").sample
    parts = [
        sorted(path.relative_to(folder) for path in (folder / "cache").rglob("*.safetensors"))
        for folder in (one, two)
    ]
    assert parts[0] == parts[1]
    assert all((one / part).read_bytes() == (two / part).read_bytes() for part in parts[0])


def test_every_window_is_one_processs(monkeypatch):
    windows = window_text(TEXTS["digits"], tiny.tokenizer(), length=48)
    rows, lengths = torch.arange(len(windows.starts) - 1), windows.starts.diff()
    for count in (1, 2, 3, 7, 200):
        shares = []
        for rank in range(count):
            with monkeypatch.context() as patch:
                patch.setattr("tether.delta.dealt.current", lambda rank=rank, count=count: Group(count, rank))
                shares.append(deal(windows, rows))
        assert torch.equal(torch.cat(shares), rows)
        tokens = [int(lengths[share].sum()) for share in shares]
        assert max(tokens) <= sum(tokens) / count + 48


def test_alone_nothing_is_shared_and_everything_written(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not writes()
    with alone() as group, joined() as same:
        assert group is same is ALONE
        assert writes()
        assert current().once(lambda: 3) == 3
    assert not writes()
