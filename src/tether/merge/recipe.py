"""What a user asks for: a YAML file, read strictly."""

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tether.errors import ConfigError
from tether.reading import read_yaml

__all__ = ["BASE", "Check", "Model", "Override", "Recipe", "Refine", "read_recipe", "validated"]

Schema = TypeVar("Schema", bound=BaseModel)

BASE = "base"
"""The name of the parent model in a recipe; the others have the names that the user gives them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(BaseModel):
    """One input: where it is, and the operator's settings for it (``weight``, ``density`` and so on)."""

    # The operator's own schema checks the rest, as strictly as this one would.
    model_config = ConfigDict(extra="allow", frozen=True)

    path: Annotated[str, Field(min_length=1)]
    """A checkpoint folder or safetensors file, an alias, or a hub id."""
    align: str | None = None
    """A safetensors file of index maps that bring this model into the coordinates of ``into``."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is given beside path and align."""
        return dict(self.model_extra or {})


class Override(_Strict):
    """Other treatment of the output tensors whose name matches; of several, the last one holds."""

    match: Annotated[str, Field(min_length=1)]
    """A glob on the names of output tensors, such as ``*.mlp.*``; it must match something."""
    keep: str | None = None
    """Take these tensors from this model as they are."""
    options: dict[str, Any] = {}
    """Options of the operator that differ here."""
    models: dict[str, dict[str, Any]] = {}
    """Settings of models that differ here."""


class Check(_Strict):
    """How the merged model is measured before it is published."""

    text: dict[str, str] = Field(min_length=1)
    """Name to a held-out text: JSON lines with ``text``, or plain."""
    tokens: Annotated[int, Field(ge=256)] = 2048
    """About how many tokens of each text."""
    window: Annotated[int, Field(ge=32)] = 256
    """Tokens of context at most."""
    references: tuple[str, ...] | None = None
    """Names of the models to compare with; all inputs if left out. The first one holds the budget."""
    paths: Annotated[int, Field(ge=0)] = 4
    """Continuations sampled from each reference, on which drift is measured too."""
    path_length: Annotated[int, Field(ge=1)] = 64
    """Tokens of each."""
    accept: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The most mean softmax KL(first reference || merged), nats a token, on any text and on its paths."""
    solve_lambda: bool = False
    """Whether to choose ``options.lambda`` so that ``accept`` is used up, in at most four evaluations."""


class Refine(_Strict):
    """What ``lape_tefm`` finds on the merged model itself: its lambda, and its last step."""

    search: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    """Values of ``options.lambda`` to try, ascending; each is a whole merge that is measured."""
    criterion: Literal["variance", "loss"] = "variance"
    """What is made small: the document's variance of g' over neurons, or the loss of held-out text."""
    step: Literal["paper", "sam"] | None = None
    """The document's last step, or a sharpness-aware one that is kept only where held-out loss falls; None for none."""
    probes: str | None = None
    """What the merged model continues for g': JSON lines with ``text`` and, optionally, ``image``."""
    samples: Annotated[int, Field(ge=1)] = 8
    """How many probes at most."""
    paths: Annotated[int, Field(ge=1)] = 8
    """Continuations of each."""
    longest: Annotated[int, Field(ge=4)] = 32
    """Tokens of a continuation at most; lengths are drawn from 4 on."""
    text: dict[str, str] = {}
    """Name to a held-out text, for the criterion ``loss`` and the step ``sam``."""
    tokens: Annotated[int, Field(ge=256)] = 2048
    """About how many tokens of each text."""
    window: Annotated[int, Field(ge=32)] = 256
    """Tokens of context at most."""

    @property
    def encodes(self) -> bool:
        """Whether the merged model's neurons are encoded, for which it needs probes."""
        return self.step == "paper" or bool(self.search and self.criterion == "variance")

    @property
    def reads(self) -> bool:
        """Whether it needs held-out text."""
        return self.step == "sam" or bool(self.search and self.criterion == "loss")


class Recipe(_Strict):
    """A merge: which models, by which operator, into what.

    Raises:
        pydantic.ValidationError: If a field is missing, unknown or of the wrong type.
    """

    operator: Annotated[str, Field(min_length=1)]
    """Its name, as ``tether.merge.operators.OPERATORS`` lists them."""
    models: dict[str, Model] = Field(min_length=1)
    """Name to input, in order."""
    base: Model | None = None
    """The parent of all models, where the operator works on differences."""
    options: dict[str, Any] = {}
    """The operator's options."""
    into: str | None = None
    """Whose names, config and tensors outside the language tower the result has; the base if there is one."""
    tokenizer: str | None = None
    """Whose tokenizer it has; that of ``into`` if left out."""
    towers: Literal["keep", "merge"] = "keep"
    """Tensors outside the language tower: kept from ``into``, or merged like the others."""
    vocabulary: Literal["same", "same-rows"] = "same"
    """Whether all tokenizers must agree, or only the numbers of rows (for files without a tokenizer)."""
    conventions: Literal["same", "into"] = "same"
    """Whether configs must make the same function of equal weights, or the result is read as that of ``into`` says."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the result's floats; as in ``into`` if left out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of operators that draw."""
    shard_bytes: Annotated[int, Field(ge=1)] = 5_000_000_000
    """The most bytes of tensors in a file."""
    overrides: tuple[Override, ...] = ()
    refine: Refine | None = None
    check: Check | None = None
    out: str | None = None
    """Folder for the result, unless it is given elsewhere."""

    @property
    def inputs(self) -> dict[str, Model]:
        """All models by name, the base first where there is one."""
        return ({BASE: self.base} if self.base else {}) | self.models

    @property
    def skeleton(self) -> str:
        """The name of the model whose names and config the result has."""
        return self.into or (BASE if self.base else next(iter(self.models)))


def read_recipe(path: str | PathLike[str]) -> Recipe:
    """Read a recipe.

    Args:
        path: A YAML file. Paths inside it are relative to the current folder, as on a command line.

    Returns:
        The recipe, checked in itself; its files are not looked at yet.

    Raises:
        ConfigError: If it cannot be read, is not such YAML, has a key twice or unknown keys, or names models
            that it does not define; one message lists all of them.
    """
    path = Path(path)
    content = read_yaml(path, error=ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path}: expected lines of 'name: value', with operator and models")
    recipe = validated(Recipe, content, f"recipe {path}")
    problems = _wrong_names(recipe)
    if problems:
        raise ConfigError(f"recipe {path}: {'; '.join(problems)}")
    return recipe


def _wrong_names(recipe: Recipe) -> list[str]:
    known = list(recipe.inputs)
    problems = []
    if BASE in recipe.models:
        problems.append(f"models.{BASE}: the name {BASE} is that of the parent; choose another")
    named = {"into": recipe.into, "tokenizer": recipe.tokenizer}
    for number, override in enumerate(recipe.overrides):
        named[f"overrides.{number}.keep"] = override.keep
        problems += [
            f"overrides.{number}.models.{name}: not one of the models {', '.join(recipe.models)}"
            for name in override.models
            if name not in recipe.models
        ]
        if override.keep is None and not override.options and not override.models:
            problems.append(f"overrides.{number}: changes nothing; give keep, options or models")
        if override.keep is not None and (override.options or override.models):
            problems.append(f"overrides.{number}: keep excludes options and models; give one of them")
    if recipe.check and recipe.check.references is not None:
        named |= {f"check.references.{name}": name for name in recipe.check.references}
        if not recipe.check.references:
            problems.append("check.references: is empty; name a model, or leave it out")
    if recipe.check and recipe.check.solve_lambda and recipe.check.accept is None:
        problems.append("check.solve_lambda: needs check.accept, the budget to meet")
    if recipe.refine:
        problems += _wrong_refine(recipe.refine)
    problems += [
        f"{place}: {name!r} is not an input; expected one of {', '.join(known)}"
        for place, name in named.items()
        if name is not None and name not in known
    ]
    if recipe.inputs[recipe.skeleton if recipe.skeleton in known else known[0]].align:
        problems.append("into: a model that is aligned to others cannot be the one they are aligned to")
    return problems


def _wrong_refine(refine: Refine) -> list[str]:
    problems = []
    if not refine.search and not refine.step:
        problems.append("refine: changes nothing; give search or step")
    if any(later <= earlier for earlier, later in pairwise(refine.search)):
        problems.append(f"refine.search: {list(refine.search)} is not ascending")
    if refine.encodes and not refine.probes:
        problems.append(
            "refine.probes: is missing; the variance of g' and the document's step are measured on probes"
        )
    if refine.reads and not refine.text:
        problems.append(
            "refine.text: is missing; the criterion loss and the step sam are measured on held-out text"
        )
    return problems


def validated(schema: type[Schema], content: Mapping[str, Any], what: str) -> Schema:
    """Check a mapping against a schema; say all that is wrong, with the nearest known key for unknown ones.

    Args:
        schema: A pydantic model that forbids unknown keys.
        content: The mapping.
        what: What to call it in the message.

    Returns:
        The model.

    Raises:
        ConfigError: If the content does not fit.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = ".".join(map(str, item["loc"])) or "whole"
            if item["type"] == "extra_forbidden":
                known = _keys(schema)
                close = get_close_matches(str(item["loc"][-1]), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
                problems.append(f"{place}: unknown key; {hint}")
            else:
                problems.append(f"{place}: {item['msg']}, got {str(item['input'])[:60]!r}")
        raise ConfigError(f"{what}: {'; '.join(problems)}") from error


def _keys(schema: type[BaseModel]) -> list[str]:
    nested = (Override, Check, Refine) if schema is Recipe else ()
    fields = [(name, field.alias) for each in (schema, *nested) for name, field in each.model_fields.items()]
    return [alias or name for name, alias in fields]
