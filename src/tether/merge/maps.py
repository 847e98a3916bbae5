"""Index maps: which unit of another model stands where, for every space of a decoder.

A map has one entry a unit of the target: the index of the source's unit that takes its place, or -1 where no
unit does. A permutation is a map without -1 onto as many units. Maps live in safetensors files under the
names ``residual``, ``vocab``, ``layers``, ``layers.N.mlp``, ``layers.N.group``, ``layers.N.query`` and
``layers.N.value`` (the last two of shape (groups, units)); what is not given stays where it is.
"""

import hashlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from tether.errors import CheckpointError, ShapeError
from tether.files import read_bytes
from tether.merge.axes import Axis, Sizes, axes_of, layer_of

__all__ = ["Maps", "axis_index", "bring", "check_maps", "read_maps", "source_name"]

Index = npt.NDArray[np.int64]
Maps = Mapping[str, Index]

MAPS_BYTES: Final = 2**30
"""Size of a file of maps at most: those of a decoder with 128 layers and half a million tokens have less."""
_NESTED: Final = ("query", "value")


def read_maps(path: str | PathLike[str]) -> tuple[dict[str, Index], str]:
    """Read a file of maps.

    Args:
        path: a safetensors file of integers.

    Returns:
        The maps by name, and the SHA-256 of the bytes that they were read from.

    Raises:
        CheckpointError: If it is missing, damaged, or holds anything but integers.
    """
    try:
        # Not by the reader of checkpoints: the hash has to be that of the bytes that the maps come from.
        content = read_bytes(Path(path), MAPS_BYTES)
        maps = load(content)
    # Types that numpy lacks are a KeyError of the library, sizes that it cannot make a ValueError.
    except (CheckpointError, SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"index maps {path} cannot be read ({error}); expected a safetensors file"
        ) from error
    if wrong := [name for name, values in maps.items() if values.dtype.kind not in "iu"]:
        raise CheckpointError(f"index maps {path}: {', '.join(sorted(wrong))} are not integers")
    return {name: values.astype(np.int64) for name, values in maps.items()}, hashlib.sha256(
        content
    ).hexdigest()


def check_maps(maps: Maps, target: Sizes, source: Sizes, layers: tuple[int, int], what: str) -> None:
    """Refuse maps that do not fit two models; one message lists all that is wrong.

    Args:
        maps: from the source's units to the target's places.
        target: lengths of the model in whose coordinates the result is.
        source: lengths of the model that is brought there.
        layers: how many layers target and source have.
        what: what to call the maps in an error.

    Raises:
        ShapeError: If a name is unknown, a shape or an index is wrong, or a unit is used twice.
    """
    have, want = source._asdict(), target._asdict()
    problems = []
    for name, values in sorted(maps.items()):
        factor = name.rpartition(".")[2]
        layer = layer_of(name)
        per_layer = factor in {"mlp", "group", *_NESTED}
        if (
            factor not in {"residual", "vocab", "layers", "mlp", "group", *_NESTED}
            or per_layer != (layer is not None)
            or (layer is not None and (layer >= layers[0] or name != f"layers.{layer}.{factor}"))
        ):
            problems.append(f"{name} is no space of this model")
            continue
        shape = (layers[0],) if factor == "layers" else (want[factor],)
        units = layers[1] if factor == "layers" else have[factor]
        if factor in _NESTED:
            shape = (want["group"], *shape)
        if values.shape != shape:
            problems.append(f"{name} has shape {values.shape}, expected {shape}")
        elif values.min() < -1 or values.max() >= units:
            problems.append(f"{name} holds {values.min()}..{values.max()}, expected -1..{units - 1}")
        elif any(len(np.unique(row[row >= 0])) < (row >= 0).sum() for row in np.atleast_2d(values)):
            problems.append(f"{name} uses a unit twice")
    spaces = {"residual": "residual", "vocab": "vocab"}
    for layer in range(layers[0]):
        spaces |= {f"layers.{layer}.{factor}": factor for factor in ("mlp", "group", *_NESTED)}
    problems += [
        f"{name} has {want[factor]} units here and {have[factor]} there, and no map"
        for name, factor in spaces.items()
        if want[factor] != have[factor] and name not in maps
    ]
    if target.rope != source.rope:
        problems.append(
            f"rope has {target.rope} dimensions here and {source.rope} there: heads do not correspond"
        )
    if layers[0] != layers[1] and "layers" not in maps:
        problems.append(f"there are {layers[0]} layers here and {layers[1]} there, and no map layers")
    if problems:
        raise ShapeError(f"{what}: {'; '.join(problems[:12])}. Make the maps for these two models.")


def source_name(canonical: str, maps: Maps) -> str | None:
    """Name the source's tensor that stands for one of the target's.

    Args:
        canonical: the target's name.
        maps: with or without ``layers``.

    Returns:
        The source's canonical name; None where its layer has no counterpart.
    """
    layer = layer_of(canonical)
    if layer is None or "layers" not in maps:
        return canonical
    there = int(maps["layers"][layer])
    return None if there < 0 else canonical.replace(f"layers.{layer}.", f"layers.{there}.", 1)


def axis_index(axis: Axis, layer: int | None, maps: Maps, target: Sizes, source: Sizes) -> Index | None:
    """Work out the map of a whole axis from those of its factors.

    Args:
        axis: its factors.
        layer: the target's layer.
        maps: the maps.
        target: lengths of the target.
        source: lengths of the source.

    Returns:
        For each index of the target's axis the source's, or -1; None where nothing moves.

    Example:
        >>> one = Sizes(vocab=2, residual=4, mlp=2, group=2, query=1, value=2, rope=2)
        >>> maps = {"layers.0.group": np.array([1, 0]), "layers.0.value": np.array([[0, 1], [1, 0]])}
        >>> axis_index(("group", "value"), 0, maps, one, one)
        array([2, 3, 1, 0])
    """
    names = [
        factor if layer is None or factor in {"residual", "vocab"} else f"layers.{layer}.{factor}"
        for factor in axis
    ]
    if not any(name in maps for name in names):
        return None
    want, have = target._asdict(), source._asdict()
    index: Index = np.zeros((1, 1), np.int64)  # rows: the group so far; columns: the axis within it
    for factor, name in zip(axis, names, strict=True):
        if factor in _NESTED and name in maps:
            inner = maps[name]  # what stands in each target group, as indices into its source group
        else:
            inner = np.atleast_2d(maps.get(name, np.arange(want[factor])))
        combined = index[:, :, None] * have[factor] + inner[:, None, :]
        combined[(index < 0)[:, :, None] | (inner < 0)[:, None, :]] = -1
        index = combined.reshape(-1, 1) if factor == "group" else combined.reshape(len(combined), -1)
    return index.reshape(-1)


def bring(
    canonical: str,
    values: npt.NDArray[np.float32],
    fill: npt.NDArray[np.float32],
    maps: Maps,
    target: Sizes,
    source: Sizes,
) -> npt.NDArray[np.float32]:
    """Bring a tensor of the source into the target's coordinates.

    Args:
        canonical: the target's name of it, or the own name of a projector's tensor.
        values: the source's tensor.
        fill: the target's tensor: what stands where no unit of the source does.
        maps: the maps.
        target: lengths of the target.
        source: lengths of the source.

    Returns:
        Shape of ``fill``. An element stands if all of its indices have a counterpart.
    """
    axes = axes_of(canonical) or ()
    moved = [axis_index(axis, layer_of(canonical), maps, target, source) for axis in axes]
    if all(index is None for index in moved):
        return values
    taken = [
        np.arange(length) if index is None else np.where(index < 0, 0, index)
        for index, length in zip(moved, fill.shape, strict=True)
    ]
    brought = np.ascontiguousarray(values[np.ix_(*taken)])
    for number, index in enumerate(moved):
        if index is not None and (index < 0).any():
            absent = (slice(None),) * number + (index < 0,)
            brought[absent] = fill[absent]
    return brought
