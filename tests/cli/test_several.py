"""Commands in two processes: one prints and writes, an error is said once, and both leave with one code, soon."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import tiny
from processes import run_command
from tether.cli import several
from tether.cli.app import SHARED, app
from tether.cli.merge import merge_app
from tether.delta.delta import Delta
from tether.errors import ConfigError
from tether.processes import Group
from tether.store.documents import write_documents

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
    pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning"),
]

LEARN = [
    "learn",
    "base",
    "--text",
    "digits.jsonl",
    "--base-text",
    "words.jsonl",
    "--cache",
    "cache",
    "--tokens",
    "1500",
]
SOON = 20
"""Seconds, of which most are the reading of files on a busy machine; a hang takes until the test's own limit."""


@pytest.fixture
def work(tmp_path, monkeypatch):
    for part in (tiny.backbone(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "base")
    for name, seed in (("digits", 1), ("words", 2)):
        write_documents(tmp_path / f"{name}.jsonl", tiny.documents(name, 30, seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said_once(said, code):
    """Check that all left with a code, and give what was printed and said: by one of them, the other said nothing."""
    assert [each[0] for each in said] == [code] * len(said), said
    outputs, errors = ([each[part] for each in said if each[part]] for part in (1, 2))
    assert len(outputs) <= 1
    return "".join(outputs), errors


def test_learn_prints_and_writes_once_what_one_process_learns(work, tether):
    assert tether(*LEARN, "--out", "one/digits.delta", "--json")[0] == 0
    out, (err,) = said_once(run_command(*LEARN, "--out", "two/digits.delta", "--json"), 0)
    record = json.loads(out)
    assert err.count("30 documents in `text`") == 2
    assert err.count("learning digits") == 1  # the states are there
    one, two = (Delta.load(work / place / "digits.delta") for place in ("one", "two"))
    assert two.record["factor"] == pytest.approx(one.record["factor"], rel=1e-5)
    assert (two.second == one.second).all()
    assert record["path"] == "two/digits.delta"
    assert [path.name for path in (work / "two").iterdir()] == ["digits.delta"]


def test_an_adapter_is_written_once(work):
    adapter = ["--adapter", "lora", "--no-gate", "--out", "digits.lora", "--json"]
    out, (err,) = said_once(run_command(*LEARN, *adapter), 0)
    assert json.loads(out)["drift_base"] <= 0.05
    assert err.count("digits.jsonl") == 1
    assert {path.name for path in work.iterdir()} == {
        "base",
        "cache",
        "digits.jsonl",
        "digits.lora",
        "words.jsonl",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*LEARN, "--budget", "-1", "--out", "a.delta"], "budget=-1.0"),
        ([*LEARN, "--nonsense"], "No such option"),
        ([*LEARN, "--out", "base"], "exists already"),
        ([*LEARN[:6], "--out", "a.delta"], "name a folder for them"),
        (["fuse", "base", "absent.delta", "--out", "fused"], "absent.delta"),
    ],
)
def test_what_is_wrong_for_all_is_said_once(work, arguments, message):
    before, began = sorted(work.iterdir()), time.monotonic()
    out, errors = said_once(run_command(*arguments), 2)
    assert out == ""
    assert len(errors) == 1
    assert message in errors[0]
    assert errors[0].count("in process 1") == 0
    assert sorted(work.iterdir()) == before
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--epochs", "3"], "differ in options: process 0 has "),
        (["--text", "words.jsonl"], "differ in texts: process 0 has "),
        (["--cache", "elsewhere"], "process 1 does not see what process 0 writes there"),
        # Found by one alone, while the other waits for it.
        (["--text", "absent.jsonl"], "in process 1 of 2: tether: absent.jsonl: no such text file"),
        (["--budget", "-1"], "in process 1 of 2: tether: budget=-1.0"),
        (["--nonsense"], "No such option"),
    ],
)
def test_processes_that_differ_end_together_with_one_message(work, other, message):
    began, last = time.monotonic(), [*LEARN, "--out", "a.delta"]
    for name, value in zip(other[::2], other[1::2], strict=False):
        at = last.index(name) if name in last else len(last)
        last[at : at + 2] = [name, value]
    last += other if len(other) == 1 else []
    _, errors = said_once(run_command(*LEARN, "--out", "a.delta", other=last), 2)
    assert "".join(errors).count(message) == 1
    assert sum(error.count("tether: ") - error.count("documents in") for error in errors) <= 1
    assert not (work / "a.delta").exists()
    assert time.monotonic() - began < SOON


def test_one_that_is_killed_ends_the_other(work, monkeypatch):
    # The second process ends itself in the middle of its share, without a word.
    import tether.delta.shards as shards

    write = shards.cache_states

    def killed(*given, **options):
        if os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*given, **options)

    monkeypatch.setattr(shards, "cache_states", killed)
    began = time.monotonic()
    first, second = run_command(*LEARN, "--out", "a.delta")
    assert (first[0], second[0]) == (130, -signal.SIGKILL)
    assert first[2].count("another process of this group has ended") == 1
    assert "Traceback" not in first[2]
    assert not (work / "a.delta").exists()
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_fault_in_one_is_told_with_its_lines_and_ends_both(work, monkeypatch, rank):
    import tether.delta.learning as learning

    gather = learning.gather

    def faulty(*given, **options):
        if os.environ.get("RANK") == rank:
            raise ZeroDivisionError("in the middle of it")
        return gather(*given, **options)

    monkeypatch.setattr(learning, "gather", faulty)
    began = time.monotonic()
    _, errors = said_once(run_command(*LEARN, "--out", "a.delta"), 3)
    assert "".join(errors).count("ZeroDivisionError: in the middle of it") == 1
    assert "".join(errors).count("this is a fault of tether itself") == 1
    assert time.monotonic() - began < SOON


def test_a_place_that_is_taken_meanwhile_ends_both(work, monkeypatch):
    # Only the main process writes, when all others have done their part.
    def save(self, path):
        raise ConfigError(f"{path}: somebody was faster")

    monkeypatch.setattr(Delta, "save", save)
    first, second = run_command(*LEARN, "--out", "a.delta")
    assert (first[0], second[0]) == (2, 2)
    assert first[2].count("somebody was faster") == 1
    assert second[1:] == ("", "")


def test_ctrl_c_for_both_is_said_once(work, monkeypatch):
    import tether.delta.learning as learning

    def asked(*given, **options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(learning, "gather", asked)
    began = time.monotonic()
    _, errors = said_once(run_command(*LEARN, "--out", "a.delta"), 130)
    assert "".join(errors).count("interrupted; no output is half written") == 1
    assert time.monotonic() - began < SOON


def test_a_command_that_is_not_shared_is_one_processs(work, tether):
    assert tether(*LEARN, "--out", "digits.delta")[0] == 0
    out, _ = said_once(run_command("fuse", "base", "digits.delta", "--out", "fused"), 0)
    assert out.count("fused: the base and digits") == 1
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_every_shared_command_connects_its_processes():
    names = {
        command.name or command.callback.__name__: command.callback
        for group in (app, merge_app)
        for command in group.registered_commands
    }
    assert names.keys() > SHARED
    for name, callback in names.items():
        by_one = several.by_one.__code__.co_consts
        assert (callback.__code__ in by_one) == (name not in SHARED), name


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["torch.distributed.run"], ["accelerate.commands.launch", "--cpu"]])
def test_under_a_launcher(work, launcher):
    count = ["--nproc-per-node", "2", "--standalone"] if "torch" in launcher[0] else ["--num_processes", "2"]
    start = [sys.executable, "-m", launcher[0], *launcher[1:], *count, "-m", "tether.cli.app"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*start, *LEARN, "--out", "a.delta"]
    run, again = (
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        for _ in range(2)
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("a.delta was learnt from") == 1
    assert run.stderr.count("30 documents in `text`") == 2
    assert again.returncode != 0
    assert again.stderr.count("exists already") == 1


def test_what_became_of_it_is_said_once_where_the_store_goes_meanwhile():
    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("the store is gone")

    said = []
    peers = object.__new__(several.Peers)
    peers.group, peers._others, peers._store = Group(2, 0), [1], Gone()
    peers._first, peers._wait_for_fault = lambda: True, lambda: None
    assert peers.ended(lambda: said.append("interrupted") or 130, KeyboardInterrupt()) == 130
    assert said == ["interrupted"]
