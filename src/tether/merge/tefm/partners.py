"""Stage 2: ensembles of the neurons of two layers, and which of B belong to which of A."""

from typing import NamedTuple

import torch
from torch import Tensor

from tether.errors import ShapeError
from tether.merge.ensembles import average_rows, paired_features, spectral_labels
from tether.merge.matching import EnsembleMatch, ensemble_similarity, match_ensembles, match_within
from tether.merge.tefm.neurons import Neurons, curvature
from tether.merge.tefm.switches import Switches

__all__ = ["Pair", "Partners", "find_partners"]


class Pair(NamedTuple):
    """Neurons of the same layer of A (m of them) and of B (n), with what stage 1 says of them.

    Attributes:
        a: of A.
        b: of B, those that there are.
        place: where each row of B stands among the rows of A's tensor, shape (n,).
        mean_a: encodings averaged over samples, shape (m, 3).
        mean_b: likewise, shape (n, 3).
        curvature_a: Hessian diagonal, shape (m,).
        curvature_b: likewise, shape (n,).
    """

    a: Neurons
    b: Neurons
    place: Tensor
    mean_a: Tensor
    mean_b: Tensor
    curvature_a: Tensor
    curvature_b: Tensor

    @classmethod
    def of(cls, a: Neurons, b: Neurons, switches: Switches) -> "Pair":
        """Work out what stage 1 says.

        Args:
            a: neurons of A.
            b: of B; where an aligned model has no unit, all samples are zero.
            switches: the choices.

        Returns:
            The pair.
        """
        there = b.present
        b = b.rows(there)
        mean_a, mean_b = a.mean(), b.mean()
        curves = (curvature(a, mean_a, switches.hessian), curvature(b, mean_b, switches.hessian))
        return cls(a, b, there.nonzero().squeeze(-1), mean_a, mean_b, *curves)


class Partners(NamedTuple):
    """Which neurons belong together.

    Attributes:
        labels_a: ensemble of each neuron of A from 0, shape (m,).
        labels_b: of each neuron of B, shape (n,).
        match: pairs of ensembles.
        row: for each neuron of A its neuron of B, -1 where it has none, shape (m,).
    """

    labels_a: Tensor
    labels_b: Tensor
    match: EnsembleMatch
    row: Tensor

    @property
    def ensemble(self) -> Tensor:
        """For each neuron of A the ensemble of B that its own is paired with, -1 where it has none, shape (m,)."""
        of = torch.full((int(self.labels_a.max()) + 1,), -1)
        of[self.match.first] = self.match.second
        return of[self.labels_a]

    def from_b(self, rows: Tensor, *, ensemble: bool) -> Tensor:
        """Bring rows of B to A's neurons.

        Args:
            rows: a row a neuron of B, shape (n, c).
            ensemble: whether A's neurons get the mean of the ensemble of B, or the row of their own neuron of B.

        Returns:
            Shape (m, c); zeros where A has no partner.
        """
        of = self.ensemble if ensemble else self.row
        found = (average_rows(rows, self.labels_b) if ensemble else rows)[of.clamp(min=0)]
        return torch.where(of.unsqueeze(-1) >= 0, found, 0)

    def from_a(self, rows: Tensor, *, ensemble: bool) -> Tensor:
        """Give A's neurons the mean of their ensemble, or their own row.

        Args:
            rows: a row a neuron of A, shape (m, c).
            ensemble: which.

        Returns:
            Shape (m, c).
        """
        return average_rows(rows, self.labels_a)[self.labels_a] if ensemble else rows


def find_partners(pair: Pair, switches: Switches) -> Partners:
    """Find ensembles and pair them.

    ``matching: ensembles``: each model's neurons are clustered by themselves, ensembles are paired so that the sum of
    TOS is largest, and neurons of paired ensembles by the correlation of their activations. ``matching: rows``: each
    row of B belongs to the same row of A, and both have B's ensembles.

    Args:
        pair: the neurons.
        switches: the choices.

    Returns:
        The partners.

    Raises:
        ShapeError: The two models were observed on other numbers of samples, and neurons are to be compared by them.

    Reference:
        TEFM, stage 2.
    """
    samples = (len(pair.a.activation), len(pair.b.activation))
    by_rows = switches.matching == "rows"
    compared = switches.features == "samples" or (not by_rows and _needs_rows(switches))
    if compared and samples[0] != samples[1]:
        raise ShapeError(
            f"A was observed on {samples[0]} samples, B on {samples[1]}: expected the same probes for both, since "
            "neurons are compared sample by sample; observe one of them again"
        )
    features = (
        paired_features(pair.a.phi, pair.b.phi)
        if switches.features == "samples"
        else (pair.mean_a, pair.mean_b)
    )

    def ensembles(of: Tensor) -> Tensor:
        return spectral_labels(of, min(switches.ensembles, len(of)), affinity=switches.affinity)

    labels_b = ensembles(features[1])
    row = torch.full((len(pair.mean_a),), -1)
    if by_rows:
        row[pair.place] = torch.arange(len(pair.place))
        # Rows without a counterpart are an ensemble of their own, with no partner.
        alone = int(labels_b.max()) + 1
        labels_a = torch.where(row >= 0, labels_b[row.clamp(min=0)], alone)
    else:
        labels_a = ensembles(features[0])
    similarity = ensemble_similarity(
        *features, labels_a, labels_b, pair.curvature_a, pair.curvature_b, switches.beta
    )
    if by_rows:
        same = torch.arange(int(labels_b.max()) + 1)
        return Partners(labels_a, labels_b, EnsembleMatch(same, same, similarity[same, same]), row)
    match = match_ensembles(similarity)
    if _needs_rows(switches):
        values = (pair.a.activation, pair.b.activation)
        row = match_within(*values, labels_a, labels_b, match).partner
    return Partners(labels_a, labels_b, match, row)


# Whether anything depends on which single neurons belong together.
def _needs_rows(switches: Switches) -> bool:
    return switches.task_vector == "row" or (switches.interference != "paper" and switches.mask != "none")
