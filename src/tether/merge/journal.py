"""The record of finished tensors: one line each, believed only if the bytes are there."""

import json
import os
import threading
from pathlib import Path
from typing import NamedTuple, final

__all__ = ["Journal", "Written"]


class Written(NamedTuple):
    """A finished tensor.

    Attributes:
        name: in the result.
        sha256: of its bytes.
        lost: sum of squares of what rounding to the stored type took away.
        changed: sum of squares of the change from the parent (or the model it goes into), before rounding.
    """

    name: str
    sha256: str
    lost: float
    changed: float


@final
class Journal:
    """An append-only file of JSON lines.

    A process may be killed within a line; then that line is not JSON and its tensor is not believed. Nor is
    a tensor whose bytes have another hash, so that a journal that reached the disk before them does no harm.

    Args:
        path: the file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        # A torn last line must not swallow the next one.
        if (content := path.read_bytes()) and not content.endswith(b"\n"):
            os.write(self._descriptor, b"\n")

    def entries(self) -> dict[str, Written]:
        """Read what earlier processes have finished.

        Returns:
            Tensor name to its record.
        """
        found = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = Written(*json.loads(line))
            except (ValueError, TypeError):
                continue
            found[entry.name] = entry
        return found

    def append(self, entry: Written) -> None:
        """Record a finished tensor.

        Args:
            entry: about it.
        """
        with self._lock:
            os.write(self._descriptor, json.dumps(entry).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
