"""Layers that are computed again in the backward pass, where their activations would take too much memory.

transformers calls it gradient checkpointing, and does it in a layer that is in training mode alone. What is learnt here
is the law that is served, which has no dropout: such a layer trains, and all that it computes with does not.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tether.errors import ConfigError

__all__ = ["as_served", "check_recomputing", "recomputing"]


def check_recomputing(backbone: Any) -> None:
    """Refuse a backbone whose layers transformers cannot compute again.

    Args:
        backbone: of transformers.

    Raises:
        ConfigError: it has no such layers.
    """
    able = any(isinstance(layer, GradientCheckpointingLayer) for layer in backbone.modules())
    if not (able and backbone.supports_gradient_checkpointing):
        raise ConfigError(
            f"gradient_checkpointing: transformers cannot compute the layers of {type(backbone).__name__} again; leave "
            "it out, and take shorter windows (window) or fewer of them a step (batch)"
        )


@contextmanager
def recomputing(backbone: Any, *, wanted: bool = True) -> Iterator[None]:
    """Let a backbone keep what goes into each layer alone, and compute the rest again in the backward pass.

    Results and gradients are those of the backbone in evaluation mode, bit for bit on a CPU. Cost: a forward pass more
    for each backward pass.

    Args:
        backbone: of transformers, in evaluation mode; it is as it was afterwards.
        wanted: False changes nothing.

    Yields:
        Nothing.
    """
    if not wanted:
        yield
        return
    with warnings.catch_warnings():
        # An older name of `activation_checkpointing_enable`, which not every release that is taken here has.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_.*` is deprecated")
        # No random numbers are drawn in evaluation mode, so that no states of generators need to be kept.
        kept = {"use_reentrant": False, "preserve_rng_state": False}
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
        # That lets embeddings ask for a gradient, which only the other kind of checkpointing needs.
        backbone.disable_input_require_grads()
    try:
        with as_served(backbone):
            yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_.*` is deprecated")
            backbone.gradient_checkpointing_disable()


@contextmanager
def as_served(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; its layers that are set to be computed again still are.

    Args:
        model: of transformers or of PEFT; its modes are as they were afterwards.

    Yields:
        Nothing.
    """
    modes = _modes(model)
    layers = [
        part
        for part in model.modules()
        if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing
    ]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    model.eval()
    for layer, function in zip(layers, functions, strict=True):
        layer.training = True
        layer._gradient_checkpointing_func = _still(layer, function)
    try:
        yield
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = function
        _put(modes)


# The layer is in evaluation mode whenever it computes, in the backward pass too, when the model may train again.
def _still(layer: nn.Module, recompute: Callable[..., Any]) -> Callable[..., Any]:
    def run(forward: Callable[..., Any], *args: Any) -> Any:
        def evaluated(*given: Any) -> Any:
            modes = _modes(layer)
            layer.eval()
            try:
                return forward(*given)
            finally:
                _put(modes)

        return recompute(evaluated, *args)

    return run


def _modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(part, part.training) for part in module.modules()]


def _put(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, mode in modes:
        part.training = mode
