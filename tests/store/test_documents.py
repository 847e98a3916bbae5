import hashlib
import json
import sys
import tracemalloc

import pytest

from tether.errors import ConfigError
from tether.store import plain
from tether.store.documents import (
    beginning,
    cut_documents,
    documents_of,
    read_documents,
    text_hash,
    write_documents,
)


def test_documents_come_back_from_disk(tmp_path):
    documents = ["one\ntwo", 'quote " and ünïcode', " padded "]
    write_documents(tmp_path / "text.jsonl", documents)
    assert list(read_documents(tmp_path / "text.jsonl")) == documents
    (tmp_path / "plain.txt").write_text("one\n\ntwo")
    assert list(read_documents(tmp_path / "plain.txt")) == ["one\n\ntwo"]
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
        ("deep.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000, "line 2"),
        ("far.txt", b"ab \xc3\xa9 cd ef gh ij \xc3(", "at byte 18"),
        ("far.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "at byte 24"),
        ("half.jsonl", b'{"text": "fine"}\n{"text": "half \\ud83d"}\n', "line 2"),
    ],
)
def test_unusable_text_is_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(plain, "BLOCK", 4)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_documents(tmp_path / name)


def test_json_lines_of_other_tools_are_read(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "one", "meta": 3}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    assert list(read_documents(path)) == ["one", "two"]
    for name in ("text.JSONL", "text.ndjson", "text.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert list(read_documents(tmp_path / name)) == ["one", "two"]
    (tmp_path / "plain.txt").write_bytes(b"\xef\xbb\xbfone")
    assert list(read_documents(tmp_path / "plain.txt")) == ["one"]


CONTENTS = {
    "words": "one two three four five six seven eight",
    "lines": "one\r\ntwo\rthree\n\r\n\nfour five\r\n",
    "wide": "\u00e9\u4e2d \U0001f600\u4e2d\u4e2d \u00e9\n" * 5,
    "no space": "abcdefghijklmnopqrstuvwxyz",
    "one space": "a bcdefghijklmnopqrstuvwxyz",
}


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_plain_file_is_hashed_and_cut_as_its_content_is(tmp_path, monkeypatch, content, mark, block):
    monkeypatch.setattr(plain, "BLOCK", block)
    data = (mark + content).encode()
    (tmp_path / "text.txt").write_bytes(data)
    text = read_documents(tmp_path / "text.txt")
    whole = content.replace("\r\n", "\n").replace("\r", "\n")
    assert list(text) == [whole]
    assert text.sha256 == hashlib.sha256(data).hexdigest()
    assert text_hash(text) == text_hash([whole])
    assert beginning(text, 0, 7) == whole[:7]
    for share in (0.1, 0.5, 0.6, 0.95):
        parts = cut_documents(text, share)
        assert [part[0] for part in parts] == [part[0] for part in cut_documents([whole], share)]
        assert [text_hash(part) for part in parts] == [text_hash([part[0]]) for part in parts]
        # A part can be read and cut again.
        assert cut_documents(parts[1], 0.5)[0][0] == cut_documents([parts[1][0]], 0.5)[0][0]
        assert beginning(parts[1], 0, 4) == parts[1][0][:4]


def test_some_of_the_lines_are_a_text_of_their_own(tmp_path):
    documents = [f"document {number} \u00e9" for number in range(10)]
    write_documents(tmp_path / "text.jsonl", documents)
    text = read_documents(tmp_path / "text.jsonl")
    assert text_hash(text) == text_hash(documents)
    assert list(text[2:7:2]) == documents[2:7:2]
    assert text_hash(text[2:7]) == text_hash(documents[2:7])
    assert text[-1] == documents[-1]
    assert [list(part) for part in cut_documents(text, 0.6)] == [documents[:6], documents[6:]]
    assert documents_of(text) is text
    with pytest.raises(IndexError):
        text[10]


@pytest.mark.parametrize("name", ["plain.txt", "lines.jsonl"])
def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path, name):
    path = tmp_path / name
    write_documents(path, ["one", "two"])
    text = read_documents(path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ConfigError, match="has changed while it was in use"):
        text[0]


@pytest.mark.parametrize("name", ["plain.txt", "lines.jsonl"])
def test_a_large_file_takes_no_memory_and_is_passed_over_once(tmp_path, name):
    path = tmp_path / name
    content = "the quick brown fox jumps over the lazy dog\n" * 500_000
    if name == "plain.txt":
        path.write_text(content)
    else:
        write_documents(path, content.split("\n")[:200_000])
    opens, watched = [], True

    def watch(event, arguments):
        if event == "open" and watched and str(arguments[0]) == str(path):
            opens.append(event)

    sys.addaudithook(watch)
    tracemalloc.start()
    text = read_documents(path)
    assert text_hash(text).startswith("sha256:")
    assert len(text.sha256) == 64
    assert len(opens) == 1
    _, second = cut_documents(text, 0.6)
    assert beginning(second, 0, 9)
    peak, watched = tracemalloc.get_traced_memory()[1], False
    tracemalloc.stop()
    # The file has 22 MB of plain text, or 11 MB of JSON lines; a block and what is decoded of it are held.
    assert peak < 6_000_000, peak
