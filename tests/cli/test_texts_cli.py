"""Texts of every form on the command line: what is printed, what is refused, what a certificate says of them."""

import json

import datasets
import pytest

import tiny
from store.test_tables import cells, lines, saved, table
from tether.delta.certificate import Certificate, read
from tether.store.documents import write_documents


@pytest.fixture
def work(tmp_path, monkeypatch):
    tiny.backbone().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    own = [{"id": n, "body": text} for n, text in enumerate(tiny.documents("digits", 60, 1))]
    general = [{"text": text} for text in tiny.documents("words", 60, 2)]
    cells(tmp_path / "own.csv", own)
    table(tmp_path / "own.parquet", own)
    saved(tmp_path / "general", general)
    datasets.DatasetDict({"own": datasets.Dataset.from_list(own)}).save_to_disk(tmp_path / "split")
    lines(tmp_path / "general.jsonl", general)
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(tiny.documents("digits", 9, 3)):
        (tmp_path / "notes" / f"{number}.md").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


LEARN = ("learn", "base", "--window", 64, "--epochs", 1, "--no-gate")


def test_every_command_reads_every_form_and_says_what_it_found(work, tether):
    code, out, err = tether(
        *LEARN,
        "--text",
        "own.csv",
        "--field",
        "body",
        "--base-text",
        "general",
        "--out",
        "own.delta",
        "--json",
    )
    assert code == 0, err
    assert "tether: own.csv: 60 documents in `body`\n" in err
    assert "tether: general: 60 documents in `text`\n" in err
    assert json.loads(out)["texts"]["domain"]
    code, out, err = tether(
        "fuse", "base", "own.delta", "--check", "own=own.parquet", "--field", "body", "--out", "fused"
    )
    assert code == 0, err
    assert "own.parquet: 60 documents in `body`" in err
    for text, found in (("notes", "notes: 9 documents, of 9 files"), ("general", "general: 60 documents")):
        code, out, err = tether("ledger", "fused", "--text", text, "--tokens", 300)
        assert code == 0, err
        assert found in err
        code, out, err = tether("evaluate", "fused", "--text", text, "--tokens", 300)
        assert code == 0, err
        assert found in err
    code, out, err = tether(
        "train", "base", "--text", "own.parquet", "--field", "body", "--steps", 1, "--out", "run"
    )
    assert code == 0, err
    assert "own.parquet: 60 documents in `body`" in err
    code, out, err = tether(
        "route", "base", "own.delta", "--text", "own.csv", "--base-text", "general", "--field", "body", "--tokens", 600,
        "--out", "routed",
    )  # fmt: skip
    assert code == 0, err
    code, out, err = tether("convert", "base", "--calibrate", "notes", "--out", "made")
    assert code == 0, err
    assert "notes: 9 documents" in err


def test_a_certificate_says_how_its_texts_were_read(work, tether):
    assert (
        tether(
            *LEARN, "--text", "own.csv", "--field", "body", "--base-text", "general", "--out", "own.delta"
        )[0]
        == 0
    )
    assert tether("fuse", "base", "own.delta", "--out", "fused")[0] == 0
    code, _, err = tether(
        "certify", "base", "fused", "--text", "own.parquet", "--text", "general", "--text", "split:own",
        "--text", "notes",
        "--field", "body", "--tokens", 300, "--continuations", 0, "--out", "cert.json",
    )  # fmt: skip
    assert code == 0, err
    texts = read("cert.json").texts
    asked = {name: {key: text.get(key) for key in ("field", "split")} for name, text in texts.items()}
    assert asked == {
        "own": {"field": "body", "split": None}, "general": {"field": None, "split": None},
        "split": {"field": "body", "split": "own"}, "notes": {"field": None, "split": None},
    }  # fmt: skip
    code, out, err = tether("verify", "cert.json")
    assert code == 0, out + err
    (work / "notes" / "3.md").write_text("other words")
    code, out, _ = tether("verify", "cert.json")
    assert code == 1
    assert "notes has changed since the certificate was made" in out


def test_control_tokens_are_read_where_they_are_asked_for(work, tether):
    write_documents(work / "ends.jsonl", [f"{text}<eos>{text}" for text in tiny.documents("digits", 40, 1)])
    figures = {}
    for name, more in {"letters": (), "control": ("--control-tokens",)}.items():
        code, out, err = tether(
            *LEARN,
            "--text",
            "ends.jsonl",
            "--base-text",
            "general.jsonl",
            "--out",
            f"{name}.delta",
            *more,
            "--json",
        )
        assert code == 0, err
        figures[name] = json.loads(out)["tokens"]
    # Five letters, or one token.
    assert figures["letters"] > figures["control"] + 3 * 30
    assert tether("fuse", "base", "control.delta", "--out", "fused")[0] == 0
    certify = ("certify", "base", "fused", "--text", "ends.jsonl", "--tokens", 300, "--continuations", 0)
    for name, more in {"letters": (), "control": ("--control-tokens",)}.items():
        code, _, err = tether(*certify, *more, "--out", f"{name}.json")
        assert code == 0, err
        assert read(f"{name}.json").texts["ends"].get("control_tokens") == (True if more else None)
        assert tether("verify", f"{name}.json")[0] == 0
    one, other = (read(f"{name}.json").figures["ends"]["nll_base"] for name in ("letters", "control"))
    assert one != other
    # Certificates of older schemas read them without having been asked.
    content = json.loads((work / "control.json").read_text())
    del content["texts"]["ends"]["control_tokens"]
    for schema, code in ((9, 0), (10, 1)):
        older = Certificate(**{**content, "schema_version": schema}).sealed()
        (work / "older.json").write_text(json.dumps(older.model_dump(mode="json")))
        assert tether("verify", "older.json")[0] == code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--text", "own.csv", "--base-text", "general"), "the fields there are id, body: name the one"),
        (("--text", "own.csv", "--base-text", "own.parquet", "--field", "bodi"), "expected a field 'bodi'"),
        (
            ("--text", "own.csv", "--base-text", "general.jsonl", "--field", "text"),
            "fields there are id, body",
        ),
        (("--text", "general.jsonl", "--base-text", "general", "--field", "body"), "expected a field 'body'"),
        (("--text", "absent.csv", "--base-text", "general"), "absent.csv: no such text file or folder"),
        (("--text", "split:test", "--base-text", "general"), "no split test; it has own"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_before_the_model_is_loaded(work, tether, arguments, said):
    (work / "base" / "config.json").unlink()
    code, out, err = tether(*LEARN, *arguments, "--out", "own.delta")
    assert code == 2
    assert said in err
    assert out == ""
    assert not (work / "own.delta").exists()


def test_what_is_in_no_file_is_not_certified(work, tether, monkeypatch):
    assert tether(*LEARN, "--text", "notes", "--base-text", "general", "--out", "own.delta")[0] == 0
    assert tether("fuse", "base", "own.delta", "--out", "fused")[0] == 0
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(work / "cache"))
    (work / "data").mkdir()
    lines(work / "data" / "train.jsonl", [{"text": text} for text in tiny.documents("words", 30, 2)])
    code, _, err = tether("certify", "base", "fused", "--text", "data:train", "--out", "cert.json")
    assert code == 2
    assert "a certificate refers to files" in err
    # The folder itself is a text of files.
    assert tether("certify", "base", "fused", "--text", "data", "--tokens", 300, "--out", "cert.json")[0] == 0
