"""Wherever a command writes to is looked at before its work: exit 2, and nothing is loaded, measured or left behind."""

from pathlib import Path
from typing import get_type_hints

import pytest
from typer.models import OptionInfo

from said import complaints
from tether.cli.app import app

TEXTS = ["--text", "words.txt"]
BASE_TEXT = ["--base-text", "words.txt"]
LEARN = ["learn", "absent", *TEXTS, *BASE_TEXT]
SPREAD = ["--device-map", "auto", "--offload-folder"]
WRITTEN = {
    "demo --out": ["demo", "--out"],
    "convert --out": ["convert", "absent", "--out"],
    "learn --out": [*LEARN, "--out"],
    "learn --cache": [*LEARN, "--out", "a.delta", "--cache"],
    "learn --log_folder": [*LEARN, "--out", "a.delta", "--log-with", "tensorboard", "--log-folder"],
    "train --log_folder": [
        "train",
        "absent",
        *TEXTS,
        "--out",
        "a",
        "--log-with",
        "tensorboard",
        "--log-folder",
    ],
    "learn --offload_folder": [*LEARN, "--out", "a.delta", *SPREAD],
    "fuse --offload_folder": ["fuse", "absent", "absent.delta", "--out", "a", *SPREAD],
    "certify --offload_folder": ["certify", "absent", "absent", *TEXTS, "--out", "a.json", *SPREAD],
    "verify --offload_folder": ["verify", "absent.json", *SPREAD],
    "generate --offload_folder": ["generate", "absent", "a", *SPREAD],
    "ledger --offload_folder": ["ledger", "absent", *TEXTS, *SPREAD],
    "fuse --out": ["fuse", "absent", "absent.delta", "--out"],
    "certify --out": ["certify", "absent", "absent", *TEXTS, "--out"],
    "route --out": ["route", "absent", "absent.delta", *TEXTS, *BASE_TEXT, "--out"],
    "export --out": ["export", "absent", "--out"],
    "generate --noise": ["generate", "absent", "a", "--mode", "causal", "--noise"],
    "train --out": ["train", "absent", *TEXTS, "--out"],
    "leash --out": ["leash", "absent", "--base", "absent", *BASE_TEXT, "--budget", "0.1", "--out"],
    "leash --cache": [
        "leash",
        "absent",
        "--base",
        "absent",
        *BASE_TEXT,
        "--budget",
        "0.1",
        "--out",
        "a",
        "--cache",
    ],
    "theory experiments --figures": ["theory", "experiments", "--figures"],
    "theory enclose --state": ["theory", "enclose", "any", "--state"],
    "merge align --out": ["merge", "align", "absent", "absent", *TEXTS, "--out"],
    "merge observe --out": ["merge", "observe", "absent", "--probes", "probes.jsonl", "--out"],
    "merge run --out": ["merge", "run", "recipe.yaml", "--out"],
}
"""Every option that names a place to write to, and a command up to it, whose models are not there."""
READ = {"config", "text", "base_text", "held_out", "calibrate", "check", "probes", "options", "sign", "key"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("One text.\n" * 40)
    (tmp_path / "probes.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "recipe.yaml").write_text("operator: linear\nmodels: {a: {path: absent}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths(group, before=""):
    """Every option of every command that is a path."""
    for command in group.registered_commands:
        name = command.name or command.callback.__name__
        for option, kind in get_type_hints(command.callback, include_extras=True).items():
            if isinstance(getattr(kind, "__metadata__", [None])[0], OptionInfo) and "Path" in str(
                kind.__origin__
            ):
                yield f"{before}{name}", option
    for inner in group.registered_groups:
        yield from paths(inner.typer_instance, f"{inner.name or inner.typer_instance.info.name} ")


def test_no_option_that_takes_a_path_is_forgotten():
    written = {f"{name} --{option}" for name, option in paths(app) if option not in READ}
    assert written == set(WRITTEN)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("place", ["words.txt/below/a", f"{'a' * 240}/a"])
def test_a_place_that_nothing_can_be_written_to_is_refused_first(folder, tether, name, place):
    code, out, err = tether(*WRITTEN[name], Path(place))
    assert (code, out) == (2, "")
    assert "is not a folder; choose another" in err or "at most 230 bytes" in err, err
    assert complaints(err) == 1
    assert {path.name for path in folder.iterdir()} == {"words.txt", "probes.jsonl", "recipe.yaml"}
