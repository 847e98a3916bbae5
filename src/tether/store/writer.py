"""Write tensors as safetensors: one file, or a stream of them cut into shards."""

import json
from collections.abc import Mapping
from itertools import pairwise
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, final

from tether.errors import ConfigError, ShapeError
from tether.store.publish import clean_stale, publish_file, publish_folder, write_json

if TYPE_CHECKING:
    import torch

# What publishes and what writes is imported from here by the rest of the library.
__all__ = [
    "ShardWriter",
    "clean_stale",
    "publish_file",
    "publish_folder",
    "write_json",
    "write_safetensors",
]

# The names of the types in a header, and the bytes of one element.
_DTYPES: Final = {
    "float64": ("F64", 8),
    "int64": ("I64", 8),
    "uint64": ("U64", 8),
    "float32": ("F32", 4),
    "int32": ("I32", 4),
    "uint32": ("U32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int16": ("I16", 2),
    "uint16": ("U16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


def write_safetensors(
    path: str | PathLike[str],
    tensors: Mapping[str, "torch.Tensor"],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file, whole or not at all.

    The same tensors and metadata give the same bytes: keys are sorted, which ``safetensors.torch.save_file``
    does not do for metadata. The file has the permissions that any new file has. Tensors that are not
    contiguous are copied; the others are written from where they are, one at a time.

    Args:
        path: The file; an existing one is replaced.
        tensors: Names to dense tensors of any layout and device, no two of them sharing memory.
        metadata: Text to text, stored in the header.

    Raises:
        ConfigError: If metadata is not text; the message names all such keys.
        ShapeError: If tensors cannot be stored; the message names them all.
        CheckpointError: If the disk is full.
    """  # noqa: DOC502 - CheckpointError is raised by publish_file
    metadata = dict(metadata or {})
    if wrong := [
        key for key, value in metadata.items() if not isinstance(key, str) or not isinstance(value, str)
    ]:
        raise ConfigError(
            f"metadata for {path} is not text under {', '.join(map(repr, wrong))}; expected text keys and "
            "values. Encode the values with json.dumps."
        )
    _refuse_unstorable(path, tensors)
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    _refuse_aliases(path, dense)
    # Wide types first, so that every tensor starts at a multiple of its element size.
    order = sorted(dense, key=lambda name: (-dense[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        stop = offset + dense[name].nbytes
        header[name] = {
            "dtype": _DTYPES[_type_name(dense[name])][0],
            "shape": list(dense[name].shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with publish_file(path, needed=8 + len(text) + offset) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(dense[name]))


@final
class ShardWriter:
    """A stream of named tensors, cut into the files of a Hugging Face checkpoint.

    Writes ``model-00001-of-0000N.safetensors`` and so on with ``model.safetensors.index.json``, or a single
    ``model.safetensors`` when all fits into one shard. Holds at most one shard in memory. Use it inside
    ``publish_folder``; the index is written, and the shards get their names, on a clean exit only.

    Args:
        folder: An existing folder, the temporary one of ``publish_folder``.
        shard_bytes: The most bytes of tensors in a file; a larger tensor gets a file of its own.
        metadata: Text to text for every header, beside ``format: pt``, which transformers asks for.

    Raises:
        ConfigError: If ``shard_bytes`` is not positive, a name comes twice, or nothing was added.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as parent, publish_folder(f"{parent}/model") as folder:
        ...     with ShardWriter(folder, shard_bytes=16) as writer:
        ...         writer.add("a", torch.zeros(4))
        ...         writer.add("b", torch.ones(4))
        ...     sorted(path.name for path in folder.glob("*.safetensors"))
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if shard_bytes <= 0:
            raise ConfigError(
                f"shard_bytes is {shard_bytes}; expected a positive number of bytes. Try 5000000000."
            )
        self._folder = Path(folder)
        self._shard_bytes = shard_bytes
        self._metadata = {"format": "pt", **(metadata or {})}
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[Path] = []
        self._shard_of: dict[str, int] = {}

    def add(self, name: str, tensor: "torch.Tensor") -> None:
        """Take the next tensor; write the shard that it no longer fits into.

        Args:
            name: A name that was not added before.
            tensor: A dense tensor. It is held, not copied, until its shard is written: do not change it.

        Raises:
            ConfigError: If the name was added before.
            CheckpointError: If the disk is full.
        """  # noqa: DOC502 - CheckpointError is raised by write_safetensors
        if name in self._shard_of:
            raise ConfigError(f"tensor {name} was added twice; expected each name once. Rename or drop one.")
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._write_shard()
        self._shard_of[name] = len(self._shards)
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _write_shard(self) -> None:
        path = self._folder / f"shard-{len(self._shards):05d}.part"
        write_safetensors(path, self._pending, self._metadata)
        self._shards.append(path)
        self._pending = {}
        self._pending_bytes = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if not self._shard_of:
            raise ConfigError(
                f"no tensor was added for {self._folder}; expected at least one. Add the tensors."
            )
        self._write_shard()
        count = len(self._shards)
        names = [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for path, name in zip(self._shards, names, strict=True):
            path.rename(self._folder / name)
        if count > 1:
            weight_map = {name: names[shard] for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self._folder / "model.safetensors.index.json", index)


def _type_name(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_unstorable(path: str | PathLike[str], tensors: Mapping[str, "torch.Tensor"]) -> None:
    wrong = []
    for name, tensor in tensors.items():
        layout = str(tensor.layout).removeprefix("torch.")
        if (
            name == "__metadata__"
            or _type_name(tensor) not in _DTYPES
            or layout != "strided"
            or tensor.is_meta
        ):
            wrong.append(f"{name} ({_type_name(tensor)}, {layout}, {tensor.device})")
    if wrong:
        raise ShapeError(
            f"tensors for {path} cannot be stored: {', '.join(wrong)}. Expected dense tensors with data, of "
            f"type {', '.join(_DTYPES)}, under any name but __metadata__. Convert or rename them first."
        )


def _refuse_aliases(path: str | PathLike[str], tensors: Mapping[str, "torch.Tensor"]) -> None:
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in tensors.items()
        if tensor.nbytes
    )
    shared = []
    for before, after in pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            shared.append(f"{before[3]} and {after[3]}")
    if shared:
        raise ShapeError(
            f"tensors for {path} share memory: {', '.join(shared)}. Expected each in memory of its own, so "
            "that loading gives back what was saved. Drop one of each pair (tied weights), or clone it."
        )


def _bytes(tensor: "torch.Tensor") -> memoryview:
    import torch

    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().data
