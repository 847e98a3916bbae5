"""Whether a fused model stands on a base: weights, settings and what was put between the two."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tether.causal.offloading import fetched, weights_of

__all__ = ["unlike"]

WITHOUT_EFFECT = frozenset(
    {
        "_attn_implementation", "_name_or_path", "architectures", "attn_implementation", "bos_token_id", "dtype",
        "eos_token_id", "id2label", "label2id", "name_or_path", "output_attentions", "output_hidden_states",
        "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Fields of a backbone's config that change no logit. Every other field must be equal."""


def unlike(model: Any, fused: Any) -> list[str]:
    """Find the parts in which a fused model is not its base.

    Args:
        model: the base, without a fusion.
        fused: the fused model, in the same number format.

    Returns:
        Names of parts whose weights differ and of settings that do; none where the fused model without its fusion is
        the base. The backbone of adapters is not compared: they are put on a base whose fingerprint is theirs.
    """
    parts = ["numeric", "abduction", "action"]
    if fused.config.fusion.get("kind") != "adapters":
        parts.append("backbone")
    found = [part for part in parts if not _equal(model, fused, part)]
    pairs = [(model.config.backbone_config.to_dict(), fused.config.backbone_config.to_dict())]
    own = ("logit_scale", "logit_cap")
    pairs.append(tuple({name: getattr(each.config, name) for name in own} for each in (model, fused)))  # type: ignore[arg-type]
    for left, right in pairs:
        found += _settings(left, right)
    return found


def _settings(left: Mapping[str, Any], right: Mapping[str, Any], at: str = "") -> list[str]:
    found = []
    for name in sorted({*left, *right} - WITHOUT_EFFECT):
        one, other = left.get(name), right.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += _settings(one, other, f"{at}{name}.")
        elif one != other:
            found.append(f"{at}{name} ({one!a:.40}, fused {other!a:.40})")
    return found


def _equal(model: Any, fused: Any, part: str) -> bool:
    own, other = (_held(getattr(each, part)) for each in (model, fused))
    if own.keys() != other.keys():
        return False
    for name, values in own.items():
        if values is not other[name]:
            one, two = fetched(values), fetched(other[name])
            if not _same(name, one, two.to(one)):
                return False
    return True


# Parameters, and buffers that a checkpoint holds.
def _held(module: torch.nn.Module) -> dict[str, Any]:
    return {**module.state_dict(), **weights_of(module)}


def _same(name: str, values: Tensor, other: Tensor) -> bool:
    # Start values of the action are computed from the base's weights in their dtype, or rounded to it after that.
    derived = name in ("threshold", "class_noise", "value_weight", "value_bias")
    if derived:
        return values.shape == other.shape and bool(((values - other).abs() <= 2**-7 * values.abs()).all())
    return torch.equal(values, other)
