"""What is claimed about the drift of fused deltas, as functions that can be tested.

A ``Statement`` says ``drift <= bound``: ``sides`` evaluates both for any batch of deltas and weights. Where it is about
laws or texts instead, its sides read x and y as scores or losses (``tether.theory.mixtures``). Its verdict
is ``refuted`` (an exact counterexample exists), ``proved`` (on paper, written out in docs/how-drift-adds-up.md),
``enclosed`` (a proof whose computation is done in ball arithmetic) or ``supported`` (numbers only). The
statements themselves are listed in ``tether.theory.catalogue``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tether.cauchy.charts import fuse
from tether.cauchy.divergence import drift
from tether.errors import ConfigError, ShapeError

__all__ = [
    "Place",
    "Sides",
    "Statement",
    "Verdict",
    "as_given",
    "fused_drift",
    "is_shared",
    "positive_scale_drift",
    "single_drifts",
]

ROUNDING = 1e-9
"""How far the sum of weights that are shares may be from 1."""

Verdict: TypeAlias = Literal["refuted", "proved", "enclosed", "supported"]
Sides: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From x, y of shape (N, ..., d) and weights (N,) or (N, ...) to drift and bound, shape (...)."""
Place: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From any x, y, weights of these shapes to some at which a statement's assumptions hold, differentiably."""


def as_given(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point unchanged: the ``place`` of a statement about all deltas and weights.

    Args:
        x: changes of the log scale.
        y: changes of the location over the base scale.
        weights: any.

    Returns:
        The same.
    """
    return x, y, weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """An inequality about fused drift, where it comes from, and what became of it."""

    name: str
    text: str
    """The inequality in mathematical notation."""
    assumptions: str
    source: str
    """Document and section."""
    sides: Sides
    verdict: Verdict
    basis: str
    """What the verdict rests on: a counterexample, a section of the page of proofs, a computation."""
    weights: Literal["unit", "any", "at least 1", "shares"] = "unit"
    """The weights it is about; others are refused. Shares are not negative and add up to 1."""
    count: int | None = None
    """The number of deltas it is about; None for any."""
    least_dimension: int = 1
    """The least number of dimensions, or contexts, that it is about."""
    place: Place = as_given
    """Brings arbitrary deltas and weights to where the assumptions hold, so that searches stay inside them."""

    def slack(
        self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], weights: Float[Tensor, "..."]
    ) -> Float64[Tensor, "..."]:
        """Bound minus drift: negative where the statement fails.

        Args:
            x: changes of the log scale, shape (N, ..., d).
            y: changes of the location over the base scale, of the same shape.
            weights: shape (N,), or (N, ...) for one a point.

        Returns:
            Slack in nats (in the unit of k for ``appendix``), shape (...), float64; inf where the statement's
            assumptions do not hold.

        Raises:
            ConfigError: the statement is about another number of deltas or about other weights.
            ShapeError: the shapes do not fit together.
        """  # noqa: DOC502 - raised by evaluate
        moved, bound = self.evaluate(x, y, weights)
        return bound - moved

    def ratio(
        self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], weights: Float[Tensor, "..."]
    ) -> Float64[Tensor, "..."]:
        """Drift over bound: above 1 where the statement fails.

        Args:
            x: changes of the log scale, shape (N, ..., d).
            y: changes of the location over the base scale, of the same shape.
            weights: shape (N,), or (N, ...) for one a point.

        Returns:
            Dimensionless, shape (...), float64; 0 where both sides are 0 or the assumptions do not hold.

        Raises:
            ConfigError: the statement is about another number of deltas or about other weights.
            ShapeError: the shapes do not fit together.
        """  # noqa: DOC502 - raised by evaluate
        moved, bound = self.evaluate(x, y, weights)
        return torch.where(bound > 0, moved / torch.where(bound > 0, bound, 1), 0)

    def evaluate(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return drift and bound.

        Args:
            x: changes of the log scale, shape (N, ..., d).
            y: changes of the location over the base scale, of the same shape.
            weights: shape (N,), or (N, ...) for one a point.

        Returns:
            Both of shape (...), float64.

        Raises:
            ConfigError: the statement is about another number of deltas or about other weights.
            ShapeError: the shapes do not fit together.
        """
        if x.ndim < 2 or x.shape != y.shape or weights.shape not in {x.shape[:1], x.shape[:-1]}:
            raise ShapeError(
                f"x {tuple(x.shape)}, y {tuple(y.shape)}, weights {tuple(weights.shape)}: expected (N, ..., d) twice,"
                " and (N,) or (N, ...) weights"
            )
        if self.count is not None and len(x) != self.count:
            raise ConfigError(
                f"{self.name} is about {self.count} deltas, but {len(x)} are given: give {self.count}"
            )
        if x.shape[-1] < self.least_dimension:
            raise ConfigError(
                f"{self.name} is about {self.least_dimension} dimensions and more, but {x.shape[-1]} are given"
            )
        if self.weights == "unit" and not (weights == 1).all():
            raise ConfigError(f"{self.name} is about weights 1, but others are given: leave the weights out")
        if self.weights == "at least 1" and not (weights >= 1).all():
            raise ConfigError(f"{self.name} is about weights of 1 and more: give such weights")
        if self.weights == "shares" and not is_shared(weights):
            raise ConfigError(
                f"{self.name} is about weights that are not negative and add up to 1: give such weights"
            )
        return self.sides(x.double(), y.double(), weights.double())


def is_shared(weights: Tensor) -> bool:
    """Tell whether weights are shares of 1.

    Args:
        weights: shape (N,) or (N, ...).

    Returns:
        Whether none is negative and they add up to 1 over the first axis, up to rounding.
    """
    return bool((weights >= 0).all() and ((weights.sum(0) - 1).abs() <= ROUNDING).all())


def single_drifts(x: Tensor, y: Tensor) -> Tensor:
    """Drift of each delta alone.

    Args:
        x: changes of the log scale, shape (N, ..., d).
        y: changes of the location over the base scale, of the same shape.

    Returns:
        Nats, summed over dimensions, shape (N, ...).
    """
    return drift(x, y).sum(-1)


def fused_drift(x: Tensor, y: Tensor, weights: Tensor, chart: str) -> Tensor:
    """Drift of the weighted sum of deltas in a chart.

    Args:
        x: changes of the log scale, shape (N, ..., d).
        y: changes of the location over the base scale, of the same shape.
        weights: shape (N,) or (N, ...).
        chart: one of ``tether.cauchy.charts.CHARTS``.

    Returns:
        Nats, summed over dimensions, shape (...).
    """
    return single_drifts(*fuse(x, y, weights, chart))


def positive_scale_drift(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Drift when the scales themselves are added, ``scale = 1 + sum a_k (e^{x_k} - 1)``.

    Args:
        x: changes of the log scale of each delta alone, shape (N, ..., d).
        y: changes of the location over the base scale, of the same shape.
        weights: shape (N,) or (N, ...).

    Returns:
        Nats, summed over dimensions, shape (...); inf where a scale is not positive, so that there is no law.
    """
    weights = weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim))
    change, shift = (weights * torch.expm1(x)).sum(0), (weights * y).sum(0)
    lawful = change > -1
    scale = torch.where(lawful, 1 + change, 1)
    nats = torch.log1p((change.square() + shift.square()) / (4 * scale))
    return torch.where(lawful, nats, torch.inf).sum(-1)
