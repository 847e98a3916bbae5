"""States in files as if they were one tensor: only the rows asked for are read."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tether.errors import CheckpointError
from tether.store.nameless import Nameless

__all__ = ["FileRows", "ShardedStates"]

Rows = npt.NDArray[np.int64]
States = npt.NDArray[np.float16]


class FileRows:
    """Rows of half-precision numbers in a file.

    They are read and not mapped: pages of a mapped file count as memory of the process for as long as there is room,
    and a text of ten million tokens has more of them than a machine may have.

    Args:
        file: the file, or one without a name.
        begin: of the first row, in bytes.
        shape: rows, and numbers in each.
    """

    dtype = torch.float16

    def __init__(self, file: Path | Nameless, begin: int, shape: tuple[int, int]) -> None:
        self.file, self.begin, self.shape = file, begin, torch.Size(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        rows = _positions(index, len(self)).numpy()
        if isinstance(self.file, Nameless):
            return torch.from_numpy(self._rows(self.file.read, rows))
        with self.file.open("rb") as stream:

            def read(begin: int, size: int) -> bytes:
                stream.seek(begin)
                return stream.read(size)

            return torch.from_numpy(self._rows(read, rows))

    def _rows(self, read: Callable[[int, int], bytes], rows: Rows) -> States:
        order = np.argsort(rows, kind="stable")
        found = np.empty((len(rows), self.shape[1]), dtype=np.float16)
        wanted, width = rows[order], 2 * self.shape[1]
        # Rows that follow each other in the file are read at once.
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(wanted) != 1) + 1):
            if not len(part):
                continue
            size = width * len(part)
            data = read(self.begin + width * int(wanted[part[0]]), size)
            if len(data) != size:
                raise CheckpointError(f"{self.file}: cut short while it was read; compute the states again")
            found[order[part]] = np.frombuffer(data, dtype=np.float16).reshape(len(part), -1)
        return found


class ShardedStates:
    """States that lie in several files, or in parts of one, indexed like one tensor.

    Args:
        parts: rows of each, shapes (n_i, F).
    """

    def __init__(self, parts: Sequence[Tensor | FileRows]) -> None:
        self.parts = tuple(parts)
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = torch.Size((int(self.ends[-1]), parts[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        index = _positions(index, len(self))
        found = torch.empty(len(index), self.shape[1], dtype=self.parts[0].dtype)
        of_part = torch.searchsorted(self.ends, index.contiguous(), right=True)
        for number in of_part.unique().tolist():
            rows = of_part == number
            begin = int(self.ends[number]) - len(self.parts[number])
            found[rows] = self.parts[number][index[rows] - begin]
        return found

    def float(self) -> Tensor:
        """Read everything.

        Returns:
            All states, shape (n, F), float32.
        """
        return torch.cat([part[:].float() for part in self.parts])


def _positions(index: Tensor | slice, length: int) -> Tensor:
    if isinstance(index, slice):
        return torch.arange(*index.indices(length))
    return index.nonzero().squeeze(-1) if index.dtype == torch.bool else index
