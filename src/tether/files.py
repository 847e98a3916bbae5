"""Files that are opened: plain ones only, and no more bytes of them than one such file needs."""

import os
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import IO, Final

from tether.errors import CheckpointError, ConfigError, TetherError

__all__ = ["LINE_BYTES", "check_plain", "is_plain", "read_bytes", "text_lines"]

LINE_BYTES: Final = 256 * 2**20
"""Size of a line of a text at most: each is held in memory whole."""


def check_plain(path: str | PathLike[str], *, error: type[TetherError] = CheckpointError) -> None:
    """Refuse what is no plain file: a pipe would be waited for when it is opened, and a device may have no end.

    Args:
        path: what will be opened.
        error: what to raise.

    Raises:
        TetherError: of the type given, if it is missing, or is a folder, a device or a pipe.
    """  # noqa: DOC502 - `error` is raised
    try:
        plain = stat.S_ISREG(Path(path).stat().st_mode)
    except FileNotFoundError as missing:
        raise error(f"{path} does not exist: no such file; check the path") from missing
    except (OSError, ValueError) as broken:
        raise error(
            f"{str(path)[:400]}: cannot be read ({broken}); check the path and its permissions"
        ) from broken
    if not plain:
        raise error(f"{path}: cannot be read; expected a file, and this is a folder, a device or a pipe")


def is_plain(path: str | PathLike[str]) -> bool:
    """Say whether something is a plain file; a path that no file can have is none.

    Args:
        path: any path, also one that a file gives.

    Returns:
        False for what `check_plain` refuses.
    """
    try:
        check_plain(path)
    except CheckpointError:
        return False
    return True


def read_bytes(path: str | PathLike[str], most: int, *, error: type[TetherError] = CheckpointError) -> bytes:
    """Read a whole file that is small, and is one: no device, pipe or folder.

    Args:
        path: the file.
        most: bytes that it may have.
        error: what to raise.

    Returns:
        Its bytes.

    Raises:
        TetherError: of the type given, if it is missing, is no file, is larger, or cannot be read.
    """  # noqa: DOC502 - `error` is raised
    check_plain(path, error=error)
    try:
        with Path(path).open("rb") as stream:
            # As much memory as the file needs, not as much as it may have.
            content = stream.read(min(os.fstat(stream.fileno()).st_size, most) + 1)
    except OSError as broken:
        raise error(f"{path}: cannot be read ({broken}); check the path and its permissions") from broken
    if len(content) > most:
        raise error(f"{path}: larger than {most:,} bytes, which no such file needs; take another copy")
    return content


def text_lines(path: str | PathLike[str], stream: IO[bytes]) -> Iterator[bytes]:
    """Read a text line by line, none longer than `LINE_BYTES`.

    Args:
        path: what to call it in an error.
        stream: the file, opened.

    Yields:
        Lines with their ends.

    Raises:
        ConfigError: a line is longer.
    """
    number = 0
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise ConfigError(
                f"{path}, line {number}: longer than {LINE_BYTES:,} bytes; expected a JSON object a line, so cut the "
                "text into several documents, or give it as a plain file"
            )
        yield line
