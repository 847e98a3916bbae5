"""Enclosures of the sharp constants: intervals that are certain to contain them.

A maximum over a region is enclosed in three steps: its value at a rational point near the maximum is a lower end;
on a box around that point the logarithm is shown to be concave, so that its tangent there bounds it; and every
other cell of the region is shown to lie below (mean value theorem). All in ball arithmetic.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from tether.errors import ConfigError
from tether.theory.balls import Ball, Box, Jet, ball, flint, jet, split_at
from tether.theory.constants import equal_constant, many_constant, shrinking_threshold, split_constant
from tether.theory.cover import Cell, Cover, cover
from tether.theory.witness import Witness

__all__ = [
    "Enclosure",
    "LogJet",
    "enclose_equal",
    "enclose_many",
    "enclose_maximum",
    "enclose_ratio",
    "enclose_split",
    "enclose_threshold",
    "outside_holds",
]

AROUND = 1 / 16
"""Half the side of the box around a maximum, relative to the point, on which the logarithm is concave."""


class LogJet(NamedTuple):
    """The logarithm of a function of (s, y) with its derivatives, as balls."""

    value: Ball
    s: Ball
    y: Ball
    ss: Ball
    sy: Ball
    yy: Ball


class Enclosure(NamedTuple):
    """An interval that is certain to contain a constant."""

    low: float
    high: float
    cover: Cover
    """The cells of the proof."""

    @property
    def holds(self) -> bool:
        """Whether all cells were proved; the interval means nothing otherwise."""
        return self.cover.holds


def enclose_equal(count: int, region: Box | None = None) -> Enclosure:
    """Enclose ``C_N = max G(N q) / (N^2 G(q))`` over equal deltas.

    Args:
        count: N, at least 2.
        region: where the maximum is taken; by default all but where the easy theorem gives less than C_N.

    Returns:
        The enclosure.

    Raises:
        ConfigError: N is below 2.
    """
    if count < 2:
        raise ConfigError(f"N={count}: expected at least 2 equal deltas")
    at = equal_constant(count)
    region = region or Box(*(end / count for end in _region_of(at.value - 1e-9)))

    def function(s: Ball, y: Ball) -> LogJet:
        far, near = _logarithm(jet(count * s, count * y), count), _logarithm(jet(s, y), 1)
        return _minus(far, near)

    low, high, counts = enclose_maximum(function, (-at.x, at.y), region)
    return _exp(low, high, flint().arb(count * count), counts)


def enclose_many(region: Box) -> Enclosure:
    """Enclose ``K_inf = max 4 G(P) / |P|^2`` over a region.

    Args:
        region: where the maximum is taken.

    Returns:
        The enclosure.
    """
    at = many_constant()

    def function(s: Ball, y: Ball) -> LogJet:
        square = s * s + y * y
        length = LogJet(
            square.log(),
            2 * s / square,
            2 * y / square,
            2 * (y * y - s * s) / (square * square),
            -4 * s * y / (square * square),
            2 * (s * s - y * y) / (square * square),
        )
        return _minus(_logarithm(jet(s, y), 1), length)

    low, high, counts = enclose_maximum(function, (-at.x, at.y), region)
    return _exp(low, high, flint().arb("0.25"), counts)


def enclose_split() -> Enclosure:
    """Enclose ``max G / (D(s, 0) + D(0, y))``, the constant of the easy theorem.

    Returns:
        The enclosure.
    """
    at = split_constant()

    def function(s: Ball, y: Ball) -> LogJet:
        # The parts' sum in the form of a jet: 2 log cosh(s/2) + log(1 + y^2/4).
        wide = (s / 2).sinh() / (s / 2).cosh()
        rest = 1 / (1 + y * y / 4)
        value = ((s / 2).sinh() ** 2).log1p() + (y * y / 4).log1p()
        parts = (value, wide, y * rest / 2, (1 - wide * wide) / 2, 0 * s, (2 * rest - 1) * rest / 2)
        return _minus(_logarithm(jet(s, y), 1), _logarithm(parts, 1))

    low, high, counts = enclose_maximum(function, (-at.x, at.y), _region_of(at.value - 1e-9))
    return _exp(low, high, flint().arb(1), counts)


def enclose_threshold() -> Enclosure:
    """Enclose the smallest drift at which shrinking can raise the drift.

    On the border ``y^2 = 2 x sinh(x) e^x / (x - 2)`` the drift is
    ``log(cosh(x/2)^2 + x sinh(x) / (2 (x - 2)))``, a function of ``x > 2`` alone.

    Returns:
        The enclosure, over ``2 < x <= 12``; at ``x >= 6`` the first term alone is above 4.
    """
    arb = flint().arb

    def border(x: Ball) -> Ball:
        return ((x / 2).cosh() ** 2 + x * x.sinh() / (2 * (x - 2))).log()

    best = border(arb(shrinking_threshold().x)).upper()
    floor = best - arb("1e-7")

    def prove(cell: Cell) -> str | int:
        x0, x1 = (arb(v) for v in cell)
        # Both terms, part by part: cosh, x and sinh rise, x - 2 as well.
        low = ((x0 / 2).cosh() ** 2 + x0 * x0.sinh() / (2 * (x1 - 2))).log()
        if low > best:
            return "monotone parts"
        if low > floor:
            return "within 1e-7"
        return 0

    counts = cover([(2 + k / 4, 2.25 + k / 4) for k in range(40)], prove, key="shrinking threshold")
    return Enclosure(_below(floor), _above(best), counts)


def enclose_ratio(witness: Witness) -> tuple[float, float]:
    """Enclose drift over bound at an exact counterexample.

    Args:
        witness: the counterexample.

    Returns:
        Lower and upper end; the lower one is above 1 where the counterexample holds.
    """
    arb = flint().arb

    def log(value: Fraction) -> Ball:
        return (arb(value.numerator) / arb(value.denominator)).log()

    exponent = witness.exponent()
    bound = sum((log(k) for k in witness.single_k()), arb(0)) * exponent.numerator / exponent.denominator
    ratio = log(witness.fused_k()) / bound
    return _below(ratio), _above(ratio)


def outside_holds(constant: Ball, region: Box) -> bool:
    """Check that ``G <= constant (a^2 + b^2)`` outside a region, by four inequalities at its ends.

    With ``a^2 = D(s, 0)``, ``b^2 = D(0, y)`` and the excess ``E = G - a^2 - b^2``: ``G <= 4 sigma^2 (a^2 + b^2)``,
    which serves small ``s``; ``E <= log 4``, which serves large ``a`` or ``b``; ``E <= 3/4 y^2``, which serves small y.

    Args:
        constant: above 1.
        region: the sums inside are left to the branch and bound.

    Returns:
        Whether all four hold.
    """
    arb = flint().arb
    s0, s1, y0, y1 = (arb(v) for v in region)
    zero, excess = arb(0), constant - 1
    sigma = 1 / (1 + (-s0).exp())
    return bool(
        4 * sigma * sigma <= constant
        and arb(4).log() <= excess * split_at(s1, zero)
        and arb(4).log() <= excess * split_at(zero, y1)
        and arb("0.75") * y0 * y0 <= excess * split_at(s0, zero)
    )


def enclose_maximum(
    function: Callable[[Ball, Ball], LogJet], near: tuple[float, float], region: Box
) -> tuple[Ball, Ball, Cover]:
    """Enclose the maximum of a function of two variables over a region.

    Args:
        function: its logarithm with derivatives, over balls.
        near: a point close to the maximum.
        region: where it is taken.

    Returns:
        Lower and upper end of the logarithm, and the cells of the proof.
    """
    arb = flint().arb
    s, y = near
    inner = Box(s * (1 - AROUND), s * (1 + AROUND), y * (1 - AROUND), y * (1 + AROUND))
    here = function(arb(s), arb(y))
    low = here.value.lower()
    reach_s, reach_y = ((ball(*ends) - c).abs_upper() for ends, c in ((inner[:2], s), (inner[2:], y)))
    high = (here.value + here.s.abs_upper() * reach_s + here.y.abs_upper() * reach_y).upper()

    def prove(cell: Cell) -> str | int:
        box = Box(*cell)
        over = function(ball(box.s0, box.s1), ball(box.y0, box.y1))
        loss_s, loss_y = (
            slope.abs_upper() * (width / 2)
            for slope, width in ((over.s, box.s1 - box.s0), (over.y, box.y1 - box.y0))
        )
        if inner.s0 <= box.s0 and box.s1 <= inner.s1 and inner.y0 <= box.y0 and box.y1 <= inner.y1:
            if over.ss < 0 and over.ss * over.yy > over.sy * over.sy:
                return "concave"
        else:
            middle = function(arb((box.s0 + box.s1) / 2), arb((box.y0 + box.y1) / 2)).value
            if middle + loss_s + loss_y < low:
                return "below"
        if loss_s.is_finite() and loss_y.is_finite():
            return int(float(loss_y) > float(loss_s))
        return int(box.y1 / box.y0 > box.s1 / box.s0)

    return low, high, cover(_cells(region, inner), prove, key="maximum")


def _region_of(constant: float) -> Box:
    """Return a region of sums outside which the easy theorem gives less than a constant.

    Raises:
        ArithmeticError: it does not, because of an error here.
    """
    excess = constant - 1
    sigma = math.sqrt(constant) / 2
    s0 = 0.99 * math.log(sigma / (1 - sigma))
    y0 = 0.99 * math.sqrt(excess * math.log1p(math.sinh(s0 / 2) ** 2) / 0.75)
    region = Box(s0, 1.01 * (math.log(4) / excess + math.log(4)), y0, 2.02 * math.exp(math.log(2) / excess))
    if not outside_holds(flint().arb(constant), region):
        raise ArithmeticError(f"the easy theorem does not give {constant} outside {region}")
    return region


def _cells(region: Box, inner: Box) -> list[Cell]:
    """Return cells that cover the region, each inside or outside the inner box."""
    ends_s, ends_y = (region.s0, inner.s0, inner.s1, region.s1), (region.y0, inner.y0, inner.y1, region.y1)
    return [(*wide, *high) for wide in pairwise(ends_s) for high in pairwise(ends_y)]


def _logarithm(parts: Jet | tuple[Ball, ...], factor: int) -> LogJet:
    """Return the jet of the logarithm of a function of ``factor`` times the variables."""
    value, s, y, ss, sy, yy = parts
    by_s, by_y = s / value, y / value
    return LogJet(
        value.log(),
        factor * by_s,
        factor * by_y,
        factor**2 * (ss / value - by_s * by_s),
        factor**2 * (sy / value - by_s * by_y),
        factor**2 * (yy / value - by_y * by_y),
    )


def _minus(left: LogJet, right: LogJet) -> LogJet:
    return LogJet(*(a - b for a, b in zip(left, right, strict=True)))


def _exp(low: Ball, high: Ball, divisor: Ball, counts: Cover) -> Enclosure:
    return Enclosure(_below(low.exp() / divisor), _above(high.exp() / divisor), counts)


def _below(value: Ball) -> float:
    """Return a float at most the ball."""
    return math.nextafter(float(value.lower()), -math.inf)


def _above(value: Ball) -> float:
    """Return a float at least the ball."""
    return math.nextafter(float(value.upper()), math.inf)
