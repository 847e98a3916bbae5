"""Stages 1 to 3 of one linear layer: from weights and neurons of two models to the fused rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tether.errors import ShapeError
from tether.merge.ensembles import average_rows
from tether.merge.task_vectors import (
    combine,
    input_directions,
    interference,
    interference_mask,
    project,
    project_constant,
)
from tether.merge.tefm.neurons import Neurons
from tether.merge.tefm.partners import Pair, Partners, find_partners
from tether.merge.tefm.switches import Switches

__all__ = ["Layer", "Side", "directions_of", "fuse_layer", "row_masks"]


class Side(NamedTuple):
    """One model's part of a layer.

    Attributes:
        weight: shape (d_out, d_in), float64.
        neurons: of its rows.
    """

    weight: Tensor
    neurons: Neurons


class Layer(NamedTuple):
    """A fused layer, and what stages 2 and 3 found.

    Attributes:
        weight: fused rows, shape (d_out, d_in), float64.
        partners: which neurons belong together; None where B has none here.
        mask: M of each row, shape (d_out,).
        moved: which rows have a partner; the others are A's, shape (d_out,).
    """

    weight: Tensor
    partners: Partners | None
    mask: Tensor
    moved: Tensor


def directions_of(grams: Sequence[Tensor], rank: int) -> Tensor:
    """Find the leading directions of what a layer reads in several models, each counted alike.

    Args:
        grams: Gram matrices of its inputs, shape (d_in, d_in) each.
        rank: how many directions.

    Returns:
        Orthonormal columns, shape (d_in, rank), float64; all axes where there are no more inputs than that.
    """
    if rank >= len(grams[0]):
        return torch.eye(len(grams[0]), dtype=torch.float64)
    doubled = [gram.double() for gram in grams]
    scaled = [gram / gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny) for gram in doubled]
    return input_directions(torch.stack(scaled).sum(0), rank)


def fuse_layer(
    a: Side, b: Side, parent: Tensor | None, directions: Tensor | None, switches: Switches
) -> Layer:
    """Fuse one linear layer.

    ``W* = base + lambda_proj M s + lambda_ortho r``, row by row: tau is B's task vector (for the symmetric update the
    sum of both), s its projection, r the rest, M the mask and base the mean of an ensemble of A, A's row, or the
    parent's. Rows of A without a partner stay as they are.

    Args:
        a: of the model whose rows the result has; m rows.
        b: of the other, in A's coordinates: m rows.
        parent: weights of the parent in A's coordinates, float64; None where there is none.
        directions: orthonormal columns to project on, where the switches ask for inputs.
        switches: the choices.

    Returns:
        The layer.

    Raises:
        ShapeError: Weights, neurons or directions do not fit together, or directions are missing.

    Reference:
        TEFM, stages 1 to 3; docs/lape-tefm.md, "the operator".
    """  # noqa: DOC502 - raised by _check
    _check(a, b, parent, directions, switches)
    if not bool(b.neurons.present.any()):
        rows = len(a.weight)
        return Layer(a.weight, None, torch.ones(rows, dtype=torch.float64), torch.zeros(rows).bool())
    pair = Pair.of(a.neurons, b.neurons, switches)
    partners = find_partners(pair, switches)
    by_ensemble = switches.task_vector == "ensemble"
    moved = (partners.ensemble if by_ensemble else partners.row) >= 0
    tau = _task_vectors(a, b, parent, pair, partners, switches)
    base = partners.from_a(a.weight, ensemble=switches.update == "ensemble")
    if switches.update == "symmetric":
        assert parent is not None  # Options.chosen refuses it otherwise
        own = a.weight - parent + switches.sigma * pair.mean_a[:, 1:2]
        tau, base = tau + partners.from_a(own, ensemble=by_ensemble), parent
    if directions is None:
        level = partners.from_a(pair.mean_a[:, :1], ensemble=True).squeeze(-1)
        shared = project_constant(tau, level)
    else:
        shared = project(tau, directions)
    mask = row_masks(pair, partners, switches)
    fused = combine(
        base, tau, shared, mask,
        lambda_proj=switches.lambda_proj, lambda_ortho=switches.lambda_ortho, rest=switches.rest,
    )  # fmt: skip
    return Layer(torch.where(moved.unsqueeze(-1), fused, a.weight), partners, mask, moved)


def _check(a: Side, b: Side, parent: Tensor | None, directions: Tensor | None, switches: Switches) -> None:
    shapes = {"A": tuple(a.weight.shape), "B": tuple(b.weight.shape)}
    shapes |= {} if parent is None else {"the parent": tuple(parent.shape)}
    neurons = {"A": a.neurons.activation.shape[1], "B": b.neurons.activation.shape[1]}
    if len({*shapes.values()}) > 1 or {*neurons.values()} != {len(a.weight)}:
        raise ShapeError(
            f"weights have shapes {shapes}, neurons {neurons}: expected equal shapes, and as many neurons as rows"
        )
    inputs = a.weight.shape[1]
    if (switches.direction == "inputs") != (directions is not None) or (
        directions is not None and len(directions) != inputs
    ):
        have = None if directions is None else tuple(directions.shape)
        raise ShapeError(
            f"direction is {switches.direction} and the directions have shape {have}: expected ({inputs}, rank) for "
            "inputs, and none for paper"
        )


# B's task vectors, brought to A's rows.
def _task_vectors(
    a: Side, b: Side, parent: Tensor | None, pair: Pair, partners: Partners, switches: Switches
) -> Tensor:
    by_ensemble = switches.task_vector == "ensemble"
    rows = b.weight[pair.place]
    pushed = switches.sigma * pair.mean_b[:, 1:2]
    if parent is not None:
        return partners.from_b(rows - parent[pair.place] + pushed, ensemble=by_ensemble)
    if switches.without_parent == "weights":
        own = partners.from_a(a.weight, ensemble=by_ensemble)
        return partners.from_b(rows + pushed, ensemble=by_ensemble) - own
    own = partners.from_a(pair.mean_a[:, :1], ensemble=by_ensemble)
    number = partners.from_b(pair.mean_b[:, :1] + pushed, ensemble=by_ensemble) - own
    return number.expand_as(a.weight)


def row_masks(pair: Pair, partners: Partners, switches: Switches) -> Tensor:
    """Work out the mask of each row of A.

    Args:
        pair: the neurons.
        partners: which belong together.
        switches: the choices.

    Returns:
        M, in [0, 1], shape (m,), float64.

    Reference:
        TEFM, stage 3, Int_p and M'_p.
    """
    if switches.mask == "none":
        return torch.ones(len(pair.mean_a), dtype=torch.float64)
    if switches.interference == "paper":
        mean_a = average_rows(pair.mean_a, partners.labels_a)[partners.labels_a]
        mean_b = partners.from_b(pair.mean_b, ensemble=True)
        curve = partners.from_b(pair.curvature_b.unsqueeze(-1), ensemble=True).squeeze(-1)
        score = interference(mean_a, mean_b, curve)
    else:
        score = _standardised_scores(pair, partners, switches.interference == "ensembles")
    return interference_mask(score, switches.beta, switches.mask)


# Of single neurons, each component standardised over those of both models; shared by an ensemble where asked.
def _standardised_scores(pair: Pair, partners: Partners, by_ensemble: bool) -> Tensor:
    both = torch.cat([pair.mean_a, pair.mean_b])
    standard = (both - both.mean(0)) / both.std(0).clamp(min=1e-12)
    one, other = standard.split([len(pair.mean_a), len(pair.mean_b)])
    curve = partners.from_b(
        (pair.curvature_b / pair.curvature_b.mean()).unsqueeze(-1), ensemble=False
    ).squeeze(-1)
    score = interference(one, partners.from_b(other, ensemble=False), curve)
    has = partners.row >= 0
    known = torch.where(has, score, 0).unsqueeze(-1)
    of = partners.labels_a
    share = average_rows(has.double().unsqueeze(-1), of)
    mean = (average_rows(known, of) / share.clamp(min=1e-300))[of].squeeze(-1)
    # A neuron that is left over in its ensemble has the mean of the others.
    return mean if by_ensemble else torch.where(has, score, mean)
