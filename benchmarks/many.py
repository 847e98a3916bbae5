"""Fusions of 5 to 50 synthetic deltas on the real base: time and memory by their number, and removal to the bit."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.ovr import peak_memory
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.certificate import certify
from tether.delta.delta import Delta
from tether.delta.fusion import fuse, unfuse
from tether.delta.gate import RANK, WINDOW, Gate
from tether.demo.corpora import BASE_TEXTS, documents

__all__ = ["rows"]

Row = dict[str, Any]
COUNTS = (5, 10, 25, 50)
STAGES = 7
REMOVED = 3


def rows(*, fast: bool) -> list[Row]:
    """Fuse, certify, take one out.

    Args:
        fast: fewer deltas and half the text.

    Returns:
        A row for each number of deltas with CPU seconds and peak bytes of each step, whether the fusion with one
        delta taken out is bit for bit the fusion that never had it; and a row a step on how linear that is.
    """
    torch.set_num_threads(1)
    model, tokenizer = load("smollm2-135m")
    text = [document[:800] for document in documents(BASE_TEXTS["news"])[:4]][: 2 if fast else 4]
    counts = (2, 4, 8) if fast else COUNTS
    found = [_row(model, tokenizer, text, count) for count in counts]
    return found + [
        _linear(step, counts, [row[step] for row in found])
        for step in ("fuse_seconds", "certify_seconds", "remove_seconds", "fuse_bytes", "certify_bytes")
    ]


def _row(model: CausalQwenForCausalLM, tokenizer: Any, text: Sequence[str], count: int) -> Row:
    deltas = {_delta(model, seed): 0.5 for seed in range(count)}
    made: dict[str, Any] = {}

    def fused() -> None:
        made["fused"] = fuse(model, deltas, by="sum")

    def certified() -> None:
        made["certificate"] = certify(model, made["fused"], tokenizer, {"news": text}, tokens=600)

    def removed() -> None:
        base, kept = unfuse(made["fused"])
        made["less"] = fuse(
            base, {d: w for d, w in kept.items() if d.name != f"d{REMOVED % count}"}, by="sum"
        )

    row: Row = {}
    for step, work in (("fuse", fused), ("certify", certified), ("remove", removed)):
        row[f"{step}_bytes"] = peak_memory(work)
        row[f"{step}_seconds"] = min(_cpu(work) for _ in range(1 if step == "certify" else 3))
    never = fuse(model, {d: w for d, w in deltas.items() if d.name != f"d{REMOVED % count}"}, by="sum")
    exact = never.config.fusion == made["less"].config.fusion and all(
        torch.equal(a, b)
        for a, b in zip(never.fusion.parameters(), made["less"].fusion.parameters(), strict=True)
    )
    figures = made["certificate"].figures["news"]
    return {
        "case": f"{count} synthetic deltas with gates, all open; {figures['tokens']} tokens",
        **row,
        "stored_bytes": sum(p.numel() * p.element_size() for p in made["fused"].fusion.parameters()),
        "removal_bit_exact": exact,
        "bound_violations": figures["bound"]["violations"],
        "gates_open": min(figures["gates_open"]),
    }


def _linear(step: str, counts: Sequence[int], values: Sequence[float]) -> Row:
    """How far values lie from a line in the number of deltas, and the growth of the last half over the line's."""
    slope, start = np.polyfit(counts, values, 1)
    line = slope * np.array(counts) + start
    late = (values[-1] - values[-2]) / (counts[-1] - counts[-2])
    return {
        "case": f"{step} by number of deltas, {counts[0]} to {counts[-1]}",
        "metric": "a delta; baseline: the last two numbers alone",
        "ours": float(slope),
        "baseline": float(late),
        "ratio": float(slope / late) if late else None,
        "at_none": float(start),
        "off_the_line": float(np.abs(line - values).max() / max(values)),
        "runs": len(counts),
    }


def _cpu(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _delta(model: CausalQwenForCausalLM, seed: int) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    width = model.abduction.loc.in_features
    first, second = torch.randn(2, width, width, generator=generator) / width
    whitening = torch.randn(STAGES, RANK, width, generator=generator)
    return Delta(
        name=f"d{seed}",
        chart="symmetric",
        first=first,
        second=second,
        gate=Gate(torch.zeros(STAGES, width), whitening, torch.full((WINDOW,), 1e30), torch.ones(STAGES)),
        base=str(model.config.base_fingerprint),
    )
