"""Exit codes: what became of a command, for the scripts that run it."""

import io
import os
import platform
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from tether._version import __version__
from tether.cli.asked import ASKED
from tether.cli.output import plain, tell
from tether.cli.several import ended, together
from tether.errors import GroupError, IdentityError, TetherError

__all__ = ["DONE", "FAILED", "FAULT", "INTERRUPTED", "UNHEARD", "UNUSABLE", "run", "stop"]

DONE = 0
"""Done, or what was checked holds."""
FAILED = 1
"""What was checked does not hold."""
UNUSABLE = 2
"""What was given cannot be used: a file, an option, a place, or more than this machine has memory for."""
FAULT = 3
"""A fault of tether itself."""
INTERRUPTED = 130
"""Stopped by Ctrl-C, as shells say it (128 + 2), or by the end of another process of its group."""
UNHEARD = 141
"""Whoever read the output has gone, as shells say it (128 + 13)."""

_FULL = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc",
    "failed to map segment", "can't start new thread", "error return without exception set",
)  # fmt: skip
"""How libraries say that memory is short, as errors of other types, on the various devices and systems."""


def run(command: Callable[[], Any]) -> int:
    """Run a command, and say on stderr what stopped it.

    Args:
        command: typer's application, which leaves by SystemExit, or anything else.

    Returns:
        One of the codes above.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A console of another encoding shows what it cannot show by its number.
            stream.reconfigure(errors="backslashreplace")
    try:
        with together():
            return _run(command)
    except TetherError as error:
        # The processes of the command do not find each other.
        tell(str(error))
        return UNUSABLE


def _run(command: Callable[[], Any]) -> int:
    try:
        try:
            command()
        except SystemExit as error:
            left = error
            return ended(lambda: _left(left))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as asked:
        return ended(_interrupted, asked)
    except BrokenPipeError:
        return ended(lambda: UNHEARD)
    except BaseException as error:
        fault = error
        return ended(lambda: _stopped(fault), fault)
    return ended(lambda: DONE)


def _stopped(error: BaseException) -> int:
    if ASKED.is_set():
        return _interrupted()
    if said := _memory_is_short(error):
        return _full(said)
    if isinstance(error, GroupError):
        tell(str(error), "yellow")
        return INTERRUPTED
    if isinstance(error, IdentityError):
        tell(str(error))
        return FAILED
    if isinstance(error, TetherError):
        tell(str(error))
        return UNUSABLE
    if isinstance(error, OSError):
        # Names too long, places that cannot be written to: what the system says is what can be said.
        tell(f"{error.filename or 'the system'}: {error.strerror or error}; choose another name or place")
        return UNUSABLE
    if type(error).__name__ == "PanicException":
        # Rust libraries end so on what they cannot read; it is no Exception, and nothing else tells what it is.
        said = plain(str(error)).splitlines()[0] if str(error) else "no reason given"
        tell(
            f"a library gave up on a file ({said}); if it is a pattern, then that of tokenizer.json: take another base"
        )
        return UNUSABLE
    return _fault(error)


# What it says where memory is the reason, of this error or of one that it was raised for; else nothing.
def _memory_is_short(error: BaseException | None) -> str:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return "no memory is left"
        # tether's own errors tell what is in files, in whatever words.
        told = isinstance(error, RuntimeError | ImportError | OSError | SystemError) and not isinstance(
            error, TetherError
        )
        if told and any(words in str(error).lower() for words in _FULL):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return ""


# Typer turns what ends a command into SystemExit, and keeps what it was as the context.
def _left(left: SystemExit) -> int:
    cause = left.__context__
    if isinstance(cause, BrokenPipeError):
        return UNHEARD
    if isinstance(cause, typer.Abort):
        tell("a question could not be answered; tether asks none: name a base that needs none")
        return UNUSABLE
    if left.code == INTERRUPTED or (
        ASKED.is_set() and left.code not in (DONE, None) and not isinstance(cause, typer.Exit)
    ):
        return _interrupted()
    if left.code == FAILED and not isinstance(cause, typer.Exit):
        return _fault(left)  # a library left: no check has failed
    return left.code if left.code in (DONE, FAILED, UNUSABLE) else _fault(left)


def _interrupted() -> int:
    tell("interrupted; no output is half written: start the same command again", "yellow")
    return INTERRUPTED


def _full(said: str) -> int:
    tell(
        f"out of memory ({said}); nothing is half written: take fewer tokens, a smaller base or half precision, or a "
        "machine with more memory"
    )
    return UNUSABLE


def _fault(error: BaseException) -> int:
    lines = traceback.format_exception(error)
    sys.stderr.write(plain("".join(lines)))
    tell(
        f"this is a fault of tether itself ({type(error).__name__}), not of what you gave it. Please report the lines "
        f"above with the command that you typed; tether {__version__}, Python {platform.python_version()}, "
        f"{platform.system()}"
    )
    return FAULT


def stop(code: int) -> NoReturn:
    """Leave with a code.

    Args:
        code: one of the above.

    Raises:
        SystemExit: always.
    """
    if code == UNHEARD:
        # Python flushes stdout once more at the end, and would say that nobody reads it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        # What connects processes may have threads that outlive the work, and would end in an abort of their own.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
