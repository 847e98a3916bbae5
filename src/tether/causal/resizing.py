"""Another number of classes, in every part of a model that has one entry for each."""

import copy
from typing import Any

import torch
from torch import nn

from tether.causal.fingerprint import renew_fingerprint
from tether.errors import ConfigError

__all__ = ["resize", "set_classes"]


@torch.no_grad()
def set_classes(action: Any, weight: nn.Parameter, old: int, latent_scale: float) -> None:
    """Give an action head another class weight, and all its other parts as many classes.

    New classes have no bias, the mean threshold, and the noise that brings their scale_S to the size that the others
    have in the middle.

    Args:
        action: the head, `tether.causal.action.Action`; changed in place.
        weight: the new class weight, shape (V, C); its first rows are those of the old one.
        old: number of classes before; a tied weight may have changed already.
        latent_scale: scale of U at the start, > 0.
    """
    new = len(weight)
    action.weight = weight
    parts = {"bias": torch.zeros(1, device=weight.device), "threshold": action.threshold.mean().reshape(1)}
    if len(action.class_noise) == old and old > 1:
        own = weight.float().abs().sum(-1) * latent_scale
        size = (own[: min(old, new)] + action.class_noise[:new]).median()
        parts["class_noise"] = (size - own[old:]).clamp(min=0)
    for name, added in parts.items():
        values = getattr(action, name)
        if values is None or len(values) != old or old == 1:
            continue
        more = torch.cat([values.detach(), added.to(values).expand(max(new - old, 0))])[:new]
        setattr(action, name, nn.Parameter(more.clone(), requires_grad=values.requires_grad))


def resize(model: Any, size: int, *, mean_resizing: bool) -> nn.Module:
    """Give a model another number of tokens, once it is known that it can be saved and loaded with them.

    The whole change is made to a copy without weights first, whose parts must be those that its config asks for.

    Args:
        model: a CausalQwenForCausalLM; changed in place.
        size: number of tokens.
        mean_resizing: whether new embeddings are drawn around the mean of the others.

    Returns:
        The embedding.

    Raises:
        ConfigError: a fused model, a number of tokens below that of `<NUM>`, or a backbone with other parts of that
            size.
    """
    if model.fusion is not None:
        raise ConfigError(
            f"{size} tokens for a model with fused deltas, which were learnt and measured with "
            f"{model.vocab_size}: resize the base, then learn deltas on it"
        )
    number = model.config.num_token_id
    if number is not None and size <= number:
        raise ConfigError(
            f"{size} tokens for a model whose <NUM> is token {number}: expected at least {number + 1}"
        )
    kind = type(model)
    with torch.device("meta"):
        plan = kind(copy.deepcopy(model.config))
        _resized(plan, size, mean_resizing=False)
        try:
            expected = kind(copy.deepcopy(plan.config))
        except Exception as error:
            # Families check their configs in their own ways; a padding token beyond the last row is one of them.
            raise ConfigError(
                f"{size} tokens: no model can be made of the config then ({type(error).__name__}: {error}); keep the "
                "special tokens that the config names, or change them first"
            ) from error
    found, wanted = (
        {name: tuple(part.shape) for name, part in each.state_dict().items()} for each in (plan, expected)
    )
    if odd := sorted(name for name in found if found[name] != wanted.get(name)):
        raise ConfigError(
            f"{size} tokens for a backbone of type {model.config.backbone_config.model_type}: {odd[0]} would stay of "
            f"shape {found[odd[0]]}, expected {wanted.get(odd[0])}, so the model could not be loaded again; resize the "
            "base with its own means, then wrap it"
        )
    embedding = _resized(model, size, mean_resizing=mean_resizing)
    if model.config.base_fingerprint is not None:
        renew_fingerprint(model)
    return embedding


def _resized(model: Any, size: int, *, mean_resizing: bool) -> nn.Module:
    action = model.action
    classes, latent = action.weight.shape
    tied = action.weight is model.get_input_embeddings().weight
    embedding: nn.Module = model.backbone.resize_token_embeddings(size, mean_resizing=mean_resizing)
    weight: nn.Parameter = embedding.weight  # type: ignore[assignment]
    if not tied:
        head = nn.Linear(latent, classes, bias=False, device="meta")
        head.weight = action.weight
        weight = model._get_resized_lm_head(head, size, mean_resizing=mean_resizing).weight
        weight.requires_grad_(action.weight.requires_grad)
    set_classes(action, weight, classes, model.config.latent_scale)
    model.config.get_text_config(decoder=True).vocab_size = model.vocab_size = size
    return embedding
