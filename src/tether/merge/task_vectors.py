"""The document's fusion of one linear layer: task vectors, interference, mask, projection, per-row update."""

from typing import Final

import torch
from jaxtyping import Float
from scipy.linalg import eigh
from torch import Tensor

from tether.errors import ConfigError

__all__ = [
    "EPSILON",
    "MASKS",
    "RESTS",
    "combine",
    "fuse_projected",
    "fuse_shared",
    "input_directions",
    "interference",
    "interference_mask",
    "project",
    "project_constant",
    "task_vector",
]

MASKS: Final = ("exponential", "paper")
RESTS: Final = ("whole", "masked")
EPSILON: Final = 1e-8


def task_vector(weight: Float[Tensor, "o i"], parent: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """What a fine-tune changed: ``tau = W_B - W_C``; without a parent C, take A, whose rows B was aligned to.

    Args:
        weight: of the fine-tune.
        parent: of C, or of A where there is no C.

    Returns:
        The difference.

    Reference:
        TEFM, stage 3. Where there is no C the document takes ``phi_B[0] - phi_A[0]``, a number and not a row.
    """
    difference: Tensor = weight - parent
    return difference


def interference(
    phi_a: Float[Tensor, "d 3"], phi_b: Float[Tensor, "d 3"], curvature_b: Float[Tensor, "d"]
) -> Float[Tensor, "d"]:
    """Interference score ``Int = |phi_B - phi_A|_2 / (Hess_B + epsilon)`` of aligned rows or matched ensembles.

    Args:
        phi_a: encoding of A. The components have different units: pass `standardised` encodings, except where
            the document's own numbers are studied.
        phi_b: of B, aligned to A.
        curvature_b: Hessian diagonal of B, non-negative.

    Returns:
        Scores, non-negative.

    Reference:
        TEFM, stage 3, Int_p.
    """
    distance: Tensor = torch.linalg.vector_norm(phi_b - phi_a, dim=-1)
    return distance / (curvature_b + EPSILON)


def interference_mask(
    score: Float[Tensor, "d"], beta: float = 0.1, form: str = "exponential"
) -> Float[Tensor, "d"]:
    """Weight of an update from its interference.

    ``paper``: ``1 - sigmoid(beta Int)``, at most one half even without interference. ``exponential`` (default):
    ``exp(-beta Int)``, one without interference.

    Args:
        score: interference, non-negative.
        beta: strength, >= 0.
        form: one of MASKS.

    Returns:
        Weights in (0, 1], or (0, 1/2].

    Raises:
        ConfigError: an unknown form.

    Reference:
        TEFM, stage 3, M'_p.
    """
    if form not in MASKS:
        raise ConfigError(f"unknown mask {form!r}: choose one of {', '.join(MASKS)}")
    return torch.sigmoid(-beta * score) if form == "paper" else torch.exp(-beta * score)


def input_directions(gram: Float[Tensor, "i i"], rank: int = 16) -> Float[Tensor, "i r"]:
    """Leading directions of a layer's inputs: what its activations are made of.

    Args:
        gram: ``sum x x^T`` over the model's own paths.
        rank: number of directions, clipped to what there is, >= 1.

    Returns:
        Orthonormal columns, the strongest last.

    Raises:
        ConfigError: `rank` < 1.

    Reference:
        TEFM, stage 3, d_k: the document's d_k is a number a neuron, while tau is a row of inputs.
    """
    if rank < 1:
        raise ConfigError(f"rank={rank}: expected at least one direction")
    size = len(gram)
    matrix = gram.detach().cpu().double().numpy()
    _, vector = eigh(matrix, subset_by_index=[size - min(rank, size), size - 1])
    return torch.from_numpy(vector).to(gram)


def project(rows: Float[Tensor, "o i"], directions: Float[Tensor, "i r"]) -> Float[Tensor, "o i"]:
    """Project rows on the span of orthonormal directions.

    Args:
        rows: task vectors.
        directions: from `input_directions`.

    Returns:
        ``tau P P^T``; the rest ``tau - tau P P^T`` is orthogonal to it.

    Reference:
        TEFM, stage 3, tau_proj and tau_ortho.
    """
    return (rows @ directions) @ directions.T


def project_constant(rows: Float[Tensor, "o i"], level: Float[Tensor, "o"]) -> Float[Tensor, "o i"]:
    """Project rows on the document's own direction, a number, read as the vector that has it everywhere.

    ``<tau, d> / (|d|^2 + epsilon) d``; with numbers the products would not exist.

    Args:
        rows: task vectors.
        level: d of each row.

    Returns:
        Rows of one value each.

    Reference:
        TEFM, stage 3, d_k and tau_proj.
    """
    share = level * rows.sum(-1) / (rows.shape[1] * level.square() + EPSILON)
    return (share * level).unsqueeze(-1).expand_as(rows)


def combine(
    base: Float[Tensor, "o i"],
    tau: Float[Tensor, "o i"],
    shared: Float[Tensor, "o i"],
    mask: Float[Tensor, "o"],
    *,
    lambda_proj: float = 0.5,
    lambda_ortho: float = 0.5,
    rest: str = "whole",
) -> Float[Tensor, "o i"]:
    """Put a layer together: ``W* = base + lambda_proj M s + lambda_ortho r``.

    ``r = tau - s`` (``whole``), or ``r = tau - M s`` as the document has it (``masked``); there the mask cancels
    where both lambdas are equal.

    Args:
        base: what the update is added to.
        tau: task vectors.
        shared: s, their projection.
        mask: M, a number a row.
        lambda_proj: weight of the shared trajectory.
        lambda_ortho: weight of the rest.
        rest: one of RESTS.

    Returns:
        The fused rows.

    Raises:
        ConfigError: an unknown rest.

    Reference:
        TEFM, stage 3, tau_ortho and W*.
    """
    if rest not in RESTS:
        raise ConfigError(f"unknown rest {rest!r}: choose one of {', '.join(RESTS)}")
    masked = mask.to(base.dtype).unsqueeze(-1) * shared
    return base + lambda_proj * masked + lambda_ortho * (tau - (masked if rest == "masked" else shared))


def fuse_projected(
    weight_a: Float[Tensor, "o i"],
    tau_b: Float[Tensor, "o i"],
    directions: Float[Tensor, "i r"],
    mask: Float[Tensor, "o"],
    *,
    lambda_proj: float = 0.5,
    lambda_ortho: float = 0.5,
) -> Float[Tensor, "o i"]:
    """The document's update with dimensions that fit, a row at a time.

    ``W*_i = W_Ai + lambda_proj M_i tau_i P P^T + lambda_ortho tau_i (I - P P^T)``. The rest is taken before the
    mask is applied: subtracting the masked projection instead makes the mask cancel where both lambdas are
    equal, as they are by default.

    Args:
        weight_a: rows of A.
        tau_b: task vectors of B, aligned to A's rows and inputs.
        directions: P, orthonormal columns.
        mask: M, a number a row; ensembles share numbers, not rows.
        lambda_proj: weight of the shared trajectory.
        lambda_ortho: weight of what is new in B.

    Returns:
        The fused rows.

    Reference:
        TEFM, stage 3, W*; docs/lape-tefm.md, "what differs".
    """
    shared = project(tau_b, directions)
    return combine(weight_a, tau_b, shared, mask, lambda_proj=lambda_proj, lambda_ortho=lambda_ortho)


def fuse_shared(
    parent: Float[Tensor, "o i"],
    tau_a: Float[Tensor, "o i"],
    tau_b: Float[Tensor, "o i"],
    directions: Float[Tensor, "i r"],
    share_b: Float[Tensor, "o"],
    *,
    lambda_ortho: float = 0.7,
) -> Float[Tensor, "o i"]:
    """The same split, symmetric in A and B: the shared directions are shared out, the rest is added.

    ``W*_i = W_Ci + ((1 - s_i) tau_Ai + s_i tau_Bi) P P^T + lambda_ortho (tau_Ai + tau_Bi) (I - P P^T)``.

    Args:
        parent: rows of C.
        tau_a: task vectors of A from C.
        tau_b: of B from C.
        directions: P, orthonormal columns, of inputs that both models see.
        share_b: s, in [0, 1], B's share of each row.
        lambda_ortho: weight of the rest.

    Returns:
        The fused rows.

    Reference:
        TEFM, stage 3, made symmetric; measured in docs/lape-tefm.md.
    """
    share = share_b.to(parent.dtype).unsqueeze(-1)
    mixed, both = (1 - share) * tau_a + share * tau_b, tau_a + tau_b
    return parent + project(mixed, directions) + lambda_ortho * (both - project(both, directions))
