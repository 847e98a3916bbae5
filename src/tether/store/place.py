"""Places to write to, looked at before the work whose result shall go there."""

import os
import tempfile
from pathlib import Path

from tether.errors import ConfigError

__all__ = ["check_file", "check_free", "check_place"]

NAME, PATH = 230, 4000
"""Bytes of a name and of a path at most: less than file systems take, since a temporary name is 22 bytes longer."""


def check_file(path: str | Path) -> None:
    """Refuse a file's name before any work is done for it.

    Args:
        path: where a new file shall go; missing parents are fine.

    Raises:
        ConfigError: it exists, or nothing can be written there.
    """
    check_place(path)
    path = Path(path).absolute()
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already: choose another name, or remove it")


def check_free(folder: str | Path) -> None:
    """Refuse an output folder before any work is done for it.

    Args:
        folder: where a checkpoint shall go; missing parents are fine.

    Raises:
        ConfigError: it exists and is not an empty folder, or nothing can be written there.
    """
    check_place(folder)
    folder = Path(folder)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is not empty: expected a new or empty folder; choose another or remove it"
        )


def check_place(path: str | Path) -> None:
    """Refuse a place where nothing can be written: too long a name, a file on the way to it, or a closed folder.

    Args:
        path: a file or folder to be written; missing parents are fine.

    Raises:
        ConfigError: nothing can be written there.
    """
    path = Path(path).absolute()
    if "\0" in str(path) or max(len(os.fsencode(name)) for name in path.parts) > NAME:
        raise ConfigError(
            f"{str(path)[:80]!r}...: expected names of at most {NAME} bytes, without a zero; choose another"
        )
    if len(os.fsencode(path)) > PATH:
        raise ConfigError(
            f"{str(path)[:80]}...: expected a path of at most {PATH} bytes; choose a shorter one"
        )
    above = next(parent for parent in path.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise ConfigError(f"{path}: {above} is not a folder; choose another place")
    try:
        # Only writing tells: rights, read-only disks and other reasons are known to the system alone.
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ConfigError(
            f"{path}: {above} cannot be written to ({error.strerror}); choose another place"
        ) from error
