"""Whether the documents that share a window see each other: a check of the backbone, before a packed training."""

from typing import Any

import torch

from tether.errors import ConfigError

__all__ = ["check_apart"]

TOLERANCE = 1e-3
"""Relative difference of two ways to compute a state; a document that is seen changes it wholly."""


@torch.no_grad()
def check_apart(model: Any) -> None:
    """Refuse to pack documents for a backbone that takes them for one text.

    In transformers, attention stays among tokens whose positions follow each other, where no mask is given. Recurrent
    layers, and masks that a model makes itself, do not know of that.

    Args:
        model: a CausalQwenForCausalLM, in any mode.

    Raises:
        ConfigError: a document's states change with the document before it.
    """
    was_training = model.training
    model.eval()
    try:
        device = model.action.weight.device
        ids = torch.arange(1, 9, device=device).unsqueeze(0) % model.vocab_size
        places = torch.arange(8, device=device).unsqueeze(0) % 4
        packed = model.backbone(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state[:, 4:]
        alone = model.backbone(input_ids=ids[:, 4:], use_cache=False).last_hidden_state
    finally:
        model.train(was_training)
    if float((packed - alone).abs().max()) > TOLERANCE * float(alone.abs().max()):
        raise ConfigError(
            "packed: in this backbone the documents of a window would see each other; leave packed out, windows then "
            "hold one document each"
        )
