"""A causal LM becomes a CausalQwen: its modules are taken over, nothing is allocated twice."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tether.causal.action import Action
from tether.causal.after_head import check_same, continued, find_after_head, logits_of, probe_ids, refusing
from tether.causal.config import PRESETS, CausalQwenConfig
from tether.causal.constants import CONSTANTS, set_constants
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.layers import Abduction, NumericEmbedding
from tether.causal.quantising import packed
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.causal.modeling import CausalQwenForCausalLM

__all__ = ["CONSTANTS", "make_head", "wrap_backbone"]

"""Fields of the config that are chosen where a base is wrapped."""


def make_head(config: CausalQwenConfig) -> tuple[Abduction, Action]:
    """Make the layers that follow the backbone.

    Args:
        config: of the model.

    Returns:
        Abduction and action, with the weights of a new model.
    """
    text = config.get_text_config(decoder=True)
    latent_size = config.latent_size or text.hidden_size
    abduction = Abduction(
        text.hidden_size, latent_size, config.latent_scale, config.abduction_size, config.logit_scale
    )
    action = Action(
        latent_size,
        text.vocab_size,
        config.class_noise,
        config.noise_form,
        config.threshold,
        config.threshold_form,
        config.value_transform,
        config.class_bias,
        config.logit_cap,
    )
    return abduction, action


def wrap_backbone(
    cls: type["CausalQwenForCausalLM"],
    backbone: str | PreTrainedModel,
    preset: str,
    overrides: dict[str, Any],
) -> "CausalQwenForCausalLM":
    """Wrap a causal LM so that softmax mode equals it; see `CausalQwenForCausalLM.from_backbone`.

    Args:
        cls: the class to make.
        backbone: alias, path or hub id of a causal LM, or the loaded model.
        preset: of `tether.causal.config.PRESETS`.
        overrides: of the preset.

    Returns:
        The wrapped model in evaluation mode.

    Raises:
        ConfigError: unknown preset or override, or a model that cannot be wrapped exactly, with the reason.
    """
    from tether.causal.loading import load_backbone

    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r}: expected one of {', '.join(PRESETS)}")
    if unknown := set(overrides) - set(CONSTANTS):
        raise ConfigError(f"{sorted(unknown)}: expected some of {', '.join(sorted(CONSTANTS))}")
    model = load_backbone(backbone)[0] if isinstance(backbone, str) else backbone
    if isinstance(model, cls):
        raise ConfigError(
            "a CausalQwen model: expected the plain causal LM; this one is wrapped already, use it as it is"
        )
    _check_head(model)
    model.eval()
    with refusing(model, "running it on a few token ids"):
        ids = probe_ids(model)
        logits = logits_of(model, ids)
        after = find_after_head(model, ids, logits)
    settings = PRESETS[preset] | overrides
    # The wrapper is compared with the base in mode softmax.
    mode = settings.pop("mode", "softmax")
    config = CausalQwenConfig(
        backbone_config=model.config,
        preset=preset,
        logit_scale=after.scale,
        logit_cap=after.cap,
        tie_word_embeddings=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        **{name: value for name, value in settings.items() if value is not None},
    )
    with refusing(model, "wrapping it"):
        wrapped = _taken_over(cls, model, config, free_threshold=settings["threshold"] is None)
        made = logits_of(wrapped, ids)
    check_same(model, made, logits)
    with refusing(model, "going on with a text from its cache"):
        made, written = continued(wrapped, ids), continued(model, ids)
    check_same(model, made, written)
    set_constants(wrapped.config, {"mode": mode})
    renew_fingerprint(wrapped)
    return wrapped


def _check_head(model: PreTrainedModel) -> None:
    name = type(model).__name__
    with refusing(model, "looking for its output head"):
        head = model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if weight is None:
            raise ConfigError(
                f"{name}: no output head: expected a causal LM; load it with AutoModelForCausalLM"
            )
        if getattr(head, "bias", None) is not None:
            raise ConfigError(
                f"{name}: its output head has a bias, and the wrapper takes heads without one; choose another base"
            )
        if model.base_model is model:
            raise ConfigError(
                f"{name}: its class names no backbone (base_model_prefix {model.base_model_prefix!r}), so what lies "
                "below its head cannot be taken over; choose another base"
            )
        found = tuple(weight.shape)
        text = model.config.get_text_config(decoder=True)
        expected = (text.vocab_size, text.hidden_size)
    if found != expected:
        raise ConfigError(
            f"{name}: an output head of shape {found}, expected {expected}, classes times hidden size: the head reads "
            "something else than the backbone's last hidden state; choose another base"
        )


# Of weights, and of buffers that are saved. Packed weights come with scales, which a plain model has not.
def _names(backbone: PreTrainedModel) -> set[str]:
    if packed(backbone) is not None:
        return {name for name, _ in backbone.named_parameters()}
    return set(backbone.state_dict())


# On the meta device nothing is allocated twice: the backbone and the head are taken over as they are.
def _taken_over(
    cls: type["CausalQwenForCausalLM"],
    model: PreTrainedModel,
    config: CausalQwenConfig,
    *,
    free_threshold: bool,
) -> "CausalQwenForCausalLM":
    with torch.device("meta"):
        wrapped = cls(config)
    given, loaded = _names(model.base_model), _names(wrapped.backbone)
    if set(given) != set(loaded) or type(model.base_model) is not type(wrapped.backbone):
        odd = sorted(set(given) ^ set(loaded))[:3]
        raise ConfigError(
            f"{type(model).__name__}: its backbone {type(model.base_model).__name__} is not what AutoModel makes of "
            f"its config, {type(wrapped.backbone).__name__} (weights that differ: {odd or 'none'}): a checkpoint of it "
            "could not be loaded again; choose another base"
        )
    head = model.get_output_embeddings()
    wrapped.backbone = model.base_model
    dtype, device = head.weight.dtype, head.weight.device
    wrapped.abduction, action = make_head(config)
    wrapped.abduction.to(device, dtype).reset_identity()
    # Not allocated twice: the base's own head takes the place of the class weight.
    action.weight = head.weight
    action.value_weight = nn.Parameter(action.value_weight.to(device, dtype))
    action.value_bias = nn.Parameter(action.value_bias.to(device, dtype))
    action.threshold = nn.Parameter(action.threshold.to(device))
    action.class_noise = nn.Parameter(action.class_noise.to(device))
    action.reset_action()
    if config.noise_form == "fill":
        ones = torch.ones(action.weight.shape[1], device=device)
        action.fill_noise(ones * config.latent_scale, config.class_noise)
    if free_threshold:
        own = action.weight.detach()[0].float().abs().sum() * config.latent_scale
        size = float(own + action.noise_scale.detach()[0])
        # A tenth of the likelihood's peak: beyond it float32 no longer tells close scores apart.
        config.threshold = 0.1 * len(action.weight) * size / torch.pi
        nn.init.constant_(action.threshold, config.threshold)
    wrapped.action = action
    wrapped.numeric = NumericEmbedding(wrapped.abduction.loc.in_features).to(device, dtype)
    wrapped.numeric.reset_direction()
    wrapped.generation_config = copy.deepcopy(model.generation_config)
    wrapped.name_or_path = ""
    wrapped.eval()
    return wrapped
