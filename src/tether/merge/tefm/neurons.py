"""Stage 1: what was observed of the neurons of one layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.merge.ensembles import mean_curvature
from tether.merge.signatures import mean_over_samples
from tether.merge.task_vectors import EPSILON

__all__ = ["Neurons", "curvature"]


class Neurons(NamedTuple):
    """The d neurons (output rows) of a linear layer on n samples; `tether.merge.signatures.Signature` says more.

    Attributes:
        activation: phi[0] of each sample, shape (n, d).
        gradient: phi[1] in the form that is asked for, shape (n, d).
        loss: phi[2], one number for all neurons of a sample, nats, shape (n,).
        log_mass: logarithm of the sum of the document's weights, 0 for averages, shape (n,).
        fisher: squared norms of the rows' gradients, shape (n, d); None where they are not asked for.
    """

    activation: Tensor
    gradient: Tensor
    loss: Tensor
    log_mass: Tensor
    fisher: Tensor | None = None

    @property
    def phi(self) -> Tensor:
        """The encoding of each sample under normalised weights, shape (n, d, 3), float64."""
        loss = self.loss.unsqueeze(-1).expand_as(self.activation)
        return torch.stack([self.activation, self.gradient, loss], dim=-1).double()

    @property
    def present(self) -> Tensor:
        """Which neurons there are, shape (d,); a place that no unit of an aligned model takes is 0 in all samples."""
        return (self.activation != 0).any(0)

    def rows(self, kept: Tensor) -> "Neurons":
        """Keep some neurons.

        Args:
            kept: which, shape (d,), bool.

        Returns:
            These.
        """
        fisher = None if self.fisher is None else self.fisher[:, kept]
        return Neurons(self.activation[:, kept], self.gradient[:, kept], self.loss, self.log_mass, fisher)

    def mean(self) -> Tensor:
        """Average the encoding over samples, with the document's weights as they are.

        Returns:
            phi of each neuron, shape (d, 3), float64.

        Raises:
            ConfigError: The document's weights are so small that their sum is 0 even in float64.
        """
        value, scale = mean_over_samples(self.phi, self.log_mass)
        factor = torch.exp(torch.tensor(scale, dtype=torch.float64))
        if not float(factor) > 0:
            raise ConfigError(
                f"weighting paper: the probabilities of the paths add up to exp({scale:.0f}), which is 0 even in "
                "float64; observe shorter paths, or choose weighting self-normalised"
            )
        return value * factor


def curvature(neurons: Neurons, mean: Tensor, form: str) -> Tensor:
    """Estimate the Hessian's diagonal, a number a neuron.

    Args:
        neurons: of the layer.
        mean: `Neurons.mean` of them.
        form: ``paper``: ``phi[1]^2 + phi[2] + epsilon``; ``squared``: the mean of g^2 with a floor at its median;
            ``fisher``: norms of the rows' gradients. The last two are relative to their mean over the layer, since
            scales of two models cannot be compared.

    Returns:
        Shape (d,), float64, non-negative.

    Raises:
        ConfigError: Fisher norms are asked for where there are none.

    Reference:
        TEFM, stage 1, Hess_diag; docs/lape-tefm.md, "what differs".
    """
    if form == "paper":
        return mean[:, 1].square() + mean[:, 2] + EPSILON
    if form == "squared":
        found = mean_curvature(neurons.gradient.double())
    elif neurons.fisher is None:
        raise ConfigError("hessian fisher: the neurons have no Fisher norms; observe the model again")
    else:
        found = neurons.fisher.double().mean(0)
    level = found.mean()
    return found / level if float(level) > 0 else torch.ones_like(found)
