"""How far an adapter moves the law of U, token by token, in the metrics that deltas are held to."""

from typing import Any

import torch
from torch import Tensor

from tether.causal.softmax import softmax_kl
from tether.delta.head import Head, Reference, token_drift
from tether.delta.output_head import chunk_rows
from tether.delta.source import reference

__all__ = ["Given", "adapter_drift", "displacement", "logits"]


class Given(Head):
    """A move that is known at each token of a reference, where a delta's is computed from its features.

    `first` and `second` hold x and y themselves, shape (n, C).
    """

    __slots__ = ()

    def displacement(
        self, states: Tensor, share: Tensor | None = None, *, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Give the move.

        Args:
            states: not read.
            share: not read: an adapter has no ray that its weights follow.
            scale: not read.

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
        Nats, shape (n,), differentiable in `states`. In metric `softmax` they are of the scores as they are served,
        rounding of half precision included.
    """
    if metric == "softmax":
        rows = chunk_rows(model.action.weight)
        found = []
        for before, after in zip(base_states.split(rows), states.split(rows), strict=True):
            with torch.no_grad():
                base = logits(model, before).log_softmax(-1)
            found.append(softmax_kl(base, logits(model, after).log_softmax(-1)))
        return torch.cat(found)
    at = reference(model, base_states.float())
    return token_drift(metric, displacement(model, at, states), at, fisher=fisher)


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
