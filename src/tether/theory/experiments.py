"""The six experiments of the source document, repeated, and what their random samples could not see.

The document gives sample sizes, N and d, but not the law it drew from. Shifts and changes of the log scale,
uniform in (-5, 5), reproduce its power law ``1.0829 N^-0.5081`` of the mean ratio; so they are drawn like that.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.stats import clopper_pearson
from tether.theory.catalogue import statement
from tether.theory.constants import equal_constant
from tether.theory.statements import fused_drift, single_drifts
from tether.theory.witness import EXAMPLES

__all__ = [
    "DOCUMENT_DELTA",
    "DOCUMENT_FIT",
    "REACH",
    "Fit",
    "Results",
    "Row",
    "ratio_map",
    "run_experiments",
    "violators",
]

REACH = 5.0
DOCUMENT_FIT = (1.0829, -0.5081)
DOCUMENT_DELTA = (0.5, 2.0)
"""x and y of the first delta in the document's experiment 5."""
GRID = 101
CHUNK = 2**20  # numbers drawn at once

Moves: TypeAlias = Literal["both", "location", "scale"]
OnStep: TypeAlias = Callable[[dict[str, float]], None]


class Row(NamedTuple):
    """One case of an experiment."""

    experiment: int
    case: str
    samples_document: int
    held_document: float
    """Share of the document's number of samples at which ``D <= N sum D`` holds; the document says 1 throughout."""
    samples: int
    violations: int
    share: float
    """Violations over samples: the mass of the violating region under the law of the samples."""
    share_high: float
    """Upper end of its one-sided 95 % interval."""
    worst_sampled: float
    """Largest ratio of drift to bound among the samples."""
    worst: float
    """Largest ratio there is: 1 where the inequality is proved, else that of equal sharpening deltas."""
    mean_ratio: float
    """Mean of drift over the plain sum of drifts."""
    sqrt_violations: float
    """Share of samples at which ``D <= sqrt(N) sum D`` fails."""


class Fit(NamedTuple):
    """Power law ``factor N^exponent`` of the mean ratio over N."""

    factor: float
    exponent: float


class Results(NamedTuple):
    """What the experiments gave."""

    rows: list[Row]
    fit_document: Fit
    """At the document's sample size."""
    fit: Fit
    where: dict[str, Any]
    cpu_seconds: float

    def describe(self) -> dict[str, Any]:
        """Return the results as JSON.

        Returns:
            Rows, the document's fit and ours, where violations lie, and the exact one.
        """
        return {
            "rows": [row._asdict() for row in self.rows],
            "fit": {
                "document": list(DOCUMENT_FIT),
                "ours_document_size": list(self.fit_document),
                "ours": list(self.fit),
            },
            "where": self.where,
            "exact": EXAMPLES["main, N = 2"].describe(),
            "cpu_seconds": round(self.cpu_seconds, 2),
        }


def run_experiments(samples: int = 10**6, seed: int = 0, on_step: OnStep | None = None) -> Results:
    """Run all six at the document's sample sizes and at larger ones.

    Args:
        samples: of each case at the larger size; experiment 5 takes the nearest square grid.
        seed: of all draws.
        on_step: called with done and total cases.

    Returns:
        Rows, fits, and where the violations of experiment 1 lie.

    Raises:
        ConfigError: fewer than 1000 samples.
    """
    if samples < 1000:
        raise ConfigError(f"samples={samples}: expected at least 1000, ten times the document's")
    started = time.process_time()
    cases = _cases()
    rows = []
    for done, (number, case, count, dimension, moves, few) in enumerate(cases):
        rows.append(_row(number, case, count, dimension, moves, few, samples, seed + 1000 * done))
        if on_step is not None:
            on_step({"done": done + 1, "total": len(cases)})
    sixth = [row for row in rows if row.experiment == 6]
    counts = [count for number, _, count, *_ in cases if number == 6]
    few_means = [
        _measure(count, 1, "both", 100, seed + 1000 * cases.index(case)).mean_ratio
        for count, case in zip(counts, (c for c in cases if c[0] == 6), strict=True)
    ]
    rows.insert(next(i for i, row in enumerate(rows) if row.experiment == 6), _grid_row(samples))
    return Results(
        rows,
        _fit(counts, few_means),
        _fit(counts, [row.mean_ratio for row in sixth]),
        violators(samples, seed),
        time.process_time() - started,
    )


def violators(samples: int, seed: int) -> dict[str, Any]:
    """Describe the pairs of one-dimensional deltas, drawn as in experiment 1, at which the inequality fails.

    Args:
        samples: pairs to draw.
        seed: of the draw.

    Returns:
        How many fail, the share of these in which both deltas sharpen, quantiles of their size, and which share
        of all pairs lies in the box that holds 95 % of them.
    """
    kept_x, kept_y = [], []
    for x, y in _draws(2, 1, "both", samples, seed):
        bad = statement("main").ratio(x, y, torch.ones(2)) > 1
        kept_x.append(x[:, bad, 0])
        kept_y.append(y[:, bad, 0])
    x, y = torch.cat(kept_x, 1), torch.cat(kept_y, 1)
    if not x.shape[1]:
        return {"samples": samples, "violations": 0}
    size = torch.maximum(x.abs().amax(0), y.abs().amax(0))
    reach = float(torch.quantile(size, 0.95))
    return {
        "samples": samples,
        "violations": x.shape[1],
        "both_sharpen": float((x < 0).all(0).double().mean()),
        "same_side": float((y[0] * y[1] > 0).double().mean()),
        "size_median": float(size.median()),
        "size_95": reach,
        "box_share": min(1.0, reach / REACH) ** 4,
        "chance_in_100": 1 - (1 - x.shape[1] / samples) ** 100,
    }


def ratio_map(x: float, y: float, *, reach: float = REACH, side: int = GRID) -> tuple[Tensor, Tensor]:
    """Evaluate the inequality for two deltas, one fixed and one on a grid.

    Args:
        x: change of the log scale of the fixed delta.
        y: its change of the location over the base scale.
        reach: the grid covers (-reach, reach) in both coordinates.
        side: points on a side.

    Returns:
        The axis, shape (side,), and drift over ``2 (D_1 + D_2)``, shape (side, side), rows by y and columns by x.
    """
    axis = torch.linspace(-reach, reach, side, dtype=torch.float64)
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    first = torch.stack([torch.full_like(grid_x, x), grid_x]).unsqueeze(-1)
    second = torch.stack([torch.full_like(grid_y, y), grid_y]).unsqueeze(-1)
    return axis, statement("main").ratio(first, second, torch.ones(2))


def _cases() -> list[tuple[int, str, int, int, Moves, int]]:
    """Return experiment, case, N, d, what moves and the document's sample size; experiment 5 is a grid."""
    cases: list[tuple[int, str, int, int, Moves, int]] = [(1, "d=1 N=2", 2, 1, "both", 100)]
    cases += [(2, f"location only, N={n}", n, 1, "location", 100) for n in (2, 3, 5, 10)]
    cases += [(3, f"scale only, N={n}", n, 1, "scale", 100) for n in (2, 3, 5, 10)]
    cases += [(4, f"d={d} N={n}", n, d, "both", 50) for d in (2, 5, 10) for n in (2, 5)]
    cases += [(6, f"d=1 N={n}", n, 1, "both", 100) for n in (2, 3, 5, 10, 20)]
    return cases


class _Measured(NamedTuple):
    samples: int
    violations: int
    worst: float
    mean_ratio: float
    sqrt_share: float


def _measure(count: int, dimension: int, moves: Moves, samples: int, seed: int) -> _Measured:
    violations, worst, total, above = 0, 0.0, 0.0, 0
    for x, y in _draws(count, dimension, moves, samples, seed):
        ratio = fused_drift(x, y, torch.ones(count), "linear") / single_drifts(x, y).sum(0)
        violations += int((ratio > count * (1 + 1e-12)).sum())
        above += int((ratio > math.sqrt(count)).sum())
        worst = max(worst, float(ratio.max()) / count)
        total += float(ratio.sum())
    return _Measured(samples, violations, worst, total / samples, above / samples)


def _draws(
    count: int, dimension: int, moves: Moves, samples: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x and y of shape (N, batch, d)."""
    source = torch.Generator().manual_seed(seed)
    left = samples
    while left:
        batch = min(left, max(1, CHUNK // (count * dimension)))
        x, y = REACH * (2 * torch.rand(2, count, batch, dimension, generator=source, dtype=torch.float64) - 1)
        yield (0 * x if moves == "location" else x), (0 * y if moves == "scale" else y)
        left -= batch


def _row(
    number: int, case: str, count: int, dimension: int, moves: Moves, few: int, samples: int, seed: int
) -> Row:
    first, many = (_measure(count, dimension, moves, n, seed) for n in (few, samples))
    return Row(
        experiment=number,
        case=case,
        samples_document=few,
        held_document=1 - first.violations / few,
        samples=samples,
        violations=many.violations,
        share=many.violations / samples,
        share_high=clopper_pearson(many.violations, samples, 0.95).high,
        worst_sampled=many.worst,
        worst=equal_constant(count).value if moves == "both" else 1.0,
        mean_ratio=many.mean_ratio,
        sqrt_violations=many.sqrt_share,
    )


def _grid_row(samples: int) -> Row:
    """Return experiment 5: one delta fixed as in the document, the other on a grid."""
    side = max(GRID, math.isqrt(samples))
    small, large = (ratio_map(*DOCUMENT_DELTA, side=n)[1] for n in (GRID, side))
    bad = int((large > 1 + 1e-12).sum())
    return Row(
        experiment=5,
        case=f"first delta x={DOCUMENT_DELTA[0]:g} y={DOCUMENT_DELTA[1]:g}, second on a grid",
        samples_document=GRID**2,
        held_document=float((small <= 1 + 1e-12).double().mean()),
        samples=side**2,
        violations=bad,
        share=bad / side**2,
        share_high=math.nan,
        worst_sampled=float(large.max()),
        worst=1.0,
        mean_ratio=float(2 * large.mean()),
        sqrt_violations=float((2 * large > math.sqrt(2)).double().mean()),
    )


def _fit(counts: Sequence[int], means: Sequence[float]) -> Fit:
    exponent, intercept = np.polyfit(np.log(counts), np.log(means), 1)
    return Fit(float(np.exp(intercept)), float(exponent))
