"""Drift metrics, and bringing a delta to its budget on base text that it was not trained on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tether.cauchy.charts import CHARTS, from_chart
from tether.cauchy.divergence import drift
from tether.delta.objective import chunk_rows, softmax_shift
from tether.errors import ConfigError

__all__ = ["METRICS", "Budget", "Head", "Met", "Reference", "meet_budget", "token_drift"]

METRICS = {
    "softmax": "measured KL(base || tuned) of the served softmax",
    "fisher": "its second-order form in the base's output Fisher",
    "latent": "Cauchy drift of U, the metric of the theorems",
}
AIM = 0.98
"""Share of the budget that the last scaling aims at; anything in [0.95, 1] is accepted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A drift constraint on base text, or the source document's plain penalty.

    Attributes:
        value: largest mean drift on base text, nats per token, > 0; None with a penalty.
        metric: one of `METRICS`.
        penalty: lambda of the plain penalty on the latent drift at the domain's own contexts (spec document
            2), >= 0; then nothing is constrained.
    """

    value: float | None = 0.05
    metric: str = "softmax"
    penalty: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"metric={self.metric!r}: expected one of {', '.join(METRICS)}")
        if (self.value is None) == (self.penalty is None):
            raise ConfigError("expected either a budget or a penalty; a penalty replaces the budget")
        if self.value is not None and not (math.isfinite(self.value) and self.value > 0):
            raise ConfigError(f"budget={self.value}: expected a drift in nats per token, finite and > 0")
        if self.penalty is not None and not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise ConfigError(f"penalty={self.penalty}: expected a finite number >= 0")


class Head(NamedTuple):
    """A delta while it is learnt.

    Attributes:
        first: head of the chart's first coordinate, shape (C, H), or None.
        second: head of the second coordinate, shape (C, H).
        chart: the chart.
    """

    first: Tensor | None
    second: Tensor
    chart: str

    def displacement(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Move of the law of U.

        Args:
            states: z, shape (n, H).

        Returns:
            x and y, shape (n, C) each.

        Raises:
            ConfigError: unknown chart.
        """
        if self.chart not in CHARTS:
            raise ConfigError(f"chart={self.chart!r}: expected one of {', '.join(CHARTS)}")
        second = states @ self.second.T
        first = torch.zeros_like(second) if self.first is None else states @ self.first.T
        return from_chart(first, second, self.chart)

    def scaled(self, factor: float) -> "Head":
        """Shrink or stretch along the ray through the base.

        Args:
            factor: applied to both heads.

        Returns:
            The scaled head.
        """
        first = None if self.first is None else self.first * factor
        return Head(first, self.second * factor, self.chart)


class Reference(NamedTuple):
    """Base quantities at some tokens.

    Attributes:
        states: z, shape (n, H), float32.
        loc: base loc of U, shape (n, C), float32.
        scale: base scale of U, shape (n, C), float32.
    """

    states: Tensor
    loc: Tensor
    scale: Tensor

    def some(self, count: int) -> "Reference":
        """Pick tokens spread evenly over the text, so that many documents take part.

        Args:
            count: how many at most.

        Returns:
            The selection.
        """
        index = torch.linspace(0, len(self.states) - 1, min(count, len(self.states))).long()
        return Reference(*(values[index] for values in self))


def token_drift(
    metric: str, head: Head, at: Reference, *, weight: Tensor | None = None, fisher: Tensor | None = None
) -> Tensor:
    """Drift of each token in a metric.

    Args:
        metric: one of `METRICS`.
        head: the delta.
        at: base quantities at n tokens.
        weight: output head, shape (V, C), for `softmax`: two products with it a token.
        fisher: output Fisher, shape (C, C), for `fisher`.

    Returns:
        Nats, shape (n,).

    Raises:
        ConfigError: unknown metric, or what it needs is missing.
    """
    x, y = head.displacement(at.states)
    if metric == "latent":
        return drift(x, y).sum(-1)
    move = at.scale * y
    if metric == "fisher" and fisher is not None:
        return 0.5 * ((move @ fisher) * move).sum(-1)
    if metric == "softmax" and weight is not None:
        rows = chunk_rows(weight)
        parts = zip(at.loc.to(weight.dtype).split(rows), move.to(weight.dtype).split(rows), strict=True)
        return torch.cat(
            [
                softmax_shift((loc @ weight.T).float().log_softmax(-1), (d @ weight.T).float())[0]
                for loc, d in parts
            ]
        )
    raise ConfigError(f"metric={metric!r}: expected one of {', '.join(METRICS)} with what it needs")


class Met(NamedTuple):
    """Outcome of `meet_budget`.

    Attributes:
        scale: factor on the delta.
        drift: mean drift at that scale, nats.
        evaluations: how often the drift was measured.
    """

    scale: float
    drift: float
    evaluations: int


def meet_budget(
    mean_drift: Callable[[float], float],
    value: float,
    *,
    start: float = 1.0,
    power: float = 2.0,
    ceiling: float = 1.25,
    tries: int = 8,
) -> Met:
    """Find the factor on a delta at which its mean drift is within 5 % below the budget.

    Drift grows like a power of the factor, the square near the base; each step corrects by that power, fitted to
    the last two measurements once there are two, and a bracket keeps it safe where that misleads. Fails closed:
    if nothing in the band is found, the largest factor seen to be under the budget is taken, in the end 0.

    Args:
        mean_drift: measures the mean drift at a factor, nats.
        value: the budget, nats, > 0.
        start: factor to measure first, in (0, ceiling].
        power: first guess of that power.
        ceiling: largest factor, >= 1. A fit that ends far below its budget has found that more of this delta
            does not help its domain; stretching it to the budget would spend drift for nothing.
        tries: measurements at most.

    Returns:
        The factor and the drift measured there, <= value.
    """
    low, low_drift, high = 0.0, 0.0, math.inf
    factor = min(start, ceiling)
    before: tuple[float, float] | None = None
    for attempt in range(1, tries + 1):
        found = mean_drift(factor)
        if found > value:
            high = min(high, factor)
        elif factor >= low:
            low, low_drift = factor, found
        if 0.95 * value <= found <= value or low == ceiling:
            return Met(factor, found, attempt)
        if before is not None and min(found, before[1]) > 0 and found != before[1]:
            power = math.log(found / before[1]) / math.log(factor / before[0])
        before = (factor, found)
        guess = factor * (AIM * value / found) ** (1 / min(max(power, 0.5), 4.0)) if found > 0 else ceiling
        guess = min(guess, ceiling)
        factor = guess if low < guess < high else (low + min(high, ceiling)) / 2
    return Met(low, low_drift, tries)
