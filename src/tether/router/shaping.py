"""Loss terms that shape a router: pure functions of its logits and of what its experts cost."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.errors import ConfigError, ShapeError

__all__ = [
    "GATES",
    "balanced_bias",
    "expert_load",
    "masked_mean",
    "meta_entropy",
    "prior_divergence",
    "route_probability",
    "switch_balance",
    "tax",
    "z_loss",
]

GATES = {
    "softmax": "softmax of the logits",
    "sigmoid": "sigmoids of the logits over their sum (DeepSeek-V3, equation 18)",
}
FLOOR = 1e-2
"""Of the prior: share of the median cost that is added to each, so that a cost of 0 gives a finite prior."""


def route_probability(
    logits: Float[Tensor, "tokens experts"], gate: str = "softmax"
) -> Float[Tensor, "tokens experts"]:
    """Probabilities of all experts, before the choice of the top k.

    Args:
        logits: of the router, shape (n, E).
        gate: one of `GATES`.

    Returns:
        Shape (n, E), rows sum to 1; float32, or float64 for float64.

    Raises:
        ConfigError: unknown gate.

    Example:
        >>> route_probability(torch.tensor([[0.0, 0.0]]))
        tensor([[0.5000, 0.5000]])
    """
    values = logits if logits.dtype == torch.float64 else logits.float()
    if gate == "softmax":
        return values.softmax(-1)
    if gate == "sigmoid":
        scores = values.sigmoid()
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    raise ConfigError(f"gate={gate!r}: expected one of {', '.join(GATES)}")


def masked_mean(
    values: Float[Tensor, "tokens *rest"], mask: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, "*rest"]:
    """Average over the tokens that count.

    Args:
        values: shape (n, ...).
        mask: which tokens count, shape (n,); None counts all.

    Returns:
        The mean, shape (...); zeros where no token counts.

    Raises:
        ShapeError: a mask for another number of tokens.
    """
    if mask is None:
        return values.mean(0)
    if len(mask) != len(values):
        raise ShapeError(f"mask of {len(mask)} tokens for {len(values)}: expected the mask of this batch")
    weight = mask.to(values.dtype)
    return (values * weight.reshape(-1, *[1] * (values.dim() - 1))).sum(0) / weight.sum().clamp(min=1)


def tax(mean_probability: Float[Tensor, " experts"], cost: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    r"""Expected cost of the experts that a router chooses.

    .. math:: \sum_e \bar p_e \hat c_e, \qquad \partial / \partial z_e = p_e (\hat c_e - \sum_j p_j \hat c_j)

    Args:
        mean_probability: shape (E,), sums to 1.
        cost: normalised costs, shape (E,); taken as constants.

    Returns:
        A scalar, between the smallest and the largest cost.

    Reference:
        Research notes on FARS, section 5.
    """
    return (mean_probability * cost.detach().to(mean_probability)).sum()


def prior_divergence(
    mean_probability: Float[Tensor, " experts"], cost: Float[Tensor, " experts"]
) -> Float[Tensor, ""]:
    r"""Divergence of the mean routing from a prior that prefers cheap experts.

    .. math:: KL(\bar p \| q), \quad q_e \propto 1 / (c_e + 10^{-2} \operatorname{median} c)

    Stronger than the tax where an expert is nearly dead, since its gradient has a log p; for revival.

    Args:
        mean_probability: shape (E,), sums to 1.
        cost: costs up to a factor, shape (E,), >= 0, not all 0; a constant cost gives the uniform prior.

    Returns:
        Nats, >= 0.

    Reference:
        Research notes on FARS, section 5; Alemi et al. 2016 for the bottleneck it is modelled on.

    Example:
        >>> prior_divergence(torch.tensor([0.5, 0.5]), torch.ones(2))
        tensor(0.)
    """
    cost = cost.detach().to(mean_probability)
    middle = cost.median()
    # With more than half of the experts dead the median is 0 too.
    middle = torch.where(middle > 0, middle, cost.mean())
    prior = 1 / (cost + FLOOR * middle)
    prior = prior / prior.sum()
    tiny = torch.finfo(mean_probability.dtype).tiny
    return (mean_probability * (mean_probability.clamp(min=tiny) / prior).log()).sum()


def meta_entropy(
    logits: Float[Tensor, "tokens experts"],
    goodness: Float[Tensor, "tokens experts"] | None = None,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    r"""Mean entropy of the routing, its logits shifted by a goodness taken as constant.

    .. math:: \operatorname{mean}_t H(\operatorname{softmax}(z_t + g_t)), \quad g = importance (belief - cost)

    Experimental: an entropy minimiser. With g = 0 it did the same to loss and routing within noise (research:
    row 9), so what it does is to sharpen, whatever the goodness.

    Args:
        logits: z, shape (n, E).
        goodness: g, shape (n, E); None is 0.
        mask: which tokens count, shape (n,).

    Returns:
        Nats, >= 0.

    Reference:
        Spec document 3, section 5 (`goodness_logits`); the sign is plus.
    """
    shifted = logits if goodness is None else logits + goodness.detach().to(logits)
    log_probability = shifted.log_softmax(-1)
    return masked_mean(-(log_probability.exp() * log_probability).sum(-1), mask)


def expert_load(
    chosen: Int[Tensor, "tokens chosen"], count: int, mask: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, " experts"]:
    """How often a token chooses each expert.

    Args:
        chosen: experts of each token, shape (n, k), in [0, count).
        count: E.
        mask: which tokens count, shape (n,).

    Returns:
        Assignments a token, shape (E,), float32; they sum to k.

    Example:
        >>> expert_load(torch.tensor([[0, 2], [0, 1]]), 3)
        tensor([1.0000, 0.5000, 0.5000])
    """
    kept = chosen if mask is None else chosen[mask]
    return torch.bincount(kept.flatten(), minlength=count).float() / max(len(kept), 1)


def switch_balance(
    mean_probability: Float[Tensor, " experts"], load: Float[Tensor, " experts"]
) -> Float[Tensor, ""]:
    r"""Load-balancing loss of the Switch Transformer, in the form transformers has it.

    .. math:: E \sum_e f_e P_e

    Args:
        mean_probability: P, shape (E,), sums to 1.
        load: f, assignments a token, shape (E,), sums to k.

    Returns:
        A scalar, k when balanced.

    Reference:
        Fedus et al. 2021, equations 4 to 6; `load_balancing_loss_func` of transformers.
    """
    return len(load) * (load.detach().to(mean_probability) * mean_probability).sum()


def z_loss(
    logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, ""]:
    r"""Keep logits small.

    .. math:: \operatorname{mean}_t (\log \sum_e e^{z_{te}})^2

    Args:
        logits: shape (n, E).
        mask: which tokens count, shape (n,).

    Returns:
        A scalar, >= 0.

    Reference:
        Zoph et al. 2022 (ST-MoE), equation 5.
    """
    values = logits if logits.dtype == torch.float64 else logits.float()
    return masked_mean(values.logsumexp(-1).square(), mask)


def balanced_bias(
    bias: Float[Tensor, " experts"], load: Float[Tensor, " experts"], rate: float
) -> Float[Tensor, " experts"]:
    r"""One step of balancing without a loss: a bias on the choice, not on the weights.

    .. math:: d = \operatorname{sign}(\bar f - f), \quad b \leftarrow b + u (d - \bar d)

    Args:
        bias: b, added to the scores when experts are chosen, shape (E,).
        load: f, since the last step, shape (E,).
        rate: u, >= 0.

    Returns:
        The new bias, shape (E,).

    Raises:
        ConfigError: a rate that is negative or not finite.

    Reference:
        Wang et al. 2024 (auxiliary-loss-free balancing), algorithm 1; the update has mean zero, so that the
        bias does not wander.

    Example:
        >>> balanced_bias(torch.zeros(2), torch.tensor([3.0, 1.0]), 0.5)
        tensor([-0.5000,  0.5000])
    """
    if not (math.isfinite(rate) and rate >= 0):
        raise ConfigError(f"rate={rate}: expected a finite number >= 0")
    direction = torch.sign(load.mean() - load).to(bias)
    return bias + rate * (direction - direction.mean())
