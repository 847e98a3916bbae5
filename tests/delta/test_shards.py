import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import tiny
from processes import run_two
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.cache import cache_states, load_states
from tether.delta.learning import anchor_text, fit_delta
from tether.delta.shards import cache_shards, cached, cut, load_shards
from tether.delta.source import Source
from tether.delta.training import Fit
from tether.delta.windows import window_text
from tether.errors import CheckpointError

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_shards as here
from pathlib import Path
here.fill(Path(sys.argv[1]))
"""


def text(count=12):
    return window_text(tiny.documents("words", count), tiny.tokenizer(), length=48)


def fill(folder):
    done = []
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    cache_shards(model, text(), folder / "parts", on_step=done.append)
    rank = os.environ["RANK"]
    (folder / f"total-{rank}").write_text(str(int(done[-1]["total"])))
    torch.distributed.barrier()  # the store lives in rank 0
    torch.distributed.destroy_process_group()


def test_parts_hold_what_one_file_holds(model, tmp_path):
    windows = text()
    whole = cache_states(model, windows, tmp_path / "whole.safetensors")
    parts = load_shards(cache_shards(model, windows, tmp_path / "parts", tokens=300))
    assert len(list((tmp_path / "parts").iterdir())) > 3
    for name in windows._fields[:4]:
        assert torch.equal(getattr(parts.windows, name), getattr(windows, name))
    index = torch.randperm(len(windows.input_ids), generator=torch.Generator().manual_seed(0))[:100]
    mask = windows.targets >= 0
    for chosen in (index, mask, slice(40, 700, 7)):
        assert_close(parts.states[chosen], whole.states[chosen])
    assert_close(parts.states.float(), whole.states.float(), rtol=1e-3, atol=1e-3)
    assert len(parts.states) == len(whole.states)


def test_cuts_fall_between_windows_and_lose_nothing():
    windows = text()
    parts = cut(windows, 300)
    assert torch.equal(torch.cat([part.input_ids for part in parts]), windows.input_ids)
    assert torch.equal(torch.cat([part.targets for part in parts]), windows.targets)
    assert all(len(part.input_ids) >= 300 for part in parts[:-1])
    lengths = torch.cat([part.starts.diff() for part in parts])
    assert torch.equal(lengths, windows.starts.diff())


def test_a_stopped_caching_goes_on_with_the_missing_parts(model, tmp_path):
    windows, folder = text(), tmp_path / "parts"

    def stop(step):
        if step["done"] > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_shards(model, windows, folder, tokens=300, on_step=stop)
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert 0 < len(there) < len(cut(windows, 300))
    with pytest.raises(CheckpointError, match="parts are there; run the caching again"):
        load_shards(folder)
    steps = []
    again = load_shards(cache_shards(model, windows, folder, tokens=300, on_step=steps.append))
    assert steps[-1]["total"] < len(windows.input_ids)
    assert {name: (folder / name).stat().st_mtime_ns for name in there} == there
    whole = cache_states(model, windows, tmp_path / "whole.safetensors")
    assert_close(again.states.float(), whole.states.float(), rtol=1e-3, atol=1e-3)


def test_parts_of_another_size_or_base_are_computed_again(model, tmp_path, caplog):
    windows, folder = text(), tmp_path / "parts"
    cache_shards(model, windows, folder, tokens=300)
    before = {path.name for path in folder.iterdir()}
    other = CausalQwenForCausalLM.from_backbone(tiny.backbone(seed=5))
    for base, tokens in ((model, 400), (other, 400)):
        cache_shards(base, windows, folder, tokens=tokens)
        expected = cache_states(base, windows, tmp_path / "whole").states
        assert_close(load_shards(folder).states.float(), expected.float(), rtol=1e-3, atol=1e-3)
        assert "not a part of this text" in caplog.text
        caplog.clear()
    assert not before & {path.name for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="no parts"):
        load_shards(tmp_path / "nothing")
    next(folder.iterdir()).unlink()
    with pytest.raises(CheckpointError, match="parts are there; run the caching again"):
        load_shards(folder)


def test_parts_of_several_bases_do_not_go_together(model, tmp_path):
    windows = text()
    other = CausalQwenForCausalLM.from_backbone(tiny.backbone(seed=5))
    for base, name in ((model, "a"), (other, "b")):
        cache_shards(base, windows, tmp_path / name, tokens=300)
    first = sorted((tmp_path / "a").iterdir())[0]
    first.write_bytes((tmp_path / "b" / first.name).read_bytes())
    with pytest.raises(CheckpointError, match="several bases"):
        load_shards(tmp_path / "a")


@pytest.mark.parametrize("count", [12, 150])
def test_whoever_is_stopped_loses_a_twentieth_at_most(model, tmp_path, count):
    windows = text(count)
    cache_shards(model, windows, tmp_path / "parts")
    parts = list((tmp_path / "parts").iterdir())
    # Parts are cut between windows, of 48 tokens here.
    assert max(len(load_states(part).windows.input_ids) for part in parts) <= len(windows.input_ids) / 32 + 48
    share = 0.9 * len(windows.input_ids)
    said = []

    def stop(step):
        said.append(step["done"])
        if step["done"] >= share:
            raise KeyboardInterrupt

    for part in parts:
        part.unlink()
    with pytest.raises(KeyboardInterrupt):
        cache_shards(model, windows, tmp_path / "parts", on_step=stop)
    assert all(path.name.startswith("part-") for path in (tmp_path / "parts").iterdir())
    left = []
    cache_shards(model, windows, tmp_path / "parts", on_step=left.append)
    # What was said to be done is done, but for the part in work.
    lost = said[-1] - (len(windows.input_ids) - left[-1]["total"])
    assert 0 <= lost <= len(windows.input_ids) / 32 + 48
    assert lost == 0 or count == 150
    assert left[-1]["total"] <= 0.15 * len(windows.input_ids)


def test_a_fit_from_parts_is_the_fit_from_one_file(model, caches, tmp_path, monkeypatch):
    # The same batches from the same order: reading in pieces changes nothing but where tokens are read from.
    domain = caches["digits"]
    parts = load_shards(cache_shards(model, domain.windows, tmp_path / "parts", tokens=700))
    anchor = anchor_text(
        model, caches["words"], caches["words-held-out"], tokens=2000, background=tiny.BACKGROUND
    )
    fit = Fit(epochs=1, batch=128, candidates=200, probe=2000, gate=False)
    whole = fit_delta(model, domain, anchor, "a", fit)
    pieces = fit_delta(model, parts, anchor, "a", fit)
    # A window's states depend in their last bits on what it was batched with.
    assert_close(whole.second, pieces.second, rtol=1e-3, atol=1e-3)

    for limit in ("KEPT_BYTES", "MIXED_BYTES"):
        monkeypatch.setattr(f"tether.delta.source.{limit}", 0)
    streamed = Source(model, parts)
    assert streamed.kept is None
    order = torch.cat(list(streamed.batches(64, torch.Generator().manual_seed(0))))
    assert torch.equal(order.sort().values, torch.arange(len(streamed)))
    # Parts follow one another, so a batch reads from one or two files.
    of_part = torch.searchsorted(parts.states.ends, streamed.rows[order], right=True)
    assert len(torch.unique_consecutive(of_part)) == len(parts.states.parts)
    kept = Source(model, domain)
    assert streamed.kept is None
    for mine, theirs in zip(streamed.take(order[:50]), kept.take(order[:50]), strict=True):
        assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    learnt = fit_delta(model, parts, anchor, "a", fit)
    assert learnt.record["drift_base"] == pytest.approx(whole.record["drift_base"], rel=0.5)


def test_cached_reads_parts_where_there_are_some(model, tmp_path, monkeypatch):
    windows = text()
    monkeypatch.setattr("tether.delta.shards.PART_TOKENS", 300)
    first = cached(model, windows, tmp_path)
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]
    steps = []
    second = cached(model, windows, tmp_path, on_step=steps.append)
    assert steps == []
    assert torch.equal(first.states.float(), second.states.float())


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path):
    run_two(SCRIPT.format(tests=str(Path(__file__).parent)), tmp_path, tmp_path)
    shares = [int((tmp_path / f"total-{rank}").read_text()) for rank in range(2)]
    windows = text()
    assert sum(shares) == len(windows.input_ids)
    assert min(shares) > 0.3 * sum(shares)
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    alone = cache_states(model, windows, tmp_path / "alone.safetensors")
    filled = load_shards(tmp_path / "parts")
    assert_close(filled.states.float(), alone.states.float(), rtol=1e-3, atol=1e-3)
