"""The plain base below PEFT's layers."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tether.delta.attached import frozen_twin

__all__ = ["without_adapters"]


def without_adapters(peft: Any) -> Any:
    """Give the plain causal LM that PEFT's model stands on.

    Args:
        peft: PEFT's model, in which adapters are layers around the base's own; it is not touched.

    Returns:
        The causal LM in evaluation mode: modules of its own around the same weights, without adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = peft.get_base_model()
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)
    parts = nn.ModuleList([getattr(model, model.base_model_prefix), model.get_output_embeddings()])
    backbone, head = frozen_twin(parts)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, module.get_base_layer())
    setattr(shell, shell.base_model_prefix, backbone)
    shell.set_output_embeddings(head)
    shell.generation_config = model.generation_config
    shell.name_or_path = model.name_or_path
    return shell.eval()
