"""The directions of middle states that a delta is fitted in: those its domain's text varies in most."""

from typing import NamedTuple

import torch
from torch import Tensor

from tether.delta.cache import StateCache
from tether.delta.head import Head, Reference

__all__ = ["Basis", "middle_basis"]

SHARE = 0.5
"""Directions kept, as a share of the hidden size. Half of it has the loss of all three layers to .01 nats, at two
thirds of the CPU seconds (docs/log.md, 2026-11-28)."""
TOKENS = 4096
"""Tokens of the domain that the directions are found on."""


class Basis(NamedTuple):
    """What a delta reads while it is fitted.

    Attributes:
        size: of the last hidden state, which is kept as it is.
        middle: orthonormal directions of the middle states, shape (F - H, k), or None where there are none.
    """

    size: int
    middle: Tensor | None

    def reduce(self, at: Reference) -> Reference:
        """Read states in the basis.

        Args:
            at: base quantities with states of shape (n, F).

        Returns:
            The same with states of shape (n, H + k).
        """
        if self.middle is None:
            return at
        last, middle = at.states[:, : self.size], at.states[:, self.size :]
        return at._replace(states=torch.cat([last, middle @ self.middle.to(middle)], -1))

    def expand(self, head: Head) -> Head:
        """Give the delta of the whole states that moves them as this one moves the reduced.

        Args:
            head: heads of shape (C, H + k).

        Returns:
            Heads of shape (C, F).
        """
        middle = self.middle
        if middle is None:
            return head

        def whole(weight: Tensor) -> Tensor:
            return torch.cat([weight[:, : self.size], weight[:, self.size :] @ middle.to(weight).T], -1)

        return Head(None if head.first is None else whole(head.first), whole(head.second), head.chart)


def middle_basis(cache: StateCache) -> Basis:
    """Find the directions in which the middle states of a text have most of their squares.

    Cost: TOKENS x (F - H)^2 for the second moments, and the eigenvectors of that matrix.

    Args:
        cache: the domain's text.

    Returns:
        The basis; without middle layers one that changes nothing.
    """
    size = cache.states.shape[1] // (1 + len(cache.layers))
    if not cache.layers:
        return Basis(size, None)
    index = torch.linspace(
        0, len(cache.states) - 1, min(TOKENS, len(cache.states)), dtype=torch.float64
    ).long()
    middle = cache.states[index][:, size:].float()
    vector = torch.linalg.eigh(middle.T @ middle / len(middle))[1]
    return Basis(size, vector[:, -max(1, round(SHARE * size)) :].contiguous())
