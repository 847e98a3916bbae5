"""The recipes that are shipped are recipes: every key, option and setting is known."""

from pathlib import Path

import pytest

from tether.merge.operators import OPERATORS
from tether.merge.planner import Schemas
from tether.merge.recipe import read_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
# Other parts of the project keep recipes of their own kind there.
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if "\noperator:" in "\n" + path.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path):
    recipe = read_recipe(path)
    operator = OPERATORS[recipe.operator]
    Schemas(recipe, operator)
    assert operator.refined or recipe.refine is None
    assert operator.base <= (recipe.base is not None)


def test_every_operator_but_the_plainest_has_a_recipe():
    assert {read_recipe(path).operator for path in RECIPES} >= {
        "task_arithmetic",
        "ties/mergekit",
        "dare_ties",
        "regression_mean",
        "fisher_mean",
        "lape_tefm",
    }
