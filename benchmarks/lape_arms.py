"""Arms of the LAPE-TEFM trial: both forms, every switch turned alone, what is found on the merged model, the rivals."""

import os
from typing import Any, NamedTuple

from benchmarks.lape_merge import BASELINES
from tether.merge.fisher import INPUTS
from tether.merge.recipe import Model, Recipe, Refine
from tether.merge.tefm.switches import PRESETS

__all__ = ["Arm", "arms", "rivals", "seeds"]

SEARCH = (0.25, 0.5, 0.75, 1.0)
FURTHER = {
    "literal": {"lambda_ortho": (0.7,), "hessian": ("fisher",)},
    "corrected": {
        "lambda_ortho": (0.5,),
        "mask": ("none",),
        "interference": ("rows",),
        "hessian": ("fisher",),
        "ensembles": (1,),
    },
}
"""Values of switches beside those of the other form."""


def seeds(*, fast: bool) -> list[int]:
    """Give the seeds that are run: those of `TETHER_SEEDS`, else all three.

    Args:
        fast: the first alone.

    Returns:
        The seeds; all switches are turned on the first.
    """
    return [int(each) for each in os.environ.get("TETHER_SEEDS", "0" if fast else "0 1 2").split()]


class Arm(NamedTuple):
    """One way to merge.

    Attributes:
        options: of the operator.
        refine: the section of that name; None without it.
    """

    options: dict[str, Any]
    refine: dict[str, Any] | None = None

    def recipe(self, plain: Recipe, refine: dict[str, Any]) -> Recipe:
        """Put the arm into a recipe.

        Args:
            plain: a recipe of lape_tefm.
            refine: probes and texts to refine on.

        Returns:
            The recipe.
        """
        section = None if self.refine is None else Refine(**(refine | self.refine))
        return plain.model_copy(update={"options": self.options, "refine": section})


def arms(*, fast: bool, words: bool) -> dict[str, Arm]:
    """List the arms.

    Args:
        fast: the two forms, and one search.
        words: whether there is held-out text, for the loss and the sharpness-aware step.

    Returns:
        Name to arm.
    """
    found = {form: Arm({"form": form}) for form in PRESETS}
    search = {"search": SEARCH[:2] if fast else SEARCH}
    found["literal, lambda by variance, last step"] = Arm({"form": "literal"}, search | {"step": "paper"})
    if fast:
        return found
    for form, preset in PRESETS.items():
        other = PRESETS["corrected" if form == "literal" else "literal"]
        values = {name: (value,) for name, value in other.items() if value != preset[name]}
        for name, more in FURTHER[form].items():
            values[name] = tuple(dict.fromkeys((*values.get(name, ()), *more)))
        for name, each in values.items():
            for value in each:
                found[f"{form}, {name}: {value}"] = Arm({"form": form, name: value})
    found["literal, lambda by variance"] = Arm({"form": "literal"}, search)
    found["corrected, lambda by variance"] = Arm({"form": "corrected"}, search)
    if words:
        found["corrected, lambda by loss"] = Arm({"form": "corrected"}, search | {"criterion": "loss"})
        found["corrected, sharpness-aware step"] = Arm({"form": "corrected"}, {"step": "sam"})
    return found


def rivals(plain: Recipe, base: str, head: str) -> dict[str, list[Recipe]]:
    """List the merges to compare with, and the options that each is tuned over.

    Args:
        plain: a recipe of lape_tefm, whose models are taken.
        base: path of the parent.
        head: what the regression mean's matrix of the head's inputs is for.

    Returns:
        Name to recipes; the average, the regression mean and the Fisher means have one.
    """
    seen = {name: model.settings["observed"] for name, model in plain.models.items()}
    grams = {name: Model(path=model.path, grams=seen[name]) for name, model in plain.models.items()}
    bare = {name: Model(path=model.path) for name, model in plain.models.items()}
    common = {"refine": None, "base": None}
    linear = {"operator": "linear", "models": bare, "options": {}}
    regression = {"operator": "regression_mean", "models": grams, "options": {"head": head}}
    fisher = {"operator": "fisher_mean"}
    found = {
        "average": [plain.model_copy(update=common | linear)],
        "regression mean": [plain.model_copy(update=common | regression)],
    } | {
        f"Fisher mean, {inputs}": [plain.model_copy(update=common | fisher | {"options": {"inputs": inputs}})]
        for inputs in INPUTS
    }
    for name in ("task arithmetic", "TIES"):
        found[name] = [
            plain.model_copy(
                update={
                    "operator": operator,
                    "options": options,
                    "refine": None,
                    "base": Model(path=base),
                    "models": {each: Model(path=model.path, **settings) for each, model in bare.items()},
                }
            )
            for operator, options, settings in BASELINES[name]
        ]
    return found
