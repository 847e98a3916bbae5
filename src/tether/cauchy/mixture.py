"""Mixtures of Cauchy laws: their distribution function and its inverse."""

import torch
from jaxtyping import Float
from torch import Tensor

from tether.cauchy.functional import cdf, icdf

__all__ = ["mixture_cdf", "quantile"]

STEPS = 2200
"""Halvings of a bracket at most: more than there are doublings from the smallest to the largest float64, so that a part
that is very far away costs the others no digits. About 60 are made where none is."""


def mixture_cdf(
    value: Float[Tensor, "*batch"],
    loc: Float[Tensor, "*batch parts"],
    scale: Float[Tensor, "*batch parts"],
    log_weights: Float[Tensor, "*batch parts"],
) -> Float[Tensor, "*batch"]:
    """Probability of a value or less under a mixture.

    Args:
        value: shape (...).
        loc: of the parts, shape (..., K).
        scale: of the parts, shape (..., K), > 0.
        log_weights: shape (..., K), their exponentials add up to 1; -inf for no weight.

    Returns:
        In [0, 1], shape (...).
    """
    return (log_weights.exp() * cdf(value.unsqueeze(-1), loc, scale)).sum(-1)


def quantile(
    level: float,
    loc: Float[Tensor, "*batch parts"],
    scale: Float[Tensor, "*batch parts"],
    log_weights: Float[Tensor, "*batch parts"],
) -> Float[Tensor, "*batch"]:
    """Value below which a mixture has a given probability.

    It lies between the smallest and the largest of the parts' own quantiles, and is found by halving that bracket.

    Args:
        level: in (0, 1); 0.5 for the median.
        loc: of the parts, shape (..., K).
        scale: of the parts, shape (..., K), > 0.
        log_weights: shape (..., K), their exponentials add up to 1; -inf for no weight.

    Returns:
        Shape (...), float64; a part's own quantile exactly where it has all the weight.

    Example:
        >>> import torch
        >>> halves = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
        >>> quantile(0.5, torch.tensor([-1.0, 3.0]), torch.ones(2), halves)
        tensor(1.0000, dtype=torch.float64)
    """
    loc, scale, log_weights = loc.double(), scale.double(), log_weights.double()
    own = icdf(torch.full_like(loc, level), loc, scale)
    counted = log_weights > -torch.inf
    low = own.masked_fill(~counted, torch.inf).amin(-1)
    high = own.masked_fill(~counted, -torch.inf).amax(-1)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if not bool(((middle > low) & (middle < high)).any()):
            break
        above = mixture_cdf(middle, loc, scale, log_weights) >= level
        high, low = torch.where(above, middle, high), torch.where(above, low, middle)
    return high
