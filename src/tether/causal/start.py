"""The first point of a chain: an individual who acts as observed, or the message that none was found."""

from collections.abc import Callable

import torch
from torch import Tensor

from tether.causal.gibbs import settle
from tether.causal.polytope import Polytope, feasible_start

__all__ = ["first_point", "nobody"]


def first_point(
    polytope: Polytope,
    normals: Tensor,
    targets: Tensor,
    *,
    replays: Callable[[Tensor], Tensor],
    limit: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Look for a point of each chain where all its rows act as observed, in float64 and as the model computes.

    Args:
        polytope: the decisions observed, R rows.
        normals: of the observed values in t, shape (N, m, C); m may be 0.
        targets: what ``normals @ t`` must be, shape (N, m).
        replays: tells which rows act as observed, from noise (N, C) to (R,).
        limit: projections allowed, >= 0.

    Returns:
        Noise, shape (N, C), the projections it took, shape (N,), and the row that failed, shape (N,), -1 where
        none did.
    """
    chains, each = len(normals), len(polytope.loc) // len(normals)
    first = torch.zeros(chains, polytope.loc.shape[1], dtype=torch.float64, device=polytope.loc.device)
    basis = normals
    if normals.shape[1]:
        first = (torch.linalg.pinv(normals) @ targets.unsqueeze(-1)).squeeze(-1)
        basis = torch.linalg.qr(normals.mT).Q.mT
    start = feasible_start(polytope, first, basis=basis, limit=limit)
    noise, t = settle(start.t, normals, targets)
    latent = polytope.latent(t)
    fine = polytope.worst(polytope.scores(latent))[0] > polytope.margin * latent.norm(dim=-1)
    lost = ~(fine & replays(noise)).view(chains, each)
    row = torch.arange(chains, device=t.device) * each + lost.int().argmax(-1)
    failed = torch.where(start.failed >= 0, start.failed, row.masked_fill(~lost.any(-1), -1))
    return noise, start.iterations, failed


def nobody(failed: list[int], polytope: Polytope, names: list[int], limit: int) -> str:
    """Write the message for observations that no individual was found for.

    Args:
        failed: rows.
        polytope: the decisions observed.
        names: position of each row in the request.
        limit: projections that were allowed.

    Returns:
        The message.
    """
    places = [
        f"position {names[row]}"
        + ("" if polytope.tokens is None else f" (token {int(polytope.tokens[row])})")
        for row in failed[:8]
    ]
    more = f" and {len(failed) - 8} more" if len(failed) > 8 else ""
    return (
        f"no individual acts as observed at {', '.join(places)}{more}: {limit} projections found none. A token"
        " that is never the argmax cannot be abducted, nor can positions that no one noise explains together;"
        " leave the position out (token -100), take shared=False, or raise start_limit"
    )
