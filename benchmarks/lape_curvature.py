"""Traces of Hessians before and after merges as rows, with verdicts on what the document says of them."""

import math
from typing import Any

from tether.merge.tefm.trace import Trace, fall_of_trace
from tether.merge.towers import find_linears

__all__ = ["curvature_rows", "linear_weights"]

Row = dict[str, Any]
Curvature = dict[str, list[dict[str, Any]]]
"""Model to its figures on each domain: train, test, samples, trace (draws). Models that are merged have one domain."""


def linear_weights(model: Any) -> list[Any]:
    """Let the linear layers of a model's language tower alone require gradients.

    Args:
        model: a transformers model.

    Returns:
        Their weights.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights = [module.weight for layer in find_linears(model) for module in layer.values()]
    for weight in weights:
        weight.requires_grad_(True)
    return weights


def curvature_rows(what: str, trials: list[Curvature]) -> list[Row]:
    """Judge the claims on the trace, and show what constant the bound on generalisation would need.

    Args:
        what: the pair.
        trials: of each seed.

    Returns:
        A row a merge: trace after against before, with a verdict a seed; and a row a model of the constant c in
        ``test <= train + c sqrt(trace / samples)``.
    """
    found = []
    merges = [name for name, parts in trials[0].items() if len(parts) > 1]
    single = [name for name in trials[0] if name not in merges]
    for name in merges:
        falls = []
        for trial in trials:
            own = [trial[each][0] for each in single]
            before = [_trace(one) for one in own]
            after = [_trace(next(o for o in trial[name] if o["domain"] == one["domain"])) for one in own]
            falls.append((fall_of_trace(before, after), before, after))
        row = _row(
            f"{what}, {name}: sum of traces on both domains; baseline: of the models that are merged, each on its own",
            "trace of the Hessian of the linear layers",
            [sum(each.mean for each in after) for _, _, after in falls],
            [sum(each.mean for each in before) for _, before, _ in falls],
        )
        row["fall"] = [[fall.share, fall.standard_error, fall.verdict] for fall, _, _ in falls]
        found.append(row)
    for name in trials[0]:
        found.append(_bound(what, name, [trial[name] for trial in trials]))
    return found


def _bound(what: str, name: str, parts: list[list[dict[str, Any]]]) -> Row:
    gaps, roots = [], []
    for trial in parts:
        for one in trial:
            mean = sum(one["trace"]) / len(one["trace"])
            gaps.append(one["test"] - one["train"])
            # A trace below 0, which the document does not foresee, has no root.
            roots.append(math.sqrt(mean / one["samples"]) if mean > 0 else math.nan)
    needed = [gap / root if root > 0 else None for gap, root in zip(gaps, roots, strict=True)]
    row = _row(
        f"{what}, {name}: gap of test and train loss; baseline: root of trace / n", "nats", gaps, roots
    )
    row["domains"] = [one["domain"] for trial in parts for one in trial]
    row["constant"] = needed
    return row


def _trace(figures: dict[str, Any]) -> Trace:
    draws = figures["trace"]
    return Trace(sum(draws) / len(draws), 0.0, tuple(draws))


def _row(case: str, metric: str, ours: list[float], baseline: list[float]) -> Row:
    mine, theirs = sum(ours) / len(ours), sum(baseline) / len(baseline)
    usable = math.isfinite(theirs) and theirs != 0
    return {
        "case": case, "metric": metric, "ours": mine, "baseline": theirs if math.isfinite(theirs) else None,
        "ratio": mine / theirs if usable else None, "runs": ours,
    }  # fmt: skip
