"""Count violations at very many points: what random sampling can say about a statement.

Two ways. ``sweep_pairs`` evaluates two deltas of one dimension in a repaired chart, all pairs of two clouds, with
nothing but the arithmetic of the drift: over 20 million points a CPU second. ``sweep_points`` draws independent
points for any statement, N and d, and goes through the library's own fusion and bounds.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tether.errors import ConfigError
from tether.theory.search import BOX, TOLERANCE
from tether.theory.statements import Statement

__all__ = ["PAIRED", "SHAPES", "Count", "sweep_pairs", "sweep_points"]

PAIRED = ("symmetric", "geodesic", "rootkl")
SHAPES = ((2, 1), (2, 4), (3, 2), (5, 1), (5, 16), (10, 4), (20, 1), (20, 64))
"""Numbers of deltas and dimensions that a sweep without a choice of its own covers."""

ROWS, COLUMNS = 64, 1024  # of a block of pairs: it stays in the cache
CHUNK = 2**18  # numbers held at once by a sweep of points

Array = npt.NDArray[np.float64]
OnStep = Callable[[dict[str, float]], None]


class Count(NamedTuple):
    """What a sweep saw."""

    points: int
    violations: int
    """Points where drift over bound exceeds 1 by more than rounding."""
    worst: float
    """The largest ratio of drift to bound."""
    cpu_seconds: float


def sweep_pairs(
    chart: str, points: int, generator: np.random.Generator, on_step: OnStep | None = None
) -> Count:
    """Evaluate ``D <= (sqrt D_1 + sqrt D_2)^2`` for pairs of one-dimensional deltas in a repaired chart.

    Deltas are drawn in the chart's coordinates, with directions uniform and lengths log-uniform from 1e-4 to
    2.7 BOX. All pairs of 64 and 1024 deltas are evaluated, then new ones are drawn: the points of a block are
    distinct but not independent of each other. In the geodesic and rootkl charts the drift of a sum follows
    from its length; that the charts keep lengths is tested with the charts.

    Args:
        chart: ``symmetric``, ``geodesic`` or ``rootkl``.
        points: how many pairs at least.
        generator: source of the deltas.
        on_step: called with done and total.

    Returns:
        The count.

    Raises:
        ConfigError: the chart has no constant 1, or points is not positive.
    """
    if chart not in PAIRED:
        raise ConfigError(
            f"chart {chart!r}: expected one of {', '.join(PAIRED)}, whose bound for two deltas is 1"
        )
    _check_points(points)
    started, done, violations, worst = time.process_time(), 0, 0, 0.0
    while done < points:
        left, right = _cloud(generator, ROWS), _cloud(generator, COLUMNS)
        moved = _drift_of_sums(chart, left[:, :, None], right[:, None, :])
        one, two = (_drift_of_sums(chart, cloud, np.zeros_like(cloud)) for cloud in (left, right))
        root = np.sqrt(one)[:, None] + np.sqrt(two)
        np.multiply(root, root, out=root)
        np.divide(moved, root, out=moved)
        top = float(moved.max())
        worst = max(worst, top)
        if not top <= 1 + TOLERANCE:
            violations += int((~(moved <= 1 + TOLERANCE)).sum())
        done += ROWS * COLUMNS
        if on_step is not None and done % (64 * ROWS * COLUMNS) == 0:
            on_step({"done": min(done, points), "total": points})
    return Count(done, violations, worst, time.process_time() - started)


def sweep_points(
    statement: Statement,
    points: int,
    seed: int,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    on_step: OnStep | None = None,
) -> Count:
    """Draw independent deltas and weights and evaluate a statement at each point.

    Directions are uniform in (x, asinh y), lengths log-uniform from 1e-4 to ``2.7 BOX``, one for each point,
    times log-normal factors for each delta; half of the points have almost equal deltas, where the linear chart
    is worst. Free weights are normal with deviation 1.5. Every shape gets the same count of numbers, so small
    ones get more points.

    Args:
        statement: what to evaluate.
        points: how many points at least, over all shapes.
        seed: of the draws.
        shapes: pairs (N, d); statements about a fixed number of deltas keep the d, those about more dimensions have
            at least their own least number.
        on_step: called with done and total.

    Returns:
        The count.

    Raises:
        ConfigError: points is not positive.
    """  # noqa: DOC502 - raised by _check_points
    _check_points(points)
    started = time.process_time()
    source = torch.Generator().manual_seed(seed)
    least = statement.least_dimension
    shapes = sorted({(statement.count or count, max(dimension, least)) for count, dimension in shapes})
    share = points / sum(1 / (count * dimension) for count, dimension in shapes)
    total = sum(math.ceil(share / (count * dimension)) for count, dimension in shapes)
    done, violations, worst = 0, 0, 0.0
    for count, dimension in shapes:
        left = math.ceil(share / (count * dimension))
        while left:
            batch = min(left, max(1, CHUNK // (count * dimension)))
            ratio = statement.ratio(*_deltas(statement, count, batch, dimension, source))
            violations += int((~(ratio <= 1 + TOLERANCE)).sum())
            worst = max(worst, ratio.nan_to_num(math.inf).max().item())
            done, left = done + batch, left - batch
            if on_step is not None:
                on_step({"done": done, "total": total})
    return Count(done, violations, worst, time.process_time() - started)


def _check_points(points: int) -> None:
    if points < 1:
        raise ConfigError(f"points={points}: expected at least 1")


def _cloud(generator: np.random.Generator, count: int) -> Array:
    """Return coordinates of deltas, shape (2, count)."""
    length = np.exp(generator.uniform(math.log(1e-4), math.log(2.7 * BOX), count))
    angle = generator.uniform(0, 2 * math.pi, count)
    return np.stack([length * np.cos(angle), length * np.sin(angle)])


def _drift_of_sums(chart: str, left: Array, right: Array) -> Array:
    """Return the drift of deltas whose coordinates are ``left + right``."""
    first, second = left[0] + right[0], left[1] + right[1]
    np.multiply(first, first if chart != "symmetric" else 0.5, out=first)
    np.multiply(second, second, out=second)
    if chart == "symmetric":  # log1p(sinh(x/2)^2 + w^2 / 4)
        np.sinh(first, out=first)
        np.multiply(first, first, out=first)
        np.multiply(second, 0.25, out=second)
    np.add(first, second, out=first)
    if chart == "rootkl":  # the drift is the squared length itself
        return np.asarray(first)
    if chart == "geodesic":  # log1p(sinh(rho/2)^2)
        np.sqrt(first, out=first)
        np.multiply(first, 0.5, out=first)
        np.sinh(first, out=first)
        np.multiply(first, first, out=first)
    return np.asarray(np.log1p(first, out=first))


def _deltas(
    statement: Statement, count: int, batch: int, dimension: int, source: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, y (N, batch, d) and weights (N, batch) at which the statement's assumptions hold."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    direction = normal(2, count, batch, dimension)
    half = batch // 2
    direction[:, :, :half] = direction[:, :1, :half] + 0.05 * direction[:, :, :half]
    length = torch.exp(
        torch.rand(batch, 1, generator=source, dtype=torch.float64) * math.log(2.7e4 * BOX) + math.log(1e-4)
    )
    each = torch.exp(normal(count, batch, 1))
    each[:, :half] = 1
    norm = direction.square().sum((0, 3)).mean(0).sqrt()[:, None]
    moves = (direction * each * length / norm).clamp(-2.7 * BOX, 2.7 * BOX)
    weights = torch.ones(count, batch, dtype=torch.float64)
    if statement.weights != "unit":
        weights = 1.5 * normal(count, batch)
    x, y, placed = statement.place(moves[0], torch.sinh(moves[1]), weights)
    return x, y, placed
