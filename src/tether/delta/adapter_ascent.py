"""The multiplier of the drift on base text while an adapter is learnt: it follows what batches show."""

import math

from tether.delta.budget import Budget
from tether.scale import DualAscent

__all__ = ["Ascent"]

SMOOTH = 0.8
"""Share of the past in the running mean of the drift, which a batch of one context tells only roughly."""
RISE, FALL = 0.1, 0.01
"""Pace of the ascent. Every fit begins far below its budget: a multiplier that falls meanwhile lets it take directions
that drift, which the few dozens of steps of a fit do not undo (docs/log.md)."""
USUAL = 0.05
"""Budget for which the multiplier starts at 1, nats. What a nat of drift buys falls with the root of the drift."""


class Ascent:
    """The multiplier, and the drift it answers to.

    Args:
        budget: the constraint, or None.
        fixed: a multiplier that stays as it is, or None to follow the drift.

    Attributes:
        drift: running mean of what the budget limits, at the base batches so far, or None.
    """

    def __init__(self, budget: Budget | None, fixed: float | None = None) -> None:
        value = USUAL if budget is None or budget.value is None else budget.value
        start = math.sqrt(USUAL / value) if fixed is None else fixed
        self._dual = DualAscent(start, budget=value, rise=RISE, fall=FALL)
        self.drift: float | None = None

    @property
    def multiplier(self) -> float:
        """Of the drift on base text, now."""
        return self._dual.multiplier

    def see(self, drift: float) -> None:
        """Take a batch's drift into the running mean.

        Args:
            drift: what the budget limits, on this batch, nats.
        """
        self.drift = drift if self.drift is None else SMOOTH * self.drift + (1 - SMOOTH) * drift

    def step(self) -> None:
        """Answer to the running mean, if there is one yet."""
        if self.drift is not None:
            self._dual.step(self.drift)

    def go_on_from(self, multiplier: float, drift: float | None = None) -> None:
        """Take over the multiplier of a fit that was interrupted.

        Args:
            multiplier: as it stood, > 0.
            drift: the running mean as it stood, or None.
        """
        self._dual.multiplier, self.drift = multiplier, drift
