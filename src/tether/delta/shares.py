"""Who accounts for the drift of a fusion: each delta's share, by Aumann and Shapley."""

import numpy as np
import torch
from torch import Tensor

from tether.cauchy.charts import from_chart
from tether.cauchy.divergence import drift

__all__ = ["shares"]

NODES = 24
"""Points of the quadrature along the way from base to fusion."""


def shares(first: Tensor, second: Tensor, weights: Tensor, chart: str) -> tuple[Tensor, Tensor]:
    """Divide the drift of a fusion among its deltas.

    A delta's share is what its own coordinates contribute while all weights grow together from 0 to theirs:
    integral over t from 0 to 1 of a_k dD/da_k (t a). The shares add up to the drift (Aumann and Shapley); in
    `rootkl` they are the rows of a^T M a. A share can be negative: such a delta takes drift back.

    Cost: linear in the number of deltas; the integral is taken over the fused coordinates alone.

    Args:
        first: first coordinates of the deltas in the chart, shape (N, n, C).
        second: second coordinates, shape (N, n, C).
        weights: weights, shape (N, n).
        chart: the chart.

    Returns:
        Shares, nats, shape (N, n), and the drift of the fusion, shape (n,).

    Reference:
        Aumann and Shapley 1974, Values of Non-Atomic Games.
    """
    scaled = [part.double() * weights.double().unsqueeze(-1) for part in (first, second)]
    total = [part.sum(0) for part in scaled]
    nats = drift(*from_chart(total[0], total[1], chart))
    if chart in ("geodesic", "rootkl"):
        # Drift is a function of the length of the coordinates alone.
        square = total[0].square() + total[1].square()
        slopes = [torch.where(square > 0, part * nats / square.clamp(min=1e-300), 0) for part in total]
    else:
        slopes = _mean_slopes(total[0], total[1], chart)
    parts = scaled[0] * slopes[0] + scaled[1] * slopes[1]
    along = total[0] * slopes[0] + total[1] * slopes[1]
    # What the quadrature misses is spread in proportion, so that the shares add up exactly.
    exact = torch.where(along > 0, nats / along.clamp(min=1e-300), 0)
    return (parts * exact).sum(-1), nats.sum(-1)


def _mean_slopes(first: Tensor, second: Tensor, chart: str) -> list[Tensor]:
    """Return the gradient of the drift by both coordinates, averaged over the way from the base."""
    node, weight = (
        part.to(first) / 2 for part in map(torch.as_tensor, np.polynomial.legendre.leggauss(NODES))
    )
    node = node + 0.5
    means = [torch.zeros_like(first), torch.zeros_like(second)]
    for place, share in zip(node, weight, strict=True):
        # A drift of thousands of nats is gained in the first hundredth of the way: t = place^4.
        t, density = place**4, 4 * place**3 * share
        half = t * first / 2
        # D = 2 log cosh(x/2) + log(1 + q), q = (w / (2 cosh(x/2)))^2; in `linear`, w = y e^{-x/2}.
        narrow = torch.exp(-half) if chart == "linear" else 1.0
        scale = narrow / torch.cosh(half.clamp(-300, 300)) / 2
        root = t * second * scale
        rest = 1 / (1 + root.square())
        by_first = half.tanh() - root.square() if chart == "linear" else half.tanh()
        means[0] += density * by_first * rest
        means[1] += density * 2 * root * scale * rest
    return means
