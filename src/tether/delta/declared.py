"""What deltas declare of their drift, and the measurement that they are held to where their base text is at hand."""

from collections.abc import Mapping
from typing import Any

from tether.causal.mixture import Mixture
from tether.delta.fusion import fuse, unfuse
from tether.delta.measure import Variant, measure
from tether.delta.summary import mean_figures
from tether.delta.windows import Windows

__all__ = ["BEYOND", "alone_figures", "broken", "unmeasured"]

BEYOND = 1.25
"""A declared drift is broken where the lower end of the measured mean's interval is above it by more than this factor.
A budget is met on the part of its base text that the fit did not see; the rest differs by chance."""
BEYOND_ALONE = 2.0
"""The same for the mean itself, where the text is one document and gives no interval."""


def alone_figures(fused: Any, windows: Windows, documents: str, confidence: float) -> dict[str, Any]:
    """Measure each delta alone on the base text that its budget was met on.

    Every other text costs nothing. On the base text: one more backbone pass, and for each such delta one product with
    the output head.

    Args:
        fused: a fused model.
        windows: of a text.
        documents: hash of the text's documents; deltas whose budget names another text are passed over.
        confidence: of the interval over documents.

    Returns:
        By domain and declared figure (`budget`, in its metric, and `latent_base`): metric, declared, mean, low and
        high, in nats; the last two None where the text is one document. Each delta at weight 1, without its gate.
    """
    described = fused.config.fusion
    rows = [
        row for row, budget in enumerate(described.get("budgets") or ()) if budget.get("text") == documents
    ]
    asked = {row: _declared(described["budgets"][row]) for row in rows}
    asked = {row: figures for row, figures in asked.items() if figures}
    if not asked or not _can_stand_alone(described):
        return {}
    fusion = fused.fusion
    if isinstance(fusion, Mixture):
        base, deltas = unfuse(fused)
        fusion = fuse(base, dict.fromkeys(deltas, 1.0), by="sum", gated=False).fusion
    count = len(described["domains"])
    single = [tuple(float(other == row) for other in range(count)) for row in asked]
    result = measure(
        fused, fusion, windows, [Variant(weights, "symmetric", gated=False) for weights in single]
    )
    numbers = result.documents.numpy()
    found: dict[str, Any] = {}
    for at, (row, figures) in enumerate(asked.items()):
        drifts = {"softmax": result.softmax_kl[at], "latent": result.latent_drift[at]}
        found[described["domains"][row]] = {
            name: {"metric": metric, "declared": nats, **mean_figures(drifts[metric], numbers, confidence)}
            for name, (metric, nats) in figures.items()
        }
    return found


# A quantile of a sample says little, and the Fisher form is another figure: those budgets are not compared.
def _declared(budget: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    found = {}
    if budget.get("budget") is not None and budget.get("quantile") is None:
        found["budget"] = (str(budget.get("metric")), budget["budget"])
    if budget.get("latent_base") is not None:
        found["latent_base"] = ("latent", budget["latent_base"])
    return {name: pair for name, pair in found.items() if pair[0] in ("softmax", "latent")}


# Adapters by evidence and a router's deltas act only together.
def _can_stand_alone(described: Mapping[str, Any]) -> bool:
    return not described.get("router") and (
        described.get("kind") != "adapters" or described.get("by") != "evidence"
    )


def broken(
    described: Mapping[str, Any],
    texts: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Compare what is declared with what was measured on the text that it was declared on.

    Args:
        described: the fusion, `config.fusion`.
        texts: of a certificate, with the hash of their `documents`.
        figures: of each text.

    Returns:
        One sentence for each budget of a delta, latent figure of a delta, or budget of the fusion (`allowance`) that
        the measurement is beyond.
    """
    wrong = []
    for text, row in figures.items():
        for domain, declared in row.get("alone", {}).items():
            names = {"budget": f"budget of {domain}", "latent_base": f"latent drift of {domain}"}
            wrong += [
                _beyond(text, names[name], found) for name, found in declared.items() if _is_beyond(found)
            ]
        limit = described.get("allowance")
        if limit and limit.get("text") is not None and limit["text"] == texts[text]["documents"]:
            drift = row["softmax_kl" if limit["metric"] == "softmax" else "latent_drift"]
            found = {key: drift[key] for key in ("mean", "low", "high")}
            found |= {"metric": limit["metric"], "declared": limit["nats"]}
            if _is_beyond(found):
                wrong.append(_beyond(text, "budget of the fusion", found))
    return wrong


def _is_beyond(found: Mapping[str, Any]) -> bool:
    if found["low"] is None:
        return bool(found["mean"] > BEYOND_ALONE * found["declared"])
    return bool(found["low"] > BEYOND * found["declared"])


def _beyond(text: str, what: str, found: Mapping[str, Any]) -> str:
    return (
        f"{text}: {what} is declared as {found['declared']:.4g} nats ({found['metric']}), measured {found['mean']:.4g} "
        "on the text that it was met on"
    )


def unmeasured(described: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name the domains whose declared budget no text of a certificate measures.

    Args:
        described: the fusion.
        figures: of each text.

    Returns:
        Domains in their order.
    """
    measured = {domain for row in figures.values() for domain in row.get("alone", {})}
    budgets = described.get("budgets") or ()
    declared = [name for name, budget in zip(described["domains"], budgets, strict=False) if _any(budget)]
    return [name for name in declared if name not in measured]


def _any(budget: Mapping[str, Any]) -> bool:
    return budget.get("budget") is not None or budget.get("latent_base") is not None
