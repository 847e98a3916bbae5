"""Merging across widths: models of hidden sizes 256 and 320, each good at another task, merged by the product.

The wide model starts from the narrow one's parent, widened and with all of its units shuffled, so that what
corresponds has to be found. The recipe that is shipped is the one that runs.
"""

import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lape_lines import Data, accuracy, byte_tokenizer, fresh, nll, shuffled, train, widened
from tether.merge.observation import observe
from tether.merge.pairing import align_checkpoints
from tether.merge.plan import make_plan
from tether.merge.probes import encode_probes, read_probes
from tether.merge.recipe import Model, Recipe, read_recipe
from tether.merge.run import merge

__all__ = ["rows"]

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).parents[1] / "recipes" / "unequal-widths.yaml"
NARROW, WIDE = 256, 320
TASKS = {"narrow": "digits", "wide": "tumors"}
"""The task of each model."""

Row = dict[str, Any]
Figures = dict[str, float]


def rows(*, fast: bool) -> list[Row]:
    """Train, merge and measure.

    Args:
        fast: a twentieth of the steps.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline is the accuracy of the model that was
        trained on the task. The last row says how well the units matched.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = Data(0)
        steps = (8, 6) if fast else (150, 150)
        parent = _trained(fresh(NARROW, 0), data, "parent", steps[0])
        narrow = _trained(copy.deepcopy(parent), data, "narrow", steps[1])
        wide = _trained(shuffled(widened(parent, WIDE, 1), 2), data, "wide", steps[1])
        return _measured(narrow, wide, data)
    finally:
        torch.set_num_threads(threads)


def _trained(model: Any, data: Data, role: str, steps: int) -> Any:
    start = time.process_time()
    if role == "parent":
        mix = {"text": 16, "digits": 8, "tumors": 8}
        train(model, data, mix, steps=steps, rate=2e-3, seed=0)
    else:
        train(model, data, {"text": 8, TASKS[role]: 24}, steps=steps, rate=1e-3, seed=1)
    logger.info("%s: %d steps, %.0f CPU s", role, steps, time.process_time() - start)
    return model


def _measured(narrow: Any, wide: Any, data: Data) -> list[Row]:
    tokenizer = byte_tokenizer()
    own = {"narrow": narrow, "wide": wide}
    figures = {name: _figures(model, data) for name, model in own.items()}
    with tempfile.TemporaryDirectory() as place, chdir(place):
        runs = Path("runs")
        for name, model in own.items():
            model.save_pretrained(runs / name)
            tokenizer.save_pretrained(runs / name)
        lines = [_twice(data.texts[name][:160]) for name in data.texts]
        _write(runs / "lines.jsonl", [text for texts in zip(*lines, strict=True) for text in texts])
        probes = [_prompt(line) for name in data.texts for line in data.texts[name][:32]]
        _write(runs / "probes.jsonl", probes)
        start = time.process_time()
        matched = align_checkpoints(
            "runs/wide", "runs/narrow", runs / "lines.jsonl", runs / "narrow.maps", tokens=8192
        )
        for name in own:
            loaded = AutoModelForCausalLM.from_pretrained(runs / name, dtype=torch.float32).eval()
            reader = AutoTokenizer.from_pretrained(runs / name)
            observe(loaded, encode_probes(read_probes(runs / "probes.jsonl"), reader), runs / "grams" / name)
        recipe = read_recipe(RECIPE)
        for label, asked in _variants(recipe).items():
            target = Path("runs") / label.replace(" ", "-")
            merge(make_plan(asked), target, threads=1)
            merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
            figures[label] = _figures(merged, data)
        logger.info("aligned, observed, merged in %.0f CPU s", time.process_time() - start)
    likeness = matched["similarity"]["residual"]
    row = {
        "case": "units of the narrow model matched", "metric": "similarity of residual dimensions",
        "ours": likeness, "baseline": 1.0, "ratio": likeness, "runs": matched["similarity"],
        "unmatched": matched["unmatched"],
    }  # fmt: skip
    return [*_as_rows(figures), row]


# Two lines a document: one alone is shorter than what is compared on.
def _twice(lines: list[str]) -> list[str]:
    return [f"{one}\n{other}" for one, other in zip(lines[::2], lines[1::2], strict=True)]


# What is asked of a model: its line without the answer; the first half of running text.
def _prompt(line: str) -> str:
    return line[:-1] if line[-2] == "=" else line[: len(line) // 2]


def _write(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _variants(recipe: Recipe) -> dict[str, Recipe]:
    averaged = {name: Model(path=model.path, align=model.align) for name, model in recipe.models.items()}
    linear = recipe.model_copy(update={"operator": "linear", "options": {}, "models": averaged})
    return {"merged by the recipe": recipe, "merged, plain average": linear}


def _figures(model: Any, data: Data) -> Figures:
    found = {"text NLL a byte": nll(model, data.test["text"])}
    for task in TASKS.values():
        found[f"{task} accuracy"], found[f"{task} NLL"] = accuracy(model, data.test[task])
    return found


def _as_rows(figures: dict[str, Figures]) -> list[Row]:
    best: dict[str, Callable[[str], float]] = {}
    for role, task in TASKS.items():
        for metric in (f"{task} accuracy", f"{task} NLL"):
            best[metric] = lambda m, r=role: figures[r][m]
    best["text NLL a byte"] = lambda m: min(figures[role][m] for role in TASKS)
    return [
        {
            "case": f"{name}; baseline: the model trained on the task",
            "metric": metric,
            "ours": value,
            "baseline": best[metric](metric),
            "ratio": value / best[metric](metric),
            "runs": [value],
        }
        for name, values in figures.items()
        for metric, value in values.items()
    ]
