"""Statistics of a gate's windows: a mean, principal directions, and a covariance drawn towards one variance."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SHARES", "fit_stage"]

EMPTY = 1e-9
"""Share of the largest variance below which a direction counts as empty."""
NARROWEST = 1e-3
"""Least variance in any direction: states are kept in half precision."""
SHARES = (0.0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
"""How far a covariance may be drawn towards one variance."""


def fit_stage(samples: Tensor, fold: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Fit the statistics of one stage of a gate's window.

    Cost: one product of the samples with themselves, n x H^2, and an eigendecomposition of each fold's rest.

    Args:
        samples: window means, shape (n, H).
        fold: part that each sample's document was dealt to, shape (n,).
        rank: principal directions kept.

    Returns:
        Center (H,), whitening (rank, H) and precision (), float32; and the squared distance of each sample under
        statistics without its own fold, shape (n,).
    """
    middle = samples.double().mean(0)
    # Around the common mean, so that differences of sums lose nothing.
    samples = samples.double() - middle
    parts = {number: fold == number for number in fold.unique().tolist()}
    moments: dict[int, _Moments] = {}
    if len(samples) > 2 * samples.shape[1]:
        moments = {number: _Moments.of(samples[out]) for number, out in parts.items()}
        every = _Moments(
            len(samples),
            *(torch.stack(v).sum(0) for v in zip(*(m[1:] for m in moments.values()), strict=True)),
        )
    total: Tensor = torch.zeros(len(SHARES), dtype=torch.float64)
    distances = torch.zeros(len(SHARES), len(samples), dtype=torch.float64)
    for number, out in parts.items():
        left = every.without(moments[number]).spread(rank) if moments else _spread(samples[~out], rank)
        squares = left.squares(samples[out])
        for row, share in enumerate(SHARES):
            drawn = left.shrunk(share)
            distances[row, out] = drawn.distance(*squares)
            total[row] -= (distances[row, out] + drawn.log_det()).sum()
    best = int(total.argmax())
    fitted = (every.spread(rank) if moments else _spread(samples, rank)).shrunk(SHARES[best])
    whitening = torch.zeros(rank, samples.shape[1])
    whitening[: len(fitted.variance)] = (fitted.direction / fitted.variance.sqrt().unsqueeze(-1)).float()
    center = (fitted.center + middle).float()
    return (center, whitening, (1 / fitted.outside).float()), distances[best].float()


class _Spread(NamedTuple):
    """Mean and covariance of some samples: `variance` along `direction`, one mean variance `outside` of them."""

    center: Tensor  # (H,)
    direction: Tensor  # (r, H)
    variance: Tensor  # (r,)
    outside: Tensor  # ()

    def shrunk(self, share: float) -> "_Spread":
        size, kept = len(self.center), len(self.variance)
        level = (self.variance.sum() + (size - kept) * self.outside) / size
        drawn = ((1 - share) * v + share * level for v in (self.variance, self.outside))
        return self._replace(
            **dict(zip(("variance", "outside"), (v.clamp(min=NARROWEST) for v in drawn), strict=True))
        )

    # Squares along each direction, and of all that is left: the same for every share.
    def squares(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        away = samples - self.center
        along = (away @ self.direction.T).square_()
        return along, (away.square_().sum(-1) - along.sum(-1)).clamp_(min=0)

    def distance(self, along: Tensor, rest: Tensor) -> Tensor:
        return along @ (1 / self.variance) + rest / self.outside

    def log_det(self) -> Tensor:
        return self.variance.log().sum() + (len(self.center) - len(self.variance)) * self.outside.log()


class _Moments(NamedTuple):
    """Sums over samples, from which those without a fold are a difference."""

    size: int
    total: Tensor  # (H,)
    products: Tensor  # (H, H)

    @classmethod
    def of(cls, samples: Tensor) -> "_Moments":
        return cls(len(samples), samples.sum(0), samples.T @ samples)

    def without(self, part: "_Moments") -> "_Moments":
        return _Moments(self.size - part.size, self.total - part.total, self.products - part.products)

    def spread(self, rank: int) -> _Spread:
        center = self.total / self.size
        gram = self.products - self.size * torch.outer(center, center)
        value, vector = torch.linalg.eigh(gram / max(self.size - 1, 1))
        variance, outside = _kept(value, self.size, len(center), rank)
        return _Spread(center, vector[:, -len(variance) :].T, variance, outside)


def _spread(samples: Tensor, rank: int) -> _Spread:
    count, size = samples.shape
    if count >= size:
        return _Moments.of(samples).spread(rank)
    # The smaller of the two products has the same variances.
    center = samples.mean(0)
    away = samples - center
    value, vector = torch.linalg.eigh(away @ away.T / max(count - 1, 1))
    variance, outside = _kept(value, count, size, rank)
    direction = torch.nn.functional.normalize(vector[:, -len(variance) :].T @ away, dim=-1)
    return _Spread(center, direction, variance, outside)


# The largest variances, and the mean of all others.
def _kept(value: Tensor, count: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    # Directions without variance are noise: not even orthogonal when they come from the smaller product.
    kept = min(rank, count - 1, size, max(1, int((value > EMPTY * value[-1]).sum())))
    variance = value[-kept:].clamp(min=0)
    return variance, (value.sum() - variance.sum()).clamp(min=0) / max(size - kept, 1)
