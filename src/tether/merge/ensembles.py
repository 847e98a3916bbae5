"""Ensembles: groups of neurons with alike signatures, found without an n x n matrix."""

import warnings
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.errors import ConfigError, ShapeError

__all__ = [
    "AFFINITIES",
    "SMALLEST",
    "average_rows",
    "importance",
    "mean_curvature",
    "neuron_features",
    "paired_features",
    "spectral_labels",
    "split_half_agreement",
]

AFFINITIES: Final = ("shifted", "cosine")
SMALLEST: Final = 1e-300
"""Norm below which a row has no direction; the document's unnormalised encodings are as small as 1e-100."""
_PRODUCTS: Final = 1 << 22
"""Cosines that are held at once."""


def average_rows(rows: Float[Tensor, "d c"], labels: Int[Tensor, "d"]) -> Float[Tensor, "k c"]:
    """Average rows over ensembles.

    Args:
        rows: a neuron a row.
        labels: its ensemble, from 0.

    Returns:
        A row an ensemble; an ensemble without neurons has zeros.
    """
    count = int(labels.max()) + 1
    size = torch.bincount(labels, minlength=count).clamp(min=1).to(rows.dtype)
    total = torch.zeros(count, rows.shape[1], dtype=rows.dtype).index_add_(0, labels, rows)
    return total / size.unsqueeze(-1)


def importance(
    gradient: Float[Tensor, "d"],
    information: Float[Tensor, "d"],
    curvature: Float[Tensor, "d"],
    epsilon: float = 1e-8,
) -> Float[Tensor, "d"]:
    """Trajectory-flatness importance ``TFI_i = |g'_i| MI_i / (Hess_i + epsilon)``.

    Args:
        gradient: phi[1] of each neuron.
        information: mutual information of its activation with the loss, nats; negative estimates count as 0.
        curvature: the Hessian's diagonal by the caller's choice, non-negative: the document's
            ``phi[1]^2 + phi[2]``, or `mean_curvature`, or the Fisher row norm.
        epsilon: keeps the quotient finite.

    Returns:
        Importance, non-negative.

    Reference:
        TEFM, stage 2, TFI.
    """
    return gradient.abs() * information.clamp(min=0) / (curvature + epsilon)


def mean_curvature(gradient: Float[Tensor, "n d"]) -> Float[Tensor, "d"]:
    """Curvature from squared gradients over samples, with a floor at its median.

    The document adds the loss, which is one number for all neurons and 95 to 99.9 % of the sum: a constant.

    Args:
        gradient: phi[1] a sample.

    Returns:
        ``mean g^2``, raised to its median over neurons where smaller.

    Reference:
        docs/lape-tefm.md, "what differs": Hessian.
    """
    squared = gradient.square().mean(0)
    return squared.clamp(min=float(squared.median()))


def neuron_features(phi: Float[Tensor, "n d 3"]) -> Float[Tensor, "d f"]:
    """Turn signatures into one vector a neuron: all samples, each component standardised over neurons.

    Components that do not vary over neurons (the loss, equal for all) drop out.

    Args:
        phi: from `Signatures.phi`; pass its mean with n = 1 for the document's 3-vectors.

    Returns:
        Features, rows of unit mean square where a neuron is not at the mean in everything.
    """
    centred, spread, kept = _spread(phi)
    return (centred[:, kept] / spread[kept]).to(phi.dtype)


def paired_features(
    phi_a: Float[Tensor, "n a 3"], phi_b: Float[Tensor, "n b 3"]
) -> tuple[Float[Tensor, "a f"], Float[Tensor, "b f"]]:
    """Give features of two models that can be compared: what varies over the neurons of both.

    Each model is standardised by itself, so that neither units nor levels of the two models enter.

    Args:
        phi_a: signatures of A's neurons.
        phi_b: of B's, on as many samples.

    Returns:
        Features of A and of B, with the same columns.
    """
    (one, size_a, kept_a), (other, size_b, kept_b) = _spread(phi_a), _spread(phi_b)
    kept = kept_a & kept_b
    return (one[:, kept] / size_a[kept]).to(phi_a.dtype), (other[:, kept] / size_b[kept]).to(phi_b.dtype)


# Columns about their mean, their standard deviations, and whether they vary.
def _spread(phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = phi.double().permute(1, 0, 2).reshape(phi.shape[1], -1)
    centred = flat - flat.mean(0)
    spread = centred.square().mean(0).sqrt()
    return centred, spread, spread > 1e-9 * (flat.abs().mean(0) + 1e-30)


def spectral_labels(
    features: Float[Tensor, "d f"], clusters: int, seed: int = 0, affinity: str = "shifted"
) -> Int[Tensor, "d"]:
    """Normalised spectral clustering of cosines, without a (d, d) matrix.

    Both affinities are products ``z_i . z_j``. That of ``shifted``, ``(1 + cos(f_i, f_j)) / 2``, has
    ``z = [1, f / |f|] / sqrt(2)``; that of ``cosine``, the document's R itself, has ``z = f / |f|``. The eigenvectors
    of ``D^-1/2 A D^-1/2`` are left singular vectors of ``D^-1/2 z``. Rows of the leading vectors, at unit length, go to
    k-means. A matrix of rank r has r eigenvectors that say anything, so that no more than r are taken.

    The degrees of ``shifted`` are ``z_i . sum_j z_j``, in O(d f^2). Those of ``cosine`` are ``sum_j |R_ij|``, in
    O(d^2 f). Where no cosine is negative, these are the usual degrees of the document's matrix. Where one is, the usual
    degrees can be zero or negative and have no root; the degrees of the signed Laplacian stand for them.

    Args:
        features: a neuron a row; a zero row has cosine 0 with everything.
        clusters: K, in [1, d].
        seed: of the k-means start; equal inputs give equal labels.
        affinity: one of AFFINITIES.

    Returns:
        Labels from 0, numbered by first appearance.

    Raises:
        ConfigError: K outside [1, d], or an unknown affinity.

    Reference:
        TEFM, stage 2 (cosine matrix R, spectral clustering); Ng, Jordan and Weiss 2001; Kunegis et al. 2010,
        Spectral analysis of signed graphs, section 4 (signed Laplacian).

    Example:
        >>> import torch
        >>> spectral_labels(torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.2], [-1.0, -0.2]]), 2)
        tensor([0, 0, 1, 1])
    """
    if not 1 <= clusters <= len(features):
        raise ConfigError(f"clusters={clusters}: expected 1 to {len(features)}, the number of neurons")
    if affinity not in AFFINITIES:
        raise ConfigError(f"unknown affinity {affinity!r}: choose one of {', '.join(AFFINITIES)}")
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    z = torch.nn.functional.normalize(features.double(), dim=-1, eps=SMALLEST).cpu()
    if affinity == "shifted":
        z = torch.cat([torch.ones(len(z), 1, dtype=z.dtype), z], dim=1) / 2**0.5
        degrees = z @ z.sum(0)
    else:
        degrees = torch.cat([(part @ z.T).abs().sum(1) for part in z.split(max(1, _PRODUCTS // len(z)))])
    scaled = z / degrees.clamp(min=1e-12).sqrt().unsqueeze(-1)
    # Left singular vectors through the small Gram matrix; only the leading ones are used, where this is exact.
    value, vector = torch.linalg.eigh(scaled.T @ scaled)
    kept = min(clusters, len(value))
    leading = vector[:, -kept:] / value[-kept:].clamp(min=1e-18).sqrt()
    embedded = torch.nn.functional.normalize(scaled @ leading, dim=-1)
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters is no error: some clusters stay empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(clusters, random_state=seed, n_init=4).fit_predict(embedded.numpy())
    labels = torch.from_numpy(found).long()
    first = torch.stack([(labels == k).int().argmax() for k in labels.unique()])
    order = labels[first.sort().values]
    rank = torch.zeros(clusters, dtype=torch.int64)
    rank[order] = torch.arange(len(order))
    return rank[labels]


def split_half_agreement(phi: Float[Tensor, "n d 3"], clusters: int, seed: int = 0) -> float:
    """Say whether ensembles can be found again: cluster two halves of the samples and compare.

    Args:
        phi: signatures a sample, n >= 2; even samples against odd ones.
        clusters: K.
        seed: of k-means.

    Returns:
        Adjusted Rand index: 1 for equal partitions, 0 for chance.

    Raises:
        ShapeError: fewer than 2 samples.

    Reference:
        Hubert and Arabie 1985.
    """
    if len(phi) < 2:
        raise ShapeError(f"phi has {len(phi)} samples: two halves need at least 2")
    from sklearn.metrics import adjusted_rand_score

    halves = [spectral_labels(neuron_features(phi[start::2]), clusters, seed) for start in (0, 1)]
    return float(adjusted_rand_score(*(half.numpy() for half in halves)))
