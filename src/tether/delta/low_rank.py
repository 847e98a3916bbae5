"""Deltas of low rank: two thin factors a head, which are what a file holds."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tether.delta.head import Head, Reference

__all__ = ["Factors", "factored", "shortened"]

RIDGE = 1e-6
"""Added to second moments, as a share of their mean: a direction that no text has would be without weight."""


class Factors(NamedTuple):
    """A head as a product of two thin matrices.

    Attributes:
        up: shape (C, r).
        down: shape (r, F).
    """

    up: Tensor
    down: Tensor

    def whole(self) -> Tensor:
        """Multiply the factors.

        Returns:
            The head, shape (C, F).
        """
        return self.up @ self.down


@torch.no_grad()
def shortened(head: Head, at: Reference, fisher: Tensor, rank: int) -> Head:
    """Find the delta of low rank that does most nearly what a delta does.

    For each head that is the best approximation where an error counts as it does in use: states as they occur in the
    domain, and errors of loc by what they do to the softmax. With S the second moments of the states and L the root of
    the output Fisher in units of the scale of U, the head is L^-1 [L D S^1/2]_r S^-1/2, [.]_r a truncated singular
    value decomposition (Eckart and Young). Log scales do nothing to the softmax; their L is 1. In chart `matrix` the
    head moves loc itself, and its unit is 1.

    Cost: two decompositions of F x F and C x C, and one of C x F for each head.

    Args:
        head: the delta as it was learnt, C x F.
        at: base quantities at some tokens of the domain.
        fisher: output Fisher on base text, shape (C, C).
        rank: r >= 1.

    Returns:
        Heads of rank r at most.
    """
    right, back = _root(at.states.T @ at.states / len(at.states))
    unit = at.scale.log().mean(0).exp() if head.chart != "matrix" else torch.ones_like(at.scale[0])
    left, undo = _root(fisher * torch.outer(unit, unit))
    second = undo @ _truncated(left @ head.second @ right, rank) @ back
    first = None if head.first is None else _truncated(head.first @ right, rank) @ back
    return Head(first, second, head.chart)


# The symmetric root of a second moment, and its inverse.
def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0) + RIDGE * values.clamp(min=0).mean()
    root, inverse = (vectors * values.pow(power) @ vectors.T for power in (0.5, -0.5))
    return root.to(moment), inverse.to(moment)


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return kept.to(matrix)


@torch.no_grad()
def factored(heads: Mapping[str, Tensor], rank: int) -> dict[str, Factors]:
    """Write heads of low rank as factors.

    Args:
        heads: by name, shape (C, F) each, of rank r at most.
        rank: r.

    Returns:
        Factors of the same size, float32; what is beyond rank r is lost.
    """
    found = {}
    for name, head in heads.items():
        u, s, vh = torch.linalg.svd(head.double(), full_matrices=False)
        root = s[:rank].sqrt()
        found[name] = Factors((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float())
    return found
