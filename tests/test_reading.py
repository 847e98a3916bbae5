"""Bounds of what is read: each refused in no time, with the file and the field named."""

import json
import time
from itertools import pairwise

import pytest

from tether import files
from tether.errors import CheckpointError, ConfigError
from tether.files import is_plain
from tether.merge import probes
from tether.merge.probes import read_probes
from tether.reading import (
    DEEPEST,
    JSON_BYTES,
    YAML_BYTES,
    Strict,
    checked,
    finite,
    parse_as,
    parse_json,
    read_json,
    read_yaml,
)
from tether.store.documents import read_documents

JSONS = {
    "NaN": ('{"a": NaN}', "NaN is no number"),
    "infinity": ('{"a": [1, -Infinity]}', "-Infinity is no number"),
    "overflow": ('{"a": {"b": 1e999}}', "a.b: inf is no finite number"),
    "a thousand digits": ('{"a": ' + "9" * 1000 + "}", "a whole number of 1000 digits"),
    "more than 64 bits": ('{"a": 36893488147419103232}', "a: a whole number of more than 64 bits"),
    "a field twice": ('{"a": 1, "a": 2}', "a field is there twice"),
    "half a character": ('{"a": ["\\ud800"]}', "a.0: text with half a character"),
    "a zero byte": ('{"a": "x\\u0000"}', "a: text with half a character or a zero byte"),
    "half a character in a name": ('{"\\udc00": 1}', "a field's name"),
    "deep": ("[" * 100_000, "deeper than 32"),
    "just too deep": ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "deeper than 32"),
    "cut": ('{"a": 1', "expected JSON"),
    "other bytes": (b"\xff\xfe{}", "expected JSON"),
}


@pytest.mark.parametrize("name", JSONS)
def test_json_out_of_bounds_is_refused_by_file_and_field(name):
    text, said = JSONS[name]
    before = time.process_time()
    with pytest.raises(CheckpointError, match=r"^a\.json: ") as refused:
        parse_json(text, "a.json")
    assert said in str(refused.value)
    assert time.process_time() - before < 5


def test_json_within_bounds_is_what_the_standard_library_reads():
    text = json.dumps({"a": [1, -2.5, None, True, "é\n", {"b": []}], "c": 2**63, "d": [[[[]]]]})
    assert parse_json(text, "a.json") == parse_json(text.encode(), "a.json") == json.loads(text)
    deepest = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(deepest, "a.json") == json.loads(deepest)


YAMLS = {
    "aliases that multiply": (
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefg")),
        "write it out",
    ),
    "a tag": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "a field twice": ("a: 1\na: 2", "expected each field once"),
    "a number of base 60": ("a: 1" + ":59" * 20_000, "a whole number of"),
    "NaN": ("a: .nan", "a: nan is no finite number"),
    "a date": ("a: 2026-01-01", "a: a date"),
    "a number for a name": ("1: 2", "a field's name is 1"),
    "deep": ("[" * 100_000, "deeper than 32"),
    "too long": ("a: " + "x" * YAML_BYTES, "larger than"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_out_of_bounds_is_refused(name, tmp_path):
    text, said = YAMLS[name]
    (tmp_path / "o.yaml").write_text(text)
    before = time.process_time()
    with pytest.raises(ConfigError, match=r"o\.yaml: ") as refused:
        read_yaml(tmp_path / "o.yaml", error=ConfigError)
    assert said in str(refused.value)
    assert time.process_time() - before < 5


def test_yaml_within_bounds(tmp_path):
    (tmp_path / "o.yaml").write_text("a: 1\nb: [x, {c: 2.5}]\nd: null\n")
    assert read_yaml(tmp_path / "o.yaml") == {"a": 1, "b": ["x", {"c": 2.5}], "d": None}


def test_only_files_of_a_sensible_size_are_read(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(CheckpointError, match=r"a folder, a device or a pipe|cannot be read"):
        read_json(tmp_path)
    with (tmp_path / "large.json").open("wb") as stream:
        stream.truncate(JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="larger than"):
        read_json(tmp_path / "large.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json("a\0b")


def test_a_schema_names_every_wrong_field():
    class Leash(Strict):
        nats: float
        metric: str

    assert checked(Leash, {"nats": 1, "metric": "softmax"}, "a.json").nats == 1.0
    with pytest.raises(CheckpointError) as refused:
        checked(Leash, {"nats": "0.5", "chart": 1}, "a.json")
    for field in ("nats", "metric", "chart"):
        assert f"{field}: " in str(refused.value)


def test_files_of_other_libraries_have_infinity_and_any_text_and_the_same_bounds_else():
    text = '{"limit": [0.0, Infinity], "token": "\\ud800\\u0000", "length": 1000000000000000019884624838656}'
    assert parse_json(text, "config.json", foreign=True) == json.loads(text)
    with pytest.raises(CheckpointError):
        parse_json(text, "config.json")
    for name in ("a thousand digits", "a field twice", "deep", "just too deep", "cut", "other bytes"):
        with pytest.raises(CheckpointError):
            parse_json(JSONS[name][0], "config.json", foreign=True)


def test_json_is_parsed_and_checked_at_once():
    class Leash(Strict):
        nats: float

    assert parse_as(Leash, b'{"nats": 0.5}', "a.json").nats == 0.5
    for text in ('{"nats": NaN}', '{"nats": "0.5"}', '{"nats": 0.5, "nats": 1}', '{"nats": 1, "more": 2}'):
        with pytest.raises(ConfigError, match=r"^a\.json: "):
            parse_as(Leash, text, "a.json", error=ConfigError)


def test_paths_that_no_file_can_have_are_no_files(tmp_path):
    (tmp_path / "a").write_text("x")
    assert is_plain(tmp_path / "a")
    for path in (tmp_path, tmp_path / "b", tmp_path / "a" / "b", tmp_path / ("x" * 10_000), "a\0b"):
        assert not is_plain(path)


def test_what_json_cannot_hold_becomes_null():
    content = {"a": (1, float("inf")), "b": {"c": float("nan")}, "d": "x"}
    assert finite(content) == {"a": [1, None], "b": {"c": None}, "d": "x"}


@pytest.mark.parametrize("read", [read_documents, read_probes], ids=lambda read: read.__name__)
def test_a_line_without_an_end_fills_no_memory(read, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate(2**33)  # takes no place on the disk, and would take 8 GB of memory
    for module in (files, probes):
        monkeypatch.setattr(module, "LINE_BYTES", 2**20)
    before = time.process_time()
    with pytest.raises(ConfigError, match=r"(longer|larger) than 1,048,576 bytes"):
        read(path)
    assert time.process_time() - before < 5
