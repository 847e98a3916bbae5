"""How files of the fourth list of fresh texts are cut."""

import gzip
import json
from pathlib import Path

from benchmarks import fresh_fourth


def test_pages_lose_frame_commands_and_what_is_still_english(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(
        '<html><head><title>T</title></head><body bgcolor="white"><div class="navheader"><p>Naar het begin</p></div>'
        "<p>Dit is een <em>boek</em> &amp; meer.</p><pre>a b c d</pre><p>The cat and the dog with this.</p><p>kort</p>"
        '<div class="navfooter"><p>een twee drie</p></div></body></html>'
    )
    assert list(fresh_fourth._guide(path)) == ["Dit is een boek & meer.\n"]


def test_comments_before_the_code_go_in_every_language(tmp_path: Path) -> None:
    for name, text, rest in (
        ("a.erl", "%% head\n%% more\n\n-module(a). % kept\n", "-module(a). % kept\n"),
        ("a.ml", "(* head\n *)\n(* more *)\nlet x = 1;; (* kept *)\n", "let x = 1;; (* kept *)\n"),
        ("a.pp", "{ head }\n// more\nunit a; { kept }\n", "unit a; { kept }\n"),
        ("a.tcl", "# head\n\nset a 1 ;# kept\n", "set a 1 ;# kept\n"),
    ):
        (tmp_path / name).write_text(text)
        assert list(fresh_fourth._without_head(tmp_path / name)) == [rest]
    (tmp_path / "testing.ml").write_text("let x = 1;;")
    assert list(fresh_fourth._without_head(tmp_path / "testing.ml")) == []


def test_manual_pages_keep_their_macros(tmp_path: Path) -> None:
    path = tmp_path / "a.2.gz"
    path.write_bytes(gzip.compress(b'.\\" head\n.TH a 2\n.\\"\n.SH NAME\na \\- b\n'))
    assert list(fresh_fourth._manual_page(path)) == [".TH a 2\n.SH NAME\na \\- b\n"]


def test_contracts_lose_version_and_imports(tmp_path: Path) -> None:
    path = tmp_path / "a.sol"
    path.write_text('// SPDX\npragma solidity ^0.8;\n\nimport {A} from "a";\ncontract B {}\n')
    assert list(fresh_fourth._contracts(path)) == ["\ncontract B {}\n"]


def test_dictionaries_sayings_and_records_are_cut_between_entries(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("00-database-info\n  x\nfoo\n    n 1: {bar}\nbar\n    n 1: foo\n")
    assert list(fresh_fourth._senses(path)) == ["foo\n    n 1: {bar}\nbar\n    n 1: foo\n"]
    assert list(fresh_fourth._jargon(path)) == ["foo\n    n 1: bar\nbar\n    n 1: foo\n"]
    path.write_text("One.\n%\nTwo\nlines.\n%\n")
    assert list(fresh_fourth._sayings(path)) == ["One.\n\nTwo\nlines.\n\n\n\n"]
    path.with_suffix(".json").write_text(json.dumps([{"a": 1}, {"a": None}]))
    assert list(fresh_fourth._records(path.with_suffix(".json"))) == ['{"a": 1}\n{"a": null}\n']
