"""Plan a fusion before any delta is learnt: what drift its budgets allow, and how many domains a leash holds."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tether.errors import ConfigError
from tether.theory.bounds import fused_drift_bound

__all__ = ["Domain", "Plan", "how_many_fit", "plan_fusion"]

MANY = 2**17
"""More domains than this are not counted."""

ROUNDING = 1 + 2**-39
"""Bounds are rounded outwards; ten domains that use a leash to the last digit still fit."""


class Domain(NamedTuple):
    """One domain's part in a plan."""

    budget: float
    """Drift of its delta alone, nats."""
    weight: float
    alone: float
    """Bound on its drift at its weight, without the others, nats."""
    share: float
    """Its part of the root of the bound: parts add up to 1, as the roots of drifts do."""
    fit: int | None
    """How many domains like it stay within the leash; None for more than ``MANY``."""


class Plan(NamedTuple):
    """An a-priori bound and how it comes about."""

    chart: str
    bound: float
    """On the drift of the fusion, whatever the deltas are, nats."""
    leash: float
    within: bool
    """Whether the bound is at most the leash."""
    domains: list[Domain]

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON.

        Returns:
            Its fields; the domains as a list.
        """
        return self._asdict() | {"domains": [domain._asdict() for domain in self.domains]}


def plan_fusion(
    budgets: Sequence[float | int],
    weights: Sequence[float | int] | None,
    chart: str = "symmetric",
    leash: float = 1.0,
) -> Plan:
    """Bound the drift of a fusion from the budgets of its deltas.

    The bound is ``tether.theory.bounds.fused_drift_bound``, the function that certificates use.

    Args:
        budgets: drift of each delta alone, nats, non-negative.
        weights: a weight for each; None for 1.
        chart: one of ``tether.cauchy.charts.CHARTS``.
        leash: the drift that the fusion may have, nats, positive.

    Returns:
        The plan.

    Raises:
        ConfigError: no budgets, as many weights as budgets are not given, a budget is negative or infinite, a
            weight not finite, the chart unknown, or the leash not positive.

    Example:
        >>> plan = plan_fusion([0.1, 0.2, 0.1], [1, 0.5, 1])
        >>> round(plan.bound, 4), [round(domain.share, 3) for domain in plan.domains]
        (0.7475, [0.366, 0.268, 0.366])
    """
    weights = [1.0] * len(budgets) if weights is None else [float(weight) for weight in weights]
    if not budgets or len(weights) != len(budgets):
        raise ConfigError(
            f"{len(budgets)} budgets and {len(weights)} weights: expected at least one budget and a weight for each"
        )
    if not all(math.isfinite(b) and b >= 0 for b in budgets):
        raise ConfigError(f"budgets {list(budgets)}: expected finite drifts in nats, none negative")
    if not leash > 0:
        raise ConfigError(f"leash={leash}: expected a drift in nats above 0")
    bound = _bound(budgets, weights, chart)
    alone = [_bound([b], [w], chart) for b, w in zip(budgets, weights, strict=True)]
    roots = [math.sqrt(value) for value in alone]
    whole = sum(roots)
    domains = [
        Domain(
            budget=b,
            weight=w,
            alone=a,
            share=r / whole if whole else 0.0,
            fit=how_many_fit(b, w, chart, leash),
        )
        for b, w, a, r in zip(budgets, weights, alone, roots, strict=True)
    ]
    return Plan(chart=chart, bound=bound, leash=leash, within=bound <= leash * ROUNDING, domains=domains)


def how_many_fit(budget: float, weight: float, chart: str, leash: float) -> int | None:
    """Count the domains of one budget and weight whose fusion is sure to stay within a leash.

    Args:
        budget: drift of each delta alone, nats.
        weight: of each.
        chart: one of ``tether.cauchy.charts.CHARTS``.
        leash: the drift that the fusion may have, nats.

    Returns:
        The largest count with a bound of at most the leash; None if it is above ``MANY``.

    Raises:
        ConfigError: a number is out of its range or the chart unknown.
    """  # noqa: DOC502 - raised by fused_drift_bound

    def fits(count: int) -> bool:
        return _bound([budget] * count, [weight] * count, chart) <= leash * ROUNDING

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
        if high > MANY:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _bound(budgets: Sequence[float | int], weights: Sequence[float | int], chart: str) -> float:
    drifts = torch.tensor(budgets, dtype=torch.float64)
    return fused_drift_bound(drifts, torch.tensor(weights, dtype=torch.float64), chart).item()
