"""The two sides of every statement about fused drift, and where its assumptions hold.

Every function takes x and y of shape (N, ..., d) and weights (N,) or (N, ...). Sides return drift and bound, shape
(...); places return x, y and weights of the same shapes.
"""

import math

import torch
from torch import Tensor

from tether.cauchy.charts import fuse, to_chart
from tether.cauchy.divergence import distance, drift
from tether.theory.bounds import fused_drift_bound, scaling_bound_total
from tether.theory.constants import MONOTONE_DRIFT, equal_constant
from tether.theory.statements import Sides, fused_drift, positive_scale_drift, single_drifts

__all__ = [
    "at_least_1",
    "charted",
    "equal",
    "gram",
    "location",
    "positive_scale",
    "quadratic",
    "rooted",
    "scale",
    "scaled",
    "scaling_lemma",
    "shared",
    "shrinking",
    "shrunk",
    "signs",
    "sums",
    "turned",
    "widened",
    "widening",
]


def _roots(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return ``(sum |a_k| sqrt(D_k))^2``."""
    nats = single_drifts(x, y)
    size = weights.abs().reshape(*weights.shape, *[1] * (nats.ndim - weights.ndim))
    return (size * nats.sqrt()).sum(0).square()


def sums(factor: float, power: float) -> Sides:
    """Return the sides of ``D(sum p_k) <= factor N^power sum D(p_k)``."""

    def sides(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return fused_drift(x, y, weights, "linear"), factor * len(x) ** power * single_drifts(x, y).sum(0)

    return sides


def rooted(factor: float) -> Sides:
    """Return the sides of ``D(sum a_k p_k) <= factor (sum |a_k| sqrt D(p_k))^2``."""

    def sides(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return fused_drift(x, y, weights, "linear"), factor * _roots(x, y, weights)

    return sides


def charted(chart: str) -> Sides:
    """Return the sides of the a-priori bound that certificates use in a chart."""

    def sides(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return fused_drift(x, y, weights, chart), fused_drift_bound(single_drifts(x, y), weights, chart)

    return sides


def _only_where(holds: Tensor, bound: Tensor) -> Tensor:
    """Return the bound where the assumptions hold in every dimension, inf elsewhere: nothing is claimed."""
    return torch.where(holds.all(-1), bound, torch.inf)


def location(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the triangle inequality of root drifts, claimed where locations alone move."""
    moved, bound = rooted(1.0)(x, y, weights)
    return moved, _only_where((x == 0).all(0), bound)


def scale(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the triangle inequality of root drifts, claimed where scales alone move."""
    moved, bound = rooted(1.0)(x, y, weights)
    return moved, _only_where((y == 0).all(0), bound)


def _no_net_sharpening(x: Tensor) -> Tensor:
    return x.sum(0) + (-x).amax(0) >= 0


def signs(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of Lemma A: the triangle inequality, claimed where there is no net sharpening."""
    moved, bound = rooted(1.0)(x, y, weights)
    return moved, _only_where(_no_net_sharpening(x), bound)


def turned(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point with the changes of scale turned round where they sharpen on balance."""
    return torch.where(_no_net_sharpening(x), x, -x), y, weights


def widening(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of Lemma B: splitting off a first delta that widens, all shifts to one side."""
    rest = single_drifts(x[1:].sum(0), y[1:].sum(0))
    bound = (single_drifts(x[0], y[0]).sqrt() + rest.sqrt()).square()
    return fused_drift(x, y, weights, "linear"), _only_where((x[0] >= 0) & (y >= 0).all(0), bound)


def widened(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point with a first delta that widens and all shifts to one side."""
    return torch.cat([x[:1].abs(), x[1:]]), y.abs(), weights


def equal(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the conjecture that equal deltas are the worst, with ``C_N``."""
    return fused_drift(x, y, weights, "linear"), equal_constant(len(x)).value * _roots(x, y, weights)


def scaled(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the scaling bound of one delta."""
    weights = weights.detach()  # the bound is tabled by weight: searches move the delta alone
    bound = scaling_bound_total(single_drifts(x, y)[0], weights[0])
    return fused_drift(x, y, weights, "linear"), bound


def scaling_lemma(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the scaling lemma, summed over dimensions."""
    weight = weights[0].unsqueeze(-1)
    stretch = torch.exp((1 - weight).abs() * distance(x[0], y[0]))
    bound = torch.log1p(weight.square() * stretch * torch.expm1(drift(x[0], y[0]))).sum(-1)
    return fused_drift(x, y, weights, "linear"), bound


def shrinking(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift of a shrunk delta and of the delta, claimed below the threshold in each dimension."""
    small = (drift(x[0], y[0]) <= MONOTONE_DRIFT) & ((weights[0] >= 0) & (weights[0] <= 1)).unsqueeze(-1)
    return fused_drift(x, y, weights, "linear"), _only_where(small, single_drifts(x, y)[0])


def shrunk(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image of the plane among the deltas below the threshold: the width, then the room for the shift."""
    most = math.expm1(MONOTONE_DRIFT) * (1 - 1e-12)
    half = math.asinh(math.sqrt(most)) * torch.tanh(x)
    shift = 2 * torch.exp(half) * torch.sqrt(most - torch.sinh(half).square()) * torch.tanh(y)
    return 2 * half, shift, torch.sigmoid(weights)


def quadratic(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift in the symmetric chart and a quarter of the squared sum of the coordinates."""
    signed = weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim))
    first, second = to_chart(x, y, "symmetric")
    total = (signed * first).sum(0).square() + (signed * second).sum(0).square()
    return fused_drift(x, y, weights, "symmetric"), total.sum(-1) / 4


def gram(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift in the rootkl chart and its quadratic form in the weights."""
    signed = weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim))
    first, second = to_chart(x, y, "rootkl")
    norm = (signed * first).sum(0).square() + (signed * second).sum(0).square()
    return single_drifts(*fuse(x, y, weights, "rootkl")), norm.sum(-1)


def positive_scale(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift when scales are added, and N times the sum of drifts."""
    return positive_scale_drift(x, y, weights), len(x) * single_drifts(x, y).sum(0)


def shared(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales that share a positive fused scale ``e^(sum x)`` out, all changing it in one direction."""
    total = x.sum(0).clamp(-30, 30)
    return torch.log1p(torch.softmax(x, 0) * torch.expm1(total)), y, weights


def at_least_1(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point with weights of at least 1."""
    return x, y, 1 + weights.abs()
