"""What the budgets of fused deltas allow before anything is measured: the plan of a fusion, for mean drifts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tether.causal.summed import bound_chart
from tether.errors import ConfigError
from tether.theory.bounds import K_INF, fused_drift_bound

__all__ = ["budget_figures", "planned_drift"]


def planned_drift(
    means: Sequence[float], weights: Sequence[float], chart: str, *, shared: bool = False
) -> float | None:
    """Bound the mean latent drift of a fusion by the mean latent drift of each of its deltas alone.

    The bound is the function that `tether theory plan` prints (`fused_drift_bound`), for means instead of single
    contexts. In every context `sqrt(D) <= sum_k s_k sqrt(D_k)` with a factor s_k that does not depend on the
    context, so by Minkowski's inequality `sqrt(E D) <= sum_k s_k sqrt(E D_k)` over any contexts whatever. s_k is,
    for a weight a:

    - `symmetric`: max(1, |a|), because a smaller weight never adds drift;
    - `geodesic`, `rootkl`: that of the plan itself, whose terms are proportional to the drift of each delta;
    - `linear`: the root of a^2 for a >= 1 and of 2 - a for 0 < a < 1 (scaling bound), all together times the
      root of K_inf unless one delta acts alone.

    All of them grow with |a|, or are taken at their largest, so a gate, which multiplies a weight by a factor
    in [0, 1], changes nothing.

    Args:
        means: mean drift of each delta alone at weight 1 over some contexts, nats, >= 0.
        weights: its weight, finite.
        chart: in which they are added.
        shared: whether gates may give weights between 0 and the weight (softmax gates).

    Returns:
        Bound on the mean drift over the same contexts, nats; None for a negative weight in `linear`, where
        the worst case grows faster than the mean.

    Raises:
        ConfigError: as many weights as means are not given, numbers out of their range, or an unknown chart.

    Reference:
        Theory notes, "Three repaired fusions" and "Weights in the linear chart".

    Example:
        >>> round(planned_drift([0.1, 0.2], [1.0, 0.5], "symmetric"), 4)
        0.5828
    """
    if not means or len(means) != len(weights):
        raise ConfigError(
            f"{len(means)} mean drifts and {len(weights)} weights: expected one of each for every delta"
        )
    if not all(map(math.isfinite, [*means, *weights])) or min(means) < 0:
        raise ConfigError(
            f"mean drifts {list(means)}, weights {list(weights)}: expected finite numbers, drifts >= 0"
        )
    if chart == "symmetric":
        return _bound(means, [max(1.0, abs(a)) if a else 0.0 for a in weights], chart)
    if chart != "linear":
        return _bound(means, weights, chart)
    if min(weights) < 0:
        return None
    single = sum(a != 0 for a in weights) == 1
    scaled = []
    for mean, a in zip(means, weights, strict=True):
        # A share of a weight may be as small as it likes, and then nearly doubles the drift.
        below = 2.0 if shared else 2 - a
        scaled.append(mean * max(below, a * a * (K_INF if single and a > 1 else 1.0)) if a else 0.0)
    return _bound(scaled, [1.0] * len(scaled), chart)


def _bound(means: Sequence[float], weights: Sequence[float], chart: str) -> float:
    nats, factors = (torch.tensor(list(values), dtype=torch.float64) for values in (means, weights))
    return float(fused_drift_bound(nats, factors, chart))


def budget_figures(described: Mapping[str, Any], measured: float) -> dict[str, float] | None:
    """Put what a fusion's budgets allow beside what was measured.

    Args:
        described: the fusion's description, `config.fusion`.
        measured: its mean latent drift on a text, nats.

    Returns:
        allowed, measured and ratio; None where a delta's record has no latent figure (files from before it was
        kept), or where there is no such bound.
    """
    means = [budget.get("latent_base") for budget in described["budgets"]]
    if any(mean is None for mean in means):
        return None
    chart = bound_chart(described["chart"], described["location_only"])
    shared = bool(described["gated"]) and described.get("gate") == "softmax"
    allowed = planned_drift(means, described["weights"], chart, shared=shared)
    if allowed is None:
        return None
    leash = described.get("leash")
    if leash and leash["metric"] == "latent":
        allowed = min(allowed, leash["nats"])
    return {"allowed": allowed, "measured": measured, "ratio": measured / allowed if allowed > 0 else 0.0}
