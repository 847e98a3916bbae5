"""The factor on a change whose measured drift meets a budget, found in a few evaluations."""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

from tether.errors import ConfigError

__all__ = ["EVALUATIONS", "Scaled", "scale_to_budget"]

EVALUATIONS: Final = 4
"""The most merges that are measured."""

_AIM: Final = 0.97  # of the budget, so that a small error still stays below it
_LAST_AIM: Final = 0.92  # a miss of the last evaluation could not be made good
_ENOUGH: Final = 0.9  # of the budget: more is not worth another evaluation
_BLIND_STEP: Final = 8.0  # where nothing has moved yet
_REACH: Final = math.log(64)  # beyond the factors that were tried


class Scaled(NamedTuple):
    """A factor and how it was found.

    Attributes:
        scale: the largest factor that was measured to keep the budget; None if none did.
        drift: its drift, nats.
        tried: every factor and its drift, in order.
    """

    scale: float | None
    drift: float
    tried: tuple[tuple[float, float], ...]


def scale_to_budget(
    drift_at: Callable[[float], float], budget: float, *, start: float = 1.0, evaluations: int = EVALUATIONS
) -> Scaled:
    r"""Search the factor lambda whose drift is just below a budget.

    KL grows as lambda^2 for small changes, so the first guess is

    .. math:: \lambda' = \lambda (0.97\, b / D(\lambda))^{1/2}

    and every later one interpolates log lambda over log D through the two or three measurements nearest the
    budget (the secant, then inverse quadratic interpolation).

    Args:
        drift_at: measures the drift at a factor, nats.
        budget: b, > 0.
        start: the first factor, > 0.
        evaluations: how many measurements at most, >= 1.

    Returns:
        What was found. The drift of the returned factor was measured: it is never above the budget.

    Raises:
        ConfigError: If budget, start or evaluations is not positive.

    Example:
        >>> found = scale_to_budget(lambda scale: 0.3 * scale**2.2, 0.01)
        >>> len(found.tried) <= 4 and 0.009 <= found.drift <= 0.01
        True
    """
    if not (budget > 0 and start > 0 and evaluations >= 1):
        raise ConfigError(
            f"budget={budget}, start={start}, evaluations={evaluations}: expected positive numbers"
        )
    tried: list[tuple[float, float]] = []
    scale = start
    for _ in range(evaluations):
        tried.append((scale, drift_at(scale)))
        if _ENOUGH * budget <= tried[-1][1] <= budget:
            break
        last = len(tried) == evaluations - 1
        scale = _next(tried, (_LAST_AIM if last else _AIM) * budget)
    kept = [entry for entry in tried if entry[1] <= budget]
    best = max(kept, default=(None, math.nan), key=lambda entry: entry[0] or 0.0)
    return Scaled(best[0], best[1], tuple(tried))


def _next(tried: list[tuple[float, float]], wanted: float) -> float:
    moved = {scale: drift for scale, drift in tried if drift > 0}
    if not moved:
        return tried[-1][0] * _BLIND_STEP
    aim = math.log(wanted)
    # Equal drifts at different factors tell nothing of the slope.
    near = {math.log(drift): math.log(scale) for scale, drift in moved.items()}
    points = sorted(near.items(), key=lambda point: abs(point[0] - aim))[:3]
    if len(points) == 1:
        return math.exp(points[0][1] + (aim - points[0][0]) / 2)
    guess = _interpolated(points, aim)
    below = [x for y, x in near.items() if y < aim]
    above = [x for y, x in near.items() if y > aim]
    # A curve that is none (rounding gives it a floor) can send the guess anywhere.
    if below and above:
        low, high = max(below), min(above)
        guess = guess if low < guess < high else (low + high) / 2
    elif above:
        guess = min(max(guess, min(above) - _REACH), min(above))
    else:
        guess = max(min(guess, max(below) + _REACH), max(below))
    return math.exp(guess)


# Lagrange's polynomial for x over y.
def _interpolated(points: list[tuple[float, float]], aim: float) -> float:
    total = 0.0
    for y, x in points:
        weight = 1.0
        for other, _ in points:
            if other != y:
                weight *= (aim - other) / (y - other)
        total += weight * x
    return total
