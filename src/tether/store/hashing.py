"""SHA-256 of files and the reading in chunks behind it."""

import hashlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from tether.errors import CheckpointError
from tether.files import check_plain

__all__ = ["file_chunks", "sha256_file", "unreadable"]

CHUNK = 4 * 1024 * 1024
"""Bytes read at a time."""


def sha256_file(path: str | PathLike[str]) -> str:
    """Hash the bytes of a file, a chunk at a time.

    Args:
        path: A file.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: If it is missing, is a device or a pipe, which may have no end, or cannot be read.
    """
    check_plain(path)
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(unreadable(Path(path), error)) from error


def file_chunks(file: Path, start: int, stop: int) -> Iterator[memoryview]:
    """Read a part of a file, a chunk at a time.

    Args:
        file: which.
        start: first byte.
        stop: the byte after the last.

    Yields:
        Its bytes; the next chunk overwrites the last.

    Raises:
        OSError: It cannot be read, or ends before `stop`.
    """
    buffer = memoryview(bytearray(min(CHUNK, stop - start)))
    with file.open("rb") as stream:
        stream.seek(start)
        while start < stop:
            count = stream.readinto(buffer[: stop - start])
            if not count:
                raise OSError(f"cut short, {stop - start} bytes are missing")
            yield buffer[:count]
            start += count


def unreadable(file: Path, error: Exception) -> str:
    """Say that a file cannot be read, and what to do.

    Args:
        file: which.
        error: what its reading raised.

    Returns:
        The message.
    """
    if isinstance(error, FileNotFoundError):
        return f"{file} does not exist; expected a file there. Check the path."
    return (
        f"{file} cannot be read ({error}). Expected a complete file, for weights in the safetensors format. "
        "Check the path and its permissions; if it is the right file, copy or download it again: it is "
        "damaged."
    )
