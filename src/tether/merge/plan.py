"""A merge, worked out from headers alone: every tensor, its sources, its place, and all that is wrong."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from tether._version import __version__
from tether.errors import CheckpointError, ConfigError
from tether.merge.conventions import compare_conventions
from tether.merge.files import BLOCK
from tether.merge.floats import BYTES
from tether.merge.inputs import Coordinates
from tether.merge.layout import Place, Shard, lay_out
from tether.merge.opening import Opened, align, compare_vocabularies, few, open_models
from tether.merge.operator import Extra, Operator
from tether.merge.operators import OPERATORS
from tether.merge.planner import Planner, Schemas, TensorPlan
from tether.merge.recipe import Recipe
from tether.store.reader import CheckpointReader

__all__ = ["Plan", "make_plan", "start_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole merge.

    Attributes:
        recipe: what was asked for.
        operator: by which it is done.
        opened: the models.
        coordinates: of models that are aligned.
        tensors: in order of their names.
        shards: the files.
        places: where each tensor goes.
        notes: what a reader should know, one sentence each.
        digest: equal for equal plans over unchanged files; what a resumed merge is recognised by.
    """

    recipe: Recipe
    operator: Operator
    opened: dict[str, Opened]
    coordinates: dict[str, Coordinates]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[Shard, ...]
    places: dict[str, Place]
    notes: tuple[str, ...]
    digest: str

    def memory(self, threads: int) -> int:
        """Estimate the most bytes that buffers and whole tensors take.

        Args:
            threads: how many tensors are worked on at once.

        Returns:
            Bytes, beside those of the interpreter and its libraries (about 60 MB).
        """
        sources = len(self.recipe.inputs)
        buffers = (sources + 6) * BLOCK * 4
        whole = 0
        if self.operator.whole or self.coordinates:
            largest = max((prod(tensor.shape) for tensor in self.tensors if tensor.kept is None), default=0)
            copies = (sources + 1) if self.operator.whole else len(self.coordinates) + 3
            whole = largest * (4 * copies + self.operator.held)
        return threads * (buffers + whole)

    def extras(self) -> Iterator[Extra]:
        """List what operators read beside the weights.

        Yields:
            Tensors such as Gram matrices, some of them more than once.
        """
        for tensor in self.tensors:
            yield from (tensor.extras or {}).values()

    def summary(self) -> dict[str, Any]:
        """Give what a user wants to know before the work.

        Returns:
            JSON: operator, donors, counts, bytes, memory, notes.
        """
        merged = [tensor for tensor in self.tensors if tensor.kept is None]
        kept = Counter(tensor.kept.model for tensor in self.tensors if tensor.kept)
        return {
            "operator": self.operator.name,
            "models": {name: str(opened.folder.weights) for name, opened in self.opened.items()},
            "into": self.recipe.skeleton,
            "tokenizer": self.recipe.tokenizer or self.recipe.skeleton,
            "merged": len(merged),
            "kept": dict(sorted(kept.items())),
            "tied": self.opened[self.recipe.skeleton].tied,
            "dtypes": dict(sorted(Counter(tensor.dtype for tensor in self.tensors).items())),
            "files": [shard.name for shard in self.shards],
            "bytes_read": sum(_stored(tensor) for tensor in self.tensors),
            "bytes_written": sum(shard.bytes for shard in self.shards),
            "memory_per_thread": self.memory(1),
            "notes": list(self.notes),
            "digest": self.digest,
        }


def _stored(tensor: TensorPlan) -> int:
    sources = [tensor.kept] if tensor.kept else [tensor.base, *tensor.models]
    return sum(prod(source.shape) * BYTES.get(source.dtype, 8) for source in sources if source)


def make_plan(recipe: Recipe) -> Plan:
    """Plan a merge. Reads headers, configs and tokenizers; writes nothing.

    Args:
        recipe: the recipe.

    Returns:
        The plan.

    Raises:
        ConfigError: If anything is wrong; one message lists all of it.
    """  # noqa: DOC501, DOC502 - _refusal makes it
    operator = _operator(recipe)
    schemas = Schemas(recipe, operator)
    opened, problems = open_models(recipe)
    notes: list[str] = []
    if recipe.vocabulary == "same":
        differing, notes = compare_vocabularies(recipe, opened)
        problems += differing
    coordinates, misaligned = align(recipe, opened)
    problems += misaligned
    if recipe.tokenizer in opened and not opened[recipe.tokenizer].folder.tokenizer:
        problems.append(
            f"tokenizer: {recipe.tokenizer} has no tokenizer beside its weights; name a model that has one"
        )
    unlike, said = compare_conventions(recipe, opened)
    problems, notes = [*problems, *unlike], [*notes, *said]
    if len(opened) < len(recipe.inputs) or misaligned:
        raise _refusal(problems)
    planner = Planner(recipe, operator, opened, coordinates, schemas)
    tensors = planner.tensors()
    problems += planner.problems
    problems += _unmatched(recipe, tensors)
    problems += _missing_extras(tensors)
    if problems:
        raise _refusal(problems)
    shards, places = lay_out(
        {tensor.name: (tensor.dtype, tensor.shape, _bytes(tensor)) for tensor in tensors},
        recipe.shard_bytes,
        {"format": "pt"},
    )
    return Plan(
        recipe=recipe,
        operator=operator,
        opened=opened,
        coordinates=coordinates,
        tensors=tensors,
        shards=shards,
        places=places,
        notes=(*notes, *planner.notes, *_uncarried(opened[recipe.skeleton])),
        digest=_digest(recipe, opened, tensors, shards),
    )


def _uncarried(own: Opened) -> list[str]:
    if "auto_map" not in own.folder.config:
        return []
    return [
        f"{own.name}: config.json names code of its own (auto_map), which is not carried along; copy its .py files"
    ]


def _refusal(problems: list[str]) -> ConfigError:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return ConfigError(f"this merge cannot be done; nothing was written. What is wrong:\n{listed}")


def _operator(recipe: Recipe) -> Operator:
    operator = OPERATORS.get(recipe.operator)
    if operator is None:
        raise ConfigError(
            f"operator {recipe.operator!r} is not known; expected one of {', '.join(OPERATORS)}"
        )
    if operator.base and recipe.base is None:
        raise ConfigError(f"operator {operator.name} works on differences from a parent; give it as base")
    if operator.scaled and recipe.base is None and _rescales(recipe):
        raise ConfigError(
            f"operator {operator.name}: lambda scales the change from a parent, and the recipe has none; give it as "
            "base, or leave lambda out"
        )
    if recipe.check and recipe.check.solve_lambda:
        if not operator.scaled:
            scaled = ", ".join(name for name, each in OPERATORS.items() if each.scaled)
            raise ConfigError(f"check.solve_lambda: {operator.name} has no lambda; expected one of {scaled}")
        start = start_of(recipe)
        if start <= 0:
            raise ConfigError(
                f"check.solve_lambda: options.lambda is {start}, where the search starts; expected > 0"
            )
        if fixed := [n for n, override in enumerate(recipe.overrides) if "lambda" in override.options]:
            raise ConfigError(
                f"check.solve_lambda: overrides.{fixed[0]} has a lambda of its own, which the search would not reach; "
                "leave one of them out"
            )
    if recipe.refine:
        if not operator.refined:
            able = ", ".join(name for name, each in OPERATORS.items() if each.refined)
            raise ConfigError(f"refine: {operator.name} has nothing to refine; expected operator {able}")
        if fixed := [n for n, override in enumerate(recipe.overrides) if "lambda" in override.options]:
            raise ConfigError(
                f"refine: overrides.{fixed[0]} has a lambda of its own, which the search would not reach; leave one of "
                "them out"
            )
    count, most = len(recipe.models), operator.most_models
    if count < operator.fewest_models or (most is not None and count > most):
        wanted = (
            f"{operator.fewest_models}"
            if most == operator.fewest_models
            else f"{operator.fewest_models} or more"
        )
        raise ConfigError(f"operator {operator.name} takes {wanted} models; the recipe has {count}")
    return operator


def start_of(recipe: Recipe) -> float:
    """Give the lambda of a recipe.

    Args:
        recipe: of an operator that has one.

    Returns:
        It, 1 where it is left out.

    Raises:
        ConfigError: it is no number.
    """
    given = recipe.options.get("lambda", 1.0)
    try:
        # YAML reads 1e-1 as text.
        return float(given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"options.lambda: {given!r}, expected a number") from error


def _rescales(recipe: Recipe) -> bool:
    solved = recipe.check is not None and recipe.check.solve_lambda
    given = [recipe.options, *(override.options for override in recipe.overrides)]
    return solved or any(options.get("lambda", 1.0) != 1.0 for options in given)


def _bytes(tensor: TensorPlan) -> int:
    width = {"I64": 8, "BOOL": 1}.get(tensor.dtype) or BYTES.get(tensor.dtype, 8)
    return prod(tensor.shape) * width


def _unmatched(recipe: Recipe, tensors: tuple[TensorPlan, ...]) -> list[str]:
    names = [tensor.name for tensor in tensors]
    merged = [tensor.name for tensor in tensors if not tensor.kept]
    idle = [
        f"overrides.{number}: every tensor that {override.match!r} matches is kept as it is, so its options have no "
        "effect; leave it out, or have those tensors merged"
        for number, override in enumerate(recipe.overrides)
        if not override.keep
        and any(fnmatchcase(name, override.match) for name in names)
        and not any(fnmatchcase(name, override.match) for name in merged)
    ]
    return idle + [
        f"overrides.{number}: {override.match!r} matches no tensor of the result; its tensors are called like "
        f"{few(names)}"
        for number, override in enumerate(recipe.overrides)
        if not any(fnmatchcase(name, override.match) for name in names)
    ]


def _missing_extras(tensors: tuple[TensorPlan, ...]) -> list[str]:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    problems: list[str] = []
    for tensor in tensors:
        for key, extra in (tensor.extras or {}).items():
            if extra.file not in shapes:
                shapes[extra.file] = {}
                try:
                    file = CheckpointReader(extra.file)
                    shapes[extra.file] = {name: file.shape(name) for name in file.names}
                except CheckpointError as error:
                    problems.append(
                        f"{extra.file}, which {tensor.name} needs for {key}, cannot be read: {error}"
                    )
            there = shapes[extra.file].get(extra.tensor)
            if shapes[extra.file] and there != extra.shape:
                have = f"has shape {there}" if there else "is absent"
                problems.append(f"{extra.file}: {extra.tensor} {have}; {tensor.name} needs {extra.shape}")
    return problems


def _digest(
    recipe: Recipe, opened: dict[str, Opened], tensors: tuple[TensorPlan, ...], shards: tuple[Shard, ...]
) -> str:
    files: list[Path] = [file for model in opened.values() for file in model.reader.files]
    files += [Path(model.align) for model in recipe.inputs.values() if model.align]
    files += sorted({Path(extra.file) for tensor in tensors for extra in (tensor.extras or {}).values()})
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps(
        [__version__, recipe.model_dump(mode="json", exclude={"check", "out"}), stamps], sort_keys=True
    )
    digest = hashlib.sha256(content.encode())
    for shard in shards:
        digest.update(shard.header)
    return digest.hexdigest()
