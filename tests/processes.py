"""Two gloo processes on this machine, for tests of what several processes do together."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from accelerate.state import AcceleratorState

from tether.cli.app import main

# Autograd's and gloo's threads may outlive the work; torn down with the interpreter they end some runs in
# std::terminate, so a process whose work is done leaves without that.
LEAVE = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_command(*arguments, other=None, count=2, timeout=120):
    """Run a command of tether in several processes, without a launcher that would end them together.

    They are forked from this one, so that libraries are imported once. `other` has the arguments of the last process
    where they differ. Gives exit code, output and errors of each.
    """
    given = [list(map(str, arguments))] * (count - 1) + [list(map(str, other or arguments))]
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        said = [[Path(folder, f"{stream}-{rank}") for stream in ("out", "err")] for rank in range(count)]
        children = [
            _forked(["tether", *given[rank]], _environment(rank, count, port), said[rank])
            for rank in range(count)
        ]
        until, codes = time.monotonic() + timeout, {}
        while len(codes) < count and time.monotonic() < until:
            for child in children:
                if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                    codes[child] = os.waitstatus_to_exitcode(found[1])
            time.sleep(0.02)
        for child in children:
            if child not in codes:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        texts = [[stream.read_text() for stream in each] for each in said]
    assert len(codes) == count, f"still running after {timeout} s: {texts}"
    return [(codes[child], *each) for child, each in zip(children, texts, strict=True)]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(rank, count, port):
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip


def _forked(arguments, environment, streams):
    if child := os.fork():
        return child
    code = 99
    try:
        os.environ.update(environment)
        for number, stream in enumerate(streams, start=1):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
        sys.argv = arguments
        main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_two(script, folder, *arguments, timeout=120):
    """Run a script in two processes that can find each other and the tests' own modules.

    Fails with what the first failing process said.
    """
    file = folder / "run.py"
    file.write_text(script + LEAVE)
    port = _free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(file), *map(str, arguments)],
            env=os.environ | _environment(rank, 2, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            said = rank.communicate(timeout=timeout)[1]
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
