"""A router over domain deltas on the real base, beside each delta alone, their sum and their average."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tether.causal.loading import load
from tether.delta.budget import Budget
from tether.delta.cache import StateCache, cache_states
from tether.delta.delta import Delta
from tether.delta.learning import anchor_text, fit_delta
from tether.delta.measure import Variant, measure
from tether.delta.shards import load_shards
from tether.delta.training import Fit
from tether.delta.windows import Windows, window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.demo.plan import PIECE
from tether.router.deltas import DeltaRouterFit, route_deltas
from tether.store.documents import read_documents

__all__ = ["rows"]

Row = dict[str, Any]
BUDGET = 0.01
LIMITS = {"domain": 0.05, "base text": 0.02, "seconds": 60.0}
"""NLL a token above the delta alone, NLL a token above the base, CPU seconds of learning the router."""


class Inputs(NamedTuple):
    """What a router is learnt from and measured on.

    Attributes:
        source: where the deltas are from, for the rows.
        deltas: one a domain.
        states: cached, by domain, and `base` and `held out`.
        tests: held-out text by domain and by kind of base text.
    """

    source: str
    deltas: list[Delta]
    states: dict[str, StateCache]
    tests: dict[str, Windows]


def rows(*, fast: bool) -> list[Row]:
    """Learn a router over three deltas from cached states, and measure all on held-out documents.

    The deltas, states and texts are those of a finished demo in the folder that TETHER_DEMO names, or in `demo`;
    where there is none, deltas are learnt here, on half of the demo's text.

    Args:
        fast: a fifth of the text.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline of a domain is its own delta alone, of base
        text the base. Where something is asked for, `limit` and whether it `holds`.
    """
    model, tokenizer = load("smollm2-135m")
    folder = Path(os.environ.get("TETHER_DEMO", "demo"))
    tested = 300 if fast else 1_000
    if (folder / "deltas").is_dir():
        inputs = _of_demo(folder, tokenizer, tested)
    else:
        inputs = _learnt(model, tokenizer, 3_000 if fast else 15_000, tested)
    started = time.process_time()
    routed = route_deltas(
        model, inputs.deltas, inputs.states, inputs.states["base"], inputs.states["held out"],
        DeltaRouterFit(budget=BUDGET),
    )  # fmt: skip
    seconds = time.process_time() - started
    record = routed.config.fusion["router"]["record"]
    case = f"{inputs.source}; learn the router on {record['tokens']:,} tokens"
    return [
        _row(f"{case}; baseline: the limit", "CPU seconds", seconds, LIMITS["seconds"], limit=LIMITS["seconds"]),
        *_measured(model, routed.fusion, inputs),
    ]  # fmt: skip


def _of_demo(folder: Path, tokenizer: Any, tested: int) -> Inputs:
    def text(name: str) -> Windows:
        return window_text(read_documents(folder / "texts" / f"{name}.jsonl"), tokenizer, tokens=tested)

    states = {name: load_shards(folder / "states" / name) for name in (*DOMAINS, "base")}
    states["held out"] = load_shards(folder / "states" / "base-held-out")
    deltas = [Delta.load(folder / "deltas" / f"{name}.delta") for name in DOMAINS]
    return Inputs("the demo's deltas", deltas, states, {name: text(name) for name in (*DOMAINS, *BASE_TEXTS)})


def _learnt(model: Any, tokenizer: Any, tokens: int, tested: int) -> Inputs:
    base = {name: [piece[:PIECE] for piece in documents(recipe)] for name, recipe in BASE_TEXTS.items()}
    mixed = [piece for pair in zip(*base.values(), strict=False) for piece in pair]
    texts = {name: documents(recipe) for name, recipe in DOMAINS.items()}
    tests = {name: text[-20:] for name, text in texts.items()}
    tests |= {name: text[90:150] for name, text in base.items()}
    learnt = {name: (text[:-20], tokens) for name, text in texts.items()}
    learnt |= {"base": (mixed[:120], tokens), "held out": (mixed[120:180], 3_000)}
    with tempfile.TemporaryDirectory() as folder:
        states = {
            name: cache_states(
                model, window_text(text, tokenizer, tokens=count), Path(folder) / f"{number}.st"
            )
            for number, (name, (text, count)) in enumerate(learnt.items())
        }
    anchor = anchor_text(model, states["base"], states["held out"])
    fit = Fit(budget=Budget(value=BUDGET), gate=False)
    deltas = [fit_delta(model, states[name], anchor, name, fit) for name in DOMAINS]
    held = {name: window_text(text, tokenizer, tokens=tested) for name, text in tests.items()}
    return Inputs(f"deltas of {tokens:,} tokens", deltas, states, held)


def _measured(model: Any, fusion: Any, inputs: Inputs) -> list[Row]:
    names = [delta.name for delta in inputs.deltas]
    count = len(names)
    variants = {
        "routed": Variant(tuple(fusion.weights), fusion.chart, True),
        "sum": Variant((1.0,) * count, fusion.chart, False),
        "average": Variant((1 / count,) * count, fusion.chart, False),
    } | {
        name: Variant(tuple(float(i == j) for j in range(count)), fusion.chart, False)
        for i, name in enumerate(names)
    }
    found, drifts = [], []
    for name, text in inputs.tests.items():
        result = measure(model, fusion, text, list(variants.values()))
        nll = dict(zip(variants, result.nll.mean(1).tolist(), strict=True))
        nll["base"] = float(result.base_nll.mean())
        own, limit = (name, LIMITS["domain"]) if name in names else ("base", LIMITS["base text"])
        for kind in ("routed", "sum", "average", "base"):
            asked = nll[own] + limit if kind == "routed" else None
            found.append(
                _row(f"{name}: {kind}; baseline: {own} alone", "NLL, nats", nll[kind], nll[own], limit=asked)
            )
        if own == "base":
            drift = dict(zip(variants, result.softmax_kl.mean(1).tolist(), strict=True))
            drifts.append((drift["routed"], drift["sum"], result.base_nll.numel()))
            for kind in ("routed", "sum"):
                found.append(
                    _row(f"{name}: {kind}; baseline: the budget", "mean KL, nats", drift[kind], BUDGET)
                )
    total = sum(tokens for *_, tokens in drifts)
    for place, kind in enumerate(("routed", "sum")):
        mean = sum(row[place] * row[2] for row in drifts) / total
        asked = BUDGET if kind == "routed" else None
        found.append(
            _row(f"base text: {kind}; baseline: the budget", "mean KL, nats", mean, BUDGET, limit=asked)
        )
    return found


def _row(case: str, metric: str, ours: float, baseline: float, *, limit: float | None = None) -> Row:
    row: Row = {
        "case": case, "metric": metric, "ours": ours, "baseline": baseline, "ratio": ours / baseline, "runs": 1,
    }  # fmt: skip
    return row if limit is None else row | {"limit": limit, "holds": ours <= limit}
