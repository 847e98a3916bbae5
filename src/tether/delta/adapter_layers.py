"""Updates of a base's linear layers, put together as one LoRA that PEFT and tether read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.errors import CheckpointError

__all__ = ["PREFIX", "Plain", "Update", "as_lora", "linear_layers", "linear_sizes"]

PREFIX = "base_model.model."
"""PEFT's, before the names that a causal LM has for its parts."""


class Update(NamedTuple):
    """What is added to a linear layer: B A x and a bias; the result's rows brought to given lengths, as of DoRA.

    Attributes:
        a: A, shape (r, in).
        b: B, shape (out, r), scalings multiplied in.
        bias: shape (out,), or None.
        lengths: of the rows of W + B A, shape (out,), or None.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    lengths: Tensor | None = None


class Plain(NamedTuple):
    """A LoRA.

    Attributes:
        config: PEFT's `LoraConfig`.
        tensors: PEFT's state dict, float32.
        kind: what it was made of, in a user's words.
    """

    config: Any
    tensors: dict[str, Tensor]
    kind: str


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Find the layers of a backbone that a LoRA can be on.

    Args:
        model: a CausalQwenForCausalLM.

    Returns:
        Layers by the names that they have in the causal LM.
    """
    backbone = model.backbone
    named = ((f"{backbone.base_model_prefix}.{name}", module) for name, module in backbone.named_modules())
    return {name: module for name, module in named if linear_sizes(module) is not None}


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Tell how many numbers a linear layer reads and gives.

    Args:
        module: any module.

    Returns:
        Both, or None for what is no linear layer.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if (
        type(module).__name__ == "Conv1D"
    ):  # transformers' own, of GPT-2, whose weight lies the other way round
        weight: Any = module.weight
        return weight.shape[0], weight.shape[1]
    return None


def as_lora(updates: Mapping[str, Update], model: Any, kind: str) -> Plain:
    """Put updates together.

    Ranks below the largest are filled up with zeros, and a bias where only other layers have one is 0: neither changes
    anything.

    Args:
        updates: by the layers' names in the causal LM, at least one.
        model: the base.
        kind: what they were, in a user's words.

    Returns:
        The LoRA; its alpha is its rank, so that its scaling is 1.

    Raises:
        CheckpointError: biases and lengths of rows in one, which PEFT does not serve.
    """
    from peft import LoraConfig

    layers = linear_layers(model)
    rank = max(len(update.a) for update in updates.values())
    biased = any(update.bias is not None for update in updates.values())
    dora = any(update.lengths is not None for update in updates.values())
    if biased and dora:
        raise CheckpointError(
            "biases that were trained beside DoRA: PEFT serves no such adapter; train one of both"
        )
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        missing = rank - len(update.a)
        at = f"{PREFIX}{name}."
        tensors[f"{at}lora_A.weight"] = nn.functional.pad(update.a, (0, 0, 0, missing))
        tensors[f"{at}lora_B.weight"] = nn.functional.pad(update.b, (0, missing))
        if biased:
            tensors[f"{at}lora_B.bias"] = torch.zeros(len(update.b)) if update.bias is None else update.bias
        if update.lengths is not None:
            tensors[f"{at}lora_magnitude_vector"] = update.lengths
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=_named(set(updates), set(layers)), use_dora=dora, lora_bias=biased,
        fan_in_fan_out=not any(isinstance(layers[name], nn.Linear) for name in updates), task_type="CAUSAL_LM",
        inference_mode=True, base_model_name_or_path=model.config.get_text_config(decoder=True).name_or_path or None,
    )  # fmt: skip
    return Plain(config, {name: values.float().contiguous() for name, values in tensors.items()}, kind)


# The last parts of the names, where all layers that have them are meant: other programs know them by these.
def _named(chosen: set[str], every: set[str]) -> list[str]:
    ends = {name.rpartition(".")[2] for name in chosen}
    return sorted(ends if {name for name in every if name.rpartition(".")[2] in ends} == chosen else chosen)
