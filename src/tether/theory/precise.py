"""Drift ratios of the linear chart to fifty digits, and the worst equal deltas polished to as many."""

import decimal
from collections.abc import Sequence
from decimal import Decimal

from tether.errors import ConfigError

__all__ = ["DIGITS", "KINDS", "polish_equal", "precise_ratio"]

DIGITS = 50
KINDS = ("main", "appendix", "sqrt", "weighted")
Point = tuple[Decimal, Decimal]


def precise_ratio(
    kind: str, x: Sequence[float], y: Sequence[float], weights: Sequence[float | int]
) -> Decimal:
    """Return drift over bound at deltas of one dimension, which are taken as exact.

    Args:
        kind: a statement about the linear chart, one of ``KINDS``.
        x: changes of the log scale.
        y: changes of the location over the base scale.
        weights: a weight for each.

    Returns:
        The ratio to about 45 digits.

    Raises:
        ConfigError: the statement is another one.
    """
    if kind not in KINDS:
        raise ConfigError(f"no precise ratio for {kind!r}: expected one of {', '.join(KINDS)}")
    with decimal.localcontext(prec=DIGITS + 10):
        pairs = [(Decimal(a), Decimal(b), Decimal(w)) for a, b, w in zip(x, y, weights, strict=True)]
        zero, count = Decimal(0), len(pairs)
        fused = _drift(sum((w * a for a, _, w in pairs), zero), sum((w * b for _, b, w in pairs), zero))
        singles = [_drift(a, b) for a, b, _ in pairs]
        if kind == "weighted":
            roots = (abs(w) * d.sqrt() for (_, _, w), d in zip(pairs, singles, strict=True))
            bound = sum(roots, zero) ** 2
        else:
            bound = (Decimal(count).sqrt() if kind == "sqrt" else count) * sum(singles, zero)
        return fused / bound


def polish_equal(count: int, x: float, y: float) -> tuple[Decimal, Point]:
    """Refine equal deltas at which ``D(N q) / (N^2 D(q))`` is largest, by Newton's method.

    Args:
        count: N, at least 2.
        x: change of the log scale near the maximum.
        y: change of the location over the base scale near it.

    Returns:
        The ratio and the point, to about 45 digits.

    Raises:
        ConfigError: the steps do not shrink: the start is not near a maximum.
    """
    with decimal.localcontext(prec=2 * DIGITS):
        q = (Decimal(x), Decimal(y))
        step = Decimal(10) ** (-DIGITS // 2)
        for _ in range(12):
            here = _slope(count, q)
            by_x, by_y = _slope(count, (q[0] + step, q[1])), _slope(count, (q[0], q[1] + step))
            a, c = ((by_x[i] - here[i]) / step for i in (0, 1))
            b, d = ((by_y[i] - here[i]) / step for i in (0, 1))
            determinant = a * d - b * c
            move = ((here[0] * d - here[1] * b) / determinant, (a * here[1] - c * here[0]) / determinant)
            q = (q[0] - move[0], q[1] - move[1])
            if max(map(abs, move)) < Decimal(10) ** (2 - DIGITS):
                ratio = _drift(count * q[0], count * q[1]) / (count**2 * _drift(*q))
                return ratio, q
            if max(map(abs, move)) > 1:
                break
    raise ConfigError(
        f"no maximum near x={x}, y={y} for N={count}: start from the result of a search or of constants"
    )


def _drift(x: Decimal, y: Decimal) -> Decimal:
    u = x.exp()
    return (((1 + u) ** 2 + y * y) / (4 * u)).ln()


def _slope(count: int, q: Point) -> Point:
    """Return the gradient of ``log D(N q) - log D(q)``."""
    far, near = _log_slope(count * q[0], count * q[1]), _log_slope(*q)
    return count * far[0] - near[0], count * far[1] - near[1]


def _log_slope(x: Decimal, y: Decimal) -> Point:
    u = x.exp()
    whole = ((1 + u) ** 2 + y * y) * _drift(x, y)
    return (u * u - 1 - y * y) / whole, 2 * y / whole
