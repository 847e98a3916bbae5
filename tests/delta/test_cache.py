import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.cache import cache_states, load_states
from tether.delta.shards import cached, read_states
from tether.delta.windows import window_text
from tether.errors import CheckpointError


def test_cached_states_are_the_backbones_rounded_to_half(model, tokenizer, tmp_path):
    windows = window_text(tiny.documents("words", 9), tokenizer, length=48)
    cache = cache_states(model, windows, tmp_path / "states.safetensors")
    for row in (0, 3, len(windows.starts) - 2):
        part = slice(int(windows.starts[row]), int(windows.starts[row + 1]))
        with torch.no_grad():
            expected = model.backbone(windows.input_ids[part][None]).last_hidden_state[0]
        assert_close(cache.states[part].float(), expected, rtol=2e-3, atol=2e-3)
    for name in windows._fields[:4]:
        assert torch.equal(getattr(cache.windows, name), getattr(windows, name))
    assert cache.base == model.config.base_fingerprint


def test_scored_tokens_are_those_with_a_next_token(caches):
    states, targets = caches["digits"].scored()
    windows = caches["digits"].windows
    assert len(states) == len(targets) == len(windows.input_ids) - (len(windows.starts) - 1)
    assert bool((targets >= 0).all())


def test_progress_ends_at_the_total(model, tokenizer, tmp_path):
    steps = []
    windows = window_text(tiny.documents("words", 9), tokenizer, length=48)
    cache_states(model, windows, tmp_path / "states.safetensors", on_step=steps.append)
    assert steps[-1] == {"done": len(windows.input_ids), "total": len(windows.input_ids)}


def test_the_same_text_is_read_once(model, tokenizer, tmp_path):
    windows = window_text(tiny.documents("words", 9), tokenizer, length=48)
    steps = []
    first = cached(model, windows, tmp_path, on_step=steps.append)
    count = len(steps)
    second = cached(model, windows, tmp_path, on_step=steps.append)
    assert count > 0
    assert len(steps) == count
    assert torch.equal(first.states[:], second.states[:])
    assert len(list(tmp_path.iterdir())) == 1


def test_states_of_the_same_model_in_half_precision_are_others(tokenizer, tmp_path):
    windows = window_text(tiny.documents("words", 9), tokenizer, length=48)
    for dtype in (torch.float32, torch.bfloat16):
        cached(CausalQwenForCausalLM.from_backbone(tiny.backbone()).to(dtype), windows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_that_half_precision_cannot_hold_is_refused_and_leaves_nothing(tokenizer, tmp_path):
    from tether.causal.modeling import CausalQwenForCausalLM

    huge = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    huge.backbone.norm.weight.data.mul_(1e6)
    windows = window_text(tiny.documents("words", 2), tokenizer, length=48)
    with pytest.raises(CheckpointError, match="float16"):
        cache_states(huge, windows, tmp_path / "states.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_damaged_or_foreign_files_are_refused(model, tokenizer, tmp_path):
    path = tmp_path / "states.safetensors"
    cache_states(model, window_text(tiny.documents("words", 2), tokenizer, length=48), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="states"):
        load_states(path)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="expected cached states"):
        load_states(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize("damage", ["short", "bit", "header", "other text"])
def test_a_damaged_part_is_computed_again(model, tokenizer, tmp_path, caplog, damage):
    windows = window_text(tiny.documents("words", 6), tokenizer, length=48)
    first = cached(model, windows, tmp_path).states[:].clone()
    parts = sorted(tmp_path.glob("*/part-*"))
    assert len(parts) > 5
    before = {part: part.stat().st_mtime_ns for part in parts}
    content = bytearray(parts[2].read_bytes())
    if damage == "short":
        content = content[:500]
    elif damage == "bit":
        content[-37] ^= 4
    elif damage == "header":
        content = content.replace(b'"layers":"[]"', b'"layers":"[1]"', 1)
    else:
        content = parts[3].read_bytes()
    parts[2].write_bytes(content)
    steps = []
    assert torch.equal(cached(model, windows, tmp_path, on_step=steps.append).states[:], first)
    assert "part-00002" in caplog.text
    assert "computed again" in caplog.text
    # Only the damaged part was.
    assert 0 < steps[-1]["total"] < 100
    after = {part: part.stat().st_mtime_ns for part in parts}
    assert [part for part in parts if after[part] != before[part]] == [parts[2]]
    caplog.clear()
    assert torch.equal(cached(model, windows, tmp_path).states[:], first)
    assert not caplog.text


def test_states_without_a_folder_are_those_of_a_cache_and_leave_no_file(
    model, tokenizer, tmp_path, monkeypatch
):
    windows = window_text(tiny.documents("words", 6), tokenizer, length=48)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    steps = []

    def look(step):
        steps.append(step)
        assert list((tmp_path / "temporary").iterdir()) == []

    alone = read_states(model, windows, on_step=look)
    assert steps[-1] == {"done": len(windows.input_ids), "total": len(windows.input_ids)}
    assert list((tmp_path / "temporary").iterdir()) == []
    kept = cached(model, windows, tmp_path / "kept")
    assert torch.equal(alone.states[:], kept.states[:])
    assert (alone.base, alone.layers) == (kept.base, kept.layers)


def test_short_windows_are_not_padded_to_long_ones(model, tokenizer, tmp_path, monkeypatch):
    windows = window_text(["a" * length for length in (64, 33, 60, 34, 64, 48)] * 2, tokenizer, length=64)
    padded = []
    backbone = model.backbone.forward

    def watch(*args, **kwargs):
        padded.append(kwargs["input_ids"].shape)
        return backbone(*args, **kwargs)

    monkeypatch.setattr(model.backbone, "forward", watch)
    cache_states(model, windows, tmp_path / "states")
    assert sum(shape.numel() for shape in padded) < 1.1 * len(windows.input_ids)
    assert all(shape[0] <= 8 for shape in padded)
