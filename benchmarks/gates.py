"""Gated fusion of three domains and of ten: what gates lose of each domain, and what they leave of the base."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.corpus import Corpus
from tether.delta.anchor import anchor_text
from tether.delta.budget import Budget
from tether.delta.cache import StateCache
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import fit_gate
from tether.delta.learning import fit_delta
from tether.delta.problem import Problem
from tether.delta.source import spread
from tether.delta.training import Fit

__all__ = ["rows"]

Row = dict[str, Any]
DOMAINS = ("bible", "code", "tables")
LIMIT = 0.01


def rows(*, fast: bool) -> list[Row]:
    """Fit, fuse and measure.

    Args:
        fast: a fraction of the text, and no ten domains.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder), tokens=3_000 if fast else 30_000)
        anchor = anchor_text(corpus.model, corpus.cache("base"), corpus.cache("base-held-out"))
        general = {name: corpus.cache(f"base-{name}") for name in ("news", "wiki")}
        texts = {name: corpus.cache(name) for name in DOMAINS}
        tests = {name: corpus.cache(f"{name}-test") for name in DOMAINS}
        deltas = {name: fit_delta(corpus.model, texts[name], anchor, name, _fit()) for name in DOMAINS}
        found = _measure("three domains", corpus.model, deltas, tests, general, "one-class")
        shut = {n: dataclasses.replace(d, gate=fit_gate(texts[n])) for n, d in deltas.items()}
        found += _measure("three, gates closed for 8 tokens", corpus.model, shut, tests, general, "one-class")
        if fast:
            return found
        parts = _split({name: (texts[name], tests[name]) for name in DOMAINS})
        many = {n: fit_delta(corpus.model, text, anchor, n, _fit()) for n, (text, _) in parts.items()}
        tests = {name: test for name, (_, test) in parts.items()}
        for gate in ("one-class", "softmax"):
            found += _measure(f"{len(many)} domains, {gate} gates", corpus.model, many, tests, general, gate)
        return found


def _fit() -> Fit:
    return Fit(budget=Budget(value=LIMIT))


def _split(texts: Mapping[str, tuple[StateCache, StateCache]]) -> dict[str, tuple[StateCache, StateCache]]:
    """Split corpora further: documents are clustered by their mean hidden state, tables in four, others in three."""
    from sklearn.cluster import KMeans

    found = {}
    for name, (train, test) in texts.items():
        means = []
        for cache in (train, test):
            numbers = cache.windows.documents.unique()
            means.append(
                torch.stack([cache.states[cache.windows.documents == n].float().mean(0) for n in numbers])
            )
        count = 4 if name == "tables" else 3
        kinds = KMeans(count, n_init=10, random_state=0).fit(means[0].numpy())
        labels = [torch.tensor(kinds.predict(mean.numpy())) for mean in means]
        for kind in range(count):
            halves = [
                cache.only(cache.windows.documents.unique()[label == kind])
                for cache, label in zip((train, test), labels, strict=True)
            ]
            if len(halves[1].windows.input_ids):
                found[f"{name}-{kind}"] = (halves[0], halves[1])
    return found


def _measure(
    case: str,
    model: Any,
    deltas: Mapping[str, Delta],
    tests: Mapping[str, StateCache],
    general: Mapping[str, StateCache],
    gate: str,
) -> list[Row]:
    fused = fuse(model, dict.fromkeys(deltas.values(), 1.0))
    if fused.fusion is None:
        raise RuntimeError("fuse returned a model without a fusion")
    fused.fusion.gate = gate
    problem = Problem(model, fused.fusion, Budget(value=LIMIT))
    ones = np.ones(len(deltas))
    found, extra = [], []
    for number, name in enumerate(deltas):
        scored = (tests[name].windows.targets >= 0).nonzero().squeeze(-1)
        here = problem.contexts(tests[name], scored[spread(len(scored), 1024)])
        problem.kept = [here]
        gated, base = problem.losses(ones)[0], problem.losses(0 * ones)[0]
        problem.kept = [here._replace(gates=torch.ones_like(here.gates))]
        alone = problem.losses(np.eye(len(deltas))[number])[0]
        extra.append(gated - alone)
        row = _row(f"{case}: {name}; baseline: its own delta alone, always on", "NLL", gated, alone)
        found.append(row | {"base": base, "gates_open": here.gates.mean(-1).tolist()})
    for name, cache in general.items():
        here = problem.contexts(cache, spread(len(cache.windows.input_ids), 3072))
        kl = float(problem.drift(ones, here).mean())
        row = _row(f"{case}: {name}; baseline: the budget of one delta", "softmax KL", kl, LIMIT)
        found.append(row | {"gates_open": here.gates.mean(-1).tolist()})
    mean = float(np.mean(extra))
    return [*found, _row(f"{case}: mean loss to gates; baseline: 0.05", "nats", mean, 0.05)]


def _row(case: str, metric: str, ours: float, baseline: float) -> Row:
    return {
        "case": case,
        "metric": metric,
        "ours": ours,
        "baseline": baseline,
        "ratio": ours / baseline,
        "runs": 1,
    }
