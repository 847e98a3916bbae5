"""How far one Cauchy law lies from another: the drift, the KL divergence and the half-plane distance.

A delta is given by ``x``, the change of the log scale, and ``y``, the change of the location in units of the
base scale. All three functions are functions of ``S^2 = sinh(x/2)^2 + (y e^{-x/2} / 2)^2``: the KL divergence
is ``log1p(S^2)`` in both directions, the hyperbolic distance in the half-plane of (location, scale) is
``2 asinh(S)``.

torch registers ``kl_divergence(Cauchy, Cauchy)`` itself, so nothing is registered here. It subtracts two
logarithms, which in float32 returns 1.2e-7 or 0 for every drift below about 1e-7: use the functions below
wherever small drifts count.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["distance", "drift", "kl_divergence"]

# Within these ranges S^2 is at most 2.8e24 and nothing overflows in float32; outside, the drift is at least
# 13 nats and the form in logarithms has lost nothing.
DIRECT_X, DIRECT_Y = 30.0, 1e6


def drift(x: Float[Tensor, "*#batch"], y: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch"]:
    """Drift of a delta, per dimension: the KL divergence between base and moved Cauchy law.

    ``D(x, y) = log(((1 + e^x)^2 + y^2) / (4 e^x)) = log1p(S^2)``,
    ``S^2 = sinh(x/2)^2 + (y e^{-x/2} / 2)^2``. The second form keeps its relative accuracy down to the
    smallest deltas, where the first returns 0 or one rounding unit of 1. Deltas too large for it
    (``|x| > 30`` or ``|y| > 1e6``) go through
    ``|x| - 2 log 2 + logaddexp(2 log1p(e^-|x|), 2 log|y| - x - |x|)``, which no finite ``x``, ``y``
    overflows.

    Args:
        x: change of the log scale, any finite real number.
        y: change of the location over the scale of the base, any finite real number.

    Returns:
        Drift in nats, non-negative, of the broadcast shape. Within 4 ulp of the exact value for ``|x|`` and
        ``|y|`` from 1e-12 to 1e4 (measured in float32 and float64), the large ones included although
        ``e^x`` is not representable there. Differentiable, with gradient 0 at ``x = y = 0``.

    Reference:
        Chyzak and Nielsen 2019, A closed-form formula for the Kullback-Leibler divergence between Cauchy
        distributions (arXiv:1905.10965), section 2.

    Example:
        >>> import torch
        >>> drift(torch.tensor([0.0, 1e-4, 1e4]), torch.tensor([0.0, 1e-4, 0.0]))
        tensor([0.0000e+00, 4.9997e-09, 9.9986e+03])
    """
    widening, shift = _half_chords(x, y)
    small = torch.log1p(widening * widening + shift * shift)
    return torch.where(_fits(x, y), small, _large_drift(x, y))


def kl_divergence(
    p_loc: Float[Tensor, "*#batch"],
    p_scale: Float[Tensor, "*#batch"],
    q_loc: Float[Tensor, "*#batch"],
    q_scale: Float[Tensor, "*#batch"],
) -> Float[Tensor, "*batch"]:
    """KL divergence between two Cauchy laws; it is symmetric in them.

    ``log1p(((s_p - s_q)^2 + (l_p - l_q)^2) / (4 s_p s_q))``, which has no cancellation: the drift of the
    delta that leads from q to p.

    Args:
        p_loc: location of the first law, any real number.
        p_scale: its scale, in the units of ``p_loc``, positive.
        q_loc: location of the second law, same units.
        q_scale: its scale, same units, positive.

    Returns:
        Divergence in nats, non-negative, of the broadcast shape; within 5 ulp of the exact value.
        Differentiable, with gradient 0 where the laws agree.

    Reference:
        Chyzak and Nielsen 2019 (arXiv:1905.10965), section 2.

    Example:
        >>> import torch
        >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
        >>> kl_divergence(one, one, zero, one)  # log(5/4)
        tensor(0.2231)
    """
    twice_mean = 2 * p_scale.sqrt() * q_scale.sqrt()
    widening = (p_scale - q_scale) / twice_mean
    shift = (p_loc - q_loc) / twice_mean
    # Beyond S = 1e9, log1p(S^2) is 2 log S to rounding, and S^2 would overflow in float32.
    large = (widening.abs() > 1e9) | (shift.abs() > 1e9)
    bounded = widening.clamp(-1e9, 1e9).square() + shift.clamp(-1e9, 1e9).square()
    chord = torch.hypot(torch.where(large, widening, 1), torch.where(large, shift, 1))
    return torch.where(large, 2 * torch.log(chord), torch.log1p(bounded))


def distance(x: Float[Tensor, "*#batch"], y: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch"]:
    """Hyperbolic distance that a delta moves a Cauchy law in the half-plane of (location, scale).

    ``rho = 2 asinh(S)`` with the ``S`` of ``drift``, so that ``drift = 2 log cosh(rho / 2)``. Deltas beyond
    ``|x| > 30`` or ``|y| > 1e6`` use ``rho = D + 2 log1p(sqrt(1 - e^-D))`` and overflow nowhere.

    Args:
        x: change of the log scale, any finite real number.
        y: change of the location over the scale of the base, any finite real number.

    Returns:
        Distance, dimensionless (the half-plane of curvature -1), non-negative, of the broadcast shape;
        within 3 ulp of the exact value for ``|x|`` and ``|y|`` from 1e-12 to 1e4. At ``x = y = 0``, where a
        distance has no derivative, the gradient is 0.

    Reference:
        Nielsen 2020, On Voronoi diagrams and dual Delaunay complexes on the information-geometric Cauchy
        manifolds (arXiv:2006.07020), whose Fisher-Rao distance is ``rho / sqrt(2)``.

    Example:
        >>> import torch
        >>> distance(torch.tensor(2.0), torch.tensor(0.0))
        tensor(2.)
    """
    widening, shift = _half_chords(x, y)
    moved = (widening != 0) | (shift != 0)
    chord = torch.hypot(torch.where(moved, widening, 1), shift)  # hypot has no derivative at the origin
    near = torch.where(moved, 2 * torch.asinh(chord), 0)
    return torch.where(_fits(x, y), near, distance_of_drift(_large_drift(x, y)))


def distance_of_drift(nats: Tensor) -> Tensor:
    """Return the distance ``rho`` at which the drift, ``2 log cosh(rho / 2)``, is ``nats`` (positive)."""
    return nats + 2 * torch.log1p(torch.sqrt(-torch.expm1(-nats)))


def _fits(x: Tensor, y: Tensor) -> Tensor:
    """Return whether S^2 can be formed without overflow."""
    return (x.abs() <= DIRECT_X) & (y.abs() <= DIRECT_Y)


def _half_chords(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two legs of S, for arguments cut to the range where their squares exist."""
    half = x.clamp(-DIRECT_X, DIRECT_X) / 2
    return torch.sinh(half), y.clamp(-DIRECT_Y, DIRECT_Y) * torch.exp(-half) / 2


def _large_drift(x: Tensor, y: Tensor) -> Tensor:
    """Return the drift by logarithms, exact to rounding where S^2 cannot be formed (elsewhere anything)."""
    small = _fits(x, y)  # keep the derivatives that torch.where multiplies by 0 finite
    x, y = torch.where(small, 1, x), torch.where(small, 1, y)
    # (1 + e^x)^2 / e^x is even in x, and e^|x| is common to both terms. A floor under |y| keeps log and its
    # gradient finite; what it adds is below rounding.
    breadth = 2 * torch.log1p(torch.exp(-x.abs()))
    shift = 2 * torch.log(y.abs().clamp(min=torch.finfo(y.dtype).tiny)) - (x + x.abs())
    return x.abs() - 2 * math.log(2) + torch.logaddexp(breadth, shift)
