"""Merging two vision-language models with different vision towers on the language tower they share.

Three seeds of everything: parent, both fine-tunes, pictures, paths. The recipe that is shipped is the one
that runs; the other operators have their options tuned on pictures of a validation split.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.lape_scenes import (
    QUESTIONS,
    Scenes,
    accuracy,
    drift,
    open_eye,
    parent,
    reader,
    tune,
    with_eye,
)
from tether.merge.observation import observe
from tether.merge.plan import make_plan
from tether.merge.probes import encode_probes, load_reader, read_probes
from tether.merge.recipe import Model, Recipe, read_recipe
from tether.merge.run import merge
from tether.merge.tefm.observed import Encoding
from tether.stats import standard_error

__all__ = [
    "BASELINES",
    "KINDS",
    "OWN",
    "PROBES",
    "Pair",
    "measured",
    "merged",
    "merged_and_reported",
    "observed",
    "plain",
    "rows",
    "trained",
]

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).parents[1] / "recipes" / "vision-language-regression.yaml"
OWN = {"digits": ("digit",), "colours": ("colour", "place")}
"""Tasks of each model."""
KINDS = {"digits": "clip", "colours": "siglip"}
SHARES = {"digits": {"digit": 1.0}, "colours": {"colour": 0.5, "place": 0.5}}
"""What each model is asked in training."""
RATES = {"digits": (3e-3, 5e-4), "colours": (3e-3, 5e-4)}
"""Highest learning rates of the language model and of the rest (docs/log.md says how they were chosen)."""
PROBES = 48
"""Pictures of each task on which the regression mean observes; they are training pictures."""

Options = tuple[str, dict[str, Any], dict[str, Any]]
BASELINES: dict[str, list[Options]] = {
    "average": [("linear", {}, {})],
    "task arithmetic": [("task_arithmetic", {"lambda": x}, {}) for x in (0.5, 0.7, 0.85, 1.0)],
    "TIES": [("ties/mergekit", {"lambda": x}, {"density": d}) for d in (0.2, 0.5) for x in (0.7, 1.0, 1.3)],
    "DARE-TIES": [("dare_ties", {"lambda": x}, {"density": d}) for d in (0.5, 0.8) for x in (0.7, 1.0)],
}
OURS = [{"shrinkage": a, "lambda": x} for a in (0.9, 0.98) for x in (1.0, 1.2, 1.5)]
"""Grid of the regression mean, as long as that of TIES, chosen on the same pictures; the recipe comes first."""
Figures = dict[str, Any]


def rows(*, fast: bool) -> list[dict[str, Any]]:
    """Train, merge and measure.

    Args:
        fast: one seed and a twentieth of the steps.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs: means over seeds; `runs` has the seeds. The baseline
        of the merges is the best of the tuned ones of each seed, that of a task the model trained on it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = (20, 20, 8) if fast else (500, 600, 120)
        found = [trial(seed, *steps) for seed in ((0,) if fast else (0, 1, 2))]
    finally:
        torch.set_num_threads(threads)
    return _as_rows(found)


class Pair(NamedTuple):
    """A trained pair; its checkpoints are in `runs`, in the current folder.

    Attributes:
        language: the parent's language model.
        models: name to model.
        moved: name to drift from the parent on words.
        train: pictures that both were trained on.
        validation: pictures to choose options on.
        test: the rest.
    """

    language: Any
    models: dict[str, Any]
    moved: dict[str, tuple[float, float]]
    train: Scenes
    validation: Scenes
    test: Scenes


def trained(seed: int, parent_steps: int, eye_steps: int, steps: int) -> Pair:
    """Train a parent and two vision-language models, and write them into `runs`.

    Args:
        seed: of everything.
        parent_steps: of the language model.
        eye_steps: of each vision tower alone.
        steps: of each vision-language model.

    Returns:
        The pair.
    """
    order = np.random.default_rng(seed).permutation(1797)
    train = Scenes.drawn(np.concatenate([order[600:]] * 2), seed)
    validation, test = Scenes.drawn(order[:200], seed + 10), Scenes.drawn(order[200:600], seed + 20)
    language = parent(seed, parent_steps)
    language.save_pretrained("runs/parent")
    reader("clip").tokenizer.save_pretrained("runs/parent")
    models, moved = {}, {}
    for number, (name, kind) in enumerate(KINDS.items()):
        model = open_eye(with_eye(language, kind, seed + number), train, steps=eye_steps, seed=seed)
        tune(model, train, SHARES[name], steps=steps, rates=RATES[name], seed=seed + number)
        model.save_pretrained(f"runs/{name}")
        reader(kind).save_pretrained(f"runs/{name}")
        models[name], moved[name] = model, drift(language, model)
    return Pair(language, models, moved, train, validation, test)


def trial(seed: int, parent_steps: int, eye_steps: int, steps: int) -> dict[str, Figures]:
    """Run one seed.

    Args:
        seed: of everything.
        parent_steps: of the language model.
        eye_steps: of each vision tower alone.
        steps: of each vision-language model.

    Returns:
        Model or merge to its figures: every question through both towers, `own`, the mean over tasks with the
        tower that was trained on them.
    """
    start = time.process_time()
    with tempfile.TemporaryDirectory() as place, chdir(place):
        pair = trained(seed, parent_steps, eye_steps, steps)
        language, models, moved, test, validation = (
            pair.language, pair.models, pair.moved, pair.test, pair.validation,
        )  # fmt: skip
        logger.info("seed %d: trained in %.0f CPU s, drift %s", seed, time.process_time() - start, moved)
        figures: dict[str, Figures] = {"drift": {name: list(pair) for name, pair in moved.items()}}
        for name, model in models.items():
            figures["language of " + name] = measured(_lent(models, dict.fromkeys(KINDS, model)), test)
        figures["language of the parent"] = measured(_lent(models, dict.fromkeys(KINDS, language)), test)
        figures["each its own"] = measured(models, test)
        observed(pair.train)
        recipe = read_recipe(RECIPE)
        figures["regression mean, as shipped"] = measured(merged(recipe), test)
        from_parent = recipe.model_copy(update={"base": Model(path="runs/parent")})
        ours = [from_parent.model_copy(update={"options": recipe.options | each}) for each in OURS]
        grids = {"regression mean": (ours, OURS)} | {
            name: ([plain(recipe, *options) for options in grid], [list(options[1:]) for options in grid])
            for name, grid in BASELINES.items()
        }
        for name, (tried, options) in grids.items():
            scores = (
                [measured(merged(each), validation)["own"] for each in tried] if len(tried) > 1 else [1.0]
            )
            best = int(np.argmax(scores))
            figures[name] = measured(merged(tried[best]), test) | {"options": options[best]}
    own = {name: round(each["own"], 3) for name, each in figures.items() if "own" in each}
    logger.info("seed %d: %.0f CPU s, %s", seed, time.process_time() - start, own)
    return figures


def observed(train: Scenes, encodings: Sequence[Encoding] = (), each: int = PROBES) -> None:
    """Let both models answer questions about pictures, and keep what they were seen to do in `runs/grams`.

    Args:
        train: pictures of the training split.
        encodings: weightings under which neurons are encoded too.
        each: pictures of each question.
    """
    count = each * len(QUESTIONS)
    train.save(Path("runs/pictures"), count)
    asked = [question for question in QUESTIONS.values() for _ in range(each)]
    lines = [{"text": text, "image": f"pictures/{number:03d}.png"} for number, text in enumerate(asked)]
    Path("runs/probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    probes = read_probes("runs/probes.jsonl")
    for name in KINDS:
        loaded, tokenizer, processor = load_reader(f"runs/{name}", images=True)
        shown = encode_probes(probes, tokenizer, processor=processor)
        observe(loaded, shown, f"runs/grams/{name}", shortest=1, encodings=encodings)


def plain(recipe: Recipe, operator: str, options: dict[str, Any], settings: dict[str, Any]) -> Recipe:
    """Give a recipe for the same models by an operator that observes nothing.

    Args:
        recipe: whose models.
        operator: its name.
        options: of it.
        settings: of every model alike.

    Returns:
        The recipe; all but `linear` start from the parent.
    """
    models = {name: Model(path=each.path, **settings) for name, each in recipe.models.items()}
    base = None if operator == "linear" else Model(path="runs/parent")
    return recipe.model_copy(
        update={"operator": operator, "options": options, "models": models, "base": base}
    )


def merged(recipe: Recipe) -> dict[str, Any]:
    """Merge into each of the two models.

    Args:
        recipe: of the merge.

    Returns:
        Name of the model whose vision tower is kept, to the result as plain transformers loads it.
    """
    return {name: model for name, (model, _) in merged_and_reported(recipe).items()}


def merged_and_reported(recipe: Recipe) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Do the same, and keep what `merge.json` says.

    Args:
        recipe: of the merge.

    Returns:
        Name to result and report.
    """
    found = {}
    for name in KINDS:
        target = Path("runs") / f"merged-{name}"
        report = merge(make_plan(recipe.model_copy(update={"into": name})), target, threads=1)
        model = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32).eval()
        found[name] = model, report
        shutil.rmtree(target)
    return found


# Both models' towers on other language models.
def _lent(models: dict[str, Any], languages: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, model in models.items():
        kind = KINDS[name]
        lent = with_eye(_language(languages[name]), kind, 0)
        eyes = {k: v for k, v in model.state_dict().items() if "vision_tower" in k or "projector" in k}
        lent.load_state_dict(eyes, strict=False)
        found[name] = lent.eval()
    return found


def _language(model: Any) -> Any:
    return _Language(model) if hasattr(model.model, "language_model") else model


class _Language:
    """A vision-language model seen as the language model inside it."""

    def __init__(self, model: Any) -> None:
        self.model, self.lm_head = model.model.language_model, model.lm_head


def measured(models: dict[str, Any], scenes: Scenes) -> Figures:
    """Ask every question through both towers.

    Args:
        models: name to model.
        scenes: pictures.

    Returns:
        Accuracies; `own`, the mean over tasks with the tower that was trained on them; `all`, that over all.
    """
    found: Figures = {
        f"{name}: {asked}": accuracy(model, scenes, asked)
        for name, model in models.items()
        for asked in QUESTIONS
    }
    own = [np.mean([found[f"{name}: {asked}"] for asked in asks]) for name, asks in OWN.items()]
    return found | {"own": float(np.mean(own)), "all": float(np.mean(list(found.values())))}


def _as_rows(trials: list[dict[str, Figures]]) -> list[dict[str, Any]]:
    rows_ = []
    ceiling = trials[0]["each its own"].keys()
    for name in [each for each in trials[0] if each != "drift"]:
        for metric in ceiling:
            runs = [trial_[name][metric] for trial_ in trials]
            against = [trial_["each its own"][metric] for trial_ in trials]
            rows_.append(_row(f"{name}; baseline: each model its own", metric, runs, against))
        if "options" in trials[0][name]:
            rows_[-1]["options"] = [trial_[name]["options"] for trial_ in trials]
    ours = [trial_["regression mean"]["own"] for trial_ in trials]
    best = [max(trial_[name]["own"] for name in BASELINES) for trial_ in trials]
    gap = np.subtract(ours, best)
    error = standard_error(gap) if len(gap) > 1 else None
    rows_.append(
        _row("regression mean; baseline: the best tuned one of each seed", "own", ours, best)
        | {"difference": [float(gap.mean()), error]}
    )
    for name in KINDS:
        kl, loss = zip(*[trial_["drift"][name] for trial_ in trials], strict=True)
        rows_.append(_row(f"{name}; text NLL", "KL from the parent, nats", list(kl), list(loss)))
    return rows_


def _row(case: str, metric: str, ours: list[float], baseline: list[float]) -> dict[str, Any]:
    mine, theirs = float(np.mean(ours)), float(np.mean(baseline))
    return {
        "case": case, "metric": metric, "ours": mine, "baseline": theirs, "ratio": mine / theirs if theirs else None,
        "runs": ours,
    }  # fmt: skip
