"""Input files, opened once each; every block that is read is compared with the hash of its first reading."""

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import numpy.typing as npt

from tether.errors import CheckpointError
from tether.merge.floats import BYTES
from tether.store.reader import CheckpointReader
from tether.store.system import open_binary, read_at

__all__ = ["BLOCK", "Files", "Seen", "block_bytes", "hash_array", "read_extra"]

BLOCK: Final = 1 << 18
"""Elements of a block: 1 MiB of float32, so that a handful of buffers stays in a core's cache."""


def block_bytes(dtype: str) -> int:
    """Give the length of the blocks that a tensor is read, hashed and copied in.

    Args:
        dtype: as safetensors spells it; types that are not merged go in blocks of 1 MiB.

    Returns:
        Bytes; the last block of a tensor is what is left.

    Example:
        >>> block_bytes("F32"), block_bytes("BF16"), block_bytes("I64")
        (1048576, 524288, 1048576)
    """
    return BLOCK * BYTES.get(dtype, 4)


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """Hashes of everything that a merge may read, taken in the reading that gave the inputs their hashes.

    A file can be replaced in place while a merge runs. Whatever is read later has to be what was hashed, or
    the result would be published under the hash of an input that is not in it.

    Attributes:
        blocks: file and offset of a block's first byte to the SHA-256 of the block.
        extras: file and name of a tensor beside the weights to the SHA-256 of its bytes.
    """

    blocks: Mapping[tuple[Path, int], bytes]
    extras: Mapping[tuple[str, str], bytes]


@final
class Files:
    """Input files, opened once each and read at offsets by any thread.

    Args:
        seen: hashes of their blocks.
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, file: Path, start: int, buffer: memoryview) -> None:
        """Fill a buffer with one block.

        Args:
            file: a file.
            start: offset of the block's first byte.
            buffer: bytes to fill, as many as the block has.

        Raises:
            CheckpointError: If the file has gone, is shorter, or holds other bytes than before.
        """  # noqa: DOC501 - OSError becomes CheckpointError
        rest, offset = buffer, start
        try:
            with self._lock:
                descriptor = self._open.get(file)
                if descriptor is None:
                    descriptor = self._open[file] = open_binary(file, os.O_RDONLY)
            while rest:
                count = read_at(descriptor, rest, offset)
                if not count:
                    raise OSError(f"it ends {len(rest)} bytes early")
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read any more ({error}); was it changed meanwhile?"
            ) from error
        if hashlib.sha256(buffer).digest() != self._seen.blocks[file, start]:
            raise CheckpointError(_changed(str(file), f"bytes {start} to {start + len(buffer)}"))

    def extra(self, file: str, tensor: str) -> npt.NDArray[np.generic]:
        """Read a tensor beside the weights.

        Args:
            file: a safetensors file.
            tensor: its name there.

        Returns:
            The tensor as stored.

        Raises:
            CheckpointError: If the file has gone, or holds other bytes than before.
        """
        values = read_extra(file, tensor)
        if hash_array(values) != self._seen.extras[file, tensor]:
            raise CheckpointError(_changed(file, f"tensor {tensor}"))
        return values

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def read_extra(file: str, tensor: str) -> npt.NDArray[np.generic]:
    """Read a tensor beside the weights, whatever it holds.

    Args:
        file: a safetensors file.
        tensor: its name there.

    Returns:
        The tensor as stored.

    Raises:
        CheckpointError: If the file has gone or is damaged.
    """
    try:
        return CheckpointReader(file).array(tensor)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {tensor} cannot be read any more ({error})") from error


def hash_array(values: npt.NDArray[np.generic]) -> bytes:
    """Hash the bytes of an array.

    Args:
        values: of any shape.

    Returns:
        SHA-256.
    """
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).digest()


def _changed(file: str, part: str) -> str:
    return (
        f"{file} was changed during the merge: {part} are not what they were when the file was hashed. Nothing was "
        "published. Start the same merge again when nothing writes to its inputs."
    )
