"""A lazy view of the tensors of a checkpoint, and the hash that identifies it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np
import numpy.typing as npt

from tether.errors import CheckpointError, ShapeError
from tether.files import is_plain
from tether.names import inside
from tether.store.hashing import file_chunks, unreadable
from tether.store.headers import Entry, get, opened, read_header, read_index

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointReader"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@final
class CheckpointReader:
    """The tensors of a safetensors file or of a Hugging Face checkpoint folder, read when asked for.

    Only headers are read on construction, and they are checked then: a checkpoint that opens has every
    tensor that it promises, at its full length. No file stays open between calls, and a tensor that was
    returned owns its memory: it stays valid when the file is later replaced.

    In a folder, ``model.safetensors`` is taken before ``model.safetensors.index.json``, as transformers
    does. With an index, the tensors are those that the index names.

    Args:
        path: A safetensors file, or a folder holding ``model.safetensors`` or the index of a sharded model.

    Raises:
        CheckpointError: If the file is missing or damaged, or the index names absent shards or tensors;
            one error names them all.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"head": torch.arange(6.0).reshape(3, 2)}, f"{folder}/model.safetensors")
        ...     reader = CheckpointReader(folder)
        ...     reader.names, reader.shape("head"), reader.dtype("head"), reader.slice("head", 1, 2)
        (('head',), (3, 2), 'F32', tensor([[2., 3.]]))
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = Path(path)
        self._metadata: list[tuple[Path, dict[str, str]]] = []
        self._entries: dict[str, Entry] = {}
        single = self._path / SINGLE if self._path.is_dir() else self._path
        if single.exists() or not self._path.is_dir():
            self._entries, metadata = read_header(single)
            self._metadata.append((single, metadata))
        elif (self._path / INDEX).exists():
            self._open_shards(read_index(self._path / INDEX))
        else:
            raise CheckpointError(
                f"{self._path} holds no weights that can be read: expected {SINGLE} or {INDEX} in it. "
                "Give a safetensors file or a folder that save_pretrained wrote; convert .bin and .pt files "
                "first."
            )

    def _open_shards(self, weight_map: Mapping[str, str]) -> None:
        problems: list[str] = []
        shards: dict[str, dict[str, Entry]] = {}
        for shard in sorted(set(weight_map.values())):
            try:
                file = inside(self._path, shard)
            except CheckpointError:
                problems.append(f"shard {shard[:400]} lies outside the folder")
                continue
            if not is_plain(file):
                count = sum(name == shard for name in weight_map.values())
                problems.append(f"shard {shard[:400]} is absent (it should hold {count} tensors)")
            else:
                try:
                    shards[shard], metadata = read_header(file)
                except CheckpointError as error:
                    problems.append(str(error))
                else:
                    self._metadata.append((file, metadata))
        for name, shard in sorted(weight_map.items()):
            if shard in shards:
                if name in shards[shard]:
                    self._entries[name] = shards[shard][name]
                else:
                    problems.append(f"tensor {name} is absent from shard {shard}")
        if problems:
            raise CheckpointError(
                f"{self._path / INDEX} does not match its files: {'; '.join(problems)}. Expected every shard "
                "and tensor that the index names. Copy or download the missing files again."
            )

    @property
    def path(self) -> Path:
        """The file or folder that was given."""
        return self._path

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the tensors, in order of their names."""
        return tuple(file for file, _ in self._metadata)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self._entries))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of tensor ``name``, from the header.

        Raises:
            CheckpointError: If there is no tensor of that name.
        """  # noqa: DOC502 - raised by _entry
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Return the type of tensor ``name`` as safetensors spells it: ``F32``, ``BF16``, ``I64`` and so on.

        Raises:
            CheckpointError: If there is no tensor of that name.
        """  # noqa: DOC502 - raised by _entry
        return self._entry(name).dtype

    def span(self, name: str) -> tuple[Path, int, int]:
        """Return where the bytes of tensor ``name`` lie, for readers with buffers of their own.

        Returns:
            The file, the first byte, and the byte after the last.

        Raises:
            CheckpointError: If there is no tensor of that name.
        """  # noqa: DOC502 - raised by _entry
        entry = self._entry(name)
        return entry.file, entry.start, entry.stop

    def tensor(self, name: str) -> "torch.Tensor":
        """Read one whole tensor.

        Args:
            name: One of ``names``.

        Returns:
            The tensor on the CPU, in its stored type and shape, in memory of its own.

        Raises:
            CheckpointError: If there is no tensor of that name, or its file has gone or changed since.
        """  # noqa: DOC502 - raised by _entry and get
        tensor: torch.Tensor = get(self._entry(name), name, "pt")
        return tensor.clone()

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Read one whole tensor without torch.

        Args:
            name: One of ``names``, of a type that numpy has.

        Returns:
            The tensor in its stored type and shape, in memory of its own.

        Raises:
            CheckpointError: If there is no tensor of that name, numpy lacks its type, or its file has gone or changed.
        """  # noqa: DOC502 - raised by _entry and get
        values: npt.NDArray[np.generic] = get(self._entry(name), name, "numpy")
        return values

    def slice(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Read rows ``start`` (included) to ``stop`` (excluded) of a tensor, without reading the others.

        Args:
            name: One of ``names``.
            start: First row along axis 0, from 0.
            stop: End row, at most ``shape(name)[0]``.

        Returns:
            The rows on the CPU, shape ``(stop - start, *shape(name)[1:])``, in memory of their own.

        Raises:
            CheckpointError: If there is no tensor of that name, or its file has gone or changed since.
            ShapeError: If the rows are not all there.
        """  # noqa: DOC502 - CheckpointError is raised by _entry and opened
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise ShapeError(
                f"rows {start} to {stop} were asked of tensor {name} of shape {entry.shape} in {entry.file}; "
                "expected 0 <= start <= stop <= shape[0]. Take the bounds from shape(name); read a scalar "
                "with tensor(name)."
            )
        with opened(entry.file, "pt") as file:
            rows: torch.Tensor = file.get_slice(name)[start:stop]
            return rows.clone()

    def metadata(self) -> dict[str, str]:
        """Return the text that the headers carry, joined over the shards.

        Returns:
            Key to value; empty if the files carry none.

        Raises:
            CheckpointError: If two shards give one key different values.
        """
        joined: dict[str, str] = {}
        for file, metadata in self._metadata:
            for key, value in metadata.items():
                if joined.setdefault(key, value) != value:
                    raise CheckpointError(
                        f"{file} gives metadata {key} = {value!r}, an earlier shard {joined[key]!r}; "
                        "expected one value. The shards come from different checkpoints: copy them all from "
                        "one."
                    )
        return joined

    def fingerprint(self, inspect: Callable[[str, memoryview], None] | None = None) -> str:
        """Hash what the checkpoint says, not how it is cut into files.

        SHA-256 over name, type, shape and content of every tensor, in order of the names. Equal for any
        sharding and any metadata; different for any changed bit, name, shape or type. Memory stays at one
        chunk of 4 MiB.

        Args:
            inspect: Called with the tensor's name and each chunk, so that one reading serves two purposes;
                what it raises goes to the caller.

        Returns:
            64 hexadecimal digits.

        Raises:
            CheckpointError: If a file has gone or has been cut short since it was opened.
        """
        digest = hashlib.sha256(b"tether fingerprint 1\n")
        for name in self.names:
            entry = self._entries[name]
            digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode() + b"\n")
            try:
                for chunk in file_chunks(entry.file, entry.start, entry.stop):
                    digest.update(chunk)
                    if inspect:
                        inspect(name, chunk)
            except OSError as error:
                raise CheckpointError(unreadable(entry.file, error)) from error
        return digest.hexdigest()

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            close = ", ".join(get_close_matches(name, self._entries, n=3)) or "none"
            raise CheckpointError(
                f"tensor {name} was asked of {self._path}, which holds {len(self._entries)} others (similar: "
                f"{close}). Take a name from names, or give the checkpoint that this one was made for."
            ) from None
