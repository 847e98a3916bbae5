"""A drift constraint on base text: what it limits, and what a fit is penalised for."""

import math
from dataclasses import dataclass

from torch import Tensor

from tether.delta.head import METRICS
from tether.errors import ConfigError

__all__ = ["Budget", "cvar"]


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
