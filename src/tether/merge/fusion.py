"""Closed-form fusion of linear layers: the weights that best keep every model's outputs on its own paths."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tether.errors import ConfigError, ShapeError

__all__ = ["regression_mean", "responsibilities", "row_shares"]

SHRINKAGE = 0.9
"""Factor on the off-diagonal entries of a Gram matrix; 1 trusts the sample, 0 keeps the diagonal only."""
RIDGE = 1e-6
"""Share of the mean diagonal added to the diagonal, so that directions no token visited have a solution."""


def regression_mean(
    weights: Sequence[Float[Tensor, "o i"]],
    grams: Sequence[Float[Tensor, "i i"]],
    *,
    shares: Float[Tensor, "..."] | None = None,
    shrinkage: float = SHRINKAGE,
    ridge: float = RIDGE,
) -> Float[Tensor, "o i"]:
    """Solve for the rows that keep every model's outputs on its own inputs.

    Row i minimises ``sum_M rho_Mi (w - w_Mi)^T S_M (w - w_Mi)`` with ``S = a G + (1 - a) diag(G) + ridge``, G
    scaled to a mean diagonal of one so that models with longer paths do not count more. Hence
    ``w_i = (sum_M rho_Mi S_M)^-1 sum_M rho_Mi S_M w_Mi``: equal models are kept, and permuting inputs or
    outputs commutes with it. Rows with equal shares are solved together.

    Args:
        weights: the layer's weights of each model, rows and columns aligned.
        grams: the Gram matrix of its inputs in each model; None of them may be zero.
        shares: rho, non-negative: a number a model, shape (M,), or a row, shape (M, d_out); None is equal.
        shrinkage: a, in [0, 1].
        ridge: relative to the mean diagonal, > 0.

    Returns:
        The weights, in the first model's dtype; solved in float64.

    Raises:
        ShapeError: shapes that do not belong together.
        ConfigError: a number outside its range, or a matrix that is zero or not finite.

    Reference:
        Jin et al. 2023 (RegMean), equation 3, here with Gram matrices on each
        model's own sampled paths.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> g = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))
        >>> regression_mean(w, g).round(decimals=3)
        tensor([[1., 4.]])
    """
    first = weights[0] if weights else torch.zeros(0, 0)
    outputs, inputs = first.shape
    wrong = [tuple(w.shape) for w in weights if w.shape != first.shape]
    wrong += [tuple(g.shape) for g in grams if g.shape != (inputs, inputs)]
    if not weights or len(weights) != len(grams) or wrong:
        raise ShapeError(
            f"{len(weights)} weights of {tuple(first.shape)} and {len(grams)} Gram matrices; expected as many, "
            f"all weights of one shape and matrices of {(inputs, inputs)}; misfits: {wrong or 'none'}"
        )
    if not 0 <= shrinkage <= 1 or not ridge > 0:
        raise ConfigError(f"shrinkage={shrinkage}, ridge={ridge}: expected [0, 1] and a positive number")
    rho = torch.ones(len(weights), 1) if shares is None else shares.reshape(len(weights), -1)
    if rho.shape[1] not in {1, outputs} or bool((rho < 0).any()) or bool((rho.sum(0) <= 0).any()):
        raise ConfigError(
            f"shares have shape {tuple(rho.shape)}, smallest {float(rho.min())}: expected ({len(weights)},) or "
            f"({len(weights)}, {outputs}), non-negative, not all zero in a row"
        )
    metrics = torch.stack([_metric(gram, shrinkage, ridge) for gram in grams])
    targets = torch.stack([m @ w.double().T for m, w in zip(metrics, weights, strict=True)])  # (M, i, o)
    rho = rho.double().to(first.device)
    groups, member = torch.unique(rho, dim=1, return_inverse=True)
    member = member.expand(outputs) if rho.shape[1] == 1 else member
    solution = torch.empty(outputs, inputs, dtype=torch.float64, device=first.device)
    for k in range(groups.shape[1]):
        rows = member == k
        share = groups[:, k]
        factor = torch.linalg.cholesky(torch.einsum("m,mij->ij", share, metrics))
        right = torch.einsum("m,mio->io", share, targets[:, :, rows])
        solution[rows] = torch.cholesky_solve(right, factor).T
    return solution.to(first.dtype)


def _metric(gram: Tensor, shrinkage: float, ridge: float) -> Tensor:
    full = gram.double()
    level = full.diagonal().mean()
    if not bool(torch.isfinite(full).all()) or not bool(level > 0):
        raise ConfigError("a Gram matrix is zero or not finite; expected inputs of at least one token")
    shrunk = shrinkage * full / level
    shrunk.diagonal().copy_(full.diagonal() / level + ridge)
    return shrunk


def row_shares(
    fishers: Sequence[Float[Tensor, "o"]], *, ensembles: int = 8, low: float = 0.05, high: float = 0.95
) -> Float[Tensor, "m o"]:
    """Share each row between models by its Fisher norm, with one share an ensemble of alike rows.

    A model's Fisher norms are divided by their mean over the layer first (raw scales of two models cannot be
    compared). Rows are then grouped into quantile bins of the first model's share, and a bin has its mean.

    Args:
        fishers: ``E ||dL/dW_i||^2`` of each row in each model, non-negative.
        ensembles: number of bins, >= 1; 1 gives every row the same share.
        low: smallest share.
        high: largest share.

    Returns:
        Shares that sum to one over models.

    Raises:
        ConfigError: a number outside its range, or a Fisher norm that is negative or zero everywhere.

    Reference:
        docs/lape-tefm.md, "the closed form" (rho, quantile ensembles).
    """
    norms = torch.stack([fisher.double() for fisher in fishers])
    if ensembles < 1 or not 0 < low <= high < 1 or bool((norms < 0).any()) or bool((norms.sum(1) <= 0).any()):
        raise ConfigError(
            f"ensembles={ensembles}, low={low}, high={high}, smallest Fisher norm {float(norms.min())}: expected "
            "at least one ensemble, 0 < low <= high < 1 and non-negative norms that are not all zero"
        )
    relative = norms / norms.mean(1, keepdim=True)
    share = (relative / relative.sum(0).clamp(min=1e-300)).clamp(low, high)
    share = share / share.sum(0)
    rank = share[0].argsort(stable=True).argsort(stable=True)
    member = rank * min(ensembles, share.shape[1]) // share.shape[1]
    count = torch.bincount(member).double()
    mean = torch.zeros(len(share), len(count), dtype=torch.float64).index_add_(1, member, share) / count
    return mean[:, member]


def responsibilities(losses: Float[Tensor, "m n"], temperature: float = 1.0) -> Float[Tensor, "m n"]:
    """Weigh shared samples by which model explains them: ``softmax_M(-L_M(x) / temperature)``.

    This is how LAPE's third component enters the closed form when both models read the same paths: sample x
    counts in model M's Gram matrix by M's responsibility for it.

    Args:
        losses: length-normalised loss phi[2] of each model on each sample, nats a token.
        temperature: nats; small values give each sample to one model.

    Returns:
        Weights that sum to one over models.

    Raises:
        ConfigError: a temperature that is not positive.

    Reference:
        docs/lape-tefm.md, "the closed form" (responsibilities).
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: expected a positive number of nats")
    return torch.softmax(-losses.double() / temperature, dim=0)
