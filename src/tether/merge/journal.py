"""The record of finished tensors: one line each, believed only if the bytes are there."""

import hashlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from tether.errors import CheckpointError
from tether.files import read_bytes
from tether.reading import parse_json
from tether.store.system import open_binary

__all__ = ["Journal", "Written"]

JOURNAL_BYTES: Final = 256 * 2**20
"""Size of a journal at most: a million tensors have less."""


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
    """An append-only file of JSON lines: the fields of ``Written``, and a seal of 16 hexadecimal digits.

    A process may be killed within a line; then that line is not JSON and its tensor is not believed. Nor is
    a tensor whose bytes have another hash, so that a journal that reached the disk before them does no harm.

    Args:
        path: the file; made if it is missing.
        fresh: whether to forget what is in it.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self._path = path
        self._lock = threading.Lock()
        content = read_bytes(path, JOURNAL_BYTES) if path.exists() and not fresh else b""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if fresh else 0)
        self._descriptor = open_binary(path, flags)
        # A torn last line must not swallow the next one.
        if content and not content.endswith(b"\n"):
            os.write(self._descriptor, b"\n")

    def entries(self) -> dict[str, Written]:
        """Read what earlier processes have finished.

        Returns:
            Tensor name to its record.

        Raises:
            CheckpointError: If a whole line is not one that a merge wrote.
        """
        found = {}
        for number, line in enumerate(read_bytes(self._path, JOURNAL_BYTES).split(b"\n"), start=1):
            try:
                content = parse_json(line, self._path, foreign=True)
            except CheckpointError:
                continue  # torn
            if problem := _problem(content):
                raise CheckpointError(
                    f"{self._path}, line {number} is damaged: {problem}. What the interrupted merge had finished is "
                    "removed: start the same merge again"
                )
            entry = Written(*content[:4])
            found[entry.name] = entry
        return found

    def append(self, entry: Written) -> None:
        """Record a finished tensor.

        Args:
            entry: about it.
        """
        with self._lock:
            os.write(self._descriptor, json.dumps([*entry, _seal(entry)]).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


# The figures of a line go into the report as they are, so that a changed digit must not pass.
def _seal(entry: Written) -> str:
    return hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:16]


def _problem(content: Any) -> str:
    fields = (*Written._fields, "seal")
    if not isinstance(content, list) or len(content) != len(fields):
        return f"expected a list of {', '.join(fields)}"
    for field, value in zip(fields, content, strict=True):
        kind = float if field in {"lost", "changed"} else str
        if not isinstance(value, kind) or (isinstance(value, float) and not 0 <= value < math.inf):
            return f"{field} is {str(value)[:40]!r}, expected {'a number, at least 0' if kind is float else 'text'}"
    entry = Written(*content[:4])
    return "" if _seal(entry) == content[4] else "seal: the other fields do not have it"
