"""What operating systems do each in their own way: flushing, files read and written at a place, locks, processes."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
from filelock import FileLock, Timeout

from tether.errors import ConfigError

__all__ = ["alone_with", "flush", "is_running", "open_binary", "read_at", "write_at"]

_BINARY: Final = getattr(
    os, "O_BINARY", 0
)  # Windows alone turns line ends into others unless it is told not to.
_SEEKING: Final = threading.Lock()


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder; a symbolic link is left alone.

    Windows flushes no folders, since it writes their names down by itself.

    Args:
        path: of the file or folder.
    """
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    descriptor = open_binary(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_binary(path: Path, flags: int) -> int:
    """Open a file whose bytes are taken as they are.

    Args:
        path: of the file.
        flags: of `os.open`.

    Returns:
        A descriptor. A new file gets the permissions that the umask allows.
    """
    return os.open(path, flags | _BINARY, 0o666)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer, or its beginning, from a place in a file; threads may read one descriptor at the same time.

    Args:
        descriptor: from `open_binary`.
        buffer: to fill.
        offset: of the first byte.

    Returns:
        How many bytes were read, 0 at the end of the file.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    # Without such a call the place is the descriptor's own, and reads wait for each other.
    with _SEEKING:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write bytes at a place in a file, all of them; threads may write to one descriptor at the same time.

    Args:
        descriptor: from `open_binary`.
        data: to write.
        offset: of the first byte.
    """
    rest = memoryview(data)
    while rest:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, rest, offset)
        else:
            with _SEEKING:
                os.lseek(descriptor, offset, os.SEEK_SET)
                count = os.write(descriptor, rest)
        rest, offset = rest[count:], offset + count


def is_running(pid: int) -> bool:
    """Tell whether a process runs.

    Args:
        pid: its number.

    Returns:
        Whether there is one of that number, whoever owns it.
    """
    try:
        return bool(psutil.pid_exists(pid))
    except OverflowError:
        return False


@contextmanager
def alone_with(lock: Path, occupied: str) -> Iterator[None]:
    """Work where one process works at a time; the lock goes with the process, also when it is killed.

    Args:
        lock: a file for this purpose, which is made, and stays.
        occupied: what to say where another process holds it.

    Yields:
        Nothing.

    Raises:
        ConfigError: another process, or another part of this one, holds the lock, or the file cannot be made.
    """
    holder = FileLock(lock, timeout=0, thread_local=False)
    try:
        holder.acquire()
    except Timeout as error:
        raise ConfigError(occupied) from error
    except OSError as error:
        raise ConfigError(f"{lock.parent} cannot be written to ({error}). Choose another folder.") from error
    try:
        yield
    finally:
        holder.release()
