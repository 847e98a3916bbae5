"""Mixtures in place of sums: drift in a context, means over contexts, and the loss of weights that follow the text.

The statements are about any laws; the sides here evaluate them for laws over d + 1 outcomes. Law k is the softmax of
the scores ``x_k`` and 0. Statements about a text read ``x_kt`` as the nats that expert k pays for token t. All results
are float64 and differentiable.
"""

import torch
from torch import Tensor

__all__ = [
    "awake_paths",
    "dearest_token",
    "first_awake",
    "means",
    "mixed",
    "mixture_loss",
    "over_contexts",
    "paid",
    "paid_awake",
    "paid_paths",
    "shared_out",
    "sleeping",
]

SERIES = 0.05
"""Below this size ``e^t - 1 - t`` is taken from its series."""


def log_law(scores: Tensor) -> Tensor:
    """Return log probabilities of d + 1 outcomes from d scores and a last one of 0, shape (..., d + 1)."""
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).log_softmax(-1)


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """Return ``D(P || Q)`` over the last axis from ``log P`` and ``log Q``, to relative accuracy.

    ``sum (Q - P - P t)`` with ``t = log Q - log P``: no term is negative, and nothing cancels.
    """
    log_ratio = other - base
    small = log_ratio.abs() < SERIES
    near = torch.where(small, log_ratio, 0)
    series = torch.ones_like(near)
    for power in range(9, 2, -1):
        series = 1 + near / power * series
    weight = base.exp()
    far = other.exp() - weight * (1 + log_ratio)
    return torch.where(small, weight * near.square() / 2 * series, far).sum(-1)


def shared_out(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point with weights that are shares of 1."""
    return x, y, weights.softmax(0)


def mixed(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift of a mixture from the base, whose scores are ``y_1``, and the mean drift of its parts."""
    base, laws = log_law(y[0]), log_law(x)
    log_weights = weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim)).log()
    moved = divergence(base, (log_weights + laws).logsumexp(0))
    alone = divergence(base, laws)
    return moved, (weights.reshape(*weights.shape, *[1] * (alone.ndim - weights.ndim)) * alone).sum(0)


def sleeping(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides for the mixture of those awake: those of positive weight, whose weights are made to add up.

    Nothing is claimed where nobody is awake.
    """
    awake = weights.clamp(min=0)
    total = awake.sum(0)
    somebody = total > 0
    moved, bound = mixed(x, y, torch.where(somebody, awake / torch.where(somebody, total, 1), 1 / len(x)))
    return moved, torch.where(somebody, bound, torch.inf)


def first_awake(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point with the first expert awake: its weight positive, its wakefulness y as well."""
    return x, torch.cat([y[:1].abs(), y[1:]]), torch.cat([weights[:1].abs() + 1e-3, weights[1:]])


def dearest_token(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most that an outcome costs above the base, the first expert, and the log of 1 over its weight."""
    laws = log_law(x)
    log_weights = weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim)).log()
    dearest = (laws[0] - (log_weights + laws).logsumexp(0)).amax(-1)
    return dearest, -weights[0].log().expand(dearest.shape)


def _contexts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return drifts of the mixture (..., d) and of each expert (N, ..., d) in d contexts of two outcomes.

    The base gives each outcome one half; expert k has the score ``x_kc`` in context c, where the weights are the
    softmax of ``y_c``.
    """
    base, laws = log_law(torch.zeros_like(x[0])[..., None]), log_law(x[..., None])
    log_weights = y.log_softmax(0)[..., None]
    return divergence(base, (log_weights + laws).logsumexp(0)), divergence(base, laws)


def means(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean drift of a mixture over d contexts and the largest mean drift of one expert."""
    together, alone = _contexts(x, y)
    return together.mean(-1), alone.mean(-1).amax(0)


def over_contexts(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean drift of a mixture over d contexts and the sum of the mean drifts of all experts."""
    together, alone = _contexts(x, y)
    return together.mean(-1), alone.mean(-1).sum(0)


def mixture_loss(
    loss: Tensor, prior: Tensor, awake: Tensor | None = None, restart: Tensor | float = 0.0
) -> Tensor:
    """Run a mixture whose weights follow the text, and give what it pays for each token.

    ``q_t = sum w_k p_k`` over those awake; then their weights are multiplied by ``p_k / q_t``, those asleep keep
    theirs, and the share ``restart`` of all weight goes back to the prior.

    Args:
        loss: what each expert pays for each token, nats, shape (N, ..., T).
        prior: weights at the start, adding up to 1, shape (N,) or (N, ...).
        awake: who takes part in each token, shape (N, ..., T), bool, somebody at every token; None wakes all.
        restart: share in [0, 1), a number or shape (...).

    Returns:
        Nats, shape (..., T).
    """
    log_prior = prior.log().reshape(*prior.shape, *[1] * (loss.ndim - 1 - prior.ndim)).expand(loss.shape[:-1])
    awake = torch.ones_like(loss, dtype=torch.bool) if awake is None else awake
    share = torch.as_tensor(restart, dtype=loss.dtype, device=loss.device)
    log_weights, served = log_prior, []
    for at in range(loss.shape[-1]):
        here = awake[..., at]
        before = log_weights.masked_fill(~here, -torch.inf).logsumexp(0)
        after = (log_weights - loss[..., at]).masked_fill(~here, -torch.inf).logsumexp(0)
        served.append(before - after)
        log_weights = torch.where(here, log_weights - loss[..., at] + served[-1], log_weights)
        log_weights = torch.logaddexp(torch.log1p(-share) + log_weights, share.log() + log_prior)
    return torch.stack(served, -1)


def paid(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the mixture pays for a text, and the least that one expert pays plus log 1 over its prior."""
    prior = weights.reshape(*weights.shape, *[1] * (x.ndim - 1 - weights.ndim))
    return mixture_loss(x, weights).sum(-1), (x.sum(-1) - prior.log()).amin(0)


def paid_awake(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same over the tokens at which an expert is awake, ``y >= 0``, for the expert with the least slack.

    Nothing is claimed for a text in which nobody is awake at some token.
    """
    awake = y >= 0
    somebody = awake.any(0, keepdim=True)
    served = mixture_loss(x, weights, awake | ~somebody)
    prior = weights.reshape(*weights.shape, *[1] * (x.ndim - 1 - weights.ndim))
    moved = (served * awake).sum(-1)
    bound = (x * awake).sum(-1) - prior.log()
    tightest = (bound - moved).argmin(0, keepdim=True)
    moved, bound = (side.gather(0, tightest).squeeze(0) for side in (moved, bound))
    return moved, torch.where(somebody.all(-1).squeeze(0), bound, torch.inf)


def awake_paths(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point of a text: losses that are not negative, somebody awake, and a prior."""
    return x.abs(), torch.cat([y[:1].abs(), y[1:]]), weights.softmax(0)


def paid_paths(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a mixture with restarts pays for a text, and the least that a sequence of experts and its price cost.

    The share that restarts at every token is the logistic function of the first number of y.
    """
    share = torch.sigmoid(y[0, ..., 0])
    log_prior = weights.log().reshape(*weights.shape, *[1] * (x.ndim - 1 - weights.ndim)).expand(x.shape[:-1])
    moved = mixture_loss(x, weights, restart=share).sum(-1)
    stay = -torch.log1p(-share + share * log_prior.exp())
    cheapest = x[..., 0] - log_prior
    for at in range(1, x.shape[-1]):
        switched = cheapest.amin(0) - share.log() - log_prior
        cheapest = torch.minimum(cheapest + stay, switched) + x[..., at]
    return moved, cheapest.amin(0)
