"""What a fresh text is read from, and how a file is cut where several texts are cut alike.

The packages are unpacked beside the environment by `make fresh-texts` and read as files; none of their code runs.
"""

import gzip
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["FOLDER", "LONGEST", "Source", "packed", "read", "source_code", "untranslated"]

FOLDER = Path(sys.prefix) / "fresh-texts"
LONGEST = 2000
"""The most characters of a document; the rest of a longer one is left out, or becomes further documents."""


class Source(NamedTuple):
    """Packages of a text (with a version where registries keep old ones), its files, and what cuts a file."""

    package: str
    files: str
    cut: Callable[[Path], Iterator[str]]


def read(path: Path) -> str:
    """Read a text file, packed by gzip or not; what is no UTF-8 becomes replacement characters."""
    data = gzip.decompress(path.read_bytes()) if path.suffix in {".gz", ".dz"} else path.read_bytes()
    return data.decode("utf-8", errors="replace")


def packed(parts: Iterable[str]) -> Iterator[str]:
    """Join parts of a long work, in order, into pieces of at most `LONGEST` characters.

    Args:
        parts: lines, paragraphs or entries, each with the blanks that end it.

    Yields:
        The pieces; a part that is longer than a piece is one by itself.
    """
    piece = ""
    for part in parts:
        if piece and len(piece) + len(part) > LONGEST:
            yield piece
            piece = ""
        piece += part
    if piece:
        yield piece


def source_code(path: Path) -> Iterator[str]:
    """Yield a file without the comments before its code, or about licences; /// and //! describe code and stay."""
    text = re.sub(r"\A(?:\s|/\*.*?\*/|//(?![/!])[^\n]*\n|\{#.*?#\})+", "", read(path), flags=re.DOTALL)
    yield re.sub(r"(?is)/\*(?:(?!\*/).)*?(?:licen[cs]e|copyright)(?:(?!\*/).)*\*/", "", text)


def untranslated(paragraph: str, english: str = "the of and to is for by") -> bool:
    """Tell whether a paragraph of a translation is still English: more than a twelfth of its words are `english`."""
    words = re.findall(r"[a-z]+", paragraph.lower())
    return sum(word in english.split() for word in words) > len(words) / 12
