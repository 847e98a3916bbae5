import json

import pytest
import torch

import tiny
from tether.delta.windows import read_documents, text_hash, window_text, write_documents
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
    # 200 = 64 * 3 + 8: the rest of 8 tokens is dropped; two documents bring 300 tokens.
    assert len(window_text(documents, tiny.tokenizer(), length=64, tokens=300).input_ids) == 2 * 192


def test_batches_give_every_token_once():
    windows = window_text(["x" * n for n in (64, 33, 200, 47)], tiny.tokenizer(), length=64)
    seen = torch.zeros(len(windows.input_ids), dtype=torch.long)
    for batch in windows.batches(2):
        where = windows.positions(batch)
        seen[where] += 1
        assert torch.equal(windows.input_ids[where], batch.input_ids[batch.mask])
        assert bool((batch.input_ids[~batch.mask] == 0).all())
    assert bool((seen == 1).all())


def test_documents_come_back_from_disk(tmp_path):
    documents = ["one\ntwo", 'quote " and ünïcode', " padded "]
    write_documents(tmp_path / "text.jsonl", documents)
    assert read_documents(tmp_path / "text.jsonl") == documents
    (tmp_path / "plain.txt").write_text("one\n\ntwo")
    assert read_documents(tmp_path / "plain.txt") == ["one\n\ntwo"]
    assert text_hash(["ab", "c"]) != text_hash(["a", "bc"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such text file"),
        ("empty.jsonl", b"", "holds no text"),
        ("blank.txt", b"  \n ", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("list.jsonl", b'["a"]\n', "line 1"),
        ("number.jsonl", b'{"text": 3}\n', "line 1"),
        ("broken.jsonl", b'{"text": "a"\n', "line 1"),
    ],
)
def test_unusable_text_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_documents(tmp_path / name)


def test_text_shorter_than_a_context():
    with pytest.raises(ConfigError, match="at least one context of 256"):
        window_text(["short text"], tiny.tokenizer(), length=256)
    with pytest.raises(ConfigError, match="tokenizer"):
        window_text(["text"], None, length=2)


def test_json_lines_of_other_tools_are_read(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "one", "meta": 3}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    assert read_documents(path) == ["one", "two"]
