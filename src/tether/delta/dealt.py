"""A measurement of a text whose windows are dealt to the processes that work together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tether.delta.windows import Windows
from tether.processes import alone, current

__all__ = ["deal", "dealt", "put_together"]


def deal(windows: Windows, rows: Tensor) -> Tensor:
    """Pick the windows that this process measures: the processes' shares follow one another in the text.

    Args:
        windows: a text.
        rows: numbers of the windows that are to be measured, shape (W,).

    Returns:
        Those of this process, of about as many tokens as every other has; none where there are too few.
    """
    group = current()
    if group.count == 1:
        return rows
    lengths = windows.starts.diff()[rows]
    # The middle of a window says whose it is, so that every window is one process's.
    middle = lengths.cumsum(0) - lengths / 2
    owner = (middle * group.count / max(int(lengths.sum()), 1)).long()
    return rows[owner == group.rank]


def put_together(mine: Sequence[Tensor] | None, dim: int = 0) -> list[Tensor]:
    """Join what the processes have measured, in the order of their shares.

    Args:
        mine: this process's part of each result, or None where it has no share.
        dim: along which parts follow one another.

    Returns:
        Each result whole, in every process, where its part was.
    """
    group = current()
    if group.count == 1:
        return list(mine or ())
    # A part that lies on one process's device would otherwise be sought on the same device of another.
    parts = group.gather(None if mine is None else [part.detach().cpu() for part in mine])
    there = [part for part in parts if part is not None]
    whole = [torch.cat(each, dim) for each in zip(*there, strict=True)]
    return [values.to(part.device) for values, part in zip(whole, mine or whole, strict=True)]


def dealt(windows: Windows, work: Callable[[Windows], Sequence[Tensor]], *, dim: int = 0) -> list[Tensor]:
    """Measure a text, each process a share of its windows.

    Args:
        windows: the text, of one window at least.
        work: measures some windows, token by token in their own order.
        dim: along which its results hold the tokens.

    Returns:
        Results for the whole text, the same in every process.
    """
    if current().count == 1:
        return list(work(windows))
    rows = deal(windows, torch.arange(len(windows.starts) - 1))
    found = None
    if len(rows):
        with alone():
            found = work(windows.some(rows))
    return put_together(found, dim)
