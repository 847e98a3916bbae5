"""Exit codes and what a terminal is shown: each way that a command can end, through typer as `main` runs it."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer

import tiny
from tether.cli.asked import ASKED, listen
from tether.cli.codes import run
from tether.cli.output import emit, plain
from tether.cli.progress import reporter
from tether.errors import CertificateError, CheckpointError
from tether.store.documents import write_documents

ESCAPE = "\x1b[2J\x9b31m\u202e"


def ended(monkeypatch, capsys, body, *arguments):
    """Run a function as a typer command; gives the code and what stands on stderr."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(body)
    monkeypatch.setattr(sys, "argv", ["tether", *arguments])
    code = run(app)
    return code, capsys.readouterr().err


def raising(error):
    def body():
        raise error

    return body


def allocating():
    torch.empty(2**60)


def without_memory():
    try:
        raise MemoryError
    except MemoryError as error:
        raise CheckpointError("base: could not load") from error


def asking():
    input("a question")


ENDS = {
    "done": (lambda: None, 0, ""),
    "does not hold": (raising(typer.Exit(1)), 1, ""),
    "tether's own error": (raising(CertificateError("no seal")), 2, "tether: no seal"),
    "the system": (
        raising(OSError(28, "No space left", "a.delta")),
        2,
        "a.delta: No space left; choose another",
    ),
    "memory": (raising(MemoryError()), 2, "out of memory"),
    "memory of torch": (allocating, 2, "out of memory"),
    "memory of a device": (
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried")),
        2,
        "take fewer tokens",
    ),
    "memory for a library": (
        raising(ImportError("libtorch_cpu.so: failed to map segment from shared object")),
        2,
        "out of memory (libtorch_cpu.so",
    ),
    "memory for a thread": (raising(RuntimeError("can't start new thread")), 2, "out of memory"),
    "memory of the system": (raising(OSError(12, "Cannot allocate memory")), 2, "out of memory"),
    "memory behind an error of tether": (without_memory, 2, "out of memory (no memory is left)"),
    "words of a file": (raising(CheckpointError("field 'out of memory'")), 2, "tether: field 'out of"),
    "a question": (asking, 2, "tether asks none"),
    "Ctrl-C": (raising(KeyboardInterrupt()), 130, "start the same command again"),
    "a library leaves": (raising(SystemExit(1)), 3, "Please report"),
    "a library leaves with words": (raising(SystemExit("no licence")), 3, "no licence"),
    "deep recursion": (raising(RecursionError("maximum recursion depth")), 3, "Please report"),
    "a fault": (raising(KeyError("second")), 3, "KeyError: 'second'"),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_way_to_end_has_its_code_and_a_sentence(monkeypatch, capsys, name):
    body, expected, said = ENDS[name]
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: PTH123, SIM115 - closed with the test
    code, err = ended(monkeypatch, capsys, body)
    sys.stdin.close()
    assert code == expected
    assert said in err
    assert bool(err) == (expected not in (0, 1))


def test_a_wrong_option_is_input_that_cannot_be_used(monkeypatch, capsys):
    code, err = ended(monkeypatch, capsys, lambda: None, "--nonsense")
    assert code == 2
    assert "--nonsense" in err


def test_a_fault_says_what_to_report_and_sends_nothing_to_the_terminal(monkeypatch, capsys):
    code, err = ended(monkeypatch, capsys, raising(KeyError(f"x{ESCAPE}")))
    assert code == 3
    assert "test_codes.py" in err  # where it happened
    assert "Python 3." in err
    assert not set("\x1b\x9b\u202e") & set(err)


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_output_that_nobody_reads_is_neither_a_fault_nor_a_failed_check():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tether.cli.app", "--version"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_text_from_files_cannot_steer_a_terminal(capsys):
    emit({}, False, f"law{ESCAPE}\tvalue\nnext")
    shown = capsys.readouterr().out
    assert shown == "law\\u001b[2J\\u009b31m\\u202e\tvalue\nnext\n"
    assert plain("naïve 法 \u200f") == "naïve 法 \u200f"


def test_names_beside_bars_cannot_steer_a_terminal_and_are_no_markup(capsys):
    # As `checking {name}`, with the name of a model from a recipe.
    for name in (f"checking {ESCAPE}", "checking [/b]", "checking [link=x]y[/link]"):
        with reporter() as steps:
            steps(name)({"done": 1.0, "total": 2.0})
        shown = capsys.readouterr().err
        assert not set("\x1b\x9b\u202e") & set(shown)
        assert name.replace(ESCAPE, "\\u001b[2J\\u009b31m\\u202e")[:20] in shown


def test_json_says_the_same_with_and_without_control_characters(capsys):
    result = {"name": f"law{ESCAPE}\x7f\ud800", "half": [float("nan"), 1.5]}
    emit(result, True, "")
    shown = capsys.readouterr().out
    assert not set("\x1b\x9b\x7f\u202e\ud800") & set(shown)
    assert json.loads(shown) == {"name": f"law{ESCAPE}\x7f\ud800", "half": [None, 1.5]}


def test_an_error_about_a_file_shows_its_text_without_control_characters(tether, tmp_path):
    (tmp_path / "cert.json").write_text(json.dumps({f"field{ESCAPE}": 1}), encoding="utf-8")
    code, out, err = tether("verify", tmp_path / "cert.json")
    assert code == 2
    assert not set("\x1b\x9b\u202e") & set(out + err)


def test_a_console_of_another_encoding_shows_a_number(monkeypatch):
    command = [sys.executable, "-m", "tether.cli.app", "verify", "\u6cd5.json"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert b"\\u6cd5.json" in done.stderr


def test_code_that_a_checkpoint_brings_is_not_run_and_nobody_is_asked(tether, tmp_path, monkeypatch):
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    parts = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = {"model_type": "its_own", "auto_map": parts}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "base" / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))  # what a hasty user would answer
    code, out, err = tether("convert", tmp_path / "base", "--out", tmp_path / "model")
    assert code == 2, err
    assert "[y/N]" not in out + err
    assert sys.stdin.read() == "y\ny\ny\n"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_that_comes_out_as_another_error_is_a_request_to_end(monkeypatch, capsys, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    def body():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            # As a library of another language tells it that was reading a file then.
            raise CheckpointError("cannot be read; take another copy of the file") from error

    try:
        listen()
        code, err = ended(monkeypatch, capsys, body)
        assert code == 130
        assert "interrupted" in err
        assert "another copy" not in err
        # Where the error was taken for a damaged file and the work went on, it ends at the next step.
        with reporter() as steps, pytest.raises(KeyboardInterrupt):
            steps("reading")({"done": 1, "total": 2})
        listen()
        with reporter() as steps:
            steps("reading")({"done": 1, "total": 2})
    finally:
        ASKED.clear()
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_pattern_of_a_tokenizer_that_does_not_end_is_left_soon(tether, tmp_path):
    tiny.backbone().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    content = json.loads((tmp_path / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    write_documents(
        tmp_path / "text.jsonl", ["a" * 60 + "b " + text for text in tiny.documents("digits", 40, 1)]
    )
    before = time.process_time()
    code, _, err = tether(
        "learn", tmp_path / "base", "--text", tmp_path / "text.jsonl", "--base-text", tmp_path / "text.jsonl",
        "--out", tmp_path / "out.delta",
    )  # fmt: skip
    assert code == 2, err
    assert "tokenizer.json" in err
    assert time.process_time() - before < 5
    assert not (tmp_path / "out.delta").exists()


SHORT = """
import resource, sys
import scipy.linalg, torch, transformers
from tether.causal import loading, modeling
from tether.cli.app import main

pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
most = pages + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
main()
"""
"""Memory is made short once libraries are loaded: some of them wait for memory without an end while they are."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a limit of memory is another call")
@pytest.mark.parametrize("megabytes", [1, 5, 20, 60, 200, 1000])
def test_where_memory_is_really_short_it_is_said_and_nothing_is_left(tmp_path, megabytes):
    tiny.backbone().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    command = [sys.executable, "-c", SHORT, str(megabytes), "convert", "base", "--out", "model"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300)
    if done.returncode == -signal.SIGABRT:
        # Libraries of C++ and Rust end the process themselves where they cannot say that memory is short.
        assert "bad_alloc" in done.stderr or "memory allocation" in done.stderr
    elif done.returncode:
        assert done.returncode == 2, done.stderr
        assert "tether: out of memory (" in done.stderr
        assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "model"}
    assert done.returncode == 0 or not (tmp_path / "model").exists()
