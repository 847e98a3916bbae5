"""Texts of the trial behind the thresholds of the benchmark of domains: law entries, Python source, mixed tables."""

import gzip
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tether.demo.corpora import python_source, table_rows
from tether.errors import ConfigError

__all__ = ["TRIAL"]

DICTIONARY = Path(sys.prefix) / "trial-texts" / "usr" / "share" / "dictd" / "gcide.dict.dz"
ENTRIES = 8
"""Entries or rows of a document: a few hundred tokens, as many as fill a window or two."""


def law_entries() -> list[str]:
    """Read the legal senses of the Collaborative International Dictionary of English, several a document.

    Returns:
        The documents.

    Raises:
        ConfigError: the dictionary is not there.
    """
    if not DICTIONARY.is_file():
        raise ConfigError(
            f"{DICTIONARY}: no dictionary; 'make trial-texts' fetches it (Debian package dict-gcide)"
        )
    with gzip.open(DICTIONARY, "rt", encoding="utf-8", errors="replace") as stream:
        paragraphs = re.split(r"\n\s*\n", stream.read())
    legal = (text for text in paragraphs if re.search(r"\([^()]*\bLaw\)", text))
    return _together([_plain(text) for text in legal])


def mixed_rows() -> list[str]:
    """Rows of all tables of the demo in one shuffled order: a row seldom follows one of its own table.

    Returns:
        The documents.
    """
    return _together([row for page in table_rows() for row in page.split("\n")])


# Pronunciations and sources of the dictionary are marks of its print, not language.
def _plain(text: str) -> str:
    text = re.sub(r"\[\d{4} Webster[^\]]*\]|\[WordNet[^\]]*\]|\[PJC\]", "", text)
    text = re.sub(r"\\[^\\\n]*\\(\s*\([^()]*\),)?", "", text)
    return " ".join(re.sub(r"[{}]", "", text).split())


def _together(pieces: Sequence[str]) -> list[str]:
    every = sorted({piece for piece in pieces if piece}, key=lambda t: hashlib.sha256(t.encode()).digest())
    return ["\n".join(every[start : start + ENTRIES]) for start in range(0, len(every), ENTRIES)]


TRIAL: dict[str, Callable[[], list[str]]] = {"law": law_entries, "code": python_source, "tables": mixed_rows}
