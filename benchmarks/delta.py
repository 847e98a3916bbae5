"""Cost of a delta on the real base: reading a text once, fitting from the cache, measuring."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.filling import filling
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.fusion import fuse
from tether.delta.learning import anchor_text, fit_delta, reference
from tether.delta.measure import Variant, measure
from tether.delta.training import Fit
from tether.delta.windows import Windows, window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.runs import Usage

__all__ = ["rows"]

Row = dict[str, Any]


def rows(*, fast: bool) -> list[Row]:
    """Measure; figures are medians of the runs, with the smallest and largest beside them.

    Args:
        fast: a fraction of the text.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    model, tokenizer = load("smollm2-135m")
    tokens, repeats = (4_000, 2) if fast else (30_000, 2)
    domain = window_text(documents(DOMAINS["bible"]), tokenizer, tokens=tokens)
    general = [document[:1200] for document in documents(BASE_TEXTS["news"])]
    base, held_out = (
        window_text(part, tokenizer, tokens=tokens // 2) for part in (general[:120], general[120:240])
    )
    sample = window_text(general[240:], tokenizer, tokens=min(tokens, 6_000))
    with tempfile.TemporaryDirectory() as folder:
        found = [_reading(model, sample, Path(folder), repeats)]
        caches = [
            cache_states(model, text, Path(folder) / f"{i}.st")
            for i, text in enumerate((domain, base, held_out))
        ]
        found += _fitting(model, caches, repeats)
        found.append(_measuring(model, caches, sample, repeats))
    found.append(filling(2_000 if fast else 20_000))
    with Usage() as usage:
        pass
    peak, limit = float(usage.peak_rss_bytes), 3e9
    found.append(_row("whole benchmark; baseline: the limit of 3 GB", "peak memory, bytes", [peak], [limit]))
    return found


def _cpu(work: Callable[[], Any], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return seconds


def _row(case: str, metric: str, ours: list[float], baseline: list[float]) -> Row:
    mine, other = statistics.median(ours), statistics.median(baseline)
    return {
        "case": case,
        "metric": metric,
        "ours": mine,
        "baseline": other,
        "ratio": mine / other,
        "runs": len(ours),
        "spread": {"ours": [min(ours), max(ours)], "baseline": [min(baseline), max(baseline)]},
    }


@torch.no_grad()
def _reading(model: CausalQwenForCausalLM, text: Windows, folder: Path, repeats: int) -> Row:
    """Caching states on disk against the bare backbone on the same batches, runs interleaved."""

    def bare() -> None:
        for batch in text.batches(8):
            model.backbone(input_ids=batch.input_ids, use_cache=False)

    ours, baseline = [], []
    for run in range(repeats):
        baseline += _cpu(bare, 1)
        ours += _cpu(lambda run=run: cache_states(model, text, folder / f"reading-{run}.st"), 1)
    case = f"cache states of {len(text.input_ids)} tokens; baseline: the backbone's forward pass alone"
    return _row(case, "CPU seconds", ours, baseline)


def _fitting(model: CausalQwenForCausalLM, caches: list[Any], repeats: int) -> list[Row]:
    """A fit with its budget met, against the same loss passes over the full vocabulary."""
    domain, base, held_out = caches
    anchor = anchor_text(model, base, held_out)
    fit = Fit(budget=Budget(value=0.01))
    ours = _cpu(lambda: fit_delta(model, domain, anchor, "bible", fit), repeats)
    weight = model.action.weight.detach()
    states, targets = domain.scored()
    part = reference(model, states[:1024]).loc.requires_grad_()

    def full() -> None:
        for loc, target in zip(part.split(256), targets[:1024].split(256), strict=True):
            torch.nn.functional.cross_entropy(loc @ weight.T, target).backward()

    scale = fit.epochs * len(targets) / 1024
    baseline = [seconds * scale for seconds in _cpu(full, repeats)]
    case = (
        f"fit a delta from the cache, {len(targets)} tokens, budget met; baseline: {fit.epochs} epochs of "
        "full-vocabulary cross-entropy, forward and backward, scaled up from 1,024 tokens"
    )
    prepared = _cpu(lambda: anchor_text(model, base, held_out), repeats)
    once = "prepare base text once for all domains (output Fisher); baseline: one fit"
    return [_row(case, "CPU seconds", ours, baseline), _row(once, "CPU seconds", prepared, ours)]


def _measuring(model: CausalQwenForCausalLM, caches: list[Any], text: Windows, repeats: int) -> Row:
    """Drift of one fused delta on a text, against the base's plain logits on it."""
    domain, base, held_out = caches
    delta = fit_delta(
        model, domain, anchor_text(model, base, held_out), "bible", Fit(budget=Budget(value=0.01))
    )
    fused = fuse(model, {delta: 1.0}, gated=False, by="sum")
    variant = [Variant((1.0,), "symmetric", False)]

    @torch.no_grad()
    def plain() -> None:
        for batch in text.batches(4):
            model(input_ids=batch.input_ids, use_cache=False)

    if fused.fusion is None:
        raise RuntimeError("fuse returned a model without a fusion")
    fusion = fused.fusion
    ours = _cpu(lambda: measure(model, fusion, text, variant), repeats)
    case = f"measure one delta on {len(text.input_ids)} tokens (KL, NLL, drift, bound); baseline: the base's logits"
    return _row(case, "CPU seconds", ours, _cpu(plain, repeats))
