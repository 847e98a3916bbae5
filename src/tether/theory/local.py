"""Document 2's first-order bound on a weighted sum of deltas, with what it leaves out: an explicit excess.

The document derives ``D(sum a_k p_k) <~ (sum |a_k| sqrt(D_k))^2`` for small deltas, where a drift is about a quarter of
the squared length of ``p``. Both steps of that derivation, from drift to length and back, are bounded here at any size.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tether.cauchy.divergence import drift
from tether.errors import ConfigError
from tether.theory.bounds import K_INF, OUTWARD

__all__ = ["SLOPE", "local_drift_bound", "squared_length_bound", "within"]

SLOPE = 2 / math.sqrt(27)
"""Largest value of ``c (1 - c^2)`` for ``0 <= c <= 1``: how much longer, or how much cheaper, a skew move is."""


def squared_length_bound(nats: Float[Tensor, "*batch"]) -> Float64[Tensor, "*batch"]:
    """Bound a quarter of the squared length of a delta by its drift.

    With ``m = e^D - 1``, over any number of dimensions, ``|p|^2 / 4`` is at most
    ``m min(1 + 2/sqrt(27) (e^(2 sqrt(m)) - 1), (sqrt(m) + sqrt(1 + m))^2)``.

    Args:
        nats: drift of the delta, summed over dimensions, non-negative.

    Returns:
        Dimensionless, float64: above the drift itself by a share of about ``4/sqrt(27) sqrt(D)`` for small drifts.

    Reference:
        docs/how-drift-adds-up.md, Theorem 6 (proved). Assumption: linear chart.
    """
    rise = torch.expm1(nats.double())
    near = 1 + SLOPE * torch.expm1(2 * rise.sqrt())
    return rise * torch.minimum(near, (rise.sqrt() + (1 + rise).sqrt()).square())


def local_drift_bound(nats: Float[Tensor, "..."], weights: Float[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Bound the drift of a weighted sum of deltas in the linear chart by its first-order form plus an excess.

    With ``r = 2 sum |a_k| sqrt(l(D_k))``, ``l`` from ``squared_length_bound``, the drift of the sum is at most
    ``min(K_inf, 1 + 2 r / sqrt(27) + r^2 / 16) r^2 / 4``. For drifts of at most ``e`` and ``A = sum |a_k|`` that is
    ``(sum |a_k| sqrt(D_k))^2`` times ``1 + 4/sqrt(27) (1 + A) sqrt(e) + O(e)``, and no smaller factor of ``sqrt(e)``
    serves all deltas: one delta with weight ``-A`` attains it.

    Args:
        nats: drift of each delta alone, or a bound on it, summed over dimensions, nats, non-negative, shape (N, ...).
        weights: any finite real numbers, shape (N,), or (N, ...) for one a context.

    Returns:
        Bound on the drift of the sum, nats, shape (...), float64. Useful for drifts below about 0.1 nats.

    Raises:
        ConfigError: a drift is negative or nan, or a weight is not finite.

    Reference:
        docs/how-drift-adds-up.md, Theorem 6 (proved). Assumptions: linear chart, any N, d and signs.

    Example:
        >>> import torch
        >>> budget = torch.tensor([1e-4, 1e-4])
        >>> local_drift_bound(budget, torch.tensor([0.5, -0.5])) / 1e-4  # to first order it is 1
        tensor(1.0156, dtype=torch.float64)
    """
    nats, size = nats.double(), weights.double().abs()
    if not (nats >= 0).all():
        raise ConfigError(
            f"drifts {nats[~(nats >= 0)][:3].tolist()}: expected non-negative numbers of nats, as drift returns them"
        )
    if not size.isfinite().all():
        raise ConfigError("weights must be finite numbers, but some are not")
    size = size.reshape(*size.shape, *[1] * (nats.ndim - size.ndim))
    reach = 2 * torch.where(size == 0, 0, size * squared_length_bound(nats).sqrt()).sum(0)
    excess = (1 + SLOPE * reach + reach.square() / 16).clamp(max=K_INF)
    return excess * reach.square() / 4 * OUTWARD


def within(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the first-order bound with its excess.

    Args:
        x: changes of the log scale, shape (N, ..., d).
        y: changes of the location over the base scale, of the same shape.
        weights: shape (N,) or (N, ...).

    Returns:
        Drift of the weighted sum in the linear chart and its bound, nats, shape (...).
    """
    signed = weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim))
    moved = drift((signed * x).sum(0), (signed * y).sum(0)).sum(-1)
    return moved, local_drift_bound(drift(x, y).sum(-1), weights)
