"""The enclosures that `tether theory enclose` offers, with what it prints of each."""

from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tether.cli.tables import table

__all__ = ["ENCLOSED"]

Told: TypeAlias = tuple[dict[str, Any], str]
Enclose: TypeAlias = Callable[[bool, Path | None, Callable[[dict[str, float]], None]], Told]


# The last digits of an enclosure depend on the machine's mathematical functions, so what is printed has fewer; rounded
# outward it still encloses.
def _printed(low: float, high: float) -> tuple[str, str]:
    step = Decimal("1e-12")
    return str(Decimal(low).quantize(step, ROUND_FLOOR)), str(Decimal(high).quantize(step, ROUND_CEILING))


def _enclosed_constants(fast: bool, state: Path | None, on_step: Any) -> Told:
    from tether.theory import rigor
    from tether.theory.any_number import AROUND_K

    works: dict[str, Callable[[], rigor.Enclosure]] = {
        f"C_{n}": partial(rigor.enclose_equal, n) for n in (2, 3, 4, 10)
    }
    works["K_inf"] = partial(rigor.enclose_many, AROUND_K)
    works["K of the split"] = rigor.enclose_split
    works["shrinking threshold"] = rigor.enclose_threshold
    found = {}
    for done, (name, work) in enumerate(works.items()):
        found[name] = work()
        on_step({"done": done + 1, "total": len(works)})
    record = {
        "constants": {
            name: {"low": e.low, "high": e.high, "cells": e.cover.cells, "failures": e.cover.failures}
            for name, e in found.items()
        },
        "holds": all(e.holds for e in found.values()),
    }
    rows = [[name, *_printed(e.low, e.high), e.cover.cells, e.cover.failures] for name, e in found.items()]
    return record, table(("constant", "at least", "at most", "cells", "failures"), rows)


def _enclosed_counterexamples(fast: bool, state: Path | None, on_step: Any) -> Told:
    from tether.theory.rigor import enclose_ratio
    from tether.theory.witness import EXAMPLES

    rows: list[list[Any]] = []
    listed: list[dict[str, Any]] = []
    for done, (name, example) in enumerate(EXAMPLES.items()):
        low, high = enclose_ratio(example)
        listed.append({"case": name, "low": low, "high": high} | example.describe())
        rows.append([name, *_printed(low, high), example.holds()])
        on_step({"done": done + 1, "total": len(EXAMPLES)})
    holds = all(one["holds"] and one["low"] > 1 for one in listed)
    text = table(("counterexample", "ratio at least", "at most", "holds with integers"), rows)
    return {"counterexamples": listed, "holds": holds}, text


def _enclosed_any(fast: bool, state: Path | None, on_step: Any) -> Told:
    from tether.theory.any_number import REGION, prove_any
    from tether.theory.balls import Box

    proof = prove_any(Box(0.6, 1.6, 0.6, 1.6) if fast else REGION, state=state, on_step=on_step)
    return _proof_told("Theorem 1", "K_inf", proof, fast)


def _enclosed_two(fast: bool, state: Path | None, on_step: Any) -> Told:
    from tether.theory.balls import Box
    from tether.theory.two_deltas import REGION, prove_two

    proof = prove_two(Box(0.6, 0.75, 0.6, 0.75) if fast else REGION, state=state, on_step=on_step)
    return _proof_told("Theorem 2", "C_2", proof, fast)


def _proof_told(theorem: str, constant: str, proof: Any, fast: bool) -> Told:
    parts = {
        name: value.cover if name == "constant" else value
        for name, value in proof._asdict().items()
        if name != "outside"
    }
    record = {
        "theorem": theorem,
        "reduced": fast,
        constant: {"low": proof.constant.low, "high": proof.constant.high},
        "outside": proof.outside,
        "parts": {name: part._asdict() for name, part in parts.items()},
        "holds": proof.holds,
    }
    rows = [
        [name, part.cells, part.failures, ", ".join(f"{k} {v}" for k, v in sorted(part.proofs.items()))]
        for name, part in parts.items()
    ]
    region = "around the maximum (reduced)" if fast else "all sums of deltas"
    verdict = "proved" if proof.holds else "NOT proved"
    low, high = _printed(proof.constant.low, proof.constant.high)
    head = f"{theorem}, {region}: {verdict}; {low} <= {constant} <= {high}"
    return record, f"{head}\n{table(('part', 'cells', 'failures', 'proved by'), rows)}"


ENCLOSED = {
    "constants": _enclosed_constants,
    "counterexamples": _enclosed_counterexamples,
    "any": _enclosed_any,
    "two": _enclosed_two,
}
