"""An adapter at a share of its strength: what it has learnt goes that share of the way from where PEFT starts it.

B and the bias of a LoRA start at 0. DoRA learns the lengths of the rows of W + B A too, which start at those of W. So
at the share 0 every kind is the base, bit for bit but for rounding. PEFT's own `set_scale` leaves those lengths where
they are: a DoRA at scale 0 is not the base.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["adapted_layers", "fold", "set_strength", "start_lengths"]


def adapted_layers(peft: Any, slot: str) -> Iterator[Any]:
    """Find the layers that an adapter changes.

    Args:
        peft: PEFT's model.
        slot: PEFT's name of the adapter.

    Yields:
        PEFT's LoRA layers.
    """
    for module in peft.modules():
        if slot in getattr(module, "lora_B", {}):
            yield module


def start_lengths(layer: Any) -> Tensor:
    """Give the lengths that the rows of a layer's weight have in the base, where DoRA's start.

    Args:
        layer: PEFT's LoRA layer.

    Returns:
        Shape (out,), float32.
    """
    weight = layer.get_base_layer().weight.detach().float()
    lengths: Tensor = torch.linalg.norm(weight.T if layer.fan_in_fan_out else weight, dim=1)
    return lengths


@torch.no_grad()
def set_strength(peft: Any, slot: str, share: float, learnt: dict[Any, Tensor]) -> None:
    """Let an adapter act at a share of its strength; its weights A and B stay as they are.

    Args:
        peft: PEFT's model.
        slot: PEFT's name of the adapter.
        share: any finite number.
        learnt: is filled with the lengths of rows that were learnt, by layer, which later calls go by.
    """
    for layer in adapted_layers(peft, slot):
        layer.set_scale(slot, share)
        if slot in layer.lora_magnitude_vector:
            lengths = layer.lora_magnitude_vector[slot].weight
            whole = learnt.setdefault((slot, layer), lengths.detach().clone())
            lengths.copy_(_between(start_lengths(layer), whole, share))


@torch.no_grad()
def fold(peft: Any, slot: str, share: float) -> None:
    """Make a share of an adapter's strength part of its weights, which then are the adapter at strength 1.

    Args:
        peft: PEFT's model, with the adapter at strength 1.
        slot: PEFT's name of the adapter.
        share: any finite number.
    """
    for layer in adapted_layers(peft, slot):
        for values in layer.lora_B[slot].parameters():
            values.mul_(share)
        if slot in layer.lora_magnitude_vector:
            lengths = layer.lora_magnitude_vector[slot].weight
            lengths.copy_(_between(start_lengths(layer), lengths, share))


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    return start + share * (end.float() - start)
