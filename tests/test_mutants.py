"""Mutants of source files: what is deleted, what is left alone, and that lines keep their numbers."""

import ast

from benchmarks.mutants import Run, mutants

SOURCE = '''"""A file."""

import math

__all__ = ["half"]

LIMIT = 3
"""What is allowed."""


@staticmethod
def half(n: int) -> float:
    """Halve."""
    found: float
    if n > LIMIT:
        raise ValueError(
            f"{n}: "
            "too large"
        )
    if n < 0: return 0.0; n = 1
    elif n == 0:
        found = math.nan
    else:
        found = max(
            n,
            1,
        ) / 2
    return found
'''


def test_each_statement_and_line_is_deleted_once():
    found = list(mutants("half.py", SOURCE))
    assert [(each.line, each.kind, each.always) for each in found] == [
        (7, "statement", True),
        (11, "line", True),
        (15, "check", False),
        (16, "check", False),
        (17, "check", False),
        (18, "check", False),
        (20, "statement", False),
        (20, "statement", False),
        (20, "statement", False),
        (21, "statement", False),
        (22, "statement", False),
        (24, "statement", False),
        (25, "line", False),
        (26, "line", False),
        (28, "statement", False),
    ]
    original = ast.dump(ast.parse(SOURCE))
    for each in found:
        assert ast.dump(ast.parse(each.text)) != original
        assert len(each.text.splitlines()) == len(SOURCE.splitlines())
        first, last = each.reach
        assert first <= each.line <= last
        same = [a == b for a, b in zip(each.text.splitlines(), SOURCE.splitlines(), strict=True)]
        assert all(same[: first - 1])
        assert all(same[last:])
        assert not all(same[first - 1 : last])


def test_a_mutant_is_judged_by_the_tests_that_reach_it_themselves_or_by_a_fixture():
    run = Run(
        lines={"quick": {("half.py", 21)}, "slow": {("half.py", 21)}, "made": {("half.py", 28)}},
        fixtures={"quick": [], "slow": ["made"]},
        seconds={"slow": 2.0, "quick": 1.0},
    )
    reached = {each.line: run.reached(each) for each in mutants("half.py", SOURCE)}
    assert reached[21] == ["quick", "slow"]
    assert reached[28] == ["slow"]
    assert reached[15] == []
    assert reached[7] == ["quick", "slow"]
