r"""What an expert's last step cost, in the forms of the source document and in the one that works.

Direction 2 (information cost): with Adam's moments m, v and rate eta, a step changes the parameters by
eta m / sqrt(v); with v for the Fisher, half the step's squared Fisher length is 1/2 eta^2 sum m^2.
Direction 1: the length of m / sqrt(v), the signal-to-noise ratio of the step.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tether.errors import ConfigError

__all__ = [
    "CAP",
    "COSTS",
    "PAPER",
    "information_cost",
    "log_information",
    "normalise_cost",
    "shuffle_cost",
    "step_snr",
    "temper_cost",
]

COSTS = {
    "information": "1/2 lr^2 |m|^2 of the first moments (direction 2)",
    "gradient": "the same of a running mean of the squared gradient, for optimizers without first moments",
    "snr": "|m / sqrt(v)| of Adam's moments (direction 1)",
    "fisher": "mean of sqrt(v), what the source's experiments ran",
    "uniform": "the same for every expert: no Fisher at all",
    "shuffled": "the information cost of another expert: a control",
    "paper": "direction 2 as written: the raw sum, not normalised",
    "paper-log": "direction 2 as the source's code writes it: the log of the raw mean plus 1e-8",
}
PAPER = ("paper", "paper-log")
"""Costs used as they are, without normalisation."""
CAP = 4.0
"""Largest normalised cost: one expert with all the gradient shall not push ever harder on the router."""


def information_cost(
    energies: Sequence[Float[Tensor, " experts"]],
    rates: Sequence[float],
    stepped: Float[Tensor, " experts"] | None = None,
) -> Float[Tensor, " experts"]:
    r"""Information cost of each expert's last step (direction 2).

    .. math:: c_e = h_e \sum_g \tfrac12 \eta_g^2 \lVert m_{e,g} \rVert^2

    It carries the name of nats in the source; its level is not one (research: 10^4 below the true divergence),
    its ranking is.

    Args:
        energies: squared norm of the first moments of each expert in each parameter group g, shape (E,) each,
            >= 0.
        rates: learning rate of each group, >= 0.
        stepped: running share of steps that moved the expert, shape (E,), in [0, 1]; None where every expert
            is stepped always. An expert without gradient is skipped by optimizers, its moments freeze, and
            without this factor its cost would never fall.

    Returns:
        Costs, shape (E,), float64, >= 0.

    Raises:
        ConfigError: not one rate an energy.

    Reference:
        Spec document 3, section 2.2; the factor h: research notes on FARS, section 2 row 6.

    Example:
        >>> information_cost([torch.tensor([4.0, 1.0])], [0.1])
        tensor([0.0200, 0.0050], dtype=torch.float64)
    """
    if len(energies) != len(rates) or not energies:
        raise ConfigError(f"{len(energies)} energies and {len(rates)} rates: expected one rate for each")
    total = torch.stack([0.5 * lr * lr * e.double() for e, lr in zip(energies, rates, strict=True)]).sum(0)
    return total if stepped is None else total * stepped.to(total)


def step_snr(
    moment: Float[Tensor, "experts *rest"], square: Float[Tensor, "experts *rest"], eps: float = 1e-8
) -> Float[Tensor, " experts"]:
    r"""Squared signal-to-noise ratio of each expert's step (direction 1 is its root over all tensors).

    .. math:: \lVert m_e / (\sqrt{v_e} + \epsilon) \rVert^2

    Args:
        moment: m, shape (E, ...).
        square: v, shape (E, ...), >= 0.
        eps: of the optimizer.

    Returns:
        Shape (E,), float64; add over an expert's tensors and take the root.

    Reference:
        Spec document 3, section 4, first column.
    """
    ratio = moment.float() / square.float().sqrt().add_(eps)
    return ratio.flatten(1).double().square().sum(1)


def log_information(cost: Float[Tensor, " experts"], size: int) -> Float[Tensor, " experts"]:
    r"""Direction 2 as the source's code gives it.

    .. math:: \log(\operatorname{mean}_i \tfrac12 \eta^2 m_i^2 + 10^{-8})

    The floor is far above the signal, so that this is -18.42 for every expert and its tax has no gradient.

    Args:
        cost: the raw information cost, shape (E,).
        size: parameters of one expert, >= 1.

    Returns:
        Shape (E,), float64.

    Reference:
        Spec document 3, section 5, `compute_fars_direction_2`.

    Example:
        >>> log_information(torch.tensor([1e-9, 3e-9]), 1000)
        tensor([-18.4206, -18.4204], dtype=torch.float64)
    """
    return torch.log(cost.double() / size + 1e-8)


def normalise_cost(cost: Float[Tensor, " experts"], cap: float = CAP) -> Float[Tensor, " experts"] | None:
    r"""Scale costs to mean 1 and cap them.

    .. math:: \hat c_e = \min(c_e / \operatorname{mean}_j c_j,\ \mathrm{cap})

    This cancels learning rate, loss scale and clipping, which act on all experts alike.

    Args:
        cost: shape (E,), >= 0.
        cap: largest value, > 1.

    Returns:
        Shape (E,), float32; None where the mean is not positive or not finite: then there is no tax.

    Reference:
        Research notes on FARS, section 5.

    Example:
        >>> normalise_cost(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 1.5000])
    """
    mean = cost.double().mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        return None
    return (cost.double() / mean).clamp(max=cap).float()


def temper_cost(
    cost: Float[Tensor, " experts"], load: Float[Tensor, " experts"], cap: float = CAP
) -> Float[Tensor, " experts"]:
    r"""Temper costs by the load of this batch.

    .. math:: \tilde c_e \propto \sqrt{\hat c_e f_e}, \quad \operatorname{mean}_j \tilde c_j = 1, \quad
        \tilde c_e \le \mathrm{cap}

    A cost is load times gradient energy a token, known from the last steps only. Taxed by itself it is level where
    the load goes as one over that energy, and being late it makes the load swing. Half of the logarithm from the
    load as it is now halves both: the load settles at one over the root of the energy a token, which is how samples
    are best allotted to strata that cost unequally.

    Args:
        cost: up to a factor, shape (E,), >= 0.
        load: of each expert in this batch, up to a factor, shape (E,), >= 0.
        cap: largest value, > 1.

    Returns:
        Shape (E,); zeros where no expert has both.

    Reference:
        Neyman 1934 for allocation to strata; the use here is this project's own.

    Example:
        >>> temper_cost(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor([1.3333, 0.6667])
    """
    root = (cost * load.to(cost)).clamp(min=0).sqrt()
    return (root / root.mean().clamp(min=torch.finfo(root.dtype).tiny)).clamp(max=cap)


def shuffle_cost(cost: Float[Tensor, " experts"], generator: torch.Generator) -> Float[Tensor, " experts"]:
    """Give each expert the cost of another, as a control.

    Args:
        cost: shape (E,).
        generator: of the permutation.

    Returns:
        Shape (E,).
    """
    return cost[torch.randperm(len(cost), generator=generator)]
