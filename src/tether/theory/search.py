"""Search for the worst case of a statement: ascent on drift over bound, from many starts at once."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from tether.errors import ConfigError, TetherError
from tether.theory import precise, witness
from tether.theory.statements import Statement, is_shared
from tether.theory.witness import Witness, find_witness

__all__ = ["BOX", "TOLERANCE", "Finding", "falsify"]

BOX = 8.0
"""Searches stay where ``|x|`` and ``asinh |y|`` are at most this: drifts up to about 17 nats a dimension."""

TOLERANCE = 1e-9
"""A ratio up to 1 + this is rounding."""

STARTS, STEPS, RATE = 96, 200, 0.05
POLISHED = 4
BEATEN = 10
"""The constant K that a witness against positive scales beats."""

Numbers = list[list[float]]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The worst case that a search found."""

    statement: Statement
    ratio: float
    """Drift over bound; above 1 the statement fails."""
    x: Numbers
    """Changes of the log scale, N rows of d numbers."""
    y: Numbers
    """Changes of the location over the base scale, of the same shape."""
    weights: list[float]
    drift: float
    bound: float
    at_border: bool
    """Whether the worst case lies at the end of the region searched, or at 0: the supremum is not attained."""
    precise: str | None
    """The ratio to 45 digits, after polishing where the worst case is one of equal deltas."""
    witness: Witness | None
    """The same case in small rational numbers, where the statement still fails, checked with integers."""
    evaluations: int
    cpu_seconds: float

    @property
    def violated(self) -> bool:
        """Whether the statement fails at the worst case, beyond rounding."""
        return self.ratio > 1 + TOLERANCE

    def describe(self) -> dict[str, Any]:
        """Return the finding as JSON.

        Returns:
            Ratio, deltas, weights, witness and effort.
        """
        return {
            "statement": self.statement.name,
            "text": self.statement.text,
            "verdict": self.statement.verdict,
            "violated": self.violated,
            "ratio": self.ratio,
            "precise_ratio": self.precise,
            "deltas": [{"x": a, "y": b} for a, b in zip(self.x, self.y, strict=True)],
            "weights": self.weights,
            "drift": self.drift,
            "bound": self.bound,
            "at_border": self.at_border,
            "witness": None if self.witness is None else self.witness.describe(),
            "effort": {"evaluations": self.evaluations, "cpu_seconds": round(self.cpu_seconds, 2)},
        }


def falsify(
    statement: Statement,
    *,
    count: int = 2,
    dimension: int = 1,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Finding:
    """Search for deltas (and weights) at which a statement fails, or comes closest to failing.

    96 random starts, 200 steps of Adam on the logarithm of the ratio, then a quasi-Newton method from the best
    four. In one dimension the result is rounded to rational numbers for an exact certificate, if it fails.

    Args:
        statement: what to falsify.
        count: N, the number of deltas; statements about a fixed number use their own.
        dimension: d; statements about more dimensions use the least number of their own.
        weights: fixed weights, one a delta; None searches over the weights the statement allows.
        seed: of the starts.
        on_step: called with step and steps.

    Returns:
        The worst case.

    Raises:
        ConfigError: N or d is below 1, or the weights are not what the statement is about.
    """
    count = statement.count or count
    if count < 1 or dimension < 1:
        raise ConfigError(f"N={count}, d={dimension}: expected both to be at least 1")
    if weights is not None:
        _check_weights(statement, weights, count)
    dimension = max(dimension, statement.least_dimension)
    started = time.process_time()
    space = _Space(statement, count, dimension, weights)
    points = space.starts(seed).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        space.objective(points).sum().backward()
        if points.grad is not None:
            points.grad.nan_to_num_(0, 0, 0)
        optimizer.step()
        with torch.no_grad():
            points.clamp_(-BOX, BOX)
        if on_step is not None:
            on_step({"step": step + 1, "steps": STEPS})
    with torch.no_grad():
        best = space.objective(points).nan_to_num(math.inf).argsort()[:POLISHED]
    ends = [_ascend(space, points.detach()[:, k]) for k in best.tolist()]
    evaluations = STARTS * STEPS + sum(count for _, count in ends)
    found = min(
        (end for end, _ in ends), key=lambda end: space.objective(end[:, None]).nan_to_num(math.inf).item()
    )
    return _finding(space, found, evaluations, started)


class _Space:
    """The unconstrained variables of a search: x, asinh(y) and, where they are free, weights."""

    def __init__(
        self, statement: Statement, count: int, dimension: int, weights: Sequence[float] | None
    ) -> None:
        self.statement, self.count, self.dimension = statement, count, dimension
        if weights is None and statement.weights == "unit":
            weights = [1.0] * count
        self.fixed = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.deltas = count * dimension
        self.size = 2 * self.deltas + (count if self.fixed is None else 0)

    def starts(self, seed: int) -> Tensor:
        """Return random starts of sizes from small to large, shape (variables, STARTS)."""
        source = torch.Generator().manual_seed(seed)
        spread = torch.logspace(-1.5, 0.5, STARTS, dtype=torch.float64)
        points = spread * torch.randn(self.size, STARTS, generator=source, dtype=torch.float64)
        free = self.size - 2 * self.deltas
        if free:  # the size of a weight has nothing to do with the size of a delta
            points[-free:] = 1.5 * torch.randn(free, STARTS, generator=source, dtype=torch.float64)
        return points

    def place(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, y (N, points, d) and weights (N, points) that satisfy the statement's assumptions."""
        shape = (self.count, self.dimension, -1)
        x = points[: self.deltas].reshape(shape).movedim(1, 2)
        y = torch.sinh(points[self.deltas : 2 * self.deltas].reshape(shape).movedim(1, 2))
        weights = (
            points[2 * self.deltas :] if self.fixed is None else self.fixed[:, None].expand(-1, x.shape[1])
        )
        x, y, placed = self.statement.place(x, y, weights)
        return x, y, weights if self.fixed is not None else placed

    def objective(self, points: Tensor) -> Tensor:
        """Return minus the logarithm of the ratio, shape (points,)."""
        moved, bound = self.statement.evaluate(*self.place(points))
        return bound.clamp(min=1e-300).log() - moved.clamp(min=1e-300).log()


def _check_weights(statement: Statement, weights: Sequence[float], count: int) -> None:
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights {list(weights)}: expected {count} finite numbers, one a delta")
    if statement.weights == "unit" and any(w != 1 for w in weights):
        raise ConfigError(
            f"{statement.name} is about weights 1: leave the weights out, or falsify 'weighted'"
        )
    if statement.weights == "at least 1" and any(w < 1 for w in weights):
        raise ConfigError(f"{statement.name} is about weights of 1 and more: give such weights")
    if statement.weights == "shares" and not is_shared(torch.tensor(weights, dtype=torch.float64)):
        raise ConfigError(
            f"{statement.name} is about weights that are not negative and add up to 1: give such weights"
        )


def _ascend(space: _Space, start: Tensor) -> tuple[Tensor, int]:
    """Return a local worst case near a point, by L-BFGS within the box, and how often the ratio was evaluated."""

    def value_and_slope(values: Array) -> tuple[float, Array]:
        point = torch.from_numpy(values.copy()).requires_grad_()
        value = space.objective(point[:, None]).sum()
        (slope,) = torch.autograd.grad(value, point)
        return value.detach().nan_to_num(1e9, 1e9).item(), slope.nan_to_num(0, 0, 0).numpy()

    limits = [(-BOX, BOX)] * space.size
    result = minimize(
        value_and_slope,
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=limits,
        options={"maxiter": 40, "maxfun": 60, "ftol": 1e-15, "gtol": 1e-11},
    )
    return torch.from_numpy(result.x), int(result.nfev)


def _finding(space: _Space, point: Tensor, evaluations: int, started: float) -> Finding:
    with torch.no_grad():
        x, y, weights = (value[:, 0] for value in space.place(point[:, None]))
        moved, bound = (
            side.item() for side in space.statement.evaluate(x[:, None], y[:, None], weights[:, None])
        )
        ratio = space.statement.ratio(x[:, None], y[:, None], weights[:, None]).item()
    name, fails = space.statement.name, ratio > 1 + TOLERANCE
    exact = digits = None
    if space.dimension == 1:
        columns = [value.flatten().tolist() for value in (x, y, weights)]
        if fails and name in witness.KINDS:
            exact = _certify(name, *columns)
        if name in precise.KINDS:
            digits = _precise(name, *columns)
    size = point[: 2 * space.deltas].abs()
    return Finding(
        statement=space.statement,
        ratio=ratio,
        x=x.tolist(),
        y=y.tolist(),
        weights=weights.tolist(),
        drift=moved,
        bound=bound,
        at_border=bool((size > BOX - 1e-6).any() or size.max() < 1e-3),
        precise=digits,
        witness=exact,
        evaluations=evaluations,
        cpu_seconds=time.process_time() - started,
    )


def _certify(name: str, x: list[float], y: list[float], weights: list[float]) -> Witness | None:
    """Return an exact counterexample near the worst case; unequal deltas are tried as equal ones, too."""
    rational = [Fraction(w).limit_denominator(6) for w in weights]
    factor = BEATEN if name == "positive-scale" else 1
    longest = max(range(len(x)), key=lambda k: math.hypot(x[k], y[k]))
    equal = ([x[longest]] * len(x), [y[longest]] * len(x), [rational[longest]] * len(x))
    if (
        name == "weighted"
    ):  # free weights run to 0, which is no rational number to show: halve or turn round instead
        shown = (rational[longest], Fraction(1, 2), Fraction(-1))
        tries = [([x[longest]], [y[longest]], [weight]) for weight in shown]
    else:
        tries = [(x, y, rational), equal]
    for candidate in tries:
        if all(w != 0 for w in candidate[2]) and (found := find_witness(name, *candidate, factor=factor)):
            return found
    return None


def _precise(name: str, x: list[float], y: list[float], weights: list[float]) -> str:
    alike = max(x) - min(x) < 1e-4 and max(y) - min(y) < 1e-4
    if name in {"main", "appendix"} and alike and len(x) > 1:
        try:
            return f"{precise.polish_equal(len(x), x[0], y[0])[0]:.40f}"
        except TetherError:
            pass  # not a maximum of equal deltas: the ratio at the point itself stands
    return f"{precise.precise_ratio(name, x, y, weights):.40f}"
