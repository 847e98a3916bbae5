"""Numbers as numbers on real tables: the value head against digits as text, ridge regression and boosting."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.tables import TABLES, Table
from tether.causal.dataset import make_examples
from tether.causal.evaluation import evaluate
from tether.causal.loading import load_backbone
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.readout import fit_values
from tether.causal.trainable import half_backbone
from tether.causal.training import TrainOptions, train
from tether.errors import ConfigError

__all__ = ["rows"]

Row = dict[str, Any]
Figures = dict[str, float]
Array = NDArray[np.float64]

BASE = "smollm2-135m"
NUMBERS = TrainOptions(
    part="head", fit_values=True, batch=8, lr=1e-4, warmup=0.1, mixed_precision="bf16", save_every=10**6
)
"""One pass over the rows teaches the head where a number stands; then the value head is fitted to the states."""
DIGITS = TrainOptions(part="all", batch=8, lr=1e-4, warmup=0.1, mixed_precision="bf16", save_every=10**6)
LONGEST = 8
"""Tokens that the digits baseline may write for its answer."""


def rows(*, fast: bool) -> list[Row]:
    """Fit on two thirds of each table's rows, test on the rest.

    Args:
        fast: one table, one seed, and a tenth of the tokens and rows.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; a run is a seed of the training order.
    """
    # One thread: CPU seconds then count work, not the waiting of threads for each other on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[Row] = []
    try:
        for make in TABLES[:1] if fast else TABLES:
            learnt, tested = make().split()
            if fast:
                learnt, tested = learnt.pick(np.arange(24)), tested.pick(np.arange(12))
            seeds = 1 if fast else 2
            # The fit alone has no order of rows, so no seed.
            fitted = [with_numbers(learnt, tested, seed=0, options=None)]
            trained = [with_numbers(learnt, tested, seed=seed) for seed in range(seeds)]
            tokens = round(_mean(trained, "tokens"))
            digits = [with_digits(learnt, tested, tokens=tokens, seed=seed) for seed in range(seeds)]
            found += _compare(learnt, tested, "value head fitted", fitted, digits)
            found += _compare(learnt, tested, "head trained, value head fitted", trained, digits)
    finally:
        torch.set_num_threads(threads)
    return found


def with_numbers(
    learnt: Table, tested: Table, *, seed: int, options: TrainOptions | None = NUMBERS
) -> Figures:
    """Train the model that reads and writes numbers, and let it predict.

    Args:
        learnt: rows to train on.
        tested: rows to predict.
        seed: of the training order.
        options: but for the seed; None only fits the value head to the states of the base.

    Returns:
        `error` (median absolute), `r2`, `covered_50`, `covered_80`, `covered_90`, `chosen` (share of rows at
        which the model's own next tokens are `<NUM>` and the end), `tokens` (of the steps; the fit reads each
        row once more),
        `seconds` (CPU).
    """
    started = time.process_time()
    backbone, tokenizer = load_backbone(BASE)
    model = CausalQwenForCausalLM.from_backbone(backbone, value_transform=learnt.transform)
    numeric = model.add_numbers(tokenizer)
    tokens = 0.0
    if options:
        tokens = _train(model, numeric, learnt, replace(options, seed=seed))
        tokens *= options.total(len(learnt.values)) * options.batch
    with half_backbone(model, "cpu", NUMBERS.mixed_precision):
        if not options:
            fit_values(model, make_examples(learnt.pairs(), numeric))
        figures = evaluate(model, numeric, tested.pairs(), batch=16)
    if figures["value_count"] != len(tested.values):
        raise ConfigError(f"{tested.name}: {figures['value_count']} numbers in {len(tested.values)} answers")
    return {
        "error": figures["value_median_error"],
        "r2": figures["value_r2"],
        **{f"covered_{share}": figures[f"value_coverage_{share}"] for share in (50, 80, 90)},
        "chosen": figures["softmax_accuracy"],
        "tokens": tokens,
        "seconds": time.process_time() - started,
    }


def with_digits(
    learnt: Table, tested: Table, *, tokens: int, seed: int, options: TrainOptions = DIGITS
) -> Figures:
    """Train the same model on the same rows as plain text, decode greedily, and read what it wrote.

    Args:
        learnt: rows to train on.
        tested: rows to predict.
        tokens: how many to read in training.
        seed: of the training order.
        options: but for steps and seed.

    Returns:
        `error`, `r2`, `read` (share of answers that are a number; the others count as the median of the learnt
        rows), `tokens`, `seconds` (CPU).
    """
    started = time.process_time()
    backbone, tokenizer = load_backbone(BASE)
    model = CausalQwenForCausalLM.from_backbone(backbone)
    steps = max(1, round(tokens / (_length(tokenizer, learnt) * options.batch)))
    length = _train(model, tokenizer, learnt, replace(options, seed=seed, steps=steps))
    with half_backbone(model, "cpu", options.mixed_precision):
        answers = _write(model, tokenizer, [pair.prompt for pair in tested.pairs()])
    usable = [_number(answer) for answer in answers]
    middle = float(np.median(learnt.values))
    predicted = np.array([middle if value is None else value for value in usable])
    return _figures(tested.values, predicted) | {
        "read": sum(value is not None for value in usable) / len(usable),
        "tokens": length * steps * options.batch,
        "seconds": time.process_time() - started,
    }


def _length(tokenizer: Any, table: Table) -> float:
    return int(make_examples(table.pairs(), tokenizer).starts[-1]) / len(table.values)


def _train(model: CausalQwenForCausalLM, tokenizer: Any, table: Table, options: TrainOptions) -> float:
    with tempfile.TemporaryDirectory() as folder:
        train(model, tokenizer, table.pairs(), options=options, folder=folder)
    return _length(tokenizer, table)


def _write(model: CausalQwenForCausalLM, tokenizer: Any, prompts: list[str]) -> list[str]:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    written: list[str] = []
    for start in range(0, len(prompts), 16):
        inputs = tokenizer(prompts[start : start + 16], padding=True, return_tensors="pt")
        out = model.generate(
            **inputs,
            max_new_tokens=LONGEST,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(new, skip_special_tokens=True)
    return written


def _number(answer: str) -> float | None:
    try:
        value = float(answer)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def on_columns(learnt: Table, tested: Table) -> dict[str, Figures]:
    """Fit ridge regression and gradient boosting on the columns, to the target and to its logarithm.

    Args:
        learnt: rows to fit.
        tested: rows to predict.

    Returns:
        `error` and `r2` of `ridge`, `ridge, log`, `boosting` and `boosting, log`.
    """
    makers: dict[str, Callable[[], Any]] = {
        "ridge": lambda: make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 3, 25))),
        "boosting": lambda: GradientBoostingRegressor(random_state=0),
    }
    found = {}
    for name, make in makers.items():
        plain = make().fit(learnt.features, learnt.values).predict(tested.features)
        logs = make().fit(learnt.features, np.log1p(learnt.values)).predict(tested.features)
        found[name] = _figures(tested.values, plain)
        found[f"{name}, log"] = _figures(tested.values, np.expm1(logs))
    return found


def _figures(values: Array, predicted: Array) -> Figures:
    error = np.abs(predicted - values)
    spread = float(np.square(values - values.mean()).sum())
    return {"error": float(np.median(error)), "r2": 1 - float(np.square(error).sum()) / spread}


def _compare(learnt: Table, tested: Table, arm: str, ours: list[Figures], digits: list[Figures]) -> list[Row]:
    head = f"{learnt.name}, {len(learnt.values)} rows learnt, {len(tested.values)} tested, {arm}"
    others = on_columns(learnt, tested)
    found: list[Row] = []
    for metric, title in (("error", "median absolute error"), ("r2", "R2")):
        found.append(_row(f"{head}; baseline: digits as text", title, ours, _mean(digits, metric), metric))
        found += [
            _row(f"{head}; baseline: {name} on the columns", title, ours, figures[metric], metric)
            for name, figures in others.items()
        ]
    median = float(np.median(np.abs(tested.values - np.median(learnt.values))))
    found.append(
        _row(f"{head}; baseline: median of the learnt rows", "median absolute error", ours, median, "error")
    )
    found += [
        _row(
            f"{head}; baseline: the stated share",
            f"coverage of the {share} % Cauchy interval",
            ours,
            share / 100,
            f"covered_{share}",
        )
        for share in (50, 80, 90)
    ]
    found += [
        _row(
            f"{head}; baseline: answers of the digits that are numbers",
            "next tokens right",
            ours,
            _mean(digits, "read"),
            "chosen",
        ),
        _row(f"{head}; baseline: digits as text", "tokens read", ours, _mean(digits, "tokens"), "tokens"),
        _row(f"{head}; baseline: digits as text", "CPU seconds", ours, _mean(digits, "seconds"), "seconds"),
    ]
    return found


def _mean(figures: list[Figures], name: str) -> float:
    return sum(each[name] for each in figures) / len(figures)


def _row(case: str, metric: str, ours: list[Figures], baseline: float, name: str) -> Row:
    mean = _mean(ours, name)
    return {
        "case": case,
        "metric": metric,
        "ours": mean,
        "baseline": baseline,
        "ratio": mean / baseline if baseline else math.inf,
        "runs": [each[name] for each in ours],
    }
