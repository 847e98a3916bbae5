"""The document's fusion of a layer as written, for study: an ensemble becomes one row."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.errors import ShapeError
from tether.merge.ensembles import average_rows
from tether.merge.matching import EnsembleMatch
from tether.merge.task_vectors import (
    EPSILON,
    combine,
    interference,
    interference_mask,
    project_constant,
)

__all__ = ["EnsembleStatistics", "ensemble_means", "fuse_paper"]


class EnsembleStatistics(NamedTuple):
    """Means over the ensembles of one model's layer.

    Attributes:
        phi: encoding, shape (K, 3).
        curvature: Hessian diagonal ``phi[1]^2 + phi[2]``, shape (K,).
    """

    phi: Tensor
    curvature: Tensor


def ensemble_means(phi: Float[Tensor, "d 3"], labels: Int[Tensor, "d"]) -> EnsembleStatistics:
    """Average encodings over ensembles, with the document's Hessian diagonal.

    Args:
        phi: a neuron a row.
        labels: ensembles from 0.

    Returns:
        The means.

    Reference:
        TEFM, stage 1: ``Hess = g'^2 + phi[2] + epsilon``.
    """
    curvature = phi[:, 1].square() + phi[:, 2] + EPSILON
    found = average_rows(torch.cat([phi, curvature.unsqueeze(-1)], dim=1), labels)
    return EnsembleStatistics(found[:, :3], found[:, 3])


def fuse_paper(
    weight_a: Float[Tensor, "m i"],
    weight_b: Float[Tensor, "n i"],
    parent: Float[Tensor, "n i"] | None,
    phi_a: Float[Tensor, "_ 3"],
    phi_b: Float[Tensor, "_ 3"],
    labels_a: Int[Tensor, "_"],
    labels_b: Int[Tensor, "_"],
    match: EnsembleMatch,
    *,
    beta: float = 0.1,
    sigma: float = 1.0,
    lambda_proj: float = 0.5,
    lambda_ortho: float = 0.5,
    collapse: bool = True,
) -> Float[Tensor, "m i"]:
    """The document's stage 3 as written, for study: it replaces an ensemble's rows by one row.

    For matched ensembles k of A and p of B: ``tau_p = mean_j (W_Bj - W_Cj) + sigma g'_p``, a number added to every
    coordinate; ``d_k = mean_i phi_Ai[0]``, a number, read as the constant vector of that value, the only reading
    in which ``<tau, d>`` exists; ``tau_proj = M' <tau, d> / (|d|^2 + epsilon) d``, ``tau_ortho = tau - tau_proj``;
    ``W*_k = mean_i W_Ai + lambda_proj tau_proj + lambda_ortho tau_ortho`` for every row of the ensemble.
    Ensembles of A without a partner stay.

    Args:
        weight_a: rows of A.
        weight_b: rows of B over the same inputs; their number may differ.
        parent: rows of C in B's order, or None: then ``tau_p`` is the number ``phi_B[0] - phi_A[0]``.
        phi_a: encodings of A.
        phi_b: encodings of B.
        labels_a: ensembles of A.
        labels_b: of B.
        match: their pairs.
        beta: of the mask.
        sigma: weight of the gradient.
        lambda_proj: of the projection.
        lambda_ortho: of the rest.
        collapse: as written; False adds the update to A's own rows instead.

    Returns:
        The fused rows.

    Raises:
        ShapeError: encodings or labels of other numbers of rows.

    Reference:
        TEFM, stage 3; what each step does to a model: docs/lape-tefm.md.
    """
    if (
        len({len(weight_a), len(phi_a), len(labels_a)}) > 1
        or len({len(weight_b), len(phi_b), len(labels_b)}) > 1
    ):
        raise ShapeError(
            f"A has {len(weight_a)} rows, {len(phi_a)} encodings, {len(labels_a)} labels; B {len(weight_b)}, "
            f"{len(phi_b)}, {len(labels_b)}: expected equal numbers for each model"
        )
    a, b = ensemble_means(phi_a, labels_a), ensemble_means(phi_b, labels_b)
    k, p = match.first, match.second
    if parent is None:
        tau = (b.phi[p, 0] - a.phi[k, 0]).unsqueeze(-1).expand(-1, weight_a.shape[1])
    else:
        tau = average_rows(weight_b - parent, labels_b)[p]
    tau = tau + sigma * b.phi[p, 1:2]
    mask = interference_mask(interference(a.phi[k], b.phi[p], b.curvature[p]), beta, "paper")
    update = torch.zeros(len(a.phi), weight_a.shape[1], dtype=tau.dtype)
    update[k] = combine(
        torch.zeros_like(tau), tau, project_constant(tau, a.phi[k, 0]), mask,
        lambda_proj=lambda_proj, lambda_ortho=lambda_ortho, rest="masked",
    )  # fmt: skip
    base = average_rows(weight_a, labels_a)[labels_a] if collapse else weight_a
    matched = torch.isin(labels_a, k).unsqueeze(-1)
    return torch.where(matched, base + update[labels_a].to(weight_a.dtype), weight_a)
