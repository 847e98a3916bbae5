"""Drift of a sharpening delta and its derivatives in ball arithmetic (python-flint), at points and over boxes.

A delta that sharpens by ``s > 0`` and shifts by ``y >= 0`` has the drift

``G(s, y) = D(-s, y) = 2 log cosh(s/2) + log(1 + z)``, ``z = sigma(s)^2 y^2``, ``sigma(s) = 1 / (1 + e^-s)``,

and ``g = sqrt(G)``. Every function here returns balls that contain the exact values, whatever is rounded. What
is bounded over a box ``s0 <= s <= s1``, ``y0 <= y <= y1`` uses that ``sigma``, ``z``, ``z / (1 + z)`` and ``G``
increase in both variables.
"""

from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

from tether.errors import ConfigError

__all__ = ["Ball", "Box", "Jet", "ball", "drift_at", "flint", "jet", "root_at", "root_slopes", "split_at"]

Ball: TypeAlias = Any
"""An ``arb`` of python-flint, which has no types."""

PRECISION = 64
"""Bits of a midpoint."""


class Box(NamedTuple):
    """The points with ``s0 <= s <= s1``, ``y0 <= y <= y1``; its ends are exact."""

    s0: float
    s1: float
    y0: float
    y1: float


class Jet(NamedTuple):
    """The drift and its first and second derivatives."""

    value: Ball
    s: Ball
    y: Ball
    ss: Ball
    sy: Ball
    yy: Ball


def flint() -> Any:
    """Return the module flint, at the working precision.

    Returns:
        The module.

    Raises:
        ConfigError: python-flint is not installed.
    """
    try:
        module = import_module("flint")
    except ImportError as error:
        raise ConfigError(
            "enclosures need python-flint, which is not installed: pip install 'tether[theory]'"
        ) from error
    module.ctx.prec = PRECISION
    return module


def ball(low: float | Ball, high: float | Ball) -> Ball:
    """Return a ball that contains an interval.

    Args:
        low: its lower end, a number or a ball.
        high: its upper end.

    Returns:
        The smallest ball about both, rounded outwards.
    """
    arb = flint().arb
    return arb(low).union(arb(high))


def drift_at(s: Ball, y: Ball) -> Ball:
    """Return ``G`` as ``log(1 + S^2)``, ``S^2 = sinh(s/2)^2 + y^2 e^s / 4``.

    Args:
        s: sharpening, a ball.
        y: shift, a ball.

    Returns:
        Nats.
    """
    stretch = (s / 2).exp()
    chord = stretch - 1 / stretch
    return ((chord * chord + (y * stretch) ** 2) / 4).log1p()


def root_at(s: Ball, y: Ball) -> Ball:
    """Return ``g = sqrt(G)``.

    Args:
        s: sharpening, a ball.
        y: shift, a ball; not both 0.

    Returns:
        The root of the drift.
    """
    return drift_at(s, y).sqrt()


def split_at(s: Ball, y: Ball) -> Ball:
    """Return the drift of the two parts taken apart, ``a^2 + b^2 = D(s, 0) + D(0, y)``.

    Args:
        s: sharpening, a ball.
        y: shift, a ball.

    Returns:
        Nats; its root is subadditive.
    """
    stretch = (s / 2).exp()
    chord = stretch - 1 / stretch
    return (chord * chord / 4).log1p() + (y * y / 4).log1p()


def jet(s: Ball, y: Ball) -> Jet:
    """Return the drift with its derivatives.

    With ``m = z / (1 + z)`` and ``o = 1 - sigma``:
    ``G_s = 2 sigma - 1 + 2 o m``, ``G_y = 2 sigma^2 y / (1 + z)``,
    ``G_ss = 2 sigma o (1 - m) + 4 o^2 m / (1 + z)``, ``G_sy = 4 o sigma^2 y / (1 + z)^2``,
    ``G_yy = 2 sigma^2 (1 - z) / (1 + z)^2``.

    Args:
        s: sharpening, a ball.
        y: shift, a ball of non-negative numbers.

    Returns:
        Balls that contain all values over the product of the two balls.
    """
    sigma = 1 / (1 + (-s).exp())
    square = sigma * sigma
    rest = 1 / (1 + square * y * y)  # 1 / (1 + z)
    m, o = 1 - rest, 1 - sigma
    return Jet(
        value=drift_at(s, y),
        s=2 * sigma - 1 + 2 * o * m,
        y=2 * square * y * rest,
        ss=2 * sigma * o * rest + 4 * o * o * m * rest,
        sy=4 * o * square * y * rest * rest,
        yy=2 * square * (2 * rest - 1) * rest,
    )


def root_slopes(box: Box) -> tuple[Ball, Ball]:
    """Enclose the two derivatives of ``g`` over a box that may touch the axes and the origin.

    ``g_s = G_s / (2 g)`` and ``g_y = G_y / (2 g)`` from the ends of the box, cut at bounds that hold down to
    the origin: ``g_s <= 1/2 + (1 - sigma) sqrt(m)`` and ``g_y <= sigma / sqrt(1 + z)``, since
    ``tanh(s/2)^2 <= 2 log cosh(s/2)`` and ``log(1 + z) >= z / (1 + z)``.

    Args:
        box: the box; at the origin itself the derivatives in its neighbourhood are meant.

    Returns:
        Balls that contain ``g_s`` and ``g_y``.
    """
    arb = flint().arb
    low, high = _corner(arb(box.s0), arb(box.y0)), _corner(arb(box.s1), arb(box.y1))
    least = 2 * low.sigma - 1 + 2 * (1 - high.sigma) * low.m
    most = 2 * high.sigma - 1 + 2 * (1 - low.sigma) * high.m
    limit = arb(0.5) + (1 - low.sigma) * high.m.sqrt()
    by_s = (least / (2 * high.root)).union(_smaller(most, 2 * low.root, limit))

    # sigma^2 y / (1 + sigma^2 y^2) increases in sigma; in y it rises to 1 / sigma and then falls.
    ends = [_slope_part(low.sigma, box.y0), _slope_part(low.sigma, box.y1)]
    floor = ends[0] if ends[0] < ends[1] else (ends[1] if ends[1] < ends[0] else ends[0].min(ends[1]))
    peak = 1 / high.sigma
    if peak <= box.y0:
        top = _slope_part(high.sigma, box.y0)
    elif peak >= box.y1:
        top = _slope_part(high.sigma, box.y1)
    else:
        top = high.sigma / 2
    by_y = (floor / high.root).union(_smaller(top, low.root, high.sigma * (1 - low.m).sqrt()))
    return by_s, by_y


class _Corner(NamedTuple):
    sigma: Ball
    m: Ball
    root: Ball


def _corner(s: Ball, y: Ball) -> _Corner:
    """Return sigma, ``m = z / (1 + z)`` and g at a point."""
    stretch = (s / 2).exp()
    chord = stretch - 1 / stretch
    value = ((chord * chord + (y * stretch) ** 2) / 4).log1p()
    sigma = 1 / (1 + 1 / (stretch * stretch))
    z = (sigma * y) ** 2
    return _Corner(sigma, z / (1 + z), value.sqrt() if value > 0 else 0 * value)


def _slope_part(sigma: Ball, y: float) -> Ball:
    square = sigma * sigma
    return square * y / (1 + square * y * y)


def _smaller(numerator: Ball, denominator: Ball, limit: Ball) -> Ball:
    """Return the quotient where it is known to be below the limit, else the limit."""
    if denominator > 0:
        quotient = numerator / denominator
        if quotient < limit:
            return quotient
    return limit
