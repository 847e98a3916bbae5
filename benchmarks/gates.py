"""Gated fusion of three domains and of ten: what gates lose of each domain, and what they leave of the base."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.corpus import Corpus, states_folder
from tether.causal.fused import Fusion
from tether.delta.anchor import Anchor, anchor_text
from tether.delta.budget import Budget
from tether.delta.cache import StateCache
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import fit_gate
from tether.delta.head import Reference
from tether.delta.learning import fit_delta
from tether.delta.problem import Problem
from tether.delta.source import spread
from tether.delta.training import Fit
from tether.delta.windows import Windows

__all__ = ["rows"]

Row = dict[str, Any]
DOMAINS = ("bible", "code", "tables")
KINDS = {"bible": 3, "code": 4, "tables": 3}
"""Kinds that each corpus is split into: ten domains."""
LIMIT = 0.01
TOKENS = 512
LONG = 1024


def rows(*, fast: bool) -> Iterator[Row]:
    """Fit, fuse and measure.

    Args:
        fast: a fraction of the text, and no ten domains.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    with states_folder() as folder:
        corpus = Corpus(folder, tokens=3_000 if fast else 30_000)
        anchor = anchor_text(corpus.model, corpus.cache("base"), corpus.cache("base-held-out"))
        general = {name: corpus.cache(f"base-{name}") for name in ("news", "wiki")}
        texts = {name: (corpus.cache(name), corpus.cache(f"{name}-test")) for name in DOMAINS}
        yield from _cases(
            "three domains", folder, corpus.model, anchor, texts, general, ("one-class", "softmax")
        )
        # Most windows above begin within a document, without what came before; served texts do not.
        long = {name: (text, corpus.cache(f"{name}-test", length=LONG)) for name, (text, _) in texts.items()}
        title = f"three domains, windows of {LONG} tokens"
        yield from _cases(title, folder, corpus.model, anchor, long, general, ("one-class",))
        if not fast:
            parts = _split(texts)
            title = f"{len(parts)} domains"
            yield from _cases(title, folder, corpus.model, anchor, parts, general, ("one-class", "softmax"))


def _cases(
    title: str,
    folder: Path,
    model: Any,
    anchor: Anchor,
    texts: Mapping[str, tuple[StateCache, StateCache]],
    general: Mapping[str, StateCache],
    gates: Sequence[str],
) -> Iterator[Row]:
    deltas = {name: _learnt(folder, model, text, anchor, name) for name, (text, _) in texts.items()}
    ones, alone = np.ones(len(deltas)), []
    for gate in gates:
        problem = Problem(model, _fused(model, deltas, gate), Budget(value=LIMIT))
        extra, better = [], []
        for number, (name, (_, test)) in enumerate(texts.items()):
            scored = (test.windows.targets >= 0).nonzero().squeeze(-1)
            here = problem.contexts(test, scored[spread(len(scored), TOKENS)])
            problem.kept = [here]
            gated = problem.losses(ones)[0]
            if len(alone) == number:  # what needs no gates is measured once
                base = problem.losses(0 * ones)[0]
                problem.kept = [here._replace(gates=torch.ones_like(here.gates))]
                alone.append((base, problem.losses(np.eye(len(deltas))[number])[0]))
            base, own = alone[number]
            extra.append(gated - own)
            better.append(gated < base)
            row = _row(
                f"{title}, {gate}: {name}; baseline: its own delta alone, always on", "NLL", gated, own
            )
            opened = dict(zip(deltas, here.gates.mean(-1).tolist(), strict=True))
            yield row | {"base": base, "tokens": len(here.targets), "gates_open": opened}
        for name, cache in general.items():
            yield _drift(f"{title}, {gate}: {name}", problem, cache)
        row = _row(
            f"{title}, {gate}: mean loss to gates; baseline: 0.05", "nats", float(np.mean(extra)), 0.05
        )
        yield row | {"largest": max(extra), "better_than_base": sum(better), "domains": len(deltas)}


def _drift(case: str, problem: Problem, cache: StateCache) -> Row:
    here = problem.contexts(cache, torch.arange(len(cache.windows.input_ids)))
    # Where every gate is closed the base is served.
    moved = here.gates.sum(0) > 0
    some = here._replace(at=Reference(*(v[moved] for v in here.at)), gates=here.gates[:, moved])
    kl = problem.drift(np.ones(len(problem.names)), some) if bool(moved.any()) else torch.zeros(1)
    row = _row(
        f"{case}; baseline: the budget of one delta", "softmax KL", float(kl.sum()) / len(moved), LIMIT
    )
    opened = dict(zip(problem.names, here.gates.mean(-1).tolist(), strict=True))
    return row | {"tokens": len(moved), "largest": float(kl.max()), "gates_open": opened}


def _fused(model: Any, deltas: Mapping[str, Delta], gate: str) -> Fusion:
    fusion = fuse(model, dict.fromkeys(deltas.values(), 1.0), gate=gate).fusion
    if fusion is None:
        raise RuntimeError("fuse returned a model without a fusion")
    return fusion


def _learnt(folder: Path, model: Any, text: StateCache, anchor: Anchor, name: str) -> Delta:
    """Learn a delta, or take the one that an earlier run left in the folder of TETHER_STATES; gates are always new."""
    path = folder / f"{name}-{len(text.windows.input_ids)}.delta"
    if path.is_file():
        return dataclasses.replace(Delta.load(path), gate=fit_gate(text, background=anchor.background))
    return fit_delta(model, text, anchor, name, _fit()).save(path)


def _fit() -> Fit:
    return Fit(budget=Budget(value=LIMIT))


def _split(texts: Mapping[str, tuple[StateCache, StateCache]]) -> dict[str, tuple[StateCache, StateCache]]:
    """Split corpora further by clustering documents by their mean hidden state; every fifth, or the last, is aside."""
    from sklearn.cluster import KMeans

    found = {}
    for name, halves in texts.items():
        whole = _join(*halves)
        numbers = whole.windows.documents.unique()
        means = [whole.states[whole.windows.documents == n].float().mean(0).numpy() for n in numbers]
        labels = KMeans(KINDS[name], n_init=10, random_state=0).fit_predict(np.stack(means))
        for kind in range(KINDS[name]):
            of_kind = numbers[torch.from_numpy(labels == kind)]
            tested = torch.arange(len(of_kind)) % 5 == min(4, len(of_kind) - 1)
            found[f"{name}-{kind}"] = (whole.only(of_kind[~tested]), whole.only(of_kind[tested]))
    return found


def _join(one: StateCache, other: StateCache) -> StateCache:
    """Lay two texts end to end; documents of the second are numbered on."""
    a, b = one.windows, other.windows
    windows = Windows(
        torch.cat([a.input_ids, b.input_ids]),
        torch.cat([a.targets, b.targets]),
        torch.cat([a.documents, b.documents + int(a.documents.max()) + 1]),
        torch.cat([a.starts, b.starts[1:] + a.starts[-1]]),
    )
    every = (cache.states[torch.arange(len(cache.states))] for cache in (one, other))
    return one._replace(windows=windows, states=torch.cat(list(every)))


def _row(case: str, metric: str, ours: float, baseline: float) -> Row:
    return {
        "case": case,
        "metric": metric,
        "ours": ours,
        "baseline": baseline,
        "ratio": ours / baseline,
        "runs": 1,
    }
