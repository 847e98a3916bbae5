"""Publish files and folders whole or not at all: temporary sibling, fsync, rename.

A name that this module has published always leads to complete content. Whatever stops a writer (an
exception, a full disk, ``kill -9``, power), the earlier content stays and at worst a hidden sibling
``.{name}.tmp-{pid}-{random}`` is left over, which the next writer of that name removes. Of two writers of
one name at the same time, one is refused (a folder that may not be replaced) or the later one wins.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

from tether.errors import CheckpointError, ConfigError
from tether.store.system import flush, is_running

__all__ = ["clean_stale", "publish_file", "publish_folder", "write_json"]

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)-[0-9a-f]{8}", re.DOTALL)
_FILE = 0o666  # what a new file may have at most; the umask takes some of it away
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def publish_folder(
    final: str | PathLike[str], *, replace: bool = False, needed: int | None = None
) -> Iterator[Path]:
    """Write a folder that appears under its name complete, or not at all.

    On a clean exit every file gets the permissions of a new file, whoever wrote it, and is flushed to the disk; then
    the temporary folder is renamed to ``final``.
    On any exception it is removed and ``final`` stays as it was.

    A file system has no portable call that swaps two folders, so ``replace`` renames twice: the old
    folder to ``.{name}.old-{pid}-{random}``, then the new one to ``final``; then it deletes the old one.
    Killed between the renames, nothing is at ``final`` until the next writer of that name, or
    ``clean_stale``, puts the old folder back. Killed after them, they delete the old one.

    Args:
        final: The folder to publish; missing parents are made.
        replace: Whether an existing folder with content may be replaced.
        needed: Bytes that will be written, if known: too little space is then refused before any work.

    Yields:
        The temporary folder to write into, beside ``final`` and so on the same file system.

    Raises:
        ConfigError: If ``final`` has content and may not be replaced, is not a folder, or cannot be made.
        CheckpointError: If the disk is full.
        OSError: If the system refuses for another reason.
    """  # noqa: DOC502 - raised by _prepare, _refuse_occupied and _discarded_on_error
    final = Path(final).absolute()
    _prepare(final, needed)
    _refuse_occupied(final, replace)
    temporary = _sibling(final, "tmp")
    with _discarded_on_error(temporary, final, needed):
        temporary.mkdir()
        mode = temporary.stat().st_mode & _FILE
        yield temporary
        for folder, _, files in os.walk(temporary, topdown=False):
            for file in files:
                _allow(Path(folder, file), mode)
                flush(Path(folder, file))
            flush(Path(folder))
        _refuse_occupied(final, replace)
        try:
            if replace and final.exists():
                _swap(temporary, final)
            else:
                if final.is_dir():
                    final.rmdir()  # it is empty, and not every system renames over it
                temporary.rename(final)
        except OSError:
            # Another writer may have published the name since the check.
            _refuse_occupied(final, replace)
            raise
        flush(final.parent)


@contextmanager
def publish_file(final: str | PathLike[str], *, needed: int | None = None) -> Iterator[Path]:
    """Write a file that appears under its name complete, or not at all; an existing one is replaced.

    It gets the permissions of a new file, whoever wrote it.

    Args:
        final: The file to publish; missing parents are made.
        needed: Bytes that will be written, if known: too little space is then refused before any work.

    Yields:
        A path beside ``final`` at which to write the file. Nothing is there yet.

    Raises:
        ConfigError: If ``final`` is a folder or cannot be made.
        CheckpointError: If the disk is full, or nothing was written.
    """
    final = Path(final).absolute()
    _prepare(final, needed)
    if final.is_dir():
        raise ConfigError(f"{final} is a folder; expected the path of a file to write. Choose another name.")
    temporary = _sibling(final, "tmp")
    with _discarded_on_error(temporary, final, needed):
        yield temporary
        if not temporary.is_file():
            raise CheckpointError(
                f"no file was written for {final}; expected one at the temporary path {temporary}. Write to "
                "the path that publish_file yields."
            )
        _allow(temporary, _new_mode(final))
        flush(temporary)
        temporary.replace(final)
        flush(final.parent)


def write_json(path: str | PathLike[str], obj: Any) -> None:
    """Write JSON text, whole or not at all.

    Args:
        path: The file; an existing one is replaced.
        obj: Anything that strict JSON can hold (no NaN, no infinity).

    Raises:
        ConfigError: If JSON cannot hold it; then nothing is written.
        CheckpointError: If the disk is full.
    """  # noqa: DOC502 - CheckpointError is raised by publish_file
    try:
        data = (json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the content for {path} cannot be JSON ({error}). Expected dicts with text keys, lists, text, "
            "finite numbers, booleans and None. Convert the rest first."
        ) from error
    with publish_file(path, needed=len(data)) as temporary:
        temporary.write_bytes(data)


def clean_stale(folder: str | PathLike[str]) -> tuple[Path, ...]:
    """Clear up in a folder what killed writers left there.

    Removes the temporaries of processes that no longer run; where one died between the two renames of
    ``publish_folder(replace=True)``, the earlier folder is put back under its name. What belongs to a
    running process stays. A process is known by its number only: on a file system that several machines
    or containers share, call this when no other of them writes there.

    Args:
        folder: The folder in which files or folders were published; not searched in depth.

    Returns:
        The leftovers that were removed or put back, sorted.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     clean_stale(folder)
        ()
    """
    return _clean(Path(folder), None)


def _sibling(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


# Make the parent, clear up what killed writers of this name left, check rights and space.
def _prepare(final: Path, needed: int | None) -> None:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{final.parent} cannot be made ({error}). Choose another place to write to."
        ) from error
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{final.parent} cannot be written to. Choose another place, or change its permissions."
        )
    _clean(final.parent, final.name)
    free = shutil.disk_usage(final.parent).free
    if needed is not None and needed > free:
        raise CheckpointError(
            f"{final} needs {needed} bytes, but the disk has {free} free. Nothing was changed. Free some "
            "space, or choose another place."
        )


def _refuse_occupied(final: Path, replace: bool) -> None:
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise ConfigError(f"{final} exists and is not a folder. Choose another name, or remove it.")
    if not replace and final.exists() and any(final.iterdir()):
        raise ConfigError(
            f"{final} exists and is not empty; expected a new or empty folder. Choose another name, or "
            "remove it."
        )


# Remove the temporary on any exception, and say in one way that the disk is full.
@contextmanager
def _discarded_on_error(temporary: Path, final: Path, needed: int | None) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        written = _size(temporary)
        _remove(temporary)
        # A file that was published inside a folder has already put its own name to a full disk.
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        number = _errno(cause)
        if number in _FULL:
            asked = f"{needed} bytes were needed" if needed is not None else "how much it needs is not known"
            raise CheckpointError(
                f"{final} could not be written: {os.strerror(number)} after {written} bytes; {asked}, and the "
                f"disk has {shutil.disk_usage(final.parent).free} free. Nothing was changed. Free some "
                "space, or choose another place."
            ) from cause
        raise


# What the system said, also where safetensors' Rust code has put it into words.
def _errno(error: BaseException | None) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else 0


def _swap(temporary: Path, final: Path) -> None:
    aside = _sibling(final, "old")
    try:
        final.rename(aside)
        temporary.rename(final)
        # The old folder goes only once the disk holds the new name.
        flush(final.parent)
    finally:
        # Also where somebody asks to end in between: what is not published is put back, what is replaced goes.
        if aside.exists() and not final.exists():
            aside.rename(final)
        try:
            _remove(aside)
        except BaseException:
            _remove(aside)
            raise


def _clean(folder: Path, name: str | None) -> tuple[Path, ...]:
    cleaned = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover is None or name not in {None, leftover["name"]} or is_running(int(leftover["pid"])):
            continue
        published = path.with_name(leftover["name"])
        if leftover["kind"] == "old" and not published.exists():
            # Another process may put it back at the same moment.
            with suppress(FileNotFoundError):
                path.rename(published)
        else:
            _remove(path)
        cleaned.append(path)
    return tuple(cleaned)


# The permissions that a new file gets beside a published one. Asking for the umask would change it for all threads.
def _new_mode(final: Path) -> int:
    probe = _sibling(final, "tmp")
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE)
    try:
        return os.fstat(descriptor).st_mode & _FILE
    finally:
        os.close(descriptor)
        probe.unlink()


# Libraries that write under a temporary name first, as safetensors does, leave files that only their owner may read.
def _allow(path: Path, mode: int) -> None:
    if not path.is_symlink() and path.stat().st_mode & _FILE != mode:
        path.chmod(mode)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
