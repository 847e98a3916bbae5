"""Configuration of the causal language model: a backbone's own config plus the causal head's fields."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from tether.errors import ConfigError

__all__ = ["MODES", "PRESETS", "CausalQwenConfig"]

MODES = ("softmax", "deterministic")
"""How tokens are read from the scores: logits = loc_S, or logits = log P(S_k > C_k)."""

PRESETS: dict[str, dict[str, float]] = {
    # Spec document 5, section 4, word for word.
    "paper": {"latent_scale": 100.0, "class_noise": 0.0, "threshold": 100.0},
    # Measured on SmolLM2-135M (docs/log.md): a latent scale at which sampling U is about as diverse as
    # softmax at temperature 1, and a class noise under which argmax P_k is the base's argmax.
    "calibrated": {"latent_scale": 0.02, "class_noise": 20.0, "threshold": 20.0},
}


@strict
class CausalQwenConfig(PreTrainedConfig):  # type: ignore[misc]
    """Fields of a `CausalQwenForCausalLM`.

    Args:
        backbone_config: config of the wrapped decoder (any causal architecture of transformers).
        latent_size: dimensions of U; None takes the backbone's hidden size (identity start needs equality).
        preset: name of the preset the three numbers below came from.
        latent_scale: initial scale of U, > 0, in units of the hidden state.
        class_noise: scale of an exogenous Cauchy noise on each class score, >= 0, in units of a logit.
        threshold: C_k of the one-vs-rest decision, in units of a logit, the same for all classes.
        fusion: description of the fused deltas, or None: chart, gated, domains, weights, location_only.
        base_fingerprint: hash of the backbone's weights, set by `from_backbone`; deltas are bound to it.
        initializer_range: standard deviation for the value head's start.
    """

    model_type = "causal_qwen"
    sub_configs_defaults = {  # noqa: RUF012 - transformers reads a plain class attribute
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")
    }

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    latent_size: int | None = None
    preset: str = "calibrated"
    latent_scale: float = 0.02
    class_noise: float = 20.0
    threshold: float = 20.0
    fusion: dict[str, Any] | None = None
    base_fingerprint: str | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not self.latent_scale > 0 or not self.class_noise >= 0:
            raise ConfigError(
                f"latent_scale={self.latent_scale}, class_noise={self.class_noise}: expected latent_scale > 0 "
                "and class_noise >= 0; see the presets in tether.causal.config.PRESETS"
            )
        backbone = self.backbone_config
        hidden_size = getattr(backbone, "hidden_size", None)
        if self.latent_size is not None and hidden_size is not None and self.latent_size != hidden_size:
            raise ConfigError(
                f"latent_size={self.latent_size} with a backbone of hidden size {hidden_size}: the action head "
                f"starts as the backbone's output head, so both must agree; leave latent_size out"
            )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Give the config that cache and generation read layer counts from.

        Args:
            decoder: passed to the backbone config.
            encoder: passed to the backbone config.

        Returns:
            The backbone's text config.

        Raises:
            ConfigError: there is no backbone config.
        """
        if not isinstance(self.backbone_config, PreTrainedConfig):
            raise ConfigError("no backbone_config: expected the config of a causal decoder")
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


AutoConfig.register("causal_qwen", CausalQwenConfig, exist_ok=True)
