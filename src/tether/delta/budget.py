"""Drift metrics, and bringing a delta to its budget on base text that it was not trained on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tether.delta.head import METRICS
from tether.errors import ConfigError

__all__ = ["Budget", "Met", "cvar", "meet_budget"]

AIM = 0.98
"""Share of the budget that the last scaling aims at; anything in [0.95, 1] is accepted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A drift constraint on base text, or the source document's plain penalty.

    Attributes:
        value: largest drift on base text, nats per token, > 0; None with a penalty.
        metric: one of `METRICS`.
        penalty: lambda of the plain penalty on the latent drift at the domain's own contexts (spec document
            2), >= 0; then nothing is constrained.
        quantile: which quantile of the drift over contexts the value limits, in (0, 1); None limits the mean.
        hard: limit the drift of every single training context instead, of the domain and of base text, as
            the source document writes its constraint.
        stretch: largest factor, >= 1, by which a fit that ends below its budget is stretched to it. Such a
            fit has found that more of this delta does not help its domain (docs/log.md).
    """

    value: float | None = 0.05
    metric: str = "softmax"
    penalty: float | None = None
    quantile: float | None = None
    hard: bool = False
    stretch: float = 1.25

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"metric={self.metric!r}: expected one of {', '.join(METRICS)}")
        if (self.value is None) == (self.penalty is None):
            raise ConfigError("expected either a budget or a penalty; a penalty replaces the budget")
        if self.value is not None and not (math.isfinite(self.value) and self.value > 0):
            raise ConfigError(f"budget={self.value}: expected a drift in nats per token, finite and > 0")
        if self.penalty is not None and not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise ConfigError(f"penalty={self.penalty}: expected a finite number >= 0")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ConfigError(f"quantile={self.quantile}: expected a share in (0, 1), or none for the mean")
        if self.hard and (self.quantile is not None or self.penalty is not None):
            raise ConfigError("a hard budget limits every context: leave out quantile and penalty")
        if self.penalty is not None and self.quantile is not None:
            raise ConfigError("a penalty limits nothing: leave out quantile")
        if not self.stretch >= 1:
            raise ConfigError(f"stretch={self.stretch}: expected a factor >= 1")

    def statistic(self, drifts: Tensor) -> Tensor:
        """Condense drifts of contexts to what the value limits.

        Args:
            drifts: nats, shape (n,).

        Returns:
            Their mean, their quantile (the order statistic from above), or the largest; a scalar.
        """
        if self.hard:
            return drifts.max()
        if self.quantile is None:
            return drifts.mean()
        rank = min(math.ceil(self.quantile * len(drifts)), len(drifts))
        return drifts.kthvalue(max(rank, 1)).values

    def pressed(self, drifts: Tensor) -> Tensor:
        """Give what a fit is penalised for: a mean whose gradient lowers the statistic.

        Args:
            drifts: nats at some contexts, shape (n,).

        Returns:
            The mean drift; for a quantile, that of the contexts from that quantile on (CVaR, its convex upper
            bound); for a hard budget, the mean excess over the value, in contexts above it.
        """
        if self.hard and self.value is not None:
            return (drifts - self.value).clamp(min=0).mean()
        if self.quantile is None:
            return drifts.mean()
        return cvar(drifts, self.quantile)


def cvar(values: Tensor, quantile: float) -> Tensor:
    """Mean of the values from a quantile on, an upper bound of that quantile that is convex in the values.

    Args:
        values: shape (n,).
        quantile: in (0, 1).

    Returns:
        A scalar.

    Reference:
        Rockafellar and Uryasev 2000, Optimization of conditional value-at-risk, for equal weights.

    Example:
        >>> import torch
        >>> cvar(torch.arange(1.0, 11.0), 0.8)
        tensor(9.5000)
    """
    return values.topk(max(1, round((1 - quantile) * len(values)))).values.mean()


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
        if not found <= value:  # what is not a number is over any budget
            high = min(high, factor)
        elif factor >= low:
            low, low_drift = factor, found
        if 0.95 * value <= found <= value or low == ceiling:
            return Met(factor, found, attempt)
        usable = math.isfinite(found) and factor > 0
        if (
            usable
            and before is not None
            and min(found, before[1]) > 0
            and found != before[1]
            and factor != before[0]
        ):
            power = math.log(found / before[1]) / math.log(factor / before[0])
        if usable:
            before = (factor, found)
        guess = ceiling
        if found > 0:
            guess = min(factor * (AIM * value / found) ** (1 / min(max(power, 0.5), 4.0)), ceiling)
        middle = (low + min(high, ceiling)) / 2
        if 0 < low < 0.01 * min(high, ceiling):  # ends that are orders of magnitude apart
            middle = math.sqrt(low * min(high, ceiling))
        factor = guess if low < guess < high else middle
    return Met(low, low_drift, tries)
