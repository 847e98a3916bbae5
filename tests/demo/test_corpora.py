import pytest

from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.errors import ConfigError


@pytest.mark.parametrize("name", [*DOMAINS, *BASE_TEXTS])
def test_the_texts_are_there_distinct_and_in_a_fixed_order(name):
    recipe = (DOMAINS | BASE_TEXTS)[name]
    found = documents(recipe)
    least = {"bible": 1100, "code": 300, "tables": 200, "news": 280, "wiki": 90}[name]
    assert len(found) >= least
    assert len(set(found)) == len(found)
    assert found == documents(recipe)
    assert all(len(document) > 60 for document in found)


def test_wiki_markup_is_gone():
    joined = "".join(documents(BASE_TEXTS["wiki"]))
    for mark in ("{{", "[[", "<ref", "'''"):
        assert joined.count(mark) <= 3


def test_verses_are_whole():
    chapters = documents(DOMAINS["bible"])
    genesis = next(chapter for chapter in chapters if chapter.startswith("1. In the beginning God created"))
    assert "\n3. And God said, Let there be light: and there was light.\n" in genesis


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("tether.demo.corpora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="gensim"):
        documents(BASE_TEXTS["news"])
