"""The vision-language part of the LAPE-TEFM trial: language towers merged into each of two models by every arm."""

import json
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lape_arms import arms, rivals, seeds
from benchmarks.lape_curvature import curvature_rows, linear_weights
from benchmarks.lape_scenes import Scenes, answer_loss
from benchmarks.lape_table import Kept
from benchmarks.vlm import OWN, PROBES, Pair, measured, merged, merged_and_reported, observed, trained
from tether.causal.loading import cache_folder
from tether.merge.recipe import read_recipe
from tether.merge.tefm.observed import parse_encoding
from tether.merge.tefm.trace import hessian_trace

__all__ = ["rows"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]

RECIPE = Path(__file__).parents[1] / "recipes" / "vision-language-lape-tefm.yaml"
ENCODINGS = [parse_encoding("paper"), parse_encoding("position")]
TRACED = ("average", "regression mean", "literal", "corrected")
PICTURES = 32
"""Pictures of each task on which a Hessian is measured."""


def rows(*, fast: bool) -> list[Row]:
    """Train the pairs, merge and measure.

    Args:
        fast: one seed, a twentieth of the steps, both forms without the switches.

    Returns:
        Rows: accuracy over own tasks against the best tuned rival of each seed, traces, gaps.
    """
    trials = [_kept(seed, fast) for seed in seeds(fast=fast)]
    found = []
    for name in dict.fromkeys(name for trial in trials for name in trial["merges"]):
        here = [trial for trial in trials if name in trial["merges"]]
        mine = [trial["merges"][name]["own"] for trial in here]
        best = [
            max(trial["merges"][rival]["own"] for rival in ("average", "task arithmetic", "TIES"))
            for trial in here
        ]
        found.append(
            {
                "case": f"vision-language pair, {name}; baseline: best of average, task arithmetic and TIES",
                "metric": "accuracy over own tasks",
                "ours": float(np.mean(mine)),
                "baseline": float(np.mean(best)),
                "ratio": float(np.mean(mine) / np.mean(best)),
                "runs": mine,
                "refine": [trial["refine"].get(name) for trial in here],
            }
        )
    return found + curvature_rows("vision-language pair", [trial["curvature"] for trial in trials])


# What an earlier run measured of a seed is not measured again.
def _kept(seed: int, fast: bool) -> dict[str, Any]:
    kept = Kept(
        cache_folder().absolute() / f"lape-tefm-vision-{seed}{'-fast' if fast else ''}" / "table.json"
    )
    return kept.value("trial", lambda: _trial(seed, fast))


def _trial(seed: int, fast: bool) -> dict[str, Any]:
    start = time.process_time()
    steps = (20, 20, 8) if fast else (500, 600, 120)
    with tempfile.TemporaryDirectory() as place, chdir(place):
        pair = trained(seed, *steps)
        observed(pair.train, ENCODINGS, 6 if fast else PROBES)
        logger.info("seed %d: trained and observed in %.0f CPU s", seed, time.process_time() - start)
        plain = read_recipe(RECIPE)
        found: dict[str, Any] = {"merges": {"each its own": measured(pair.models, pair.test)}, "refine": {}}
        found["curvature"] = {name: [_curvature(pair, pair.models[name], name, fast)] for name in pair.models}
        made = {}
        for name, recipes in rivals(plain, "runs/parent", "lm_head").items():
            tried = recipes[:1] if fast else recipes
            scores = (
                [measured(merged(each), pair.validation)["own"] for each in tried] if tried[1:] else [0.0]
            )
            made[name] = tried[int(np.argmax(scores))]
        probes = {"probes": "runs/probes.jsonl", "samples": 4 if fast else 36}
        # What fits both models' pictures: a probe is read by the model that it is merged into.
        for name, arm in arms(fast=fast or seed > 0, words=False).items():
            made[name] = arm.recipe(plain, probes)
        known: dict[str, Any] = {}
        for name, recipe in made.items():
            results = merged_and_reported(recipe)
            models = {own: model for own, (model, _) in results.items()}
            # Merges of equal weights are measured once.
            key = json.dumps([report["tensors"] for _, report in results.values()], sort_keys=True)
            if key not in known:
                known[key] = measured(models, pair.test)
            found["merges"][name] = known[key]
            if recipe.refine:
                found["refine"][name] = {own: report["refine"] for own, (_, report) in results.items()}
            if name in TRACED:
                found["curvature"][name] = [
                    _curvature(pair, model, own, fast) for own, model in models.items()
                ]
        own = {name: round(each["own"], 3) for name, each in found["merges"].items()}
        logger.info("seed %d: %.0f CPU s, %s", seed, time.process_time() - start, own)
    return found


# On pictures of the validation split; the gap is that of train and test pictures.
def _curvature(pair: Pair, model: Any, own: str, fast: bool) -> dict[str, Any]:
    def loss_on(scenes: Scenes, count: int) -> float:
        with torch.no_grad():
            parts = [answer_loss(model, scenes, asked, torch.arange(count)) for asked in OWN[own]]
            return float(torch.stack(parts).mean())

    def of(asked: str, rows_: Tensor) -> Callable[[], Tensor]:
        return lambda: answer_loss(model, pair.validation, asked, rows_)

    generator = torch.Generator().manual_seed(0)
    rows_ = torch.arange(4 if fast else PICTURES)
    found = hessian_trace(
        [of(asked, rows_) for asked in OWN[own]], linear_weights(model), vectors=2 if fast else 16,
        generator=generator,
    )  # fmt: skip
    return {
        "domain": own, "train": loss_on(pair.train, 400), "test": loss_on(pair.test, 400),
        "samples": len(pair.train.pictures), "trace": list(found.draws),
    }  # fmt: skip
