"""The page of proofs states what the code computes."""

import re
from pathlib import Path

import pytest
from benchmarks import theory_page

from tether.theory.catalogue import STATEMENTS
from tether.theory.witness import EXAMPLES

PAGE = Path(__file__).parents[2] / "docs" / "how-drift-adds-up.md"


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["statements", "counterexamples", "constants", "scaling", "plan"])
def test_quick_blocks_are_up_to_date(page, name):
    assert name in theory_page.QUICK
    assert page == theory_page.replaced(page, name, theory_page.block(name))


def test_no_block_is_empty(page):
    for name in theory_page.BLOCKS:
        found = re.search(rf"<!-- begin {name} -->\n(.+?)\n<!-- end {name} -->", page, flags=re.DOTALL)
        assert found is not None, name


def test_every_proof_that_a_verdict_rests_on_is_on_the_page(page):
    for one in STATEMENTS.values():
        if one.verdict in {"proved", "enclosed"}:
            head = one.basis.split(";")[0].split(",")[0].split(":")[0]
            assert head.lower() in page.lower(), one.name
    assert len([e for e in EXAMPLES.values() if e.holds()]) == len(EXAMPLES)


def test_figures_exist(page):
    for name in re.findall(r"\]\(([\w-]+\.png)\)", page):
        assert (PAGE.parent / name).is_file()
