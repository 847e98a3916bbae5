"""Configuration of the causal language model: a backbone's own config plus the causal head's fields."""

import copy
import math
import os
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from tether.causal.portable import Portable, auto_map, write_code
from tether.errors import ConfigError
from tether.registration import register_when_needed

__all__ = ["IMPLS", "MODES", "NOISES", "PRESETS", "THRESHOLDS", "TRANSFORMS", "CausalQwenConfig"]

MODES = ("softmax", "deterministic", "causal")
"""How to act: logits = loc_S; logits = log P(S_k > C_k); or logits = the scores of a sampled U."""

IMPLS = ("dense", "chunked", "sampled")
"""Forms of the one-vs-rest loss; see `tether.causal.losses.ovr_loss`."""

THRESHOLDS = ("constant", "class", "context")
"""C_k of the one-vs-rest decision: one number; one for each class; or one number above the context's
log-sum-exp of loc_S, so that a class fires when its softmax log probability plus noise exceeds the number."""

NOISES = ("constant", "fill")
"""Exogenous noise on the scores: the same scale for each class; or as much for each class as fills its scale_S
up to one size (`class_noise`; 0 for that of the widest class), so that argmax P_k is argmax loc_S."""

TRANSFORMS = ("raw", "signed-log")
"""What the value head predicts: the number itself, or sign(v) ln(1 + |v|)."""

# A threshold of None is resolved by `from_backbone` to V scale_S / (10 pi), where about ten classes are expected to
# fire.
PRESETS: dict[str, dict[str, Any]] = {
    # Spec document 5, section 4, word for word.
    "paper": {
        "latent_scale": 100.0,
        "class_noise": 0.0,
        "noise_form": "constant",
        "threshold": 100.0,
        "threshold_form": "constant",
        "value_transform": "raw",
    },
    # Measured on SmolLM2-135M (docs/presets.md): a latent scale at which sampling U is as diverse as softmax
    # at temperature 1, and the lowest one-vs-rest loss found under which argmax P_k is the base's argmax.
    "calibrated": {
        "latent_scale": 0.0245,
        "class_noise": 0.0,
        "noise_form": "fill",
        "threshold": None,
        "threshold_form": "constant",
        "value_transform": "signed-log",
    },
}


def _of_text(name: str) -> property:
    def read(config: "CausalQwenConfig") -> Any:
        try:
            return getattr(config.get_text_config(), name)
        except RuntimeError as error:
            # Layers differ (Gemma 4), so there is no one value, which `hasattr` has to see.
            raise AttributeError(str(error)) from error

    def write(config: "CausalQwenConfig", value: Any) -> None:
        setattr(config.get_text_config(), name, value)

    return property(read, write, doc=f"The backbone's {name}.")


@strict
class CausalQwenConfig(Portable, PreTrainedConfig):  # type: ignore[misc]
    """Fields of a `CausalQwenForCausalLM`.

    Args:
        backbone_config: config of the wrapped decoder (any causal architecture of transformers).
        latent_size: dimensions of U; None takes the backbone's hidden size (identity start needs equality).
        preset: name of the preset the fields up to `value_transform` came from.
        latent_scale: initial scale of U, > 0, in units of the hidden state.
        class_noise: scale of an exogenous Cauchy noise on each class score, >= 0, in units of a logit; or the
            size of scale_S that it fills up to (0: that of the widest class).
        noise_form: `constant` or `fill`, see `NOISES`; the parameter `action.class_noise` holds what is served.
        threshold: start of C_k, in units of a logit; the parameter `action.threshold` holds what is served.
        threshold_form: `constant`, `class` or `context`, see `THRESHOLDS`.
        value_transform: `raw` or `signed-log`, see `TRANSFORMS`.
        logit_scale: what the base multiplies its logits by (Cohere, Granite, ...), finite and not 0; `from_backbone`
            finds it. Abduction applies it: loc = logit_scale z.
        logit_cap: what the base caps its logits at, cap tanh(. / cap) (Gemma 2, ...), > 0; None for no cap;
            `from_backbone` finds it. See `tether.causal.action.Action`.
        abduction_size: width of a small MLP added to the linear abduction (0 at the start); 0 for none.
        num_token_id: id of `<NUM>`, or None for a model without numbers; set by `add_numbers`.
        class_bias: whether the scores have a bias b_k; set by `add_numbers` where `<NUM>` is an added class.
        mode: what the model does unless a call says otherwise, one of `MODES`; a stock trainer minimises its loss.
        gate_alpha: alpha of the gated value loss, in [0, 1].
        value_loss_weight: lambda of the total loss, >= 0.
        ovr_impl: form of the one-vs-rest loss, one of `IMPLS`.
        calibration: figures of the calibration this model went through, or None.
        fusion: description of the fused deltas, or None: chart, gated, domains, weights, location_only, leash.
        base_fingerprint: hash of the backbone's weights, set by `from_backbone`; deltas are bound to it.
        initializer_range: standard deviation for the value head's start.
    """

    model_type = "causal_qwen"
    model_class: ClassVar[str] = "CausalQwenForCausalLM"
    """Name of the model's class."""
    sub_configs_defaults = {  # noqa: RUF012 - transformers reads a plain class attribute
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")
    }

    # Trainers collect the logits of an evaluation, and not what else a forward pass gives.
    keys_to_ignore_at_inference = [  # noqa: RUF012 - transformers reads a plain class attribute
        "past_key_values", "aux_loss", "router_logits", "class_loss", "value_loss", "value", "latent", "latent_loc",
        "latent_log_scale", "value_loc", "value_scale", "gates", "gate_state", "log_weights",
    ]  # fmt: skip

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    latent_size: int | None = None
    preset: str = "calibrated"
    latent_scale: float = 0.0245
    class_noise: float = 0.0
    noise_form: str = "fill"
    threshold: float = 4600.0
    threshold_form: str = "constant"
    value_transform: str = "signed-log"
    logit_scale: float = 1.0
    logit_cap: float | None = None
    abduction_size: int = 0
    num_token_id: int | None = None
    class_bias: bool = False
    mode: str = "softmax"
    gate_alpha: float = 0.5
    value_loss_weight: float = 1.0
    ovr_impl: str = "chunked"
    calibration: dict[str, Any] | None = None
    fusion: dict[str, Any] | None = None
    base_fingerprint: str | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    # What is asked of any causal LM's config lies in the backbone's; an attribute that it lacks is lacking here.
    vocab_size = _of_text("vocab_size")
    hidden_size = _of_text("hidden_size")
    intermediate_size = _of_text("intermediate_size")
    num_hidden_layers = _of_text("num_hidden_layers")
    num_attention_heads = _of_text("num_attention_heads")
    num_key_value_heads = _of_text("num_key_value_heads")
    head_dim = _of_text("head_dim")
    max_position_embeddings = _of_text("max_position_embeddings")
    use_cache = _of_text("use_cache")
    output_router_logits = _of_text("output_router_logits")
    router_aux_loss_coef = _of_text("router_aux_loss_coef")

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Registers the model with the Auto classes, which make a config before anything else.
        import_module("tether.causal.modeling")
        if not self.latent_scale > 0 or not self.class_noise >= 0:
            raise ConfigError(
                f"latent_scale={self.latent_scale}, class_noise={self.class_noise}: expected latent_scale > 0 "
                "and class_noise >= 0; see the presets in tether.causal.config.PRESETS"
            )
        for field, known in (
            ("mode", MODES),
            ("ovr_impl", IMPLS),
            ("threshold_form", THRESHOLDS),
            ("noise_form", NOISES),
            ("value_transform", TRANSFORMS),
        ):
            if getattr(self, field) not in known:
                raise ConfigError(f"{field}={getattr(self, field)!r}: expected one of {', '.join(known)}")
        if not 0 <= self.gate_alpha <= 1 or not self.value_loss_weight >= 0 or self.abduction_size < 0:
            raise ConfigError(
                f"gate_alpha={self.gate_alpha}, value_loss_weight={self.value_loss_weight}, "
                f"abduction_size={self.abduction_size}: expected gate_alpha in [0, 1] and the others >= 0"
            )
        self.check_logits()
        backbone = self.backbone_config
        hidden_size = getattr(backbone, "hidden_size", None)
        if self.latent_size is not None and hidden_size is not None and self.latent_size != hidden_size:
            raise ConfigError(
                f"latent_size={self.latent_size} with a backbone of hidden size {hidden_size}: the action head "
                f"starts as the backbone's output head, so both must agree; leave latent_size out"
            )

    def check_logits(self) -> None:
        """Refuse what does not go with the base's multiplier or cap; the model asks again, since fields change.

        Raises:
            ConfigError: a number that means nothing, or a cap with thresholds or a leash that take logits for scores.
        """
        cap = self.logit_cap
        if not math.isfinite(self.logit_scale) or self.logit_scale == 0:
            raise ConfigError(f"logit_scale={self.logit_scale}: expected a finite number other than 0")
        if cap is None:
            return
        if not (math.isfinite(cap) and cap > 0):
            raise ConfigError(f"logit_cap={cap}: expected a positive finite number, or None for no cap")
        if self.threshold_form == "context":
            raise ConfigError(
                f"threshold_form='context' on a base that caps its logits at {cap:g}: the one-vs-rest decision is taken"
                " before the cap, softmax after it, so its log-sum-exp is no level for it; choose 'constant' or 'class'"
            )
        leash = (self.fusion or {}).get("leash")
        if leash is not None and leash.get("metric") == "softmax":
            raise ConfigError(
                f"a leash in metric 'softmax' on a base that caps its logits at {cap:g}: it walks back along a line of "
                "logits, which capped ones do not follow; choose --leash-metric latent, or a base without a cap"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config from what a checkpoint's config.json holds.

        Args:
            config_dict: its content.
            kwargs: as in transformers.

        Returns:
            The config, or what transformers returns with the options given.

        Raises:
            ConfigError: the config of another model, of which nothing would be taken.
        """
        kind = config_dict.get("model_type")
        if kind not in (None, cls.model_type):
            raise ConfigError(
                f"a config of type {kind!r}: expected {cls.model_type!r}; wrap a plain causal LM with "
                "CausalQwenForCausalLM.from_pretrained or from_backbone"
            )
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Write `config.json`, and beside it the few lines by which transformers finds the classes.

        Where the backbone came from stays in it only if it is a name that others can follow too, not a path.

        Args:
            save_directory: where to; made if need be.
            args: as in transformers.
            options: as in transformers.

        Returns:
            As in transformers.
        """
        written = copy.copy(self)
        written.auto_map = auto_map(type(self).__name__, self.model_class)
        written.architectures = [self.model_class]
        written.backbone_config = backbone = copy.copy(self.backbone_config)
        source = str(getattr(backbone, "_name_or_path", "") or "")
        if isinstance(backbone, PreTrainedConfig) and (Path(source).is_absolute() or Path(source).exists()):
            backbone._name_or_path = ""
        write_code(save_directory)
        return super(CausalQwenConfig, written).save_pretrained(save_directory, *args, **options)

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
register_when_needed()
