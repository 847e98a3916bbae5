"""Temperature and truncation of a mixture: made to each expert's law first, then the laws are mixed."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

__all__ = ["WARPERS", "each_expert"]

WARPERS = {
    "temperature": (logits_process.TemperatureLogitsWarper, 1.0),
    "top_k": (logits_process.TopKLogitsWarper, 0),
    "top_p": (logits_process.TopPLogitsWarper, 1.0),
    "min_p": (logits_process.MinPLogitsWarper, 0.0),
    "typical_p": (logits_process.TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (logits_process.EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (logits_process.EtaLogitsWarper, 0.0),
}
"""Options of sampling, in the order in which transformers applies them, with the value that changes nothing."""


def each_expert(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of sampling out of the stock loop, where they would be made to the mixture.

    Args:
        given: the options by name, None where not given.

    Returns:
        Keyword arguments for `generate`: `warp`, for the model, and the options at the value that changes nothing.

    Example:
        >>> each_expert({"temperature": 0.5})["warp"](torch.tensor([[1.0, 2.0]]))
        tensor([[2., 4.]])
    """
    active = {
        name: kind(value)
        for name, (kind, neutral) in WARPERS.items()
        if (value := given.get(name)) is not None and value != neutral
    }
    if not active:
        return {}

    def warp(scores: Tensor) -> Tensor:
        ids = torch.zeros(len(scores), 0, dtype=torch.long, device=scores.device)
        for each in active.values():
            scores = each(ids, scores)
        return scores

    return {name: WARPERS[name][1] for name in active} | {"warp": warp}
