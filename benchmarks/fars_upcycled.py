"""Shaping on real weights: SmolLM2-135M as a mixture of four copies of its MLPs, trained a little; who is dead."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune import BASE
from tether.causal.loading import load, resolve
from tether.causal.trainable import TrainOptions
from tether.causal.training import train
from tether.demo.corpora import DOMAINS, documents
from tether.router import RoutingCourse, Shaping, upcycle

__all__ = ["rows"]

Row = dict[str, Any]
EXPERTS = 4
ARMS = {"none": Shaping(form="none"), "balance": Shaping()}
OPTIONS = TrainOptions(part="all", steps=20, batch=2, window=128, lr=3e-4, save_every=1000, seed=0)
HELD_OUT = 4
"""Documents that the loss is taken on before and after."""


def rows(*, fast: bool) -> list[Row]:
    """Make the mixture once and train it with every arm, on one thread.

    Args:
        fast: two steps and one document held out.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; ours is what an arm ends with, the baseline no shaping.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = OPTIONS if not fast else TrainOptions(part="all", steps=2, batch=2, window=32, lr=3e-4)
    texts = documents(DOMAINS["bible"])
    held = 1 if fast else HELD_OUT
    try:
        with tempfile.TemporaryDirectory() as named:
            base, folder = resolve(BASE), Path(named)
            mixture = upcycle(base, [base] * (EXPERTS - 1), folder / "mixture")
            found = {
                name: _arm(mixture, shaping, options, texts[held:200], texts[:held], folder / name)
                for name, shaping in ARMS.items()
            }
    finally:
        torch.set_num_threads(threads)
    return [row for name in found for row in _rows(name, found[name], found["none"], options)]


def _arm(
    mixture: Path, shaping: Shaping, options: TrainOptions, texts: list[str], held: list[str], folder: Path
) -> dict[str, Any]:
    model, tokenizer = load(str(mixture), dtype=torch.float32)
    course = RoutingCourse(shaping, say=print)
    return train(model, tokenizer, texts, options=options, folder=folder, held_out=held, term=course)


def _rows(name: str, record: dict[str, Any], plain: dict[str, Any], options: TrainOptions) -> list[Row]:
    case = f"SmolLM2-135M, {EXPERTS} copies, {options.steps} steps, {name}; baseline: none"

    def figures(of: dict[str, Any]) -> dict[str, float]:
        report = of["term"]
        return {
            "dead experts of all layers": sum(len(row["dead"]) for row in report["layers"].values()),
            **{key: report["mean"][key] for key in ("effective_experts", "max_violation")},
            "smallest load, in fair shares": min(
                min(row["load"]) * len(row["load"]) for row in report["layers"].values()
            ),
            "training loss, mean of steps": sum(of["curve"]) / len(of["curve"]),
            "held-out loss before": of["before"]["softmax_nll"],
            "held-out loss after": of["after"]["softmax_nll"],
        }

    mine, other = figures(record), figures(plain)
    who = {layer: row["dead"] for layer, row in record["term"]["layers"].items() if row["dead"]}
    return [
        {
            "case": case, "metric": metric, "ours": value, "baseline": other[metric],
            "ratio": value / other[metric] if other[metric] else None, "runs": 1,
            **({"dead": who} if metric.startswith("dead") else {}),
        }
        for metric, value in mine.items()
    ]  # fmt: skip
