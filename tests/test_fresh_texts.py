"""Fresh texts, on files made here: the rules for documents and splits, and cuts of the second list."""

from pathlib import Path

import pytest
from benchmarks import fresh_second, fresh_texts
from benchmarks.fresh_source import LONGEST, Source, packed
from benchmarks.fresh_texts import LISTS, SECOND_DOMAINS, WORDS, documents, split

from tether.errors import ConfigError


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def tokenizer(texts: list[str], **_: bool) -> dict[str, list[list[str]]]:
    return {"input_ids": [text.split() for text in texts]}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fresh_texts, "FOLDER", tmp_path)
    monkeypatch.setitem(SECOND_DOMAINS, "mine", Source("none", "*.txt", fresh_second._paragraphs))
    documents.cache_clear()
    yield tmp_path
    documents.cache_clear()


def test_the_lists_have_twelve_domains_and_eight_foreign_kinds_and_no_name_twice():
    assert [[len(texts) for texts in both] for both in LISTS.values()] == [[12, 8]] * 4
    assert len(set().union(*(texts for both in LISTS.values() for texts in both))) == 80


def test_parts_are_packed_in_order_and_a_piece_is_as_long_as_allowed_and_no_longer():
    parts = ["a" * 1500, "b" * 500, "c", "d" * 3000, "e" * 10]
    assert list(packed(parts)) == [parts[0] + parts[1], "c", parts[3], parts[4]]
    assert LONGEST == 2000
    assert list(packed([])) == []


def test_documents_are_long_enough_and_shortened_and_no_near_duplicates(text: Path):
    (text / "a.txt").write_text(words(0, WORDS))
    (text / "b.txt").write_text(words(10, WORDS))
    (text / "c.txt").write_text(words(1000, WORDS - 1))
    (text / "d.txt").write_text(words(5000, 900))
    found = documents("mine")
    assert sorted(len(document.split()) for document in found)[0] == WORDS
    assert len(found) == 2
    assert max(len(document) for document in found) <= LONGEST


def test_seeds_of_different_parity_share_no_document_and_what_is_held_out_is_not_trained_on(text: Path):
    for number in range(40):
        (text / f"{number}.txt").write_text(words(1000 * number, 160 + number))
    splits = [split("mine", seed, tokenizer, tokens=1000, held_out=4, shortest=180) for seed in (0, 1)]
    sets = [set(part) for one in splits for part in one]
    assert sum(map(len, sets)) == len(set().union(*sets))
    for train, held_out in splits:
        assert len(held_out) == 4
        assert min(len(document.split()) for document in held_out) >= 180
        lengths = [len(document.split()) for document in train]
        assert sum(lengths[:-1]) < 1000 <= sum(lengths)


def test_too_few_tokens_or_no_text_is_an_error(text: Path):
    with pytest.raises(ConfigError, match="no text 'mine'"):
        documents("mine")
    (text / "a.txt").write_text(words(0, 200))
    (text / "b.txt").write_text(words(300, 200))
    with pytest.raises(ConfigError, match="tokens to train on"):
        split("mine", 0, tokenizer, held_out=1, shortest=100)


def test_a_mail_keeps_its_plain_text_without_the_footer_of_a_list(tmp_path: Path):
    path = tmp_path / "mail"
    head = "From: a@b\nReceived: by c\nSubject: Lunch\nContent-Type: {}\n\n"
    path.write_text(head.format("text/plain") + "At noon.\n" + "_" * 47 + "\nList mailing list\n")
    assert list(fresh_second._mails(path)) == ["From: a@b\nSubject: Lunch\n\nAt noon.\n"]
    path.write_text(head.format("text/html") + "<p>At noon.")
    assert list(fresh_second._mails(path)) == ["From: a@b\nSubject: Lunch\n\n"]


def test_a_page_of_help_is_its_translated_lines(tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(
        '<h1>Frame</h1><div id="DisplayArea" a="b"><h1>Skift &amp; sider</h1><p>Tryk <span class="MAC"><span>Cmd'
        '</span></span><b>Ctrl</b>.</p><p>This is the end of it.</p><a name="relatedtopics"></a><p>Andet</p>'
    )
    assert list(fresh_second._help_page(path)) == ["Skift & sider\nTryk Ctrl."]


def test_a_weakness_is_told_in_sentences_without_its_code_and_history(tmp_path: Path):
    path = tmp_path / "cwe.json"
    path.write_text(
        '{"7": {"attr": {"@_Name": "Loose Bolt"}, "Content_History": "x", "Common_Consequences": {"Consequence": '
        '[{"Scope": ["Safety", "Cost"], "Note": "It falls."}]}, "Description": "A bolt.", "Notes": {"Link": "y"}}}'
    )
    assert list(fresh_second._weaknesses(path)) == [
        "CWE-7: Loose Bolt\nA bolt.\nScope: Safety, Cost\nIt falls."
    ]
