"""Write every generated number and figure of docs/how-drift-adds-up.md: python -m benchmarks.theory_page."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from tether.cli.tables import table
from tether.cli.theory import app
from tether.report.theory_figures import write_figures
from tether.store.publish import publish_file
from tether.theory.bounds import scaling_bound
from tether.theory.catalogue import STATEMENTS, statement
from tether.theory.laws import law_figures
from tether.theory.local import local_drift_bound
from tether.theory.search import falsify
from tether.theory.sweep import PAIRED, sweep_pairs, sweep_points

__all__ = ["BLOCKS", "PAGE", "QUICK", "block", "main", "replaced"]

PAGE = Path("docs/how-drift-adds-up.md")
QUICK = ("statements", "counterexamples", "constants", "scaling", "local", "plan")
"""Blocks that take under a second: the tests compare them with the page."""


def block(name: str) -> str:
    """Return the generated content of a block.

    Args:
        name: one of `BLOCKS`.

    Returns:
        Markdown.
    """
    return BLOCKS[name]()


def replaced(page: str, name: str, content: str) -> str:
    """Return the page with a block's content replaced.

    Args:
        page: the page.
        name: of the block.
        content: what to put between its markers.

    Returns:
        The page.

    Raises:
        ValueError: the page has no such block.
    """
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    found, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} blocks named {name}, expected one")
    return found


def main() -> None:
    """Generate the blocks asked for, or all, and the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.theory_page", description=__doc__)
    parser.add_argument("blocks", nargs="*", help="all where left out")
    chosen = parser.parse_args().blocks or [*BLOCKS, "figures"]
    torch.set_num_threads(1)
    if "figures" in chosen:
        write_figures(PAGE.parent)
    for name in chosen:
        if name != "figures":
            content = block(name)
            page = replaced(PAGE.read_text(encoding="utf-8"), name, content)
            with publish_file(PAGE) as temporary:
                temporary.write_text(page, encoding="utf-8")


def _printed(*arguments: str) -> str:
    """Return what a command of the lab prints, as a code block under its name."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    if result.exit_code:
        raise RuntimeError(f"tether theory {' '.join(arguments)} failed: {result.output}")
    return f"```\n$ tether theory {' '.join(arguments)}\n{result.stdout.rstrip()}\n```"


def _statements() -> str:
    rows = [
        (f"`{s.name}`", s.text.replace("|", "&#124;"), s.assumptions, s.source, s.verdict, s.basis)
        for s in STATEMENTS.values()
    ]
    columns = ("name", "statement", "holds for", "source", "verdict", "rests on")
    lines = [f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns), *rows)]
    return "\n".join(["*generated, `tether theory statements`*", "", *lines])


def _constants() -> str:
    text = _printed("constants")
    kept = text[: text.index("\nB(e, a)")].rstrip()
    return f"{kept}\n```\n{_printed('enclose', 'constants')}"


def _scaling() -> str:
    text = _printed("constants")
    return "```\n" + text[text.index("a \\ e") :]


def _local() -> str:
    budgets = torch.tensor([1e-1, 1e-2, 1e-3, 1e-4, 1e-6], dtype=torch.float64)
    worst = scaling_bound(budgets, -1.0) / budgets
    bound = local_drift_bound(budgets[None], -torch.ones(1)) / budgets
    rows = [
        [f"{e:g}", f"{w:.5f}", f"{b:.5f}", f"{(b - 1) / (w - 1):.3f}"]
        for e, w, b in zip(budgets.tolist(), worst.tolist(), bound.tolist(), strict=True)
    ]
    columns = ("drift e", "largest D(-p)/e", "Theorem 6", "excess over what is needed")
    return f"```\n{table(columns, rows)}\n```"


def _laws() -> str:
    rows = [
        [one.name, *(f"{value:.3f}" for value in one[1:3]), *(f"{value:.4f}" for value in one[3:])]
        for one in law_figures()
    ]
    columns = (
        "law", "information: scale", "location", "turned", "shifts", "scales", "symmetric", "linear", "many",
    )  # fmt: skip
    return f"```\n{table(columns, rows)}\n```"


def _searches() -> str:
    found = [falsify(statement("main"), seed=seed) for seed in range(20)]
    return (
        f"```\nworst ratio: smallest {min(f.ratio for f in found):.12f}, largest {max(f.ratio for f in found):.12f}\n"
        f"CPU seconds a search: at most {max(f.cpu_seconds for f in found):.1f}\n"
        f"to 40 digits: {found[0].precise}\n```"
    )


def _effort() -> str:
    lines = []
    for chart in PAIRED:
        pairs = sweep_pairs(chart, 10**9, np.random.default_rng(0))
        points = sweep_points(statement(chart), 10**7, 0)
        lines += [
            f"{chart:<10} N = 2, d = 1           {pairs.points:>13,} points  {pairs.violations} violations"
            f"  worst ratio {pairs.worst:.12f}  {pairs.cpu_seconds:.0f} CPU seconds",
            f"{chart:<10} N <= 20, d <= 64       {points.points:>13,} points  {points.violations} violations"
            f"  worst ratio {points.worst:.12f}  {points.cpu_seconds:.0f} CPU seconds",
        ]
    return "```\n" + "\n".join(lines) + "\n```"


BLOCKS: dict[str, Callable[[], str]] = {
    "statements": _statements,
    "counterexamples": lambda: _printed("enclose", "counterexamples"),
    "experiments": lambda: _printed("experiments"),
    "searches": _searches,
    "constants": _constants,
    "theorem1": lambda: _printed("enclose", "any"),
    "theorem2": lambda: _printed("enclose", "two"),
    "scaling": _scaling,
    "local": _local,
    "laws": _laws,
    "effort": _effort,
    "plan": lambda: _printed(
        "plan", "--budgets", "0.1,0.2,0.1", "--weights", "1,0.5,1", "--chart", "symmetric"
    ),
}
"""Name of a block of the page to what writes it."""

if __name__ == "__main__":
    main()
