"""What safetensors files and their indexes say of tensors: where each lies, its type and its shape."""

from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from safetensors import SafetensorError, safe_open

from tether.errors import CheckpointError
from tether.files import check_plain, read_bytes
from tether.reading import Strict, parse_as
from tether.store.hashing import unreadable

__all__ = ["Entry", "get", "opened", "read_header", "read_index"]

INDEX_BYTES: Final = 64 * 2**20
"""Size of an index at most: half a million tensors have less."""
DIMENSIONS: Final = 64
"""Of a tensor at most: neither numpy nor torch has more."""
HEADER_BYTES: Final = 100 * 2**20
"""Size of a header at most, as the safetensors library has it."""


class Entry(NamedTuple):
    """Where one tensor lies: bytes ``start`` (included) to ``stop`` (excluded) of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def opened(file: Path, framework: str) -> Any:
    """Open a safetensors file; the library checks that its header is sound and covers the file exactly.

    Args:
        file: which.
        framework: `pt` or `numpy`.

    Returns:
        The library's view, to be used in a `with`.

    Raises:
        CheckpointError: If it is missing, is no plain file, or is damaged.
    """
    try:
        if file.exists():
            check_plain(file)
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(unreadable(file, error)) from error


def get(entry: Entry, name: str, framework: str) -> Any:
    """Read one tensor.

    Args:
        entry: where it lies.
        name: what the file calls it.
        framework: `pt` or `numpy`.

    Returns:
        The tensor.

    Raises:
        CheckpointError: If the file has gone or changed, or the framework has no such type or size.
    """
    with opened(entry.file, framework) as file:
        try:
            return file.get_tensor(name)
        # torch and numpy refuse types and sizes that safetensors lets pass, each by errors of its own.
        except (SafetensorError, OSError, ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise CheckpointError(
                f"{entry.file}: tensor {name} of type {entry.dtype} and shape {entry.shape} cannot be read ({error}); "
                "take another copy of the file"
            ) from error


class _Tensor(Strict):
    """What a header says of one tensor."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: list[NonNegativeInt]


class _Header(Strict):
    """A header: tensors under their names, and some text."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, _Tensor]
    metadata: dict[str, str] | None = Field(alias="__metadata__", default=None)


class _Index(BaseModel):
    """The field of an index that is used; other libraries write more beside it."""

    weight_map: dict[str, str]


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read what a safetensors file says of its tensors.

    Args:
        file: which.

    Returns:
        Name to place, and the text that the header carries.

    Raises:
        CheckpointError: If the file is missing, is no plain file, or is damaged.
    """
    with opened(file, "numpy"):
        pass
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = parse_as(_Header, stream.read(min(length, HEADER_BYTES)), file)
    # The library has found the rest in order: types that it knows, and offsets that cover the file.
    entries = {}
    for name, tensor in (header.__pydantic_extra__ or {}).items():
        if len(tensor.shape) > DIMENSIONS:
            raise CheckpointError(
                f"{file} is damaged: tensor {name[:80]!a} has {len(tensor.shape)} dimensions, expected {DIMENSIONS} at "
                "most; take another copy"
            )
        start, stop = (8 + length + offset for offset in tensor.data_offsets)
        entries[name] = Entry(file, tensor.dtype, tuple(tensor.shape), start, stop)
    return entries, header.metadata or {}


def read_index(file: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint.

    Args:
        file: which.

    Returns:
        Name of a tensor to name of a file, as the index gives it.

    Raises:
        CheckpointError: If it is no such index.
    """
    try:
        return parse_as(_Index, read_bytes(file, INDEX_BYTES), file).weight_map
    except CheckpointError as error:
        raise CheckpointError(
            f"{file} is not the index of a sharded checkpoint ({error}). Expected JSON with a weight_map from tensor "
            "names to file names. Copy or download it again."
        ) from error
