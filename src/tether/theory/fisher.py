"""Fusion weighted by Fisher information, ``(sum F_k)^-1 sum F_k theta_k``, and bounds on how far it moves."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tether.cauchy.divergence import drift
from tether.errors import ConfigError, ShapeError

__all__ = [
    "cauchy_mean",
    "fisher_mean",
    "foreign_form",
    "own_form",
    "own_information",
    "usual_matrices",
]


def fisher_mean(points: Float[Tensor, "..."], fishers: Float[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Fuse parameters, or moves from a common base, by their Fisher matrices.

    ``(sum F_k)^-1 sum F_k theta_k``: the point that minimises ``sum (theta - theta_k)^T F_k (theta - theta_k)``. Fusing
    moves is fusing parameters: the base cancels. A weight of a model multiplies its matrix.

    Args:
        points: parameters or moves of N models, shape (N, ..., d).
        fishers: symmetric positive semi-definite matrices, shape (N, ..., d, d); diagonal ones are given as matrices.

    Returns:
        The fused point, shape (..., d), float64.

    Raises:
        ShapeError: the shapes do not belong together.
        ConfigError: the sum of the matrices is not positive definite, so that the fused point is not determined.

    Reference:
        Matena and Raffel 2022, Merging models with Fisher-weighted averaging, equation 4; spec document 1, 2.4.

    Example:
        >>> import torch
        >>> moves = torch.tensor([[1.0, 1.0], [3.0, 5.0]])
        >>> fishers = torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2)])
        >>> fisher_mean(moves, fishers).round(decimals=6)
        tensor([2., 2.], dtype=torch.float64)
    """
    if fishers.shape != (*points.shape, points.shape[-1]):
        raise ShapeError(
            f"points {tuple(points.shape)} and matrices {tuple(fishers.shape)}: expected a matrix of "
            f"{points.shape[-1]} x {points.shape[-1]} for each point"
        )
    points, fishers = points.double(), fishers.double()
    factor, failed = torch.linalg.cholesky_ex(fishers.sum(0))
    if bool((failed != 0).any()) or not bool(factor.isfinite().all()):
        raise ConfigError(
            "the sum of the Fisher matrices is not positive definite: some direction moves no output of any model; add "
            "the base's matrix with a move of 0, or a ridge"
        )
    return torch.cholesky_solve((fishers @ points.unsqueeze(-1)).sum(0), factor).squeeze(-1)


def _matrices(y: Tensor, weights: Tensor) -> Tensor:
    """Return ``F_k = y_k y_k^T + a_k 1``, shape (N, ..., d, d)."""
    ridge = weights.reshape(*weights.shape, *[1] * (y.ndim + 1 - weights.ndim))
    return y.unsqueeze(-1) * y.unsqueeze(-2) + ridge * torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)


def _form(move: Tensor, matrix: Tensor) -> Tensor:
    """Return ``1/2 move^T matrix move``."""
    return ((matrix @ move.unsqueeze(-1)).squeeze(-1) * move).sum(-1) / 2


def usual_matrices(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point with matrices that can be added up and inverted in float64."""
    return x, 3 * torch.tanh(y / 3), 0.01 + weights.abs()


def _known(weights: Tensor, bound: Tensor) -> Tensor:
    """Return the bound where all matrices are positive definite, inf elsewhere: nothing is claimed."""
    return torch.where((weights > 0).all(0), bound, torch.inf)


def own_form(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the form of the fused move by the sum of the matrices, and the sum of each move's form by its own.

    Moves are x, matrices ``y_k y_k^T + a_k 1``; nothing is claimed where an ``a_k`` is not positive.
    """
    matrices = _matrices(y, torch.where(weights > 0, weights, 1))
    fused = fisher_mean(x, matrices)
    return _form(fused, matrices.sum(0)), _known(weights, _form(x, matrices).sum(0))


def foreign_form(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the form of the fused move by the identity, the base's matrix, and the sum of each move's."""
    matrices = _matrices(y, torch.where(weights > 0, weights, 1))
    fused = fisher_mean(x, matrices)
    return fused.square().sum(-1) / 2, _known(weights, x.square().sum((0, -1)) / 2)


def _shares(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return each delta's share of the information about the log scale and about the location, by dimension."""
    log_weights = weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim)).log()
    return log_weights.exp().expand(x.shape), (log_weights - 2 * x).softmax(0)


def cauchy_mean(
    x: Float[Tensor, "n *batch d"], y: Float[Tensor, "n *batch d"], weights: Float[Tensor, "n *#batch"]
) -> tuple[Float64[Tensor, "*batch d"], Float64[Tensor, "*batch d"]]:
    """Fuse moved Cauchy laws of one context by their own Fisher information.

    That of a Cauchy law is 1/2 about its log scale, ``1 / (2 scale^2)`` about its location, and nothing between them.
    So log scales have their weighted mean, and locations the mean with weights ``a_k e^(-2 x_k)``: the sharper a law,
    the more it counts.

    Args:
        x: changes of the log scale, shape (N, ..., d).
        y: changes of the location over the base scale, shape (N, ..., d).
        weights: shares of the deltas, positive, adding up to 1, shape (N,) or (N, ...).

    Returns:
        Change of the log scale and of the location of the fused law, shape (..., d) each, float64.

    Reference:
        docs/how-drift-adds-up.md, Theorem 10.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.0], [-1.0]]), torch.tensor([[0.0], [1.0]])
        >>> cauchy_mean(x, y, torch.tensor([0.5, 0.5]))
        (tensor([-0.5000], dtype=torch.float64), tensor([0.8808], dtype=torch.float64))
    """
    of_scale, of_location = _shares(x.double(), weights.double())
    return (of_scale * x).sum(0), (of_location * y).sum(0)


def own_information(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift of Cauchy laws fused by their own Fisher information, and its bound from each one's drift.

    ``e^D - 1 <= sum max(a_k, (3 f_k + a_k) / 4) (e^(D_k) - 1)`` in each dimension. ``a_k`` are the shares of the deltas
    and ``f_k`` those of the information about the location.
    """
    of_scale, of_location = _shares(x, weights)
    moved = drift(*cauchy_mean(x, y, weights)).sum(-1)
    most = torch.maximum(of_scale, (3 * of_location + of_scale) / 4)
    return moved, torch.log1p((most * torch.expm1(drift(x, y))).sum(0)).sum(-1)
