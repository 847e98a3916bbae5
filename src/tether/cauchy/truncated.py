"""Draws from a standard Cauchy law restricted to an interval, accurate in both tails."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tether.errors import ConfigError

__all__ = ["interval_mass", "sample_truncated"]


def sample_truncated(
    uniform: Float[Tensor, "*#batch"], lower: Float[Tensor, "*#batch"], upper: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """Turn uniform noise into draws of a standard Cauchy variable given that it lies in an interval.

    Under ``x = tan(angle)`` the law is uniform in the angle, so a draw is the point that divides the angle
    between the two ends in the ratio ``uniform : 1 - uniform``. The angle is kept three times, from the
    vertical at either infinity and from the horizontal, each as a sum of numbers of one sign where it is
    used; the draw is read from the nearest of the three. So it keeps its relative accuracy in [1e8, 1.001e8]
    as well as in [-inf, -1e12] or [1e-30, 2e-30], where a difference of two probabilities has no digits left.

    Args:
        uniform: in the open interval (0, 1); 0 gives ``lower`` and 1 ``upper``, which may be infinite.
        lower: lower end, in units of the scale; -inf is allowed.
        upper: upper end, same units, at least ``lower``; inf is allowed.

    Returns:
        One draw per element, in [lower, upper] always, of the broadcast shape.

    Raises:
        ConfigError: an end is not a number, or a lower end lies above its upper end.

    Reference:
        Inverse transform sampling of a truncated law; Devroye 1986, Non-Uniform Random Variate Generation,
        section II.2.1.

    Example:
        >>> import torch
        >>> inf = torch.tensor(torch.inf)
        >>> sample_truncated(torch.tensor(0.5), torch.tensor([1e8, -1.0]), inf)
        tensor([2.0000e+08, 4.1421e-01])
    """
    if not bool((lower <= upper).all()):
        raise ConfigError(
            f"lower ends {_some(lower)} and upper ends {_some(upper)}: expected lower <= upper and no nan;"
            " swap the ends, or drop the empty intervals"
        )
    rest = 1 - uniform
    one = torch.ones_like(uniform)
    above = rest * torch.atan2(one, lower) + uniform * torch.atan2(one, upper)  # angle from +infinity
    below = rest * torch.atan2(one, -lower) + uniform * torch.atan2(one, -upper)  # angle from -infinity
    level = rest * torch.atan(lower) + uniform * torch.atan(upper)
    outer = torch.where(above < below, 1 / torch.tan(above), -1 / torch.tan(below))
    middle = torch.minimum(above, below) > math.pi / 4
    return torch.where(middle, torch.tan(level), outer).clamp(lower, upper)


def interval_mass(
    lower: Float[Tensor, "*#batch"], upper: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """Probability that a standard Cauchy variable lies in an interval.

    The angle under which the interval is seen, over pi: ``atan2(upper - lower, 1 + lower * upper) / pi``.
    Where both ends lie beyond 1 on one side they are inverted first, ``1 / x`` being Cauchy as well, which
    keeps the product from overflowing.

    Args:
        lower: lower end, in units of the scale; -inf is allowed.
        upper: upper end, same units, at least ``lower``; inf is allowed.

    Returns:
        Probability in [0, 1], of the broadcast shape.

    Reference:
        Subtraction formula of the arctangent; Abramowitz and Stegun 1964, 4.4.34.

    Example:
        >>> import torch
        >>> interval_mass(torch.tensor([-1.0, 1e10]), torch.tensor([1.0, 2e10]))
        tensor([5.0000e-01, 1.5915e-11])
    """
    outside = (lower > 1) | (upper < -1)
    infinite = lower.isinf() | upper.isinf()
    left = torch.where(outside, 1 / upper, lower)
    right = torch.where(outside, 1 / lower, upper)
    gap = torch.where(outside & ~infinite, (upper - lower) / lower / upper, right - left)
    apart = torch.atan2(gap, 1 + left * right)
    # Across zero the two angles have opposite signs, and an infinite end has no product: add them up.
    across = torch.atan(right) - torch.atan(left)
    return torch.where((left < 0) & (right > 0) | left.isinf() | right.isinf(), across, apart) / math.pi


def _some(ends: Tensor) -> list[float]:
    """Return the first few elements for a message."""
    return [float(end) for end in ends.reshape(-1)[:4]]
