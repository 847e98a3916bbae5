"""The gates' choice as one more expert: those awake, mixed by the density that their gates give to the context.

It says nothing of its own, so it needs no product; what it weighs is handed to the experts that it consists of, and
whatever is promised of experts by evidence (`tether.causal.evidence`) is promised of it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["choice", "choice_gain", "spread"]


def choice(
    density: Float[Tensor, "*batch experts"], awake: Bool[Tensor, "*batch experts"]
) -> Float[Tensor, "*batch experts"]:
    """Share a context among those awake by the density that their gates give to it: the gates' choice.

    Args:
        density: log density that the gate of each expert's domain gives to the context, shape (..., K); any for the
            base.
        awake: who takes part, shape (..., K).

    Returns:
        Log shares, shape (..., K), float64: -inf where asleep and for the base, and adding up to 1 where anybody else
        is awake.
    """
    others = awake.clone()
    others[..., 0] = False
    found = density.double().masked_fill(~others, -torch.inf)
    return torch.where(others.any(-1, keepdim=True), found.log_softmax(-1), -torch.inf)


def choice_gain(
    gain: Float[Tensor, "*batch experts"], choice: Float[Tensor, "*batch experts"]
) -> Float[Tensor, "*batch"]:
    """Say by how much the gates' choice predicted a token better than the base did.

    Args:
        gain: from `tether.causal.evidence.gains`, shape (..., K).
        choice: log shares from `choice`, shape (..., K).

    Returns:
        log sum of share exp(gain), shape (...); 0 where everybody but the base sleeps.
    """
    found = (gain + choice).logsumexp(-1)
    return torch.where((choice > -torch.inf).any(-1), found, 0.0)


def spread(
    log_weights: Float[Tensor, "*batch voters"], choice: Float[Tensor, "*batch experts"]
) -> Float[Tensor, "*batch experts"]:
    """Hand the weight of the gates' choice to the experts that it consists of, which are what is served.

    Args:
        log_weights: from `tether.causal.evidence.serve`, of the K experts and the gates' choice, shape (..., K + 1).
        choice: log shares from `choice`, shape (..., K).

    Returns:
        Log weights of the K experts, shape (..., K).
    """
    return torch.logaddexp(log_weights[..., :-1], log_weights[..., -1:] + choice)
