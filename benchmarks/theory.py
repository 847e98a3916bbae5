"""Speed of the theory lab: evaluations of a statement, a search that refutes, a proof by branch and bound."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tether.cauchy.divergence import drift
from tether.theory.any_number import prove_any
from tether.theory.catalogue import statement
from tether.theory.search import falsify
from tether.theory.sweep import PAIRED, sweep_pairs, sweep_points

__all__ = ["rows"]

LIMIT = 5.0
"""CPU seconds within which a search has to refute the main inequality."""


def rows(fast: bool) -> list[dict[str, Any]]:
    """Measure on one thread; figures are medians, with the smallest and largest beside them.

    Args:
        fast: a tenth of the points and fewer runs.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _speeds(fast) + _searches(fast) + _proofs(fast)
    finally:
        torch.set_num_threads(threads)


def _speeds(fast: bool) -> list[dict[str, Any]]:
    """Return points a CPU second, d = 1 and N = 2, all pairs against the general path of the library."""
    points, runs = (4_000_000, 3) if fast else (40_000_000, 5)
    listed = []
    for chart in PAIRED:
        general = statement(chart)
        pairs, ones = [], []
        for run in range(runs):
            seen = sweep_pairs(chart, points, np.random.default_rng(run))
            pairs.append(seen.points / seen.cpu_seconds)
            seen = sweep_points(general, points // 40, run, [(2, 1)])
            ones.append(seen.points / seen.cpu_seconds)
        listed.append(
            _row(
                f"{chart}, d = 1, N = 2, all pairs of two clouds; baseline: independent points, fused by the library",
                "evaluations per CPU second",
                pairs,
                ones,
            )
        )
    return listed


def _searches(fast: bool) -> list[dict[str, Any]]:
    """Return CPU seconds to refute the main inequality, and what random sampling reaches in the same time."""
    seeds = range(3 if fast else 20)
    found = [falsify(statement("main"), seed=seed) for seed in seeds]
    seconds, ratios = [one.cpu_seconds for one in found], [one.ratio for one in found]
    sampled = [_sampled(seed, min(seconds)) for seed in seeds]
    case = "main inequality, N = 2; baseline: the document's random sampling for as long"
    return [
        _row("main inequality, N = 2; baseline: the limit set for it", "CPU seconds", seconds, [LIMIT]),
        _row(case, "worst ratio found", ratios, sampled),
    ]


def _sampled(seed: int, seconds: float) -> float:
    """Return the worst ratio among uniform samples in (-5, 5), drawn for a time."""
    source = torch.Generator().manual_seed(seed)
    started, worst = time.process_time(), 0.0
    while time.process_time() - started < seconds:
        x, y = 10 * torch.rand(2, 2, 2**16, generator=source, dtype=torch.float64) - 5
        worst = max(worst, (drift(*(v.sum(0) for v in (x, y))) / (2 * drift(x, y).sum(0))).max().item())
    return worst


def _proofs(fast: bool) -> list[dict[str, Any]]:
    """Return cells and CPU seconds of the proof of Theorem 1; the baseline is the earlier proof's count of cells."""
    seconds, cells = [], []
    for _ in range(1 if fast else 3):
        spent, proof = _timed(prove_any)
        if not proof.holds:
            raise RuntimeError("Theorem 1 was not proved")
        seconds.append(spent)
        cells.append(float(sum(part.cells for part in proof.parts())))
    return [
        _row(
            "Theorem 1, ball arithmetic, cells looked at; baseline: the float64 proof of the theory notes",
            "cells",
            cells,
            [6.65e6],
        )
        | {"cpu_seconds": statistics.median(seconds)},
    ]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _row(case: str, metric: str, ours: list[float], baseline: list[float]) -> dict[str, Any]:
    mine, other = statistics.median(ours), statistics.median(baseline)
    return {
        "case": case,
        "metric": metric,
        "ours": mine,
        "baseline": other,
        "ratio": mine / other,
        "runs": len(ours),
        "spread": {"ours": [min(ours), max(ours)], "baseline": [min(baseline), max(baseline)]},
    }
