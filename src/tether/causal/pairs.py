"""Prompts with the completions that are learnt: JSON lines on disk."""

import codecs
import json
from pathlib import Path
from typing import NamedTuple

from tether.errors import ConfigError
from tether.files import check_plain, text_lines
from tether.store.documents import JSON_LINES

__all__ = ["Document", "Pair", "holds_pairs", "read_pairs"]


class Pair(NamedTuple):
    """A text of which only the end is learnt."""

    prompt: str
    completion: str


Document = str | Pair
"""A text, all of it learnt, or a prompt with the completion that is learnt."""


def holds_pairs(path: str | Path) -> bool:
    """Tell whether a file has prompts and completions: JSON lines of which the first has a field `prompt`.

    Args:
        path: any path.

    Returns:
        False too where the file is missing or no JSON.
    """
    path = Path(path)
    if path.suffix.lower() not in JSON_LINES or not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            first = next((line for line in text_lines(path, file) if line.strip()), b"")
        except ConfigError:
            return False
    try:
        # Not by the strict reader: only the names of the fields are looked at.
        row = json.loads(first.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "prompt" in row and "text" not in row


def read_pairs(path: str | Path) -> list[Pair]:
    """Read JSON lines with the fields `prompt` and `completion`.

    Args:
        path: a `.jsonl` file.

    Returns:
        The pairs, none with an empty completion.

    Raises:
        ConfigError: the file is missing or not UTF-8, a line is not such JSON, or nothing is in it.
    """
    path = Path(path)
    check_plain(path, error=ConfigError)
    try:
        with path.open("rb") as file:
            # The mark that some editors begin a file with is taken off the first line.
            lines = [
                line.decode("utf-8" if number else "utf-8-sig")
                for number, line in enumerate(text_lines(path, file))
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected JSON lines in UTF-8 that can be read ({error})") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            # Not by the strict reader: rows of data sets have fields of any kind, and only these two texts are taken.
            row = json.loads(line)
            pair = Pair("" + row["prompt"], "" + row["completion"])  # a number is no text
            "".join(pair).encode()  # half a character (a lone surrogate) is none either
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f'{path}, line {number}: expected a JSON object with texts "prompt" and "completion", as in the '
                f"first line; got {line[:60]!r}"
            ) from error
        if not pair.completion.strip():
            raise ConfigError(
                f"{path}, line {number}: the completion is empty; nothing is to be learnt from it"
            )
        pairs.append(pair)
    if not pairs:
        raise ConfigError(f"{path}: the file holds no text; expected at least one row")
    return pairs
