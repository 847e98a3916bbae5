"""How files of the third list of fresh texts are cut."""

import random
import struct
import zlib
from pathlib import Path

import pytest
from benchmarks import fresh_third
from benchmarks.fresh_texts import THIRD_DOMAINS


def test_the_order_of_the_domains_is_the_one_that_was_drawn():
    names = sorted(THIRD_DOMAINS)
    random.Random(20261201).shuffle(names)
    assert list(THIRD_DOMAINS) == names


def test_a_commentary_gives_each_passage_once_however_many_verses_point_to_it(tmp_path: Path):
    passages = [b"<title>One</title>first &amp; foremost", b"<div>second</div>"]
    book = zlib.compress(b"".join(passages))
    (tmp_path / "ot.bzz").write_bytes(b"--" + book)
    (tmp_path / "ot.bzs").write_bytes(struct.pack("<6I", 0, 0, 0, 2, len(book), len(b"".join(passages))))
    second = (1, len(passages[0]), len(passages[1]))
    verses = [(0, 0, 0), (1, 0, len(passages[0])), second, second]
    (tmp_path / "ot.bzv").write_bytes(b"".join(struct.pack("<IIH", *verse) for verse in verses))
    assert list(fresh_third._commentary(tmp_path / "ot.bzz")) == ["", "One\nfirst & foremost", "second"]


def test_a_dialogue_is_in_the_order_of_the_story_and_leaves_out_what_is_not_translated(tmp_path: Path):
    campaign = tmp_path / "data/campaigns/Quest/scenarios"
    campaign.mkdir(parents=True)
    said = "".join(
        f'[message]\n speaker={who}\n message= _ "{what}"\n[/message]\n'
        for who, what in (("Ann", 'No ""er"".'), ("Bob", "Maybe."), ("Cid", "Yes."))
    )
    (campaign / "1.cfg").write_text(f"#textdomain quest\n{said}")
    (campaign / "2.cfg").write_text(f"#textdomain other\n{said}")
    path = tmp_path / "locale/xx/LC_MESSAGES/quest.mo"
    path.parent.mkdir(parents=True)
    path.write_bytes(
        mo({"": "Content-Type: text/plain; charset=UTF-8\n", "Yes.": "Oui&#8209;da.", 'No "er".': "Non."})
    )
    assert list(fresh_third._dialogues(path)) == ["Ann: Non.\n\nCid: Oui\u2011da.\n\n"]


# A catalogue of translations as gettext reads it: a head, two tables of lengths and places, the strings.
def mo(messages: dict[str, str]) -> bytes:
    strings = [text.encode() for text in [*sorted(messages), *(messages[key] for key in sorted(messages))]]
    at, table, data = 28 + 16 * len(messages), b"", b""
    for string in strings:
        table += struct.pack("<2I", len(string), at + len(data))
        data += string + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0) + table + data


def test_a_page_of_a_handbook_is_its_translated_lines_without_frame_and_commands(tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(
        '<p>Frame is here</p><ul class="docnav top"><li>previous page here</li></ul><h1>Satu dua tiga</h1><div>Ini '
        "buku &amp; itu.</div><pre>apt install it now</pre><div>This is one of the pages.</div><p>Empat lima.</p>"
        '<ul class="docnav"><li>halaman berikut itu</li></ul>'
    )
    assert list(fresh_third._handbook(path)) == ["Satu dua tiga\nIni buku & itu.\n"]


def test_code_loses_its_head_and_its_tests_and_service_definitions_their_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.rb"
    path.write_text("# frozen\n\n# licence\nputs 1 # one\n# two\n")
    (tmp_path / "testing.rb").write_text("puts 1\n")
    monkeypatch.setattr(fresh_third, "FOLDER", tmp_path)
    assert list(fresh_third._without_head(path)) == ["puts 1 # one\n# two\n"]
    assert list(fresh_third._without_head(tmp_path / "testing.rb")) == []
    path = tmp_path / "a.proto"
    head = '// Copyright\n\nsyntax = "proto3";\nimport "b.proto";\noption x =\n    "a;b";\n'
    path.write_text(head + "message M {\n  option y = 1;\n}\n")
    assert list(fresh_third._protocols(path)) == ["message M {\n  option y = 1;\n}\n"]


def test_an_introduction_loses_badges_and_licence(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text(
        "# Saw\n\n[![build](https://a/b.svg)](c)\n\nIt saws.\n\n[c]: https://d\n\n## License\n\nMIT\n"
    )
    assert list(fresh_third._readmes(path)) == ["# Saw\n\n\nIt saws.\n\n\n"]
