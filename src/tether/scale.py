"""Holding a drift to a budget with plain numbers: the ascent of a multiplier, and the factor that meets the budget."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from tether.errors import ConfigError

__all__ = ["AIM", "DualAscent", "Met", "meet_budget"]

AIM = 0.98
"""Share of a budget that the search for a factor aims at, so that a small error still stays below it."""
SMALLEST = 1e-12
"""Drifts below count as this one, nats: a logarithm needs a number above 0."""
STEEPEST = 2.0
"""Logarithm of the ratio of drift and budget beyond which the ascent goes no faster."""
RANGE = 100.0
"""How far a multiplier may go from its start, either way."""
BLIND = 8.0
"""Step of the factor where nothing has moved yet and nothing limits the factor."""
TURN = 4
"""Every so many measurements, one is in the middle of the bracket."""
LONGEST = 700.0
"""Logarithm of the largest factor that is guessed."""
POWERS = (0.5, 4.0)
"""Between which powers of the factor a drift is taken to grow."""


@final
class DualAscent:
    """The multiplier of a drift constraint: it rises while the drift is above its budget, and falls below it.

    Args:
        start: multiplier at first, > 0; it stays within a factor of 100 of this.
        budget: of the drift, nats, > 0.
        rise: pace above the budget.
        fall: pace below it.

    Attributes:
        start: as given.
        multiplier: now.

    Example:
        >>> dual = DualAscent(1.0, budget=0.1)
        >>> dual.step(0.2) > 1 > dual.step(0.02)
        True
    """

    def __init__(self, start: float, *, budget: float, rise: float = 0.3, fall: float = 0.3) -> None:
        self.start = self.multiplier = start
        self.budget, self.rise, self.fall = budget, rise, fall

    def step(self, drift: float) -> float:
        """Answer to a drift.

        Args:
            drift: measured now, nats, >= 0.

        Returns:
            The multiplier from now on.
        """
        # In logarithms the ascent answers alike to drifts far above and far below the budget.
        excess = math.log(max(drift, SMALLEST) / self.budget)
        pace = self.rise if excess > 0 else self.fall
        risen = self.multiplier * math.exp(pace * max(-STEEPEST, min(STEEPEST, excess)))
        self.multiplier = min(max(risen, self.start / RANGE), self.start * RANGE)
        return self.multiplier


class Met(NamedTuple):
    """Outcome of `meet_budget`.

    Attributes:
        scale: the largest factor whose measured drift is within the budget; 0 where none was found.
        drift: drift there, nats; 0 where none was found.
        tried: every factor that was measured, with its drift, in order.
    """

    scale: float
    drift: float
    tried: tuple[tuple[float, float], ...]


def meet_budget(
    drift_at: Callable[[float], float],
    budget: float,
    *,
    start: float = 1.0,
    power: float = 2.0,
    ceiling: float = math.inf,
    tries: int = 8,
    enough: float = 0.95,
    aim: float = AIM,
) -> Met:
    """Find the factor on a change at which its drift is just below a budget.

    Drift grows like a power of the factor, the square near the base. The first guess goes by that power, each later
    one by a curve through the logarithms of the two or three measurements nearest the budget, and a bracket keeps it
    safe where that misleads. Fails closed: if nothing in the band is found, the largest factor seen to be within the
    budget is taken, in the end 0.

    Args:
        drift_at: measures the drift at a factor, nats; what is not a number counts as over any budget.
        budget: the budget, nats, > 0.
        start: factor to measure first, > 0.
        power: first guess of the power.
        ceiling: largest factor, > 0.
        tries: measurements at most, >= 1.
        enough: share of the budget that is not worth another measurement, in (0, 1).
        aim: share that is aimed at; the last measurement, whose miss could not be made good, aims halfway down to
            `enough`.

    Returns:
        The factor and the drift measured there, which is never above the budget.

    Raises:
        ConfigError: budget, start, ceiling or tries is not positive.

    Example:
        >>> met = meet_budget(lambda factor: 0.3 * factor**2.2, 0.01)
        >>> len(met.tried) <= 3 and 0.0095 <= met.drift <= 0.01
        True
    """
    if not (budget > 0 and start > 0 and ceiling > 0 and tries >= 1):
        raise ConfigError(
            f"budget={budget}, start={start}, ceiling={ceiling}, tries={tries}: expected positive numbers"
        )
    low, low_drift, high = 0.0, 0.0, math.inf
    tried: list[tuple[float, float]] = []
    factor = min(start, ceiling)
    while len(tried) < tries:
        drift = drift_at(factor)
        tried.append((factor, drift))
        if not drift <= budget:
            high = min(high, factor)
        elif factor >= low:
            low, low_drift = factor, drift
        if enough * budget <= drift <= budget or low == ceiling:
            break
        wanted = (aim + enough) / 2 if len(tried) == tries - 1 else aim
        guess = min(_guess(tried, wanted * budget, power), ceiling)
        # A curve that misleads moves one end of the bracket only: now and then its middle is taken.
        astray = not low < guess < high or (len(tried) % TURN == 0 and 0 < low < high < math.inf)
        factor = _middle(low, min(high, ceiling)) if astray else guess
    return Met(low, low_drift, tuple(tried))


# The factor at which the drift should be the one that is wanted.
def _guess(tried: Sequence[tuple[float, float]], wanted: float, power: float) -> float:
    last, aim = tried[-1][0], math.log(wanted)
    # Equal drifts at different factors tell nothing of the slope; the later one counts.
    known = {math.log(drift): math.log(factor) for factor, drift in tried if 0 < drift < math.inf}
    if not known:
        return last * BLIND if tried[-1][1] <= 0 else math.inf
    (y, x), *others = sorted(known.items(), key=lambda point: abs(point[0] - aim))[:3]
    if len(others) == 2:
        # Lagrange's polynomial for the factor over the drift.
        points = [(y, x), *others]
        return _exp(
            sum(
                here * math.prod((aim - other) / (at - other) for other, _ in points if other != at)
                for at, here in points
            )
        )
    if others and others[0][1] != x:
        power = (others[0][0] - y) / (others[0][1] - x)
    least, most = POWERS
    return _exp(x + (aim - y) / min(max(power, least), most))


# Drifts that hardly differ lead to factors that no float holds; the bracket then decides.
def _exp(value: float) -> float:
    return math.exp(min(max(value, -LONGEST), LONGEST))


# Ends that are orders of magnitude apart are halved in logarithms.
def _middle(low: float, high: float) -> float:
    return math.sqrt(low * high) if 0 < low < 0.01 * high else (low + high) / 2
