"""A router over domain deltas on the real base, beside each delta alone, their sum and their average."""

import tempfile
import time
from pathlib import Path
from typing import Any

from tether.causal.loading import load
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.learning import anchor_text, fit_delta
from tether.delta.measure import Variant, measure
from tether.delta.training import Fit
from tether.delta.windows import window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.router.deltas import DeltaRouterFit, route_deltas

__all__ = ["rows"]

Row = dict[str, Any]
BUDGET = 0.01


def rows(*, fast: bool) -> list[Row]:
    """Learn three deltas and a router over them from cached states, and measure all on held-out documents.

    Args:
        fast: a fifth of the text.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline of a domain is its own delta alone, of base
        text the base.
    """
    model, tokenizer = load("smollm2-135m")
    tokens, tested = (3_000, 600) if fast else (15_000, 2_000)
    general = [
        piece[:1200]
        for pair in zip(*(documents(r) for r in BASE_TEXTS.values()), strict=False)
        for piece in pair
    ]
    texts = {name: documents(recipe) for name, recipe in DOMAINS.items()}
    held = {name: window_text(text[-20:], tokenizer, tokens=tested) for name, text in texts.items()}
    held["base text"] = window_text(general[-60:], tokenizer, tokens=tested)
    learnt = {name: window_text(text[:-20], tokenizer, tokens=tokens) for name, text in texts.items()}
    learnt["base"] = window_text(general[:120], tokenizer, tokens=tokens)
    learnt["held out"] = window_text(general[120:180], tokenizer, tokens=3_000)
    with tempfile.TemporaryDirectory() as folder:
        states = {
            name: cache_states(model, text, Path(folder) / f"{number}.st")
            for number, (name, text) in enumerate(learnt.items())
        }
        anchor = anchor_text(model, states["base"], states["held out"])
        fit = Fit(budget=Budget(value=BUDGET), gate=False)
        deltas = [fit_delta(model, states[name], anchor, name, fit) for name in DOMAINS]
        started = time.process_time()
        routed = route_deltas(
            model, deltas, states, states["base"], states["held out"], DeltaRouterFit(budget=BUDGET)
        )
        seconds = time.process_time() - started
    fusion = routed.fusion
    count = len(deltas)
    variants = {
        "routed": Variant(tuple(fusion.weights), fusion.chart, True),
        "sum": Variant((1.0,) * count, fusion.chart, False),
        "average": Variant((1 / count,) * count, fusion.chart, False),
    } | {
        name: Variant(tuple(float(i == j) for j in range(count)), fusion.chart, False)
        for i, name in enumerate(DOMAINS)
    }
    found = [_row("learn the router; baseline: the limit of 60", "CPU seconds", seconds, 60.0)]
    for name, text in held.items():
        result = measure(model, fusion, text, list(variants.values()))
        nll = dict(zip(variants, result.nll.mean(1).tolist(), strict=True)) | {
            "base": float(result.base_nll.mean())
        }
        kl = dict(zip(variants, result.softmax_kl.mean(1).tolist(), strict=True))
        own = name if name in DOMAINS else "base"
        for kind in ("routed", "sum", "average", "base"):
            found.append(_row(f"{name}: {kind}; baseline: {own} alone", "NLL, nats", nll[kind], nll[own]))
        if own == "base":
            found.append(_row(f"{name}: routed; baseline: the budget", "mean KL, nats", kl["routed"], BUDGET))
            found.append(_row(f"{name}: sum; baseline: the budget", "mean KL, nats", kl["sum"], BUDGET))
    return found


def _row(case: str, metric: str, ours: float, baseline: float) -> Row:
    return {
        "case": case, "metric": metric, "ours": ours, "baseline": baseline, "ratio": ours / baseline, "runs": 1,
    }  # fmt: skip
