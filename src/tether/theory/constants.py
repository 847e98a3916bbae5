"""Sharp constants of the linear chart, computed: each is the extremum of a smooth function of two variables.

They are figures to about 13 digits, not proofs; ``tether.theory.rigor`` encloses them. ``D(x, y)`` is the drift.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, root

from tether.errors import ConfigError

__all__ = [
    "MONOTONE_DRIFT",
    "Extremum",
    "equal_constant",
    "local_constant",
    "many_constant",
    "negation_constant",
    "shrinking_threshold",
    "split_constant",
]

# Lower end of the enclosure of ``shrinking_threshold``: below it, in every dimension, shrinking a delta in the
# linear chart shrinks its drift.
MONOTONE_DRIFT = 2.911571

Array = npt.NDArray[np.float64]


class Extremum(NamedTuple):
    """A constant and the delta at which it is attained."""

    value: float
    x: float
    """Change of the log scale."""
    y: float
    """Change of the location over the base scale."""


@cache
def equal_constant(count: int) -> Extremum:
    """Largest ratio of the drift of N equal deltas added in the linear chart to ``N^2`` times that of one.

    ``C_N = max_q D(N q) / (N^2 D(q))``: the sharp constant for equal deltas, for N = 2 for any two (Theorem 2).

    Args:
        count: N, at least 1.

    Returns:
        ``C_N`` and the delta ``q``; ``C_1 = 1`` at any delta.

    Raises:
        ConfigError: N is below 1.

    Reference:
        docs/how-drift-adds-up.md, "Equal deltas". Assumption: linear chart.

    Example:
        >>> round(equal_constant(2).value, 8)
        1.10767457
    """
    if count < 1:
        raise ConfigError(f"N={count}: expected at least one delta")
    if count == 1:
        return Extremum(1.0, 0.0, 0.0)

    def slope(q: Array) -> Array:
        return count * _log_slope(count * q) - _log_slope(q)

    # The maximum tends to P / N, with P that of infinitely many; its distance from there is found by Newton.
    near = np.array([-0.974130450 / (count + 0.884), 1.044405389 / (count + 1.0075)])
    q = root(slope, near, tol=1e-15).x
    return Extremum(float(_drift(*(count * q)) / (count**2 * _drift(*q))), float(q[0]), float(q[1]))


@cache
def many_constant() -> Extremum:
    """Supremum of ``C_N`` over N: the constant for any number of any deltas (Theorem 1).

    ``K_inf = max_P 4 D(P) / |P|^2``, since ``N^2 D(P/N)`` tends to ``|P|^2 / 4`` from above.

    Returns:
        ``K_inf`` and the sum ``P`` of the many small deltas that approach it.

    Reference:
        docs/how-drift-adds-up.md, Theorem 1. Assumption: linear chart.

    Example:
        >>> round(many_constant().value, 8)
        1.3385334
    """

    def slope(p: Array) -> Array:
        return _log_slope(p) - 2 * p / (p @ p)

    p = root(slope, np.array([-0.974, 1.044]), tol=1e-15).x
    return Extremum(float(4 * _drift(*p) / (p @ p)), float(p[0]), float(p[1]))


@cache
def split_constant() -> Extremum:
    """Constant of the easy theorem: drift of a sharpening delta over that of its two parts taken apart.

    ``max G / (a^2 + b^2)``, ``G = D(-s, y)``, ``a^2 = D(s, 0)``, ``b^2 = D(0, y)``.

    Returns:
        The constant, ``x = -s`` and ``y``.

    Reference:
        docs/how-drift-adds-up.md, "Easy theorem".
    """

    def negative(p: Array) -> float:
        return float(-_drift(-abs(p[0]), p[1]) / (_drift(p[0], 0.0) + _drift(0.0, p[1])))

    found = _polish(negative, np.array([1.25, 1.71]))
    return Extremum(-negative(found), -float(abs(found[0])), float(found[1]))


@cache
def negation_constant() -> Extremum:
    """Most that turning a delta round, weight -1, multiplies its drift in the linear chart.

    Returns:
        ``max D(-p) / D(p)`` and the delta ``p``.
    """

    def negative(p: Array) -> float:
        return float(-_drift(-p[0], -p[1]) / _drift(*p))

    found = _polish(negative, np.array([1.3, 2.6]))
    return Extremum(-negative(found), float(found[0]), float(found[1]))


@cache
def shrinking_threshold() -> Extremum:
    """Smallest drift at which shrinking a delta in the linear chart raises its drift.

    Along a ray the drift falls at ``p`` exactly if ``x > 2`` and ``y^2 > 2 x sinh(x) e^x / (x - 2)``; the
    drift on that border is minimised.

    Returns:
        The drift in nats of one dimension, and the delta.

    Reference:
        docs/how-drift-adds-up.md, "Shrinking can increase drift".
    """

    def border(x: float) -> float:
        return math.sqrt(2 * x * math.sinh(x) * math.exp(x) / (x - 2))

    def along(p: Array) -> float:
        return float(_drift(p[0], border(p[0]))) if p[0] > 2 else math.inf

    x = float(_polish(along, np.array([2.6]))[0])
    return Extremum(float(_drift(x, border(x))), x, border(x))


def local_constant(radius: float) -> float:
    """Largest ratio of drift to a quarter of the squared length of ``p``, for lengths up to a radius.

    ``K_plus(r) = max 4 D(p) / |p|^2 over |p| <= r``: what replaces ``K_inf`` where all moves are small.

    Args:
        radius: r, positive.

    Returns:
        The ratio, between 1 and ``K_inf``; by a search over a fine grid of angles and lengths, to about 1e-6.

    Raises:
        ConfigError: the radius is not positive.
    """
    if not radius > 0:
        raise ConfigError(f"radius={radius}: expected a positive number")
    best = many_constant()
    if radius >= math.hypot(best.x, best.y):
        return best.value
    angle = np.linspace(math.pi / 2, math.pi, 4001)
    length = radius * np.linspace(0.5, 1, 51)[:, None]
    return float((4 * _drift(length * np.cos(angle), length * np.sin(angle)) / length**2).max())


def _drift(x: Array | float, y: Array | float) -> Array:
    """Return the drift, for moderate deltas."""
    return np.asarray(np.log1p(np.sinh(np.asarray(x) / 2) ** 2 + (y * np.exp(-np.asarray(x) / 2) / 2) ** 2))


def _log_slope(p: Array) -> Array:
    """Return the gradient of the log of the drift, ``k_x = (u^2 - 1 - y^2) / (4u)``, ``k_y = y / (2u)``."""
    x, y = p
    whole = (1 + math.exp(x)) ** 2 + y * y
    slope: Array = np.array([math.expm1(2 * x) - y * y, 2 * y]) / whole / _drift(x, y)
    return slope


def _polish(function: Callable[[Array], float], start: Array) -> Array:
    """Return the minimum near a start, as well as float64 can tell it."""
    found = minimize(
        function, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-16, "maxiter": 2000}
    )
    return np.asarray(found.x)
