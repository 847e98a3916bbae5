"""--device and --dtype of every command that loads a model."""

import inspect
import json

import pytest
import torch

import tiny
from tether.causal.loading import load
from tether.cli import placing
from tether.cli.app import app
from tether.store.documents import write_documents

LOADING = {
    "convert", "learn", "fuse", "certify", "route", "ledger", "export", "generate", "counterfactual", "evaluate",
    "leash", "serve",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for part in (tiny.backbone(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "base")
    write_documents(tmp_path / "digits.jsonl", tiny.documents("digits", 30, 1))
    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 30, 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_that_loads_a_model_has_both_options():
    taken = {
        command.name or command.callback.__name__: set(inspect.signature(command.callback).parameters)
        for command in app.registered_commands
    }
    assert {name for name, options in taken.items() if {"device", "dtype"} <= options} == LOADING
    assert {name for name, options in taken.items() if "device" in options} == LOADING | {"verify", "train"}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--device", "cuda:77", "this machine has"), ("--dtype", "int8", "expected auto or")],
)
def test_a_place_that_is_not_there_is_refused_before_the_work(folder, tether, option, value, said):
    base = ["learn", "base", "--text", "digits.jsonl", "--base-text", "words.jsonl", "--out", "a.delta"]
    code, _, err = tether(*base, option, value)
    assert code == 2
    assert f"{option[2:]} '{value}'" in err
    assert said in err
    assert not (folder / "a.delta").exists()


def test_a_format_reaches_the_weights_and_every_later_command(folder, tether):
    half = ["--device", "cpu", "--dtype", "bfloat16"]
    learn = ["learn", "base", "--text", "digits.jsonl", "--base-text", "words.jsonl", "--out", "digits.delta"]
    code, _, err = tether(*learn, *half)
    assert code == 0, err
    code, _, err = tether("fuse", "base", "digits.delta", "--out", "fused", *half)
    assert code == 0, err
    assert load("fused")[0].dtype is torch.bfloat16
    assert load("base")[0].dtype is torch.float32
    code, _, err = tether("certify", "base", "fused", "--text", "words.jsonl", "--out", "cert.json", *half)
    assert code == 0, err
    assert json.loads((folder / "cert.json").read_text(encoding="utf-8"))["model"]["dtype"] == "bfloat16"
    assert tether("verify", "cert.json", "--device", "cpu")[0] == 0
    assert tether("ledger", "fused", "--text", "words.jsonl", "--dtype", "float32")[0] == 0
    # What one command was given does not reach the next.
    assert placing.place() == (torch.device("cpu"), None) or torch.accelerator.is_available()
