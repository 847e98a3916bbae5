"""Match ensembles and neurons of two models: trajectory similarity and Hungarian assignment."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tether.errors import ShapeError
from tether.merge.ensembles import SMALLEST

__all__ = [
    "EnsembleMatch",
    "NeuronMatch",
    "ensemble_similarity",
    "match_ensembles",
    "match_neurons",
    "match_within",
]


class EnsembleMatch(NamedTuple):
    """Ensembles of A and B paired one to one; with unequal numbers some stay alone.

    Attributes:
        first: ensembles of A, ascending, shape (min(K_A, K_B),).
        second: their partners in B.
        similarity: TOS of each pair.
    """

    first: Tensor
    second: Tensor
    similarity: Tensor


class NeuronMatch(NamedTuple):
    """Neurons of B assigned to neurons of A.

    Attributes:
        partner: for each neuron of A its neuron of B, -1 where it has none, shape (n_A,), int64.
        correlation: of each pair, 0 where there is none, shape (n_A,).
    """

    partner: Tensor
    correlation: Tensor


def ensemble_similarity(
    features_a: Float[Tensor, "m f"],
    features_b: Float[Tensor, "n f"],
    labels_a: Int[Tensor, "m"],
    labels_b: Int[Tensor, "n"],
    curvature_a: Float[Tensor, "m"],
    curvature_b: Float[Tensor, "n"],
    beta: float = 0.1,
) -> Float[Tensor, "ka kb"]:
    """Trajectory similarity ``TOS_kp = mean_{i in E_k, j in E_p} cos(f_i, f_j) exp(-beta |Hess_k - Hess_p|)``.

    The mean of cosines is the product of the ensembles' mean unit vectors, so no (m, n) matrix is formed.

    Args:
        features_a: signatures of A's neurons on common samples.
        features_b: of B's.
        labels_a: ensembles of A from 0.
        labels_b: of B.
        curvature_a: Hessian diagonal of A's neurons; ensembles take their mean.
        curvature_b: of B's, in the same unit.
        beta: weight of the difference in flatness, >= 0.

    Returns:
        TOS; a label without neurons has 0.

    Reference:
        TEFM, stage 2, TOS.
    """
    unit_a, curve_a = _by_ensemble(features_a, curvature_a, labels_a)
    unit_b, curve_b = _by_ensemble(features_b, curvature_b, labels_b)
    gap = (curve_a.unsqueeze(-1) - curve_b).abs()
    return (unit_a @ unit_b.T) * torch.exp(-beta * gap)


def _by_ensemble(features: Tensor, curvature: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    count = int(labels.max()) + 1
    unit = torch.nn.functional.normalize(features.double(), dim=-1, eps=SMALLEST)
    size = torch.bincount(labels, minlength=count).clamp(min=1).double()
    total = torch.zeros(count, unit.shape[1], dtype=unit.dtype).index_add_(0, labels, unit)
    curve = torch.zeros(count, dtype=unit.dtype).index_add_(0, labels, curvature.double())
    return total / size.unsqueeze(-1), curve / size


def match_ensembles(similarity: Float[Tensor, "ka kb"]) -> EnsembleMatch:
    """Pair ensembles so that the total similarity is largest (Hungarian method).

    Args:
        similarity: TOS.

    Returns:
        The pairs.

    Reference:
        TEFM, stage 2; Kuhn 1955.
    """
    first, second = linear_sum_assignment(similarity.double().numpy(), maximize=True)
    rows, columns = torch.from_numpy(first).long(), torch.from_numpy(second).long()
    return EnsembleMatch(rows, columns, similarity[rows, columns])


def match_neurons(values_a: Float[Tensor, "m d"], values_b: Float[Tensor, "n e"]) -> NeuronMatch:
    """Assign neurons of B to neurons of A by the correlation of their values on the same tokens or samples.

    Args:
        values_a: a token or sample a row, n >= 2.
        values_b: the same rows for B; its number of neurons may differ.

    Returns:
        Partners that maximise the sum of correlations; neurons in excess have none.

    Raises:
        ShapeError: different rows, or fewer than 2.

    Reference:
        Kuhn 1955; 64 tokens recover rows under noise (tests/merge/test_ensembles.py).
    """
    if len(values_a) != len(values_b) or len(values_a) < 2:
        raise ShapeError(
            f"values of {len(values_a)} and {len(values_b)} rows: expected equal numbers, at least 2"
        )
    correlation = _standardised(values_a).T @ _standardised(values_b)
    return _assigned(correlation)


def match_within(
    values_a: Float[Tensor, "n d"],
    values_b: Float[Tensor, "n e"],
    labels_a: Int[Tensor, "d"],
    labels_b: Int[Tensor, "e"],
    match: EnsembleMatch,
) -> NeuronMatch:
    """Assign neurons as `match_neurons` does, but only inside matched ensembles.

    Args:
        values_a: a token or sample a row.
        values_b: the same rows for B.
        labels_a: ensembles of A.
        labels_b: of B.
        match: pairs of ensembles.

    Returns:
        Partners; a neuron whose ensemble has no partner, or one in excess of the partner ensemble, has none.
    """
    partner = torch.full((values_a.shape[1],), -1)
    found = torch.zeros(values_a.shape[1], dtype=torch.float64)
    scores_a, scores_b = _standardised(values_a), _standardised(values_b)
    for k, p in zip(match.first.tolist(), match.second.tolist(), strict=True):
        mine, theirs = (labels_a == k).nonzero().squeeze(-1), (labels_b == p).nonzero().squeeze(-1)
        inside = _assigned(scores_a[:, mine].T @ scores_b[:, theirs])
        has = inside.partner >= 0
        partner[mine[has]] = theirs[inside.partner[has]]
        found[mine] = inside.correlation
    return NeuronMatch(partner, found)


def _assigned(correlation: Tensor) -> NeuronMatch:
    partner = torch.full((len(correlation),), -1)
    value = torch.zeros(len(correlation), dtype=torch.float64)
    rows, columns = (
        torch.from_numpy(part).long() for part in linear_sum_assignment(correlation.numpy(), maximize=True)
    )
    partner[rows], value[rows] = columns, correlation[rows, columns]
    return NeuronMatch(partner, value)


# Columns of zero mean and unit length; constant columns become zero.
def _standardised(values: Tensor) -> Tensor:
    centred = values.double() - values.double().mean(0)
    return torch.nn.functional.normalize(centred, dim=0)
