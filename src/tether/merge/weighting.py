"""How the positions of sampled paths are weighted: the document's form in logs, and forms that are estimators."""

import math
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.errors import ConfigError, ShapeError

__all__ = ["GAMMA", "WEIGHTINGS", "PathWeights", "path_weights"]

WEIGHTINGS: Final = ("position", "paper", "self-normalised", "mean", "sum")
GAMMA: Final = {"position": 0.9, "paper": 0.99, "self-normalised": 0.99, "mean": 1.0, "sum": 1.0}
"""Discount of each form where none is given."""


class PathWeights(NamedTuple):
    """Weights of the positions of K paths of at most T tokens; leading axes are samples.

    The weight that a form asks for is ``exp(log_mass) * weights``: the document's weights of long paths lie
    below the smallest float, so their sum is kept as a logarithm.

    Attributes:
        weights: non-negative, sum 1 over existing positions, shape (..., K, T), float64.
        log_mass: logarithm of the sum of the weights asked for; 0 for forms that are averages, shape (...).
        effective: effective number of paths ``(sum W_k)^2 / sum W_k^2``, in [1, K], shape (...).
    """

    weights: Tensor
    log_mass: Tensor
    effective: Tensor


def path_weights(
    log_prob: Float[Tensor, "... K T"], lengths: Int[Tensor, "... K"], form: str, gamma: float | None = None
) -> PathWeights:
    """Weight the positions of sampled paths.

    With ``W_k`` the weight of path k and a(S_k) the mean of an activation over the path's positions:

    - ``paper``: ``sum_k p(S_k|x) gamma^(len_k - 1) a(S_k)``, in log space.
    - ``self-normalised``: the same divided by the sum of its weights.
    - ``position`` (default elsewhere): ``sum_t gamma^(t-1) mean_{k: len_k >= t} a_kt / sum_t gamma^(t-1)``: each
      position is divided by its survival probability (Horvitz and Thompson 1952), so it estimates the
      activation at position t whatever lengths were drawn, and positions far out count geometrically less.
    - ``mean``: ``sum_k a(S_k) / K``. ``sum``: ``sum_k len_k a(S_k) / K``, the path sums of the theorem.

    Args:
        log_prob: log p(token | before) of each position, nats; read where the position exists.
        lengths: tokens of each path, in [1, T].
        form: one of WEIGHTINGS.
        gamma: discount in (0, 1]; None takes the form's own.

    Returns:
        The weights.

    Raises:
        ConfigError: an unknown form, or a gamma outside (0, 1].
        ShapeError: shapes that do not belong together, or lengths outside [1, T].

    Reference:
        LAPE, steps 1 to 3; docs/lape-tefm.md, "is phi independent of len_max".

    Example:
        >>> import torch
        >>> found = path_weights(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([2, 1]), "position", 0.5)
        >>> found.weights
        tensor([[0.3333, 0.3333],
                [0.3333, 0.0000]], dtype=torch.float64)
    """
    if form not in WEIGHTINGS:
        raise ConfigError(f"unknown weighting {form!r}: choose one of {', '.join(WEIGHTINGS)}")
    gamma = GAMMA[form] if gamma is None else gamma
    if not 0 < gamma <= 1:
        raise ConfigError(f"gamma={gamma}: expected a discount in (0, 1]")
    longest = log_prob.shape[-1]
    if log_prob.shape[:-1] != lengths.shape or bool((lengths < 1).any()) or bool((lengths > longest).any()):
        raise ShapeError(
            f"log_prob has shape {tuple(log_prob.shape)}, lengths {tuple(lengths.shape)} in "
            f"[{int(lengths.min())}, {int(lengths.max())}]: expected (..., K, T) and (..., K) in [1, T]"
        )
    exists = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(-1)
    length = lengths.double().unsqueeze(-1)
    zero = torch.zeros(lengths.shape[:-1], dtype=torch.float64, device=lengths.device)
    if form == "position":
        discount = gamma ** torch.arange(longest, dtype=torch.float64, device=lengths.device)
        survivors = exists.sum(-2, keepdim=True)
        weights = exists * discount / survivors.clamp(min=1)
        weights = weights / weights.sum((-2, -1), keepdim=True)
        return PathWeights(weights, zero, _effective(weights.sum(-1)))
    count = lengths.shape[-1]
    if form in {"mean", "sum"}:
        path = length if form == "sum" else torch.ones_like(length)
        path = path * gamma ** (length - 1)
        mass = path.sum(-2).squeeze(-1)
        share = path / path.sum(-2, keepdim=True)
        log_mass = torch.log(mass / count) if form == "sum" else zero
    else:
        joint = torch.where(exists, log_prob.double(), 0).sum(-1, keepdim=True)
        log_path = joint + (length - 1) * math.log(gamma)
        log_sum = torch.logsumexp(log_path, dim=-2, keepdim=True)
        share = torch.exp(log_path - log_sum)
        log_mass = log_sum.squeeze(-1).squeeze(-1) if form == "paper" else zero
    return PathWeights(exists * share / length, log_mass, _effective(share.squeeze(-1)))


def _effective(path: Tensor) -> Tensor:
    return path.sum(-1).square() / path.square().sum(-1)
