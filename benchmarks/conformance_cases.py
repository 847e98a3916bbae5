"""What the common tests of transformers are run on: tiny backbones, wrapped, in two modes, plain and fused."""

import copy
import inspect
import itertools
import random
import unittest
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import GemmaConfig, GenerationMixin, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from tether.causal.config import CausalQwenConfig
from tether.causal.evidence import Rule
from tether.causal.memory import Memory
from tether.causal.mixture import Mixture
from tether.causal.modeling import CausalQwenForCausalLM

__all__ = ["BACKBONES", "FUSIONS", "MODES", "ONCE", "Case", "cases", "test_class"]

BACKBONES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "gemma": GemmaConfig}
MODES = ("softmax", "deterministic")
FUSIONS = ("plain", "evidence")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""As the testers of transformers have them."""

FUSED = {
    "by": "evidence",
    "domains": ["first", "second"],
    "native": ["symmetric", "geodesic"],
    "weights": [1.0, 1.0],
    "strengths": [[0.5, 1.0], [1.0]],
    "gated": True,
    "gate_window": 4,
    "gate_rank": 2,
    "gate_stages": 1,
    "location_only": False,
    "layers": [],
    **Rule().described(),
}
"""Two domains behind gates; the first acts at two strengths, so that there are four experts and their choice."""


SWITCHES = {
    # Weights of values have no gradient where a text has no numbers, nor have thresholds in mode `softmax`.
    "test_all_params_have_gradient": False,
    # This test is left out for what is old, and what carries no year counts as old.
    "test_can_init_all_missing_weights_before_2023": True,
    "_is_composite": True,
}
"""Of the common tests, which have them for models of which a part is not always used, and whose config holds one."""

ONCE = ("test_generate_compilation_*", "test_generate_compile_*", "test_static_cache_no_recompile_*")
"""Tests that compile, which takes minutes: they run in the first case only."""


class _Fused(CausalQwenForCausalLM):
    # Deltas of a new fusion are zero. Here they are not, so that the experts differ and their weights matter.
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixture):
            for part in (module.first, module.second):
                nn.init.normal_(part, std=0.5 * module.hidden_size**-0.5)
            nn.init.normal_(module.gate_whitening)
            nn.init.constant_(module.gate_threshold, 4.0 * module.hidden_size)


def _model_class(mode: str) -> type[CausalQwenForCausalLM]:
    # transformers knows a model by the name of its class.
    class Acting(_Fused, GenerationMixin):
        # Of all four backbones; without these the tests of fixed caches and of packed texts would be left out.
        _can_compile_fullgraph = True
        _supports_attention_backend = True

        @classmethod
        def from_backbone(cls, *args: Any, **options: Any) -> Any:
            made = CausalQwenForCausalLM.from_backbone(*args, **{"mode": mode} | options)
            made.__class__ = cls
            return made

    # An argument named `noise` makes the tests take a model for one of images.
    whole = inspect.signature(CausalQwenForCausalLM.forward)
    shown = [each for each in whole.parameters.values() if each.name != "noise"]
    Acting.forward.__signature__ = whole.replace(parameters=shown)  # type: ignore[attr-defined]
    Acting.__name__ = Acting.__qualname__ = CausalQwenForCausalLM.__name__
    return Acting


class _Tester:
    """What the common tests ask for sizes, a config and inputs.

    Args:
        parent: the test that asks.
        backbone: one of `BACKBONES`.
        mode: one of `MODES`.
        fusion: one of `FUSIONS`.
    """

    def __init__(self, parent: unittest.TestCase, backbone: str, mode: str, fusion: str) -> None:
        self.parent, self.backbone, self.mode, self.fusion = parent, backbone, mode, fusion
        self.batch_size, self.seq_length, self.is_training = 13, 7, True
        for name, value in SIZES.items():
            setattr(self, name, value)

    def get_config(self) -> PreTrainedConfig:
        own = BACKBONES[self.backbone](**SIZES, tie_word_embeddings=self.backbone == "gemma")
        return CausalQwenConfig(
            backbone_config=own,
            latent_scale=1.0,
            mode=self.mode,
            tie_word_embeddings=own.tie_word_embeddings,
            fusion=dict(FUSED) if self.fusion == "evidence" else None,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        draw = random.Random()
        rows = [[draw.randrange(SIZES["vocab_size"]) for _ in range(7)] for _ in range(self.batch_size)]
        ids = torch.tensor(rows)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


Case = tuple[str, str, str]


def cases() -> Iterator[Case]:
    """Give all cases.

    Yields:
        Backbone, mode and fusion.
    """
    yield from itertools.product(BACKBONES, MODES, FUSIONS)


def test_class(case: Case, mixins: tuple[type, ...]) -> type[unittest.TestCase]:
    """Make the class that runs the common tests on one case.

    Args:
        case: backbone, mode and fusion.
        mixins: the classes with the tests.

    Returns:
        The class.
    """
    backbone, mode, fusion = case

    def set_up(self: Any) -> None:
        self.model_tester = _Tester(self, backbone, mode, fusion)

    def check_cache(
        self: Any, batch_size: int, past_key_values: Any, seq_length: int, config: PreTrainedConfig
    ) -> None:
        # What a fusion by evidence remembers of a text is one more layer of its cache.
        layers = [layer for layer in past_key_values.layers if not isinstance(layer, Memory)]
        assert len(layers) == len(past_key_values.layers) - 1
        keys_and_values = copy.copy(past_key_values)
        keys_and_values.layers = layers
        super(made, self)._check_past_key_values_for_generate(batch_size, keys_and_values, seq_length, config)

    fields = {"all_model_classes": (_model_class(mode),), "setUp": set_up} | SWITCHES
    if fusion == "evidence":
        fields["_check_past_key_values_for_generate"] = check_cache
    made = type("-".join(case), (*mixins, unittest.TestCase), fields)
    return made
