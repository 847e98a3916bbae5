"""Are budgets met, in which metric, at what loss: a grid of fits on the demo's domains."""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.corpus import Corpus
from tether.delta.anchor import anchor_text, feature_layers
from tether.delta.budget import Budget
from tether.delta.head import Head, token_drift
from tether.delta.learning import fit_delta
from tether.delta.source import reference, spread
from tether.delta.training import Fit

__all__ = ["rows"]

Row = dict[str, Any]
GRID = {"softmax": (0.01, 0.05, 0.2), "latent": (0.01, 0.05, 0.2)}
LOOSE = 1e6
"""Budgets are spent to the full here, whether or not the domain gains by it; the row says by what factor."""


def rows(*, fast: bool) -> list[Row]:
    """Fit and measure.

    Args:
        fast: one domain, one budget a metric, a fraction of the text.

    Returns:
        Rows of case, metric, ours (drift met, nats), baseline (the budget), ratio, runs; with the factor, the
        drift on base text seen nowhere before, and the domain's loss.
    """
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder), tokens=3_000 if fast else 30_000, features="multi")
        model, weight = corpus.model, corpus.model.action.weight.detach()
        layers = feature_layers(model, "multi")
        anchor = anchor_text(model, corpus.cache("base", layers), corpus.cache("base-held-out", layers))
        fresh = corpus.cache("base-fresh", layers)
        other = reference(model, fresh.states[spread(len(fresh.states), 1024)].float())
        found = []
        for name in ("tables",) if fast else ("tables", "code", "bible"):
            domain, test = corpus.cache(name, layers), corpus.cache(f"{name}-test", layers)
            for metric, values in GRID.items():
                for value in values[1:2] if fast else values:
                    started = time.process_time()
                    fit = Fit(budget=Budget(value=value, metric=metric, stretch=LOOSE), gate=False)
                    delta = fit_delta(model, domain, anchor, name, fit)
                    seconds = time.process_time() - started
                    head = Head(delta.first, delta.second, delta.chart)
                    met = delta.record["drift_base"]
                    found.append(
                        {
                            "case": f"{name}: drift on held-out base text; baseline: the budget",
                            "metric": f"{metric}, nats",
                            "ours": met,
                            "baseline": value,
                            "ratio": met / value,
                            "runs": 1,
                            "factor": delta.record["factor"],
                            "fresh": float(token_drift(metric, head, other, weight=weight).mean()),
                            "nll": corpus.loss(test, head),
                            "nll_base": corpus.loss(test, None),
                            "cpu_seconds": seconds,
                        }
                    )
    return found
