"""Measuring of the benchmark of domains: many arms at once on a text, each token against the base's law."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.domain_arms import Bench
from benchmarks.domain_plan import CHARTS
from benchmarks.trial_texts import TRIAL as DOMAINS
from tether.causal.softmax import softmax_kl
from tether.delta.account import account
from tether.delta.adapter_drift import logits
from tether.delta.adapter_serving import serve
from tether.delta.attached import Attached
from tether.delta.cache import hidden_states
from tether.delta.fusion import fuse
from tether.delta.measure import Measurement, Variant, measure
from tether.delta.output_head import chunk_rows
from tether.delta.windows import Windows

__all__ = [
    "FACTORS",
    "adapter_runs",
    "measure_curve",
    "measure_deltas",
    "measure_evidence",
    "measure_gated",
    "measure_runs",
]

FACTORS = (0.25, 0.5, 0.75, 1.0)
"""Of each learnt change, in the figure of domain loss against base drift."""


def adapter_runs(
    bench: Bench, seed: int, arms: Iterable[str], shrunk: Mapping[str, Any] | None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """List arms that change the backbone, as functions from ids to hidden states.

    Args:
        bench: the work.
        seed: which.
        arms: of `Bench.arms` or `Bench.extras`.
        shrunk: of `Bench.shrink`; None leaves the merges out.

    Returns:
        By the name of the arm: `lora:code`, `lora*s:code`, `merge ties`, `merge*s ties`.
    """
    found: dict[str, Callable[[Tensor], Tensor]] = {}

    for arm in arms:
        learnt = {name: bench.adapter(arm, name, seed) for name in DOMAINS}
        attached = Attached.of(bench.model, learnt)
        for name in DOMAINS:
            found[f"{arm}:{name}"] = _run(attached, name, 1.0)
            if "shrunk" in learnt[name].record:
                found[f"{arm}*s:{name}"] = _run(attached, name, learnt[name].record["shrunk"]["factor"])
    if shrunk is not None:
        attached, merges = bench.merged(seed)
        for name in merges:
            found[f"merge {name}"] = _run(attached, name, 1.0)
            found[f"merge*s {name}"] = _run(attached, name, shrunk[name]["factor"])
    return found


@torch.no_grad()
def measure_runs(bench: Bench, text: str, runs: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Any]:
    """Measure arms that change the backbone, in one pass over a text that shares the base's side.

    Args:
        bench: the work.
        text: which.
        runs: of `adapter_runs`.

    Returns:
        A cell for each arm.
    """
    windows = bench.test(text)
    count = len(windows.input_ids)
    base_nll = torch.zeros(count)
    nll, kl = torch.zeros(len(runs), count), torch.zeros(len(runs), count)
    for batch in windows.batches(4):
        where = windows.positions(batch)
        target = windows.targets[where].clamp(min=0).unsqueeze(-1)
        before = hidden_states(bench.model, batch)[batch.mask]
        after = [run(batch.input_ids)[batch.mask] for run in runs.values()]
        for index in torch.arange(len(before)).split(chunk_rows(bench.model.action.weight)):
            log_prob = logits(bench.model, before[index]).log_softmax(-1)
            base_nll[where[index]] = -log_prob.gather(-1, target[index]).squeeze(-1)
            for row, states in enumerate(after):
                log_moved = logits(bench.model, states[index]).log_softmax(-1)
                kl[row, where[index]] = softmax_kl(log_prob, log_moved)
                nll[row, where[index]] = -log_moved.gather(-1, target[index]).squeeze(-1)
    cells = {arm: _cell(windows.documents, windows.targets >= 0, nll[i], kl[i]) for i, arm in enumerate(runs)}
    return {"base": _cell(windows.documents, windows.targets >= 0, base_nll, torch.zeros(count)), **cells}


def measure_deltas(bench: Bench, text: str, seed: int) -> dict[str, Any]:
    """Measure the deltas: each alone, added in each chart, gated.

    Args:
        bench: the work.
        text: which.
        seed: which.

    Returns:
        A cell for each arm.
    """
    windows, cells = bench.test(text), {}
    for arm in bench.plan.deltas:
        variants = {f"{arm}:{name}": Variant(row, "symmetric", False) for name, row in _alone()}
        ones = (1.0,) * len(DOMAINS)
        if arm == "delta":
            variants |= {f"{arm}, sum {chart}": Variant(ones, chart, False) for chart in CHARTS}
        else:
            variants[f"{arm}, sum symmetric"] = Variant(ones, "symmetric", False)
        variants[f"{arm}, gated"] = Variant(ones, "symmetric", True)
        fused = fuse(bench.model, dict.fromkeys(bench.deltas(arm, seed), 1.0), gated=True, by="sum")
        cells |= _cells(
            windows, measure(bench.model, fused.fusion, windows, list(variants.values())), variants
        )
    return cells


def measure_gated(bench: Bench, text: str, seed: int, arms: Sequence[str]) -> dict[str, Any]:
    """Measure the adapters of all domains, added behind their gates.

    Args:
        bench: the work.
        text: which.
        seed: which.
        arms: of `Bench.arms`.

    Returns:
        A cell for each kind.
    """
    windows, cells = bench.test(text), {}
    for arm in arms:
        served = serve(
            bench.model, {bench.adapter(arm, name, seed): 1.0 for name in DOMAINS}, by="sum", gated=True
        )
        variants = {f"{arm}, gated": Variant((1.0,) * len(DOMAINS), "symmetric", True)}
        found = measure(served, served.fusion, windows, list(variants.values()))
        cells |= _cells(windows, found, variants)
    return cells


def measure_evidence(bench: Bench, text: str, seed: int, arms: Sequence[str]) -> dict[str, Any]:
    """Measure the adapters of all domains, weighted by evidence.

    Args:
        bench: the work.
        text: which.
        seed: which.
        arms: of `Bench.arms`.

    Returns:
        A cell for each kind.
    """
    windows, cells = bench.test(text), {}
    for arm in arms:
        served = serve(bench.model, {bench.adapter(arm, name, seed): 1.0 for name in DOMAINS})
        (found,) = account([served], windows)
        nll = torch.zeros(len(found.documents))
        nll[found.scored] = found.nll.float()
        cells[f"{arm}, evidence"] = _cell(windows.documents, found.scored, nll, found.softmax_kl)
    return cells


def measure_curve(bench: Bench, text: str, domain: str, seed: int) -> dict[str, Any]:
    """Measure what was learnt of a domain at several factors.

    Args:
        bench: the work.
        text: which.
        domain: whose deltas and adapters.
        seed: of the fits.

    Returns:
        A cell for each `arm*factor`.
    """
    cells: dict[str, Any] = {}
    windows = bench.test(text)
    for arm in bench.plan.deltas:
        delta = bench.deltas(arm, seed)[list(DOMAINS).index(domain)]
        variants = {f"{arm}*{factor:g}": Variant((factor,), "symmetric", False) for factor in FACTORS}
        fused = fuse(bench.model, {delta: 1.0}, gated=False, by="sum")
        cells |= _cells(
            windows, measure(bench.model, fused.fusion, windows, list(variants.values())), variants
        )
    runs = {}
    for arm in (*bench.arms(), *bench.plan.once):
        attached = Attached.of(bench.model, {domain: bench.adapter(arm, domain, seed)})
        runs |= {f"{arm}*{factor:g}": _run(attached, domain, factor) for factor in FACTORS}
    return cells | measure_runs(bench, text, runs)


def _run(attached: Attached, name: str, factor: float) -> Callable[[Tensor], Tensor]:
    def states(ids: Tensor) -> Tensor:
        attached.rescale(name, factor)
        made: Tensor = attached.states(name, ids).last_hidden_state
        return made

    return states


def _alone() -> Iterator[tuple[str, tuple[float, ...]]]:
    for name, row in zip(DOMAINS, torch.eye(len(DOMAINS)).tolist(), strict=True):
        yield name, tuple(row)


def _cells(windows: Windows, result: Measurement, variants: Mapping[str, Variant]) -> dict[str, Any]:
    cells = {}
    for row, arm in enumerate(variants):
        nll = torch.zeros(len(result.documents))
        nll[result.scored] = result.nll[row]
        cells[arm] = _cell(windows.documents, result.scored, nll, result.softmax_kl[row])
        cells[arm]["gates"] = [float(rate) for rate in result.gates.mean(-1)] if variants[arm].gated else None
    return cells


# Sums by document, so that arms can be compared pair by pair.
def _cell(numbers: Tensor, scored: Tensor, nll: Tensor, kl: Tensor) -> dict[str, Any]:
    rank = torch.unique(numbers, return_inverse=True)[1]

    def sums(values: Tensor) -> list[float]:
        return torch.zeros(int(rank.max()) + 1).double().index_add(0, rank, values.double()).tolist()

    return {
        "nll": sums(nll * scored),
        "scored": sums(scored),
        "kl": sums(kl),
        "tokens": sums(torch.ones(len(kl))),
        "kl_p99": float(kl.quantile(0.99)),
        "kl_max": float(kl.max()),
    }
