"""How far an adapter moves the law of U, token by token, in the metrics that deltas are held to."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from tether.delta.head import Head, Reference, token_drift
from tether.delta.objective import chunk_rows
from tether.delta.source import reference

__all__ = ["Given", "adapter_drift", "displacement", "softmax_kl"]


class Given(Head):
    """A move that is known at each token of a reference, where a delta's is computed from its features.

    `first` and `second` hold x and y themselves, shape (n, C).
    """

    __slots__ = ()

    def displacement(self, states: Tensor, share: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the move.

        Args:
            states: not read.
            share: not read: an adapter has no ray that its weights follow.

        Returns:
            x and y, shape (n, C) each.
        """
        return torch.zeros_like(self.second) if self.first is None else self.first, self.second


def displacement(model: Any, at: Reference, states: Tensor) -> Given:
    """Express a change of the hidden state as a move of the law of U.

    x = log scale(z') - log scale(z), y = (loc(z') - loc(z)) / scale(z), with the abduction frozen.

    Args:
        model: the base.
        at: the base at n tokens.
        states: z', the hidden state with the adapter, shape (n, H).

    Returns:
        The move, differentiable in `states`.
    """
    loc, log_scale = model.abduction(states.to(model.action.weight.dtype))
    return Given(log_scale - at.scale.log(), (loc - at.loc) / at.scale, "linear")


def adapter_drift(
    metric: str, model: Any, base_states: Tensor, states: Tensor, fisher: Tensor | None = None
) -> Tensor:
    """Drift of each token in a metric of budgets.

    Args:
        metric: one of `tether.delta.head.METRICS`.
        model: the base.
        base_states: z, shape (n, H).
        states: z' with the adapter, shape (n, H).
        fisher: output Fisher, shape (C, C), for `fisher`.

    Returns:
        Nats, shape (n,); differentiable in `states` for the metrics other than `softmax`, whose form for fits is
        `softmax_kl`.
    """
    at = reference(model, base_states.float())
    action = model.action
    bias = None if action.bias is None else action.bias.detach()
    move = displacement(model, at, states)
    return token_drift(metric, move, at, weight=action.weight.detach(), fisher=fisher, bias=bias)


def softmax_kl(model: Any, base_states: Tensor, states: Tensor) -> Tensor:
    """KL(base || adapted) of the served softmax, in a form that gradients pass through.

    Args:
        model: the base.
        base_states: z, shape (n, H).
        states: z' with the adapter, shape (n, H).

    Returns:
        Nats, shape (n,). Rounding leaves about 1e-6 where nothing moved; `adapter_drift` is sharper.
    """
    rows = chunk_rows(model.action.weight)
    found = []
    for before, after in zip(base_states.split(rows), states.split(rows), strict=True):
        with torch.no_grad():
            base = logits(model, before).log_softmax(-1)
        tuned = logits(model, after).log_softmax(-1)
        found.append(kl_div(tuned, base, reduction="none", log_target=True).sum(-1))
    return torch.cat(found)


def logits(model: Any, states: Tensor) -> Tensor:
    """Scores of all classes in softmax mode, without a fusion.

    Args:
        model: the base.
        states: hidden states, shape (n, H).

    Returns:
        Shape (n, V), float32.
    """
    scores: Tensor = model.action.score_loc(model.abduction(states.to(model.action.weight.dtype))[0]).float()
    return scores
