"""Where each tensor of a result goes: files, headers and offsets, all known before any work."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Place", "Shard", "index_json", "lay_out"]

_ALIGNMENT = 8


class Place(NamedTuple):
    """Where one tensor goes.

    Attributes:
        shard: number of the file, from 0.
        start: its first byte in the file.
        bytes: how many.
    """

    shard: int
    start: int
    bytes: int


class Shard(NamedTuple):
    """One file.

    Attributes:
        name: as transformers expects it.
        header: all bytes before the first tensor.
        bytes: length of the whole file.
    """

    name: str
    header: bytes
    bytes: int


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]],
    shard_bytes: int,
    metadata: Mapping[str, str],
) -> tuple[tuple[Shard, ...], dict[str, Place]]:
    """Cut tensors into files of a Hugging Face checkpoint.

    Args:
        tensors: name to type, shape and bytes.
        shard_bytes: the most bytes of tensors in a file; a larger tensor gets a file of its own.
        metadata: text to text for every header.

    Returns:
        The files, and the place of each tensor.

    Example:
        >>> shards, places = lay_out({"a": ("F32", (2,), 8), "b": ("F32", (1,), 4)}, 8, {})
        >>> [shard.name for shard in shards], places["b"].start == len(shards[1].header)
        (['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'], True)
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        size = tensors[name][2]
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    for number, (file, group) in enumerate(zip(names, groups, strict=True)):
        header, starts, size = _header(tensors, group, metadata)
        shards.append(Shard(file, header, size))
        places |= {name: Place(number, starts[name], tensors[name][2]) for name in group}
    return tuple(shards), places


def _header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], group: Sequence[str], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    # Wide types first, so that every tensor starts at a multiple of its element size.
    def width(name: str) -> int:
        _, shape, size = tensors[name]
        elements = 1
        for length in shape:
            elements *= length
        return size // elements if elements else 0

    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset, offsets = 0, {}
    for name in sorted(group, key=lambda name: (-width(name), name)):
        dtype, shape, size = tensors[name]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offsets[name] = offset
        offset += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in offsets.items()}, len(header) + offset


def index_json(shards: Sequence[Shard], places: Mapping[str, Place]) -> dict[str, Any]:
    """Give the content of ``model.safetensors.index.json``.

    Args:
        shards: more than one.
        places: of all tensors.

    Returns:
        What transformers reads.
    """
    return {
        "metadata": {"total_size": sum(place.bytes for place in places.values())},
        "weight_map": {name: shards[place.shard].name for name, place in sorted(places.items())},
    }
