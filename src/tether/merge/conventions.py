"""What configs say that shapes do not: models of equal tensors may still compute different functions."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from tether.merge.opening import Opened, few
from tether.merge.recipe import Recipe

__all__ = ["compare_conventions"]

_PARTS: Final = ("text_config", "backbone_config")
"""Where a config of a larger model keeps that of its language model."""

_LONG: Final = 80
"""Characters of a value in a message."""

_SMALL: Final = 1e-4
"""Up to here another epsilon of the norms is a matter of rounding."""

_HARMLESS: Final = (
    # Where a config comes from, and how it was written.
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "unsloth_version", "unsloth_fixed",
    "architectures", "dtype", "torch_dtype",
    # What the planner compares in headers and bytes, or `_derived` under another name.
    "tie_word_embeddings", "quantization_config", "rope_parameters.type",
    # Of training, and of what a forward pass gives back beside its logits.
    "initializer_range", "initializer_factor", "init_std", "*dropout*", "*_pdrop", "*aux_loss*", "pretraining_tp",
    "gradient_checkpointing", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "use_return_dict", "torchscript", "chunk_size_feed_forward", "use_cache", "attn_implementation",
    "_attn_implementation*", "cache_implementation",
    # Of classifiers.
    "id2label*", "label2id*", "problem_type", "num_labels", "finetuning_task",
)  # fmt: skip
"""Keys, as globs, that no logit of given weights depends on."""

_NOTED: Final = (
    "*_token_id", "*_token_index", "max_position_embeddings", "model_max_length", "tokenizer_class",
    "task_specific_params*", "auto_map*",
)  # fmt: skip
"""Keys that change no logit of a text but what surrounds it: where a generation ends, which code is loaded."""

_LENGTHS: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "attention",
)
"""What aligned models are expected to differ in."""

_FAMILIES: Final = {
    "mistral": "llama",
    "qwen2_vl": "qwen2", "qwen2_vl_text": "qwen2", "qwen2_5_vl": "qwen2", "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3", "gemma3_text": "gemma3",
}  # fmt: skip
"""Model types that compute the same function from the same tensors and options."""

_IMAGES: Final = ("rope_parameters.mrope_section", "rope_parameters.mrope_interleaved")
"""Axes of images among rotary pairs: on a text all axes agree, so a model without images may lack them."""

_ROPE_MADE_FOR_LENGTH: Final = {"dynamic", "longrope", "yarn", "llama3"}
"""Rotary scalings that read the longest context from the config."""


def compare_conventions(recipe: Recipe, opened: dict[str, Opened]) -> tuple[list[str], list[str]]:
    """Compare every model's config with that of the result.

    Equal shapes do not say how many heads a projection is cut into, how positions turn them, how far attention
    reaches, how many experts answer, or what the logits are multiplied by. Weights that were learnt under another
    convention are another function under that of ``into``. So every key counts, but for a list of harmless ones.
    Keys that a config leaves out have the value that transformers gives them.

    Args:
        recipe: the recipe; with ``conventions: into`` nothing is refused.
        opened: its models.

    Returns:
        Problems and notes, one sentence each. Of models that are aligned the differences are notes, since the maps
        choose heads by what they do.
    """
    own = opened.get(recipe.skeleton)
    problems: list[str] = []
    notes: list[str] = []
    if own is None:
        return problems, notes
    unknown = [name for name, model in opened.items() if not model.folder.config]
    others = [name for name in opened if name != own.name and name not in unknown]
    if unknown and len(unknown) < len(opened):
        notes.append(f"configs not compared, no config.json beside the weights: {', '.join(unknown)}")
    for name in others if own.folder.config else ():
        mine, theirs = opened[name].folder.config, own.folder.config
        differing = _differences(mine, theirs)
        outside = _outside(mine, theirs)
        if recipe.towers == "merge":
            differing |= outside
        elif outside:
            notes.append(
                f"{name}: outside its language model its config differs in {few(sorted(outside))}; that of {own.name} "
                "will be used"
            )
        aligned = recipe.inputs[name].align is not None
        if aligned:
            differing = {key: both for key, both in differing.items() if key not in _LENGTHS}
        told = {key: _told(*both) for key, both in differing.items()}
        noted = [key for key, both in differing.items() if _is_noted(key, both)]
        notes += [
            f"{name}: {key} {told[key][0]}; that of {own.name}, {told[key][1]}, will be used" for key in noted
        ]
        wrong = [key for key in differing if key not in noted]
        if not wrong:
            continue
        listed = ", ".join(f"{key} {told[key][0]} instead of {told[key][1]}" for key in wrong)
        said = f"{name}: its config has {listed} in {own.name}"
        if aligned or recipe.conventions == "into":
            notes.append(f"{said}; the result is read as {own.name}'s says")
        else:
            problems.append(
                f"{said}; read as {own.name}'s says, its weights are another function. Merge models of one "
                "convention, align it, or give conventions: into to merge them all the same"
            )
    return problems, notes


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    # Most fine-tunes have the config of their parent, and completing one costs seconds of imports.
    pair = (_language(mine), _language(theirs))
    if not _unequal(*(_flat(each) for each in pair)):
        return {}
    complete = (_completed(mine), _completed(theirs))
    if complete[0] is not None and complete[1] is not None:
        pair = (complete[0], complete[1])
    return _unequal(*(_flat(_derived(each)) for each in pair))


# The part of a config that the language model is made from.
def _language(config: dict[str, Any]) -> dict[str, Any]:
    for part in _PARTS:
        if inner := config.get(part):
            return dict(inner)
    return config


# What two models with other parts, such as eyes, say of these parts.
def _outside(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    both = [{key: value for key, value in each.items() if key not in _PARTS} for each in (mine, theirs)]
    if any(len(rest) == len(each) for rest, each in zip(both, (mine, theirs), strict=True)):
        return {}
    return _unequal(*map(_flat, both))


# What transformers makes of a config: defaults filled in, earlier spellings translated; None if it cannot.
def _completed(config: dict[str, Any]) -> dict[str, Any] | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "backbone_config" in config:
        config = _language(config)
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        complete: dict[str, Any] = made.get_text_config(decoder=True).to_dict()
    except Exception:
        # Configs of code that transformers does not have, or that its validators refuse, are compared as written.
        return None
    return complete


# Several keys that say one thing become one.
def _derived(config: dict[str, Any]) -> dict[str, Any]:
    made = dict(config)
    if kind := str(made.pop("model_type", None) or ""):
        made["family"] = _FAMILIES.get(kind, kind)
    heads, hidden = made.get("num_attention_heads"), made.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        made["num_key_value_heads"] = made.get("num_key_value_heads") or heads
        if isinstance(hidden, int):
            made["head_dim"] = made.get("head_dim") or hidden // heads
    for key in ("hidden_act", "hidden_activation"):
        if made.get(key) == "swish":
            made[key] = "silu"
    rope = made.get("rope_parameters")
    if isinstance(rope, dict):
        scalings = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
        if rope.get("rope_type") == "mrope":
            made["rope_parameters"] = rope | {"rope_type": "default"}
        if scalings & _ROPE_MADE_FOR_LENGTH:
            made["context that rope is made for"] = made.get("max_position_embeddings")
    return _attention(made)


# How far each layer looks, told once for a model whose layers agree.
def _attention(made: dict[str, Any]) -> dict[str, Any]:
    window, kinds = made.pop("sliding_window", None), made.pop("layer_types", None)
    if isinstance(kinds, list):
        each = [f"{kind} {window}" if kind == "sliding_attention" else str(kind) for kind in kinds]
        # The list was made from these.
        for key in (
            "use_sliding_window",
            "max_window_layers",
            "sliding_window_pattern",
            "_sliding_window_pattern",
        ):
            made.pop(key, None)
    else:
        each = ["full_attention" if window is None else f"sliding_attention {window}"]
    made["attention"] = each[0] if len(set(each)) == 1 else each
    return made


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _unequal(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    both = {key: (mine.get(key), theirs.get(key)) for key in sorted({*mine, *theirs})}
    return {
        key: pair
        for key, pair in both.items()
        if not any(fnmatchcase(key, pattern) for pattern in _HARMLESS)
        and _value(key, pair[0]) != _value(key, pair[1])
        and not (key in _IMAGES and None in pair)
    }


# Absent, null, off, and a factor of 1 are the same.
def _value(key: str, value: Any) -> Any:
    one = value == 1 and value is not True and key.endswith(("multiplier", "_scale", "scaling", "factor"))
    return None if value is None or value is False or one else value


def _is_noted(key: str, both: tuple[Any, Any]) -> bool:
    if "eps" in key:
        return all(isinstance(each, float) and each <= _SMALL for each in both)
    return any(fnmatchcase(key, pattern) for pattern in _NOTED)


# Of two long values, the part in which they differ.
def _told(mine: Any, theirs: Any) -> list[str]:
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in (mine, theirs)]
    if max(map(len, texts)) <= _LONG:
        return texts
    same = next((place for place, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, same - _LONG // 4)
    stop = start + _LONG
    return [f"{'...' * (start > 0)}{text[start:stop]}{'...' * (len(text) > stop)}" for text in texts]
