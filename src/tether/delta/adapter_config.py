"""Configuration of a model served with adapters."""

from importlib import import_module
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from tether.causal.config import CausalQwenConfig

__all__ = ["AdaptedConfig"]


@strict
class AdaptedConfig(CausalQwenConfig):
    """Fields of an `AdaptedForCausalLM`.

    Args:
        base: where the base is: alias, hub id, absolute path, or path relative to the folder.
    """

    model_type = "causal_qwen_adapted"

    base: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        import_module("tether.delta.adapter_serving")


AutoConfig.register("causal_qwen_adapted", AdaptedConfig, exist_ok=True)
