"""Theorem 1 by machine: any number of deltas costs at most ``K_inf``.

To show, for sharpening deltas ``p_k`` with the sum ``P = (S, Y)``: ``sum g(p_k) >= g(P) / sqrt(K_inf)``. All
``p_k`` lie in the box ``[0, S] x [0, Y]``, so it is enough to have a vector ``a`` with ``g(p) >= a.p`` on the box
(a minorant) and ``(a.P)^2 >= G(P) / K``: then ``sum g(p_k) >= a.P``.

- ``split``: ``G(P) <= K (D(S, 0) + D(0, Y))``, the easy theorem.
- ``sector``: ``a = P / (2 |P|)`` is a minorant for all P of some directions and lengths; there
  ``G(P) <= K_inf (a.P)^2`` by the definition of ``K_inf``.
- ``minorant``: an ``a`` found numerically, then verified.

Lemma U makes verifying cheap. Along every ray from the origin ``G / r^2`` rises and then falls, so its smallest
values on a box are those near the origin and on the two far edges.
"""

import math
import os
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tether.theory.balls import Ball, Box, ball, drift_at, flint, jet, split_at
from tether.theory.cover import Cell, Cover, cover, merged
from tether.theory.rigor import Enclosure, enclose_many, outside_holds

__all__ = [
    "REGION",
    "AnyNumber",
    "grid",
    "minorant_holds",
    "propose",
    "prove_any",
    "prove_rays",
]

REGION = Box(0.316, 5.6, 0.1, 15.7)
"""Sums outside it are covered by the easy theorem alone."""

NEAR = 0.5
"""Within this distance of the origin a polynomial bounds the drift from below; beyond it Lemma U is used."""

STEEPNESS, RADIUS = (0.727, 1.6), 2.0
"""The sector: ``Y / S`` between these (36 to 58 degrees) and ``|P|`` at most the radius."""

AROUND_K = Box(0.24, 1.8, 0.28, 1.9)
"""Contains the sector beyond ``NEAR``; within it ``4 G / |P|^2 <= 1.21`` (Lemma K)."""

LONGEST, MARGIN = 0.4975, 0.995
DEPTH = 12


class AnyNumber(NamedTuple):
    """What the proof consists of."""

    constant: Enclosure
    rays: Cover
    sector: Cover
    sums: Cover
    outside: bool
    """Whether the easy theorem covers all sums outside the region."""

    @property
    def holds(self) -> bool:
        """Whether every part is proved."""
        return self.outside and merged(self.parts()).holds

    def parts(self) -> list[Cover]:
        """Return the covers.

        Returns:
            Constant, rays, sector, sums.
        """
        return [self.constant.cover, self.rays, self.sector, self.sums]


def prove_any(
    region: Box = REGION,
    *,
    state: str | os.PathLike[str] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> AnyNumber:
    """Prove Theorem 1 for all sums, or for those in a region.

    Args:
        region: the sums of the branch and bound.
        state: a JSON file to resume from.
        on_step: called with done and total starting cells.

    Returns:
        The parts of the proof and their counts.
    """
    enclosure = enclose_many(AROUND_K)
    constant = flint().arb(enclosure.low)

    def prove(cell: Cell) -> str | int:
        box = Box(*(math.exp(v) for v in cell))
        top = drift_at(*_point(box.s1, box.y1))
        if top <= constant * split_at(*_point(box.s0, box.y0)):
            return "split"
        if _in_sector(box):
            return "sector"
        if minorant_covers(box, top, constant):
            return "minorant"
        return int(cell[3] - cell[2] > cell[1] - cell[0])

    sums = cover(grid(region, 0.13), prove, state=state, key=f"any number, {tuple(region)}", on_step=on_step)
    return AnyNumber(enclosure, prove_rays(REGION), prove_sector(), sums, outside_holds(constant, REGION))


def prove_rays(region: Box) -> Cover:
    """Prove Lemma U on ``[0, s1] x [0, y1]`` beyond ``NEAR``: where ``G / r^2`` stops rising, it falls.

    ``T = r G_r - 2 G`` has the sign of the derivative of ``G / r^2``, and ``r T_r = r^2 G_rr - r G_r``. In every
    cell ``T`` has no zero, or ``T_r`` is negative.

    Args:
        region: only its upper ends matter.

    Returns:
        The counts.
    """
    arb = flint().arb

    def prove(cell: Cell) -> str | int:
        box = Box(*cell)
        if arb(box.s1) ** 2 + arb(box.y1) ** 2 <= arb(NEAR) ** 2:
            return "near the origin"
        s, y = ball(box.s0, box.s1), ball(box.y0, box.y1)
        at = jet(s, y)
        rise = s * at.s + y * at.y
        if rise - 2 * at.value > 0:
            return "rising"
        if rise - 2 * at.value < 0:
            return "falling"
        if s * s * at.ss + 2 * s * y * at.sy + y * y * at.yy - rise < 0:
            return "turning"
        return int((box.y1 - box.y0) * (1 + box.s0) > (box.s1 - box.s0) * (1 + box.y0))

    # A little wider, since the cells of a grid reach beyond its region by their rounding.
    return cover([(0.0, region.s1 * 1.001, 0.0, region.y1 * 1.001)], prove, key="rays")


def prove_sector() -> Cover:
    """Prove that half the unit vector towards P is a minorant on ``[0, P]``, for all P of the sector.

    Returns:
        The counts, one cell a degree or less.

    Raises:
        ArithmeticError: the cells leave out a part, because of an error here.
    """
    arb = flint().arb
    ends = np.linspace(math.atan(STEEPNESS[0]) - 1e-9, math.atan(STEEPNESS[1]) + 1e-9, 49)

    def prove(cell: Cell) -> str | int:
        angle = ball(*cell)
        by_s, by_y = angle.cos() / 2, angle.sin() / 2
        corner = (float((RADIUS * 2 * side).upper()) * (1 + 1e-12) for side in (by_s, by_y))
        if minorant_holds(by_s, by_y, *corner, half=True):
            return "sector"
        return 0

    if not (arb(ends[0]).tan() < STEEPNESS[0] and arb(ends[-1]).tan() > STEEPNESS[1]):
        raise ArithmeticError("the angles do not cover the sector")
    return cover([(float(a), float(b)) for a, b in pairwise(ends)], prove, key="sector", limit=500)


def minorant_covers(box: Box, top: Ball, constant: Ball) -> bool:
    """Find a minorant for all sums in a box and verify it.

    Args:
        box: the sums P.
        top: ``G`` at its upper corner.
        constant: K.

    Returns:
        Whether ``G(P) <= K (a.P)^2`` for all of them and ``a`` is verified.
    """
    by_s, by_y = (flint().arb(v) for v in propose(box))
    if not top <= constant * (by_s * box.s0 + by_y * box.y0) ** 2:
        return False
    return minorant_holds(by_s, by_y, box.s1, box.y1)


def propose(box: Box) -> tuple[float, float]:
    """Find a linear function below ``g`` on ``[0, s1] x [0, y1]`` that is large in the middle of the box.

    Args:
        box: the sums P.

    Returns:
        The vector ``a``, up to rounding and to what lies between the points looked at; to be verified.
    """
    side = np.linspace(0, 1, 41)
    s, y = (
        np.concatenate([0 * side + box.s1, box.s1 * side]),
        np.concatenate([box.y1 * side, 0 * side + box.y1]),
    )
    root = np.sqrt(np.log1p(np.sinh(s / 2) ** 2 + (y * np.exp(s / 2) / 2) ** 2))
    angle = np.linspace(0.005, math.pi / 2 - 0.005, 91)
    unit = np.stack([np.cos(angle), np.sin(angle)])
    length = np.minimum(LONGEST, (root[:, None] / (s[:, None] * unit[0] + y[:, None] * unit[1])).min(0))
    best = np.argmax(length * (unit[0] * (box.s0 + box.s1) + unit[1] * (box.y0 + box.y1)))
    by_s, by_y = MARGIN * length[best] * unit[:, best]
    return float(by_s), float(by_y)


def minorant_holds(by_s: Ball, by_y: Ball, s1: float, y1: float, *, half: bool = False) -> bool:
    """Verify ``g(p) >= a.p`` on ``[0, s1] x [0, y1]``, for all ``a`` in two balls.

    Near the origin ``G / r^2 >= 1/4 + (r/4) c n^2 - r^2 (c^4 / 96 + (1 + r/2)^4 n^4 / 32)``, c and n the cosine
    and sine of the direction. For the r here the right side, with the last bracket at ``r = NEAR``, is concave in r, so
    that it is checked at 0 and at ``NEAR``. Beyond, by Lemma U, the two far edges remain.

    Args:
        by_s: first component, non-negative.
        by_y: second component, non-negative.
        s1: end of the box.
        y1: end of the box.
        half: whether ``|a| = 1/2`` is known; otherwise ``|a| <= 1/2`` is checked.

    Returns:
        Whether it is verified.
    """
    arb = flint().arb
    if not half and not by_s * by_s + by_y * by_y <= arb("0.25"):
        return False
    if not _holds_near(by_s, by_y):
        return False

    def on_edge(cell: Cell) -> str | int:
        low, high = (arb(v) for v in cell)
        if drift_at(arb(s1), low) >= (by_s * s1 + by_y * high) ** 2:
            return "edge"
        return 0

    def on_top(cell: Cell) -> str | int:
        low, high = (arb(v) for v in cell)
        if drift_at(low, arb(y1)) >= (by_s * high + by_y * y1) ** 2:
            return "edge"
        return 0

    return all(
        cover([(end * k / 8, end * (k + 1) / 8) for k in range(8)], prove, limit=DEPTH * 8).holds
        for end, prove in ((y1, on_edge), (s1, on_top))
    )


def grid(region: Box, width: float) -> list[Cell]:
    """Cut a region into cells of about one width in the logarithms of both variables.

    Args:
        region: its ends, positive.
        width: of a cell.

    Returns:
        Cells whose ends are logarithms; together, exponentials rounded, they cover the region.
    """
    # The ends lie a little outside: the exponentials of neighbours are the same float, so there is no gap inside.
    ends = [(math.log(a) - 1e-9, math.log(b) + 1e-9) for a, b in (region[:2], region[2:])]
    cuts = [np.linspace(a, b, math.ceil((b - a) / width) + 1).tolist() for a, b in ends]
    return [(*wide, *high) for wide in pairwise(cuts[0]) for high in pairwise(cuts[1])]


def _holds_near(by_s: Ball, by_y: Ball) -> bool:
    arb = flint().arb
    r, fourth = arb(NEAR), (1 + arb(NEAR) / 2) ** 4
    for k in range(64):
        angle = ball(math.pi / 128 * k, math.pi / 128 * (k + 1) + 1e-12)
        c, n = angle.cos(), angle.sin()
        low = (1 + r * c * n * n) / 4 - r * r * (c**4 / 96 + fourth * n**4 / 32)
        if not low >= (by_s * c + by_y * n) ** 2:
            return False
    return True


def _in_sector(box: Box) -> bool:
    s0, s1, y0, y1 = (flint().arb(v) for v in box)
    return bool(
        s1 * s1 + y1 * y1 <= flint().arb(RADIUS) ** 2 and y0 >= STEEPNESS[0] * s1 and y1 <= STEEPNESS[1] * s0
    )


def _point(s: float, y: float) -> tuple[Ball, Ball]:
    arb = flint().arb
    return arb(s), arb(y)
