import pytest
import torch

import tiny
from tether.delta.windows import window_text
from tether.errors import ConfigError


def test_windows_hold_every_document_in_order_and_never_cross_one():
    documents = ["a" * 100, "b" * 40, "c" * 10, "d" * 64]
    windows = window_text(documents, tiny.tokenizer(), length=64)
    # 100 = 64 + 36 tokens; the 10-token document is too short to be a window.
    assert windows.starts.tolist() == [0, 64, 100, 140, 204]
    assert windows.documents.unique().tolist() == [0, 1, 3]
    text = tiny.tokenizer().decode(windows.input_ids)
    assert text == "a" * 100 + "b" * 40 + "d" * 64
    ends = windows.starts[1:] - 1
    assert windows.targets[ends].tolist() == [-100] * 4
    inside = torch.ones(204, dtype=torch.bool)
    inside[ends] = False
    assert torch.equal(windows.targets[inside], windows.input_ids[1:][inside[:-1]])


def test_limits():
    documents = ["a" * 200] * 5
    assert len(window_text(documents, tiny.tokenizer(), length=64, per_document=1).input_ids) == 5 * 64
    # 200 = 64 * 3 + 8: the rest of 8 tokens is dropped; the window that brings 300 tokens is the last.
    assert len(window_text(documents, tiny.tokenizer(), length=64, tokens=300).input_ids) == 5 * 64
    assert (
        len(window_text(documents, tiny.tokenizer(), length=64, tokens=300, whole=True).input_ids) == 2 * 192
    )
    assert len(window_text(["a" * 6400], tiny.tokenizer(), length=64, tokens=300).input_ids) == 5 * 64
    for wrong in ({"length": 1}, {"length": 64, "tokens": 0}):
        with pytest.raises(ConfigError, match="at least 2 and at least 1"):
            window_text(documents, tiny.tokenizer(), **wrong)


def test_batches_give_every_token_once():
    windows = window_text(["x" * n for n in (64, 33, 200, 47)], tiny.tokenizer(), length=64)
    seen = torch.zeros(len(windows.input_ids), dtype=torch.long)
    for batch in windows.batches(2):
        where = windows.positions(batch)
        seen[where] += 1
        assert torch.equal(windows.input_ids[where], batch.input_ids[batch.mask])
        assert bool((batch.input_ids[~batch.mask] == 0).all())
    assert bool((seen == 1).all())


def test_text_shorter_than_a_context():
    with pytest.raises(ConfigError, match="at least one context of 256"):
        window_text(["short text"], tiny.tokenizer(), length=256)
    with pytest.raises(ConfigError, match="tokenizer"):
        window_text(["text"], None, length=2)
