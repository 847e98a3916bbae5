import json

import pytest

from tether.errors import ConfigError
from tether.store.documents import read_documents, text_hash, write_documents


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
        ("half.jsonl", b'{"text": "fine"}\n{"text": "half \\ud83d"}\n', "line 2"),
    ],
)
def test_unusable_text_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_documents(tmp_path / name)


def test_json_lines_of_other_tools_are_read(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "one", "meta": 3}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    assert read_documents(path) == ["one", "two"]
    for name in ("text.JSONL", "text.ndjson", "text.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert read_documents(tmp_path / name) == ["one", "two"]
    (tmp_path / "plain.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read_documents(tmp_path / "plain.txt") == ["one"]
