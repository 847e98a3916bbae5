"""What deltas declare of their drift, and the measurement that they are held to where their base text is at hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tether.causal.mixture import Mixture
from tether.causal.walk import Reading
from tether.delta.adapter_drift import adapter_drift
from tether.delta.adapter_mixture import AdapterMixture
from tether.delta.cache import hidden_states
from tether.delta.dealt import dealt
from tether.delta.fusion import fuse, unfuse
from tether.delta.measure import Variant, measure
from tether.delta.summary import mean_figures, quantile_figures
from tether.delta.windows import Windows

__all__ = ["BEYOND", "alone_figures", "broken", "metric_of", "unmeasured"]

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
        high, in nats; the last two None where the text is one document. Where the budget limits a quantile, `mean` is
        that quantile and `quantile` says which. Each delta at weight 1, without its gate.
    """
    described = fused.config.fusion
    rows = [
        row for row, budget in enumerate(described.get("budgets") or ()) if budget.get("text") == documents
    ]
    asked = {row: _declared(described["budgets"][row]) for row in rows}
    asked = {row: figures for row, figures in asked.items() if figures}
    if not asked or not _can_stand_alone(described):
        return {}
    drifts = _drifts_alone(fused, windows, list(asked))
    numbers = windows.documents.numpy()
    found: dict[str, Any] = {}
    for at, (row, figures) in enumerate(asked.items()):
        found[described["domains"][row]] = {
            name: {"metric": metric, "declared": nats}
            | (
                mean_figures(drifts[metric][at], numbers, confidence)
                if quantile is None
                else quantile_figures(drifts[metric][at], numbers, quantile, confidence)
            )
            for name, (metric, nats, quantile) in figures.items()
        }
    return found


# Metric, nats and quantile of what a delta declares. The Fisher form is of the fit's own contexts: it is not compared.
def _declared(budget: Mapping[str, Any]) -> dict[str, tuple[str, float, float | None]]:
    found: dict[str, tuple[str, float, float | None]] = {}
    if budget.get("budget") is not None:
        found["budget"] = (str(budget.get("metric")), budget["budget"], budget.get("quantile"))
    if budget.get("latent_base") is not None:
        found["latent_base"] = ("latent", budget["latent_base"], None)
    return {name: figure for name, figure in found.items() if figure[0] in ("softmax", "latent")}


# A router's deltas act only together.
def _can_stand_alone(described: Mapping[str, Any]) -> bool:
    return not described.get("router")


# Drift at each token of some domains alone, in both metrics, shape (rows, n) each.
def _drifts_alone(fused: Any, windows: Windows, rows: Sequence[int]) -> dict[str, Tensor]:
    fusion = fused.fusion
    if isinstance(fusion, AdapterMixture):
        softmax, latent = dealt(
            windows, lambda part: list(_adapters_alone(fused, part, rows).values()), dim=-1
        )
        return {"softmax": softmax, "latent": latent}
    if isinstance(fusion, Mixture):
        base, deltas = unfuse(fused)
        fusion = fuse(base, dict.fromkeys(deltas, 1.0), by="sum", gated=False).fusion
    count = len(fused.config.fusion["domains"])
    single = [tuple(float(other == row) for other in range(count)) for row in rows]
    variants = [Variant(weights, "symmetric", gated=False) for weights in single]
    result = measure(fused, fusion, windows, variants)
    return {"softmax": result.softmax_kl, "latent": result.latent_drift}


@torch.no_grad()
def _adapters_alone(fused: Any, windows: Windows, rows: Sequence[int]) -> dict[str, Tensor]:
    mixture, width = fused.fusion, fused.fusion.hidden_size
    found = {
        metric: torch.zeros(len(rows), len(windows.input_ids), device=fused.device)
        for metric in ("softmax", "latent")
    }
    for batch in windows.batches(8):
        states = hidden_states(fused, batch, ())
        mask = batch.mask.to(states.device)
        places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        awake = torch.zeros(*mask.shape, len(mixture.domains), dtype=torch.bool, device=mask.device)
        awake[..., list(rows)] = True
        values = None if batch.numeric_values is None else batch.numeric_values.to(mask.device)
        reading = Reading(
            states, mask, places, batch.input_ids.to(mask.device), values, fused.config.num_token_id
        )
        features = mixture.read(reading, awake, None).features[mask]
        where = windows.positions(batch).to(mask.device)
        for at, row in enumerate(rows):
            adapted = features[:, width * (1 + row) : width * (2 + row)]
            for metric, drifts in found.items():
                drifts[at, where] = adapter_drift(metric, fused, features[:, :width], adapted).float()
    return {metric: drifts.cpu() for metric, drifts in found.items()}


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


def metric_of(found: Mapping[str, Any]) -> str:
    """Say what a declared drift is in.

    Args:
        found: one of `alone_figures`, or a budget of the fusion in that form.

    Returns:
        The metric, with the quantile where that is limited.
    """
    quantile = found.get("quantile")
    return str(found["metric"]) if quantile is None else f"{found['metric']}, {100 * quantile:g} % quantile"


def _is_beyond(found: Mapping[str, Any]) -> bool:
    if found["low"] is None:
        return bool(found["mean"] > BEYOND_ALONE * found["declared"])
    return bool(found["low"] > BEYOND * found["declared"])


def _beyond(text: str, what: str, found: Mapping[str, Any]) -> str:
    return (
        f"{text}: {what} is declared as {found['declared']:.4g} nats ({metric_of(found)}), measured "
        f"{found['mean']:.4g} on the text that it was met on"
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
