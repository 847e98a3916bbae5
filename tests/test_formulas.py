"""The index of formulas: complete, in both languages, and nothing in it that does not exist."""

import ast
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import typer
from benchmarks import formulas_page

from tether.cli.app import app
from tether.cli.enclosures import ENCLOSED
from tether.theory.bounds import K_INF
from tether.theory.catalogue import C_2, STATEMENTS
from tether.theory.constants import equal_constant, many_constant

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COUNTED = {
    1: {"display": 30, "text": 28, "step": 6},
    2: {"display": 8, "text": 28, "step": 5},
    3: {"display": 4, "text": 8, "table": 6, "code": 3},
    4: {"text": 48, "step": 1},
    5: {"display": 20, "text": 21, "step": 7},
}
"""Counted in the documents, which are no part of this repository."""
DATA = formulas_page.read(ROOT / formulas_page.DATA)
ROWS = [(f"{one['number']}.{at}", row) for one in DATA["document"] for at, row in enumerate(one["row"], 1)]
CHINESE = re.compile(r"[\u4e00-\u9fff]")
FIELDS = {
    "kind", "section", "en", "zh", "formulas", "functions", "commands", "tests", "verdict", "why_en", "why_zh",
}  # fmt: skip


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def defined(nodes):
    found = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def resolve(path, name):
    """What a dotted name means in a file, or None."""
    node, nodes = None, tree(path).body
    for part in name.split("."):
        node = defined(nodes).get(part)
        if node is None:
            return None
        nodes = getattr(node, "body", [])
    return node


@cache
def root():
    return typer.main.get_command(app)


def misused(words):
    """Say what is wrong with a command of tether, or None; names in capitals stand for what a user has."""
    command, words = root(), list(words)
    while getattr(command, "commands", None):
        name = words.pop(0) if words and words[0] in command.commands else "run"
        if name not in command.commands:
            return f"no command {words[:1]}"
        command = command.commands[name]
    options = {flag: one for one in command.params for flag in one.opts if flag.startswith("-")}
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    given = []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            given.append(word)
        elif word not in options:
            return f"no option {word}"
        elif not options[word].is_flag:
            if not words or words[0].startswith("--"):
                return f"no value for {word}"
            words.pop(0)
    most = sum(math.inf if one.nargs == -1 else one.nargs for one in arguments)
    if len(given) > most:
        return f"{len(given)} arguments, at most {most}"
    return None


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(text):
    return {
        formulas_page.anchor(line.lstrip("#").strip()) for line in text.split("\n") if line.startswith("#")
    }


def test_every_document_has_the_rows_that_were_counted():
    for one in DATA["document"]:
        assert one["counted"] == COUNTED[one["number"]]
        assert Counter(row["kind"] for row in one["row"]) == one["counted"]
    assert [one["number"] for one in DATA["document"]] == list(COUNTED)


def test_rows_have_all_fields_and_no_others():
    for number, row in ROWS:
        assert set(row) <= FIELDS, number
        assert {"kind", "section", "en", "zh", "formulas", "verdict"} <= set(row), number
        assert ("why_en" in row) == ("why_zh" in row), number
        # A verdict other than literal has a reason; code is named for all that is built.
        assert row["verdict"] == "literal" or row["why_en"], number
        assert row.get("functions") or row["verdict"] != "literal", number
        assert row.get("tests") or not row.get("functions"), number


def test_words_are_in_their_language():
    assert set(DATA["page"]["en"]["verdicts"]) == set(DATA["page"]["zh"]["verdicts"])
    for words in DATA["page"].values():
        assert {row["verdict"] for _, row in ROWS} <= set(words["verdicts"])
        assert {row["kind"] for _, row in ROWS} <= set(words["kinds"])
    for number, row in ROWS:
        assert not any(CHINESE.search(row.get(name, "")) for name in ("en", "why_en")), number
        assert CHINESE.search(row["zh"]) or row["kind"] == "code", number
        assert CHINESE.search(row.get("why_zh", "的")), number


def named(field):
    return sorted({name for _, row in ROWS for name in row.get(field, [])})


def missing_function(name):
    module, _, attribute = name.partition(":")
    path = Path("src") / (module.replace(".", "/") + ".py")
    hidden = any(part.startswith("_") for part in attribute.split("."))
    return hidden or not (ROOT / path).is_file() or resolve(path, attribute) is None


def missing_test(name):
    path, _, test = name.partition("::")
    return not test.startswith("test_") or not isinstance(resolve(path, test), ast.FunctionDef)


def missing_command(line):
    program, *words = line.split()
    if program == "python":
        registry = resolve("benchmarks/__main__.py", "BENCHMARKS").value
        return words[:2] != ["-m", "benchmarks"] or words[2] not in {key.value for key in registry.keys}
    if program != "tether" or misused(words) is not None:
        return True
    choices = {"falsify": STATEMENTS, "enclose": ENCLOSED} if words[0] == "theory" else {}
    return words[1:2] != [] and words[1] in choices and words[2] not in choices[words[1]]


def test_every_function_exists():
    assert len(named("functions")) > 80
    assert [name for name in named("functions") if missing_function(name)] == []


def test_every_test_exists():
    assert len(named("tests")) > 80
    assert [name for name in named("tests") if missing_test(name)] == []


def test_every_command_exists():
    assert len(named("commands")) > 40
    assert [line for line in named("commands") if missing_command(line)] == []


def test_what_does_not_exist_is_found():
    assert missing_function("tether.cauchy.divergence:drifts")
    assert missing_function("tether.cauchy.divergences:drift")
    assert missing_function("tether.causal.layers:Abduction.backward")
    assert missing_test("tests/test_formulas.py::test_nothing")
    assert missing_test("tests/test_formulas.py::misused")
    for line in (
        "tether fuses",
        "tether fuse --leashed 1",
        "tether fuse --leash",
        "tether theory plan a",
        "tether theory falsify mains",
        "tether theory enclose three",
        "python -m benchmarks routers",
    ):
        assert missing_command(line), line
    assert misused(["merge", "RECIPE.yaml"]) is None


@pytest.mark.parametrize("name", sorted(words["file"] for words in DATA["page"].values()))
def test_pages_are_what_the_generator_makes(name):
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page == formulas_page.pages(DATA)[name], "run: python -m benchmarks.formulas_page"
    table = [line for line in page.split("\n") if re.match(r"\| \d\.\d", line)]
    assert len(table) == len(ROWS)
    # A bar that is not escaped would be another column.
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {9}


@pytest.mark.parametrize("name", ["formulas.md", "formulas.zh.md", "references.md"])
def test_no_link_is_dead(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    inside = [link for link in links(text) if not link.startswith("http")]
    assert len(inside) > 2
    for link in inside:
        path, _, part = link.partition("#")
        target = DOCS / path if path else DOCS / name
        assert target.is_file(), link
        assert not part or part in anchors(target.read_text(encoding="utf-8")), link


def test_files_named_in_the_references_exist():
    text = (DOCS / "references.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)`", text)
    assert len(named) > 40
    for name in named:
        assert (ROOT / "src" / "tether" / name).is_file() or (ROOT / name).is_file(), name


def test_the_comparison_with_the_authors_own_constants():
    """Found by search there, N equal deltas and proved here: rows of the references."""
    table = {}
    for line in (DOCS / "references.md").read_text(encoding="utf-8").split("\n"):
        if found := re.match(r"\| (\d+) \| ([\d.]+)\D.*\| ([\d.]+) \| ([\d.]+) \|$", line):
            table[int(found[1])] = [float(figure) for figure in found.groups()[1:]]
    assert set(table) == {2, 3, 5, 10}
    for count, (searched, equal, proved) in table.items():
        sharp = count * equal_constant(count).value
        assert equal == pytest.approx(sharp, abs=6e-5)
        assert proved == pytest.approx(count * (C_2 if count == 2 else K_INF), abs=6e-5)
        assert 0.93 * sharp < searched < sharp < proved + 6e-5
        assert sharp < count**1.15
    # Of the two powers given there, the smaller one fails at 2; the larger one is proved at 2 and from 7 on.
    assert 2**1.147 < 2 * equal_constant(2).value < 2 * C_2 < 2**1.15
    assert 6 * K_INF > 6**1.15
    assert 7 * K_INF < 7**1.15
    assert many_constant().value == pytest.approx(1.338533, abs=1e-6)
