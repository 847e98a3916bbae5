"""Theorem 2 by machine: two deltas cost at most ``C_2``, what two equal ones cost.

To show, for a sum ``P = (S, Y)`` of two sharpening deltas ``p`` and ``q = P - p``:
``F = g(p) + g(q) - g(P) / sqrt(C_2) >= 0``. With ``p = (a S, b Y)``, where ``0 <= a <= 1/2`` and ``0 <= b <= 1``
by symmetry, this is an inequality in the four variables (S, Y, a, b).

- ``split``: ``G(P) <= C (a^2 + b^2)(P)``, the easy theorem.
- ``convex``: ``p`` and ``q`` lie in a convex polygon where ``g`` is convex; then ``g(p) + g(q) >= 2 g(P/2)``,
  and ``G(P) <= 4 C_2 G(P/2)`` by the definition of ``C_2``.
- ``mean value``: ``F`` at the middle of a cell exceeds all it can fall within the cell.

``C`` is a lower end of the enclosure of ``C_2``, so that the supremum over arbitrary deltas is ``C_2`` itself.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

from tether.theory.any_number import grid
from tether.theory.balls import Ball, Box, ball, drift_at, flint, jet, root_at, root_slopes, split_at
from tether.theory.cover import Cell, Cover, cover, merged
from tether.theory.rigor import Enclosure, enclose_equal, outside_holds

__all__ = ["POLYGON", "REGION", "TwoDeltas", "prove_polygon", "prove_two"]

REGION = Box(0.1, 14.5, 0.0185, 1260.0)
"""Sums outside it are covered by the easy theorem alone."""

POLYGON = (
    (0.12, 0.035), (0.3, 0.08), (0.5, 0.175), (0.68, 0.3), (0.72, 0.48), (0.68, 0.62),
    (0.5, 0.63), (0.4, 0.595), (0.3, 0.54), (0.2, 0.46), (0.12, 0.36),
)  # fmt: skip
"""Vertices, counter-clockwise, of a convex region where the root of the drift is convex."""

AROUND_POLYGON = Box(0.11, 0.73, 0.03, 0.64)

NARROW = 0.12
"""Width, in logarithms, at which sums that are not split go to the argument in four variables."""


class TwoDeltas(NamedTuple):
    """What the proof consists of."""

    constant: Enclosure
    polygon: Cover
    sums: Cover
    """``pairs`` counts sums handed to the four variables; ``convex`` and ``mean value`` the cells there."""
    outside: bool
    """Whether the easy theorem covers all sums outside the region."""

    @property
    def holds(self) -> bool:
        """Whether every part is proved."""
        return self.outside and merged(self.parts()).holds

    def parts(self) -> list[Cover]:
        """Return the covers.

        Returns:
            Constant, polygon, sums.
        """
        return [self.constant.cover, self.polygon, self.sums]


def prove_two(
    region: Box = REGION,
    *,
    state: str | os.PathLike[str] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> TwoDeltas:
    """Prove Theorem 2 for all sums, or for those in a region.

    Args:
        region: the sums of the branch and bound.
        state: a JSON file to resume from.
        on_step: called with done and total starting cells.

    Returns:
        The parts of the proof and their counts.
    """
    # Outside the polygon every inequality is strict at the lower end, so the maximum of equal deltas is inside.
    enclosure = enclose_equal(2, AROUND_POLYGON)
    constant = flint().arb(enclosure.low)

    def prove(cell: Cell) -> str | int | dict[str, int]:
        box = Box(*(math.exp(v) for v in cell))
        top = drift_at(flint().arb(box.s1), flint().arb(box.y1))
        if top <= constant * split_at(flint().arb(box.s0), flint().arb(box.y0)):
            return "split"
        longer = int(cell[3] - cell[2] > cell[1] - cell[0])
        if max(cell[1] - cell[0], cell[3] - cell[2]) > NARROW:
            return longer
        pairs = cover([(*box, 0.0, 0.5, 0.0, 1.0)], lambda four: _prove_pairs(four, constant))
        return {"pairs": 1} | pairs.proofs if pairs.holds else longer

    sums = cover(grid(region, 0.24), prove, state=state, key=f"two deltas, {tuple(region)}", on_step=on_step)
    return TwoDeltas(enclosure, prove_polygon(), sums, outside_holds(constant, REGION))


def prove_polygon() -> Cover:
    """Prove that ``g`` is convex on the polygon.

    ``2 G G_ij - G_i G_j``, ``4 g^3`` times the second derivatives of ``g``, is positive definite in every cell
    that meets the polygon.

    Returns:
        The counts.
    """

    def prove(cell: Cell) -> str | int:
        box = Box(*cell)
        if _misses(box):
            return "outside"
        at = jet(ball(box.s0, box.s1), ball(box.y0, box.y1))
        ss, sy, yy = (
            2 * at.value * second - product
            for second, product in ((at.ss, at.s * at.s), (at.sy, at.s * at.y), (at.yy, at.y * at.y))
        )
        if ss > 0 and ss * yy > sy * sy:
            return "convex"
        return int(box.y1 / box.y0 > box.s1 / box.s0)

    return cover([tuple(AROUND_POLYGON)], prove, key="polygon")


def _prove_pairs(cell: Cell, constant: Ball) -> str | int:
    """Return what proves ``F >= 0`` for S, Y, a and b in a cell, or the variable to split."""
    total = Box(*cell[:4])
    a0, a1, b0, b1 = cell[4:]
    part = Box(total.s0 * a0, total.s1 * a1, total.y0 * b0, total.y1 * b1)
    rest = Box(total.s0 * (1 - a1), total.s1 * (1 - a0), total.y0 * (1 - b1), total.y1 * (1 - b0))
    # The ends are rounded: the boxes are made wider by more than that.
    part, rest = (
        Box(*(v * (1 + k * 2**-48) for v, k in zip(b, (-1, 1, -1, 1), strict=True))) for b in (part, rest)
    )
    if _contains(part) and _contains(rest):
        return "convex"
    arb, share = flint().arb, 1 / constant.sqrt()
    s, y, a, b = ((arb(cell[k]) + arb(cell[k + 1])) / 2 for k in (0, 2, 4, 6))
    middle = root_at(a * s, b * y) + root_at((1 - a) * s, (1 - b) * y) - share * root_at(s, y)
    wide_s, wide_y, wide_a, wide_b = (ball(cell[k], cell[k + 1]) for k in (0, 2, 4, 6))
    (p_s, p_y), (q_s, q_y), (r_s, r_y) = (root_slopes(box) for box in (part, rest, total))
    slopes = (
        wide_a * p_s + (1 - wide_a) * q_s - share * r_s,
        wide_b * p_y + (1 - wide_b) * q_y - share * r_y,
        wide_s * (p_s - q_s),
        wide_y * (p_y - q_y),
    )
    halves = ((arb(cell[k + 1]) - arb(cell[k])) / 2 for k in (0, 2, 4, 6))
    losses = [slope.abs_upper() * half for slope, half in zip(slopes, halves, strict=True)]
    if middle > sum(losses, arb(0)):
        return "mean value"
    spreads = [float(slope.rad()) * (cell[2 * k + 1] - cell[2 * k]) for k, slope in enumerate(slopes)]
    return spreads.index(max(spreads))


def _contains(box: Box) -> bool:
    """Return whether a box lies in the polygon: all its corners are left of all edges, by more than rounding."""
    return all(
        _side(edge, s, y) > 1e-9 for edge in _EDGES for s in (box.s0, box.s1) for y in (box.y0, box.y1)
    )


def _misses(box: Box) -> bool:
    """Return whether a box lies outside: all its corners are right of one edge, by more than rounding."""
    return any(
        all(_side(edge, s, y) < -1e-9 for s in (box.s0, box.s1) for y in (box.y0, box.y1)) for edge in _EDGES
    )


_EDGES = tuple(zip(POLYGON, POLYGON[1:] + POLYGON[:1], strict=True))


def _side(edge: tuple[tuple[float, float], tuple[float, float]], s: float, y: float) -> float:
    (s0, y0), (s1, y1) = edge
    return (s1 - s0) * (y - y0) - (y1 - y0) * (s - s0)
