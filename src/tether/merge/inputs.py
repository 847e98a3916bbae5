"""The inputs of one output tensor, read into fixed buffers."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from tether.merge.axes import Sizes, axes_of, layer_of
from tether.merge.files import BLOCK, Files
from tether.merge.floats import BYTES, widen
from tether.merge.maps import Maps, axis_index, bring
from tether.merge.operator import Block, Extra, Floats

__all__ = ["Coordinates", "Inputs", "Scratch", "Source"]


class Source(NamedTuple):
    """Where the bytes of one tensor of one model lie."""

    model: str
    name: str
    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class Coordinates(NamedTuple):
    """How a model of other shape or order is brought into the coordinates of the result.

    Attributes:
        maps: which of its units stands where.
        target: lengths of the result's axes.
        source: lengths of its own.
        sha256: of the file that the maps were read from.
    """

    maps: Maps
    target: Sizes
    source: Sizes
    sha256: str


@final
class Scratch:
    """The buffers of one thread, made once.

    Args:
        sources: the most tensors that are read side by side.
    """

    def __init__(self, sources: int) -> None:
        self.values = [np.empty(BLOCK, np.float32) for _ in range(sources)]
        self.spare = np.empty(BLOCK, np.float32)
        self.raw = np.empty(BLOCK * 2, np.uint8)  # of 16-bit types; float32 is read in place


@final
@dataclass(kw_only=True, slots=True)
class Inputs:
    """The inputs of one output tensor, as ``tether.merge.operator.TensorInputs`` describes them.

    Attributes:
        name: of the output tensor.
        canonical: its name inside the language tower.
        shape: its shape.
        options: the operator's options for it.
        settings: model name to settings.
        base: the parent's tensor, where the operator needs it.
        models: one a model; None where a model of other depth has no counterpart.
        fill: the tensor of the model that the result goes into; it stands where a model lacks units and there is
            no parent.
        coordinates: model name to how it is brought there, for aligned ones.
        extras: key to a tensor beside the weights.
        seed: of the recipe.
        files: to read from.
        scratch: to read into.
    """

    name: str
    canonical: str
    shape: tuple[int, ...]
    options: BaseModel
    settings: Mapping[str, BaseModel]
    base: Source | None
    models: tuple[Source | None, ...]
    fill: Source
    coordinates: Mapping[str, Coordinates]
    extras: Mapping[str, Extra]
    seed: int
    files: Files
    scratch: Scratch
    _whole: dict[str, Floats] = field(default_factory=dict)

    @property
    def has_base(self) -> bool:
        """Whether there is a parent to read."""
        return self.base is not None

    def blocks(self) -> Iterator[Block]:
        """Read all inputs side by side.

        Yields:
            Blocks in order.
        """
        size = prod(self.shape)
        sources = [self.base] if self.base else []
        every: list[Source | None] = [*sources, *self.models]
        for start in range(0, size, BLOCK):
            count = min(BLOCK, size - start)
            read = []
            for source, buffer, name in zip(every, self.scratch.values, self._names(), strict=False):
                self._read(source, name, start, buffer[:count])
                read.append(buffer[:count])
            if self.base:
                yield Block(start, read[0], tuple(read[1:]))
            else:
                yield Block(start, None, tuple(read))

    def whole(self, model: str) -> Floats:
        """Read one input whole.

        Args:
            model: a name of the recipe.

        Returns:
            Values of its own, in the shape of the output tensor.
        """
        every = dict(zip(self._names(), [*([self.base] if self.base else []), *self.models], strict=True))
        return self._brought(every[model], model).copy()

    def extra(self, key: str) -> npt.NDArray[np.generic]:
        """Read a tensor beside the weights.

        Args:
            key: one of those that the operator named.

        Returns:
            The tensor as stored, or brought into the coordinates of the result.

        Raises:
            CheckpointError: If its file cannot be read any more, or was changed.
        """  # noqa: DOC502 - raised by Files
        wanted = self.extras[key]
        values = self.files.extra(wanted.file, wanted.tensor)
        axes = axes_of(self.canonical)
        if wanted.model not in self.coordinates or axes is None:
            return values
        index = axis_index(axes[wanted.axis], layer_of(self.canonical), *self.coordinates[wanted.model][:3])
        if index is None:
            return values
        taken = np.where(index < 0, 0, index)
        for number in range(values.ndim) if wanted.dims is None else wanted.dims:
            values = np.take(values, taken, axis=number)
            values[(slice(None),) * number + (index < 0,)] = 0
        return values

    def key(self, model: str, start: int) -> int:
        """Give a 128-bit key that depends on seed, tensor, model and block, and nothing else.

        Args:
            model: a name of the recipe.
            start: of the block.

        Returns:
            The key.
        """
        text = "\0".join((str(self.seed), self.name, model, str(start)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")

    def _names(self) -> list[str]:
        return ([self.base.model] if self.base else []) + list(self.settings)

    def _read(self, source: Source | None, model: str, start: int, out: Floats) -> None:
        if source is not None and model not in self.coordinates:
            self.read_source(source, start, out)
        else:
            np.copyto(out, self._brought(source, model).reshape(-1)[start : start + len(out)])

    def read_source(self, source: Source, start: int, out: Floats) -> None:
        """Read one block of a stored tensor.

        Args:
            source: where it lies.
            start: first element, a multiple of ``BLOCK``.
            out: where they go, shape (n,): ``BLOCK`` elements, or those that are left.
        """
        width = BYTES[source.dtype]
        if source.dtype == "F32":
            self.files.read(source.file, source.start + start * width, out.view(np.uint8).data)
            return
        raw = self.scratch.raw[: len(out) * width]
        self.files.read(source.file, source.start + start * width, raw.data)
        widen(raw, source.dtype, out)

    # An aligned model's tensor is gathered whole, once, and kept until the tensor is done.
    def _brought(self, source: Source | None, model: str) -> Floats:
        if model in self._whole:
            return self._whole[model]
        values = self._absent(model) if source is None else self._load(source)
        if source is not None and model in self.coordinates:
            values = bring(self.canonical, values, self._absent(model), *self.coordinates[model][:3])
        self._whole[model] = values
        return values

    # What stands where a model has no unit: the parent's values, so that it changes nothing there.
    def _absent(self, model: str) -> Floats:
        if self.base is None or model == self.base.model:
            return self._load(self.fill)
        return self._brought(self.base, self.base.model)

    def _load(self, source: Source) -> Floats:
        values = np.empty(prod(source.shape), np.float32)
        for start in range(0, len(values), BLOCK):
            self.read_source(source, start, values[start : start + BLOCK])
        return values.reshape(source.shape)
