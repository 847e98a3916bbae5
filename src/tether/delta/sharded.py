"""States in several files as if they were one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ShardedStates"]


class ShardedStates:
    """States that lie in several files, indexed like one tensor; only the rows asked for are read.

    Args:
        parts: memory-mapped tensors, shapes (n_i, F).
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = torch.Size((int(self.ends[-1]), parts[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        elif index.dtype == torch.bool:
            index = index.nonzero().squeeze(-1)
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
        return torch.cat([part.float() for part in self.parts])
