"""Are budgets met, in which metric, at what loss: a grid of fits on the demo's domains."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.corpus import Corpus, states_folder
from tether.delta.anchor import Anchor, anchor_text
from tether.delta.budget import Budget
from tether.delta.cache import StateCache
from tether.delta.fisher import align_latent, fisher_axes
from tether.delta.head import Head, Reference, token_drift
from tether.delta.learning import fit_delta
from tether.delta.output_head import output_head
from tether.delta.source import reference, spread
from tether.delta.training import Fit

__all__ = ["rows"]

Row = dict[str, Any]
BUDGETS = (0.01, 0.05, 0.2)
TOKENS = 6_000
"""Of each domain: enough to ask whether budgets are met."""
LOOSE = 1e6
"""Budgets are spent to the full here, whether or not the domain gains by it; the row says by what factor."""


def rows(*, fast: bool) -> Iterator[Row]:
    """Fit and measure.

    Args:
        fast: one domain, one budget a metric, a fraction of the text.

    Yields:
        Rows of case, metric, ours (drift met, nats), baseline (the budget), ratio, runs; with the factor, the
        drift on base text seen nowhere before, the softmax KL there, and the domain's loss.
    """
    with states_folder() as folder:
        corpus = Corpus(folder, tokens=3_000 if fast else 30_000)
        model, base, held_out = corpus.model, corpus.cache("base"), corpus.cache("base-held-out")
        nothing = torch.zeros(0, 0, 0)  # no gates are fitted, so nothing needs to be written for them
        anchor = anchor_text(model, base, held_out, background=nothing)
        axes = fisher_axes(output_head(model), anchor.fitted.some(1024).loc)
        aligned = align_latent(model, axes)
        anchors = {
            ("softmax", "identity"): (model, anchor),
            ("latent", "identity"): (model, anchor),
            ("latent", "Fisher-aligned"): (aligned, anchor_text(aligned, base, held_out, background=nothing)),
        }
        fresh = corpus.cache("base-fresh")
        some = fresh.states[spread(len(fresh.states), 1024)].float()
        for name in ("tables",) if fast else ("tables", "code", "bible"):
            domain, test = _first(corpus.cache(name), TOKENS), corpus.cache(f"{name}-test")
            nll_base = corpus.loss(test, None, 512)
            for (metric, latent), (model_of, anchor_of) in anchors.items():
                if latent != "identity" and name != "tables":
                    continue  # one domain shows what the unit is
                other = reference(model_of, some)
                for value in BUDGETS[1:2] if fast else BUDGETS:
                    budget = Budget(value=value, metric=metric, stretch=LOOSE)
                    row = _row(corpus, name, (domain, test), (model_of, anchor_of), budget, other)
                    yield row | {"latent": latent, "nll_base": nll_base}


def _row(
    corpus: Corpus,
    name: str,
    texts: tuple[StateCache, StateCache],
    at: tuple[Any, Anchor],
    budget: Budget,
    other: Reference,
) -> Row:
    model, anchor = at
    started = time.process_time()
    delta = fit_delta(model, texts[0], anchor, name, Fit(budget=budget, gate=False))
    seconds = time.process_time() - started
    head = Head(delta.first, delta.second, delta.chart)
    met, value = delta.record["drift_base"], budget.value or 0.0

    def on_fresh(metric: str) -> float:
        return float(token_drift(metric, head, other, output=output_head(model)).mean())

    return {
        "case": f"{name}: drift on held-out base text; baseline: the budget",
        "metric": f"{budget.metric}, nats",
        "ours": met,
        "baseline": value,
        "ratio": met / value,
        "runs": 1,
        "factor": delta.record["factor"],
        "fresh": on_fresh(budget.metric),
        "fresh_softmax": on_fresh("softmax"),
        "nll": corpus.loss(texts[1], head, 512, model=model),
        "tokens": delta.record["tokens"],
        "cpu_seconds": seconds,
    }


def _first(cache: StateCache, tokens: int) -> StateCache:
    """Keep the documents up to the one that brings the text to so many tokens."""
    documents = cache.windows.documents
    last = documents[min(tokens, len(documents)) - 1]
    return cache.only(documents.unique()[: int((documents.unique() <= last).sum())])
