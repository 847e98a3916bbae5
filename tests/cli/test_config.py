"""`learn --config FILE`: every option from one file, the command line first."""

import re

import pytest
import yaml

import tiny
from tether.delta.adapter import Adapter
from tether.delta.delta import Delta
from tether.store.documents import write_documents


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for part in (tiny.backbone(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "base")
    write_documents(tmp_path / "digits.jsonl", tiny.documents("digits", 30, 1))
    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 30, 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WHOLE = {
    "model": "base", "text": "digits.jsonl", "base-text": "words.jsonl", "out": "law.delta", "budget": 0.02,
    "window": 64, "epochs": 1, "lr": 0.002, "rank": 3, "seed": 7, "location_only": True, "tokens": None,
}  # fmt: skip


def test_a_file_has_every_option_and_the_command_line_goes_first(folder, tether):
    (folder / "law.yaml").write_text(yaml.safe_dump(WHOLE), encoding="utf-8")
    code, _, err = tether("learn", "--config", "law.yaml", "--lr", 0.004)
    assert code == 0, err
    record = Delta.load(folder / "law.delta").record
    found = {name: record["fit"][name] for name in ("epochs", "lr", "rank", "seed", "location_only")}
    assert found == {"epochs": 1, "lr": 0.004, "rank": 3, "seed": 7, "location_only": True}
    assert (record["budget"], record["window"]) == (0.02, 64)


def test_what_is_printed_is_a_file_that_says_the_same(folder, tether):
    (folder / "law.yaml").write_text(yaml.safe_dump(WHOLE), encoding="utf-8")
    code, out, err = tether("learn", "--config", "law.yaml", "--seed", 8, "--print-config")
    assert code == 0, err
    assert not (folder / "law.delta").exists()
    (folder / "printed.yaml").write_text(out, encoding="utf-8")
    assert tether("learn", "--config", "printed.yaml", "--print-config")[1] == out
    assert yaml.safe_load(out)["seed"] == 8
    assert yaml.safe_load(out)["budget"] == 0.02


def test_options_of_an_adapters_fit(folder, tether):
    common = ["learn", "base", "--text", "digits.jsonl", "--base-text", "words.jsonl"]
    fit = ["--rank", 2, "--alpha", 6, "--lr", 0.003, "--batch", 3, "--window", 64, "--seed", 4]
    code, _, err = tether(*common, "--out", "law", "--adapter", "lora", *fit)
    assert code == 0, err
    made = Adapter.load(folder / "law")
    assert (made.config.r, made.config.lora_alpha) == (2, 6)
    assert {name: made.record["fit"][name] for name in ("lr", "batch", "seed")} == {
        "lr": 0.003,
        "batch": 3,
        "seed": 4,
    }
    code, _, err = tether(*common, "--out", "law.delta", "--alpha", 6)
    assert code == 2
    assert "--alpha is of an adapter" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning_rate: 0.1", r"no option 'learning_rate'; expected .*base_text"),
        ("- a\n- b", "expected options as 'name: value' lines; got list"),
        ("lr: fast", "lr"),
        ("window: 0", "window"),
        ("a: &x 1\nb: *x", "alias"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_the_work(folder, tether, content, said):
    (folder / "law.yaml").write_text(content, encoding="utf-8")
    code, out, err = tether(
        "learn", "base", "--text", "digits.jsonl", "--base-text", "words.jsonl", "--out", "law.delta", "--config",
        "law.yaml",
    )  # fmt: skip
    assert code == 2
    assert re.search(said, out + err), err
    assert not (folder / "law.delta").exists()
