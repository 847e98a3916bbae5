"""What commands print: results on stdout, as text or JSON, and errors on stderr, without control characters."""

import json
import os
import re
from logging import ERROR, getLogger
from typing import Any

import typer
from rich.console import Console

__all__ = ["emit", "plain", "quiet_libraries", "say", "tell"]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What steers a terminal (all but line feed and tab), turns the direction of text, or is half a character."""


def plain(text: str) -> str:
    r"""Make of text from anywhere what a terminal only shows.

    Args:
        text: may come from a file.

    Returns:
        The same with control and direction characters spelt out, as JSON spells them.

    Example:
        >>> print(plain("law" + chr(27) + "[2J"))
        law\u001b[2J
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def emit(result: Any, as_json: bool, text: str) -> None:
    """Print a result.

    Args:
        result: anything JSON can hold.
        as_json: print it as JSON.
        text: what to print otherwise.
    """
    if as_json:
        from tether.reading import finite

        # Spelt out as `plain` does it, a character is the same JSON.
        text = json.dumps(finite(result), indent=2, ensure_ascii=False, allow_nan=False)
    say(text)


def say(text: str) -> None:
    """Print a line or several on stdout.

    Args:
        text: may come from a file.
    """
    typer.echo(plain(text))


def tell(text: str, style: str = "red") -> None:
    """Print a message on stderr.

    Args:
        text: may come from a file.
        style: of rich.
    """
    line = f"tether: {plain(text)}"
    try:
        console = Console(stderr=True, soft_wrap=True)
        console.print(line, style=style, markup=False, emoji=False, highlight=False)
    except MemoryError:
        # rich loads parts of itself when it prints, for which there may be no room where memory is the message.
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def quiet_libraries() -> None:
    """Silence transformers' own progress bars, hints and questions: tether shows progress and errors itself."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    # It asks whether code that a checkpoint brings may run, for so many seconds; at 0 the answer is no.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

    logging.set_verbosity_error()
    # It reports that a faster product could be downloaded.
    getLogger("bitsandbytes").setLevel(ERROR)
    logging.disable_progress_bar()
