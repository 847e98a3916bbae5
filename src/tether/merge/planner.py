"""The sources of every tensor of a merge, found in headers, and what is wrong with them."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, final

from pydantic import BaseModel

from tether.errors import ConfigError, TetherError
from tether.merge.axes import layer_of
from tether.merge.floats import BYTES, DTYPES
from tether.merge.inputs import Coordinates, Source
from tether.merge.maps import source_name
from tether.merge.opening import COUNTING, Opened, few
from tether.merge.operator import Extra, Operator, Request
from tether.merge.recipe import BASE, Override, Recipe, validated

__all__ = ["Planner", "Schemas", "TensorPlan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlan:
    """One tensor of the result.

    Attributes:
        name: in the result.
        canonical: inside the language tower.
        shape: its shape.
        dtype: its type in the result.
        own: the tensor of the model that the result goes into.
        kept: where it is taken from unchanged; None if it is merged.
        base: the parent's, where the operator needs it.
        models: one a model; None where a model of other depth has no counterpart.
        options: the operator's options for it.
        settings: model name to settings for it.
        extras: what the operator needs beside the weights.
    """

    name: str
    canonical: str
    shape: tuple[int, ...]
    dtype: str
    own: Source
    kept: Source | None = None
    base: Source | None = None
    models: tuple[Source | None, ...] = ()
    options: BaseModel | None = None
    settings: dict[str, BaseModel] | None = None
    extras: dict[str, Extra] | None = None


@final
class Schemas:
    """Options and settings for each set of overrides that applies, validated once."""

    def __init__(self, recipe: Recipe, operator: Operator) -> None:
        self.recipe, self.operator = recipe, operator
        self.get = cache(self._get)
        if recipe.base and recipe.base.settings:
            raise ConfigError(
                f"base: unknown keys {', '.join(recipe.base.settings)}; a parent has only path and align"
            )
        self.get(())
        for number in range(len(recipe.overrides)):
            self.get((number,))

    def _get(self, overrides: tuple[int, ...]) -> tuple[BaseModel, dict[str, BaseModel]]:
        options = dict(self.recipe.options)
        settings = {name: model.settings for name, model in self.recipe.models.items()}
        where = "recipe"
        for number in overrides:
            override = self.recipe.overrides[number]
            options |= override.options
            settings |= {name: settings.get(name, {}) | given for name, given in override.models.items()}
            where = f"recipe with override {override.match!r}"
        return validated(self.operator.options, options, f"{where}: options"), {
            name: validated(self.operator.settings, given, f"{where}: models.{name}")
            for name, given in settings.items()
        }


HEAD = ("abduction", "action", "fusion", "numeric")
"""Parts of a tether checkpoint beside its backbone."""


@final
class Planner:
    """Finds the sources of every tensor and collects what is wrong."""

    def __init__(
        self,
        recipe: Recipe,
        operator: Operator,
        opened: dict[str, Opened],
        coordinates: dict[str, Coordinates],
        schemas: Schemas,
    ) -> None:
        self.recipe, self.operator, self.opened = recipe, operator, opened
        self.coordinates, self.schemas = coordinates, schemas
        self.own = opened[recipe.skeleton]
        self.from_base = operator.base or (operator.may_base and recipe.base is not None)
        self.needed = [name for name in opened if name in recipe.models or self.from_base]
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.missing: dict[str, list[str]] = {}
        self.misshapen: dict[str, list[tuple[TensorPlan, Source]]] = {}
        self.unmet: dict[str, list[str]] = {}
        self.present = {name: frozenset(model.names) for name, model in opened.items()}

    def tensors(self) -> tuple[TensorPlan, ...]:
        """Plan every tensor of the result.

        Returns:
            In order of their names; what is wrong is in ``problems`` then.
        """
        inside = self.own.inside
        canonical = {name: short for short, name in self.own.tower.names.items() if short in inside}
        planned = []
        for name in self.own.names:
            if name in canonical:
                planned.append(self._tensor(name, canonical[name], inside=True))
            elif name in self.own.tower.others:
                planned.append(self._tensor(name, name, inside=False))
            else:
                self.notes.append(
                    f"{name} is left out: it is a copy of the embedding that {self.own.name} ties it to"
                )
        self._report_names()
        for opened in self.opened.values():
            if opened.buffers:
                self.notes.append(
                    f"{opened.buffers} rotary tables of {opened.name} are left out: they are computed from the config"
                )
            if opened.untied:
                self.notes.append(
                    f"{opened.name}: config.json ties the head to the embedding, but a head of its own is stored; "
                    "it is merged as one"
                )
        outside = [tensor for tensor in planned if tensor.canonical == tensor.name and tensor.kept]
        if self.own.tower.others and self.recipe.towers == "keep":
            self.notes.append(
                f"{len(outside)} tensors outside the language tower are kept from {self.own.name}"
            )
        return tuple(planned)

    def _tensor(self, name: str, canonical: str, *, inside: bool) -> TensorPlan:
        own = self._source(self.own, name)
        overrides = tuple(
            number
            for number, override in enumerate(self.recipe.overrides)
            if fnmatchcase(name, override.match)
        )
        dtype = DTYPES[self.recipe.dtype] if self.recipe.dtype and own.dtype in BYTES else own.dtype
        plan = TensorPlan(name=name, canonical=canonical, shape=own.shape, dtype=dtype, own=own)
        # Of several the last one holds: options behind a keep take the tensor into the merge again.
        if overrides and (last := self.recipe.overrides[overrides[-1]]).keep:
            return self._kept(plan, last, inside)
        overrides = tuple(number for number in overrides if not self.recipe.overrides[number].keep)
        if own.dtype in COUNTING or (not inside and self.recipe.towers == "keep"):
            return _replaced(plan, kept=own)
        found = {each: self._counterpart(plan, each, inside) for each in self.needed}
        options, settings = self.schemas.get(overrides)
        names = self._own_names(canonical, found)
        request = Request(name, canonical, own.shape, options, settings, names, self.own.tied)
        return _replaced(
            plan,
            base=found.get(BASE) if self.from_base else None,
            models=tuple(found[each] for each in self.recipe.models),
            options=options,
            settings=settings,
            extras=self._extras(request),
        )

    # What each model calls its tensor inside its own tower, and its shape there.
    def _own_names(
        self, canonical: str, found: dict[str, Source | None]
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        names = {}
        for model, source in found.items():
            aligned = self.coordinates.get(model)
            there = source_name(canonical, aligned.maps) if aligned else canonical
            if source and there:
                names[model] = there, source.shape
        return names

    def _extras(self, request: Request) -> dict[str, Extra]:
        try:
            return dict(self.operator.extras(request))
        except TetherError as error:
            self.unmet.setdefault(str(error), []).append(request.name)
            return {}

    def _kept(self, plan: TensorPlan, override: Override, inside: bool) -> TensorPlan:
        assert override.keep is not None
        if override.keep in self.coordinates:
            self.problems.append(
                f"{plan.name}: kept from {override.keep}, which is aligned; keep it from another"
            )
        return _replaced(plan, kept=self._counterpart(plan, override.keep, inside) or plan.own)

    def _counterpart(self, plan: TensorPlan, model: str, inside: bool) -> Source | None:
        opened, canonical = self.opened[model], plan.canonical
        aligned = self.coordinates.get(model)
        if inside and aligned:
            there = source_name(canonical, aligned.maps)
            if there is None:
                return None
            canonical = there
        name = opened.tensor_for(canonical) if inside else canonical
        if name is None or name not in self.present[model]:
            self.missing.setdefault(model, []).append(plan.name)
            return None
        source = self._source(opened, name)
        if source.dtype not in BYTES and plan.own.dtype in BYTES:
            self.problems.append(f"{model}: {name} is {source.dtype}, expected a float")
        # Shapes of aligned models were checked as a whole, against the maps.
        if source.shape != plan.shape and not aligned:
            self.misshapen.setdefault(model, []).append((plan, source))
        return source

    def _source(self, opened: Opened, name: str) -> Source:
        file, start, _ = opened.reader.span(name)
        return Source(opened.name, name, file, start, opened.reader.dtype(name), opened.reader.shape(name))

    def _report_names(self) -> None:
        # What is wrong with a folder is wrong for every tensor that needs it: it is said once.
        self.problems += [f"{few(names)}: {error}" for error, names in self.unmet.items()]
        for model, names in self.missing.items():
            self.problems.append(f"{model} lacks {len(names)} tensors of {self.own.name}: {few(names)}")
        for model, found in self.misshapen.items():
            ends = {"embed_tokens.weight", "lm_head.weight"}
            rows = any(plan.canonical in ends and plan.shape[1:] == there.shape[1:] for plan, there in found)
            named = [f"{there.name} {there.shape} for {plan.shape}" for plan, there in found]
            self.problems.append(
                f"{model}: {len(found)} tensors have other shapes than in {self.own.name}: {few(named)}"
                + ("; the vocabularies have different sizes" if rows else "")
            )
        for model in self.needed:
            opened = self.opened[model]
            extra = sorted(opened.inside - self.own.inside - {"lm_head.weight"})
            if model in self.coordinates and "layers" in self.coordinates[model].maps:
                # Layers may go, but not a kind of tensor that each of them has, such as a bias.
                kinds = {_kind(name) for name in self.own.inside}
                extra = [name for name in extra if _kind(name) not in kinds]
            beside = sorted(set(opened.tower.others) - set(self.own.tower.others))
            if self.recipe.towers == "merge":
                extra += beside
            elif ours := [name for name in beside if name.partition(".")[0] in HEAD]:
                self.problems.append(
                    f"{model}: what tether has learnt in it ({len(ours)} tensors: {few(ours)}) has no place in "
                    f"{self.own.name}, and would be lost; 'tether export' it first, or fuse deltas in place of models"
                )
            elif beside:
                self.notes.append(
                    f"{len(beside)} tensors of {model} outside its language tower are left out: {few(beside)}"
                )
            if extra:
                self.problems.append(
                    f"{model} has {len(extra)} tensors that {self.own.name} lacks: {few(extra)}"
                )
            shared = [n for n in opened.tower.others if n.partition(".")[0] in HEAD and n not in beside]
            if shared and self.recipe.towers == "keep" and model != self.own.name:
                self.notes.append(f"tether's head of {model} is left out: that of {self.own.name} is kept")
            if self.own.tied and not opened.tied and self.own.recognised:
                self.problems.append(
                    f"{model} has a head of its own, {self.own.name} ties its head to its embedding, so that head "
                    f"would be lost; set into to {model}, or merge models that agree"
                )
            if not opened.recognised and self.own.recognised:
                self.problems.append(
                    f"{model}: no language tower found in it, as there is in {self.own.name}"
                )


# A tensor's name without the number of its layer.
def _kind(name: str) -> str:
    layer = layer_of(name)
    return name if layer is None else name.replace(f"layers.{layer}.", "layers.", 1)


def _replaced(plan: TensorPlan, **changes: Any) -> TensorPlan:
    given = {name: getattr(plan, name) for name in ("name", "canonical", "shape", "dtype", "own")}
    return TensorPlan(**given, **changes)
