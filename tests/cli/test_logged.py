"""`--log-with`: what a fit tells of its steps is in the logger's file; a logger that is not there is named."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

import said
import tiny
from tether.cli.logged import LOGGERS
from tether.delta.adapter import Adapter
from tether.delta.delta import Delta
from tether.store.documents import write_documents


@pytest.fixture
def work(tmp_path, monkeypatch):
    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 12, 3))
    write_documents(tmp_path / "digits.jsonl", tiny.documents("digits", 24, 1))
    tiny.backbone("llama").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scalars(folder):
    """Read the figures of a log by name: TFRecords of length, its checksum, an event, its checksum."""
    found = {}
    for path in folder.rglob("events.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def learn(tether, *more):
    return tether(
        "learn", "base", "--text", "digits.jsonl", "--base-text", "words.jsonl", "--window", "48", "--no-gate", *more
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["delta", "lora"])
def test_the_figures_of_each_step_are_there(tether, work, kind):
    more = () if kind == "delta" else ("--adapter", "lora", "--rank", "2")
    code, _, err = learn(tether, "--out", f"digits.{kind}", "--log-with", "tensorboard", *more)
    assert code == 0, err
    figures = scalars(work / "runs" / "digits")
    path = work / f"digits.{kind}"
    curve = (Delta if kind == "delta" else Adapter).load(path).record["curve"]
    assert len(curve) > 2
    for name in ("nll", "drift", "multiplier"):
        of = figures[name]
        assert len(of) >= len(curve)
        for entry in curve:
            assert of[entry["step"]] == pytest.approx(entry[name], rel=1e-6, abs=1e-12)


def test_a_training_is_logged_too(tether, work):
    code, _, err = tether(
        "train", "base", "--text", "digits.jsonl", "--out", "trained", "--steps", "4", "--log-with", "tensorboard",
        "--log-folder", "logs",
    )  # fmt: skip
    assert code == 0, err
    losses = scalars(work / "logs" / "trained")["loss"]
    assert min(losses) == 1
    assert sorted(losses) == list(range(1, len(losses) + 1))


@pytest.mark.parametrize("logger", ["wandb", "other"])
def test_a_logger_that_is_not_there_is_named_before_the_work(tether, work, logger):
    code, _, err = learn(tether, "--out", "digits.delta", "--log-with", logger)
    assert code == 2
    assert said.complaints(err) == 1
    assert (f"pip install {LOGGERS[logger]}" if logger in LOGGERS else "expected one of") in err
    assert not (work / "digits.delta").exists()


def test_nothing_is_logged_unless_asked(tether, work):
    assert learn(tether, "--out", "digits.delta")[0] == 0
    assert not (work / "runs").exists()
