"""Fisher-weighted mean of a linear layer: each model counts where its own output depends on the weights."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tether.errors import ConfigError, ShapeError

__all__ = ["INPUTS", "RIDGE", "Inputs", "fisher_rows"]

Inputs = Literal["diagonal", "full"]
INPUTS: tuple[Inputs, ...] = ("diagonal", "full")
RIDGE = 1e-6
"""Share of a model's mean information that every row and every direction of inputs has in any case."""


def fisher_rows(
    weights: Sequence[Float[Tensor, "o i"]],
    norms: Sequence[Float[Tensor, "o"]],
    grams: Sequence[Float[Tensor, "i i"]],
    *,
    inputs: Inputs = "diagonal",
    ridge: float = RIDGE,
) -> Float[Tensor, "o i"]:
    """Fuse the rows of a layer by the Fisher matrices of its models, ``(sum F_k)^-1 sum F_k w_k`` for each row.

    The Fisher matrix of row i in model k is taken as ``f_ki G_k / tr G_k``: inputs and output gradients of a token
    count as independent (the Kronecker approximation), and rows as independent of each other. Its trace is the
    mean squared gradient of the row, f_ki, as measured. With ``inputs`` = ``diagonal`` G has its diagonal alone,
    which is the diagonal Fisher matrix of Matena and Raffel under that approximation.

    Cost: `diagonal` is elementwise. `full` is one eigendecomposition of i x i for two models; for more a Cholesky
    factor of i x i for each row.

    Args:
        weights: the layer's weights of M models, rows and columns aligned.
        norms: f, the mean squared norm of each row's gradient, shape (o,), non-negative.
        grams: G, the Gram matrix of the layer's inputs in each model, shape (i, i).
        inputs: what of G counts.
        ridge: see `RIDGE`, > 0.

    Returns:
        The fused weights, float64.

    Raises:
        ShapeError: shapes that do not belong together.
        ConfigError: a number outside its range, or a model without any information about the layer.

    Reference:
        Matena and Raffel 2022, equation 4; Martens and Grosse 2015, section 3.1; spec document 1, sections 2.4 and 6.3.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])
        >>> f = torch.tensor([1.0]), torch.tensor([3.0])
        >>> fisher_rows(w, f, [torch.eye(2)] * 2).round(decimals=2)
        tensor([[2.5000, 5.0000]], dtype=torch.float64)
    """  # noqa: DOC502 - raised by _check
    _check(weights, norms, grams, inputs, ridge)
    points = torch.stack([each.double() for each in weights])
    shares = torch.stack([each.double() for each in norms])
    shares = shares + ridge * shares.mean(1, keepdim=True)
    metrics = torch.stack([_metric(each, ridge, inputs) for each in grams])
    if inputs == "diagonal":
        parts = shares.unsqueeze(-1) * metrics.unsqueeze(1)
        return (parts * points).sum(0) / parts.sum(0)
    return _two(points, shares, metrics) if len(points) == 2 else _rows(points, shares, metrics)


def _check(
    weights: Sequence[Tensor], norms: Sequence[Tensor], grams: Sequence[Tensor], inputs: str, ridge: float
) -> None:
    if inputs not in INPUTS or not ridge > 0:
        raise ConfigError(
            f"inputs={inputs!r}, ridge={ridge}: expected one of {', '.join(INPUTS)}, and ridge > 0"
        )
    shape = tuple(weights[0].shape) if weights else ()
    fits = len(weights) == len(norms) == len(grams) and len(shape) == 2
    fits = fits and all(tuple(w.shape) == shape for w in weights)
    fits = fits and all(tuple(f.shape) == shape[:1] for f in norms)
    if not fits or any(tuple(g.shape) != (shape[1], shape[1]) for g in grams):
        raise ShapeError(
            f"weights {[tuple(w.shape) for w in weights]}, norms {[tuple(f.shape) for f in norms]}, Gram matrices "
            f"{[tuple(g.shape) for g in grams]}: expected (o, i), (o,) and (i, i) of each model"
        )
    for number, (norm, gram) in enumerate(zip(norms, grams, strict=True)):
        known = bool(norm.isfinite().all() and gram.isfinite().all() and (norm >= 0).all())
        if not known or not float(norm.sum()) > 0 or not float(gram.diagonal().sum()) > 0:
            raise ConfigError(
                f"model {number} has no information about the layer (gradients or inputs that are zero, negative or "
                "not finite); observe it on text that it predicts"
            )


# Of trace one, so that the row's norm is the trace of its Fisher matrix.
def _metric(gram: Tensor, ridge: float, inputs: str) -> Tensor:
    given = gram.double()
    given = given / given.diagonal().sum()
    more = ridge / len(given)
    if inputs == "diagonal":
        return given.diagonal() + more
    return given + more * torch.eye(len(given), dtype=given.dtype, device=given.device)


# Both metrics are made diagonal at once, so that rows with different shares need one decomposition.
def _two(points: Tensor, shares: Tensor, metrics: Tensor) -> Tensor:
    lower = torch.linalg.cholesky(metrics[0])
    half = torch.linalg.solve_triangular(lower, metrics[1], upper=False)
    other = torch.linalg.solve_triangular(lower, half.T, upper=False)
    values, vectors = torch.linalg.eigh((other + other.T) / 2)
    frame = lower @ vectors
    first, second = (each @ frame for each in points)
    one, two = shares[0].unsqueeze(-1), shares[1].unsqueeze(-1) * values.clamp(min=0)
    fused = (one * first + two * second) / (one + two)
    back = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    moved: Tensor = fused @ back.T
    return moved


def _rows(points: Tensor, shares: Tensor, metrics: Tensor) -> Tensor:
    pulls = points @ metrics
    fused = torch.empty_like(points[0])
    for row in range(len(fused)):
        factor = torch.linalg.cholesky(torch.einsum("m,mij->ij", shares[:, row], metrics))
        right = torch.einsum("m,mi->i", shares[:, row], pulls[:, row])
        fused[row] = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    return fused
