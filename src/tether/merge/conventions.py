"""What configs say that shapes do not: models of equal tensors may still compute different functions."""

from typing import Any, Final

from tether.merge.opening import Opened
from tether.merge.recipe import Recipe

__all__ = ["compare_conventions"]

_SMALL: Final = 1e-4
"""Up to here another epsilon of the norms is a matter of rounding."""


def compare_conventions(recipe: Recipe, opened: dict[str, Opened]) -> tuple[list[str], list[str]]:
    """Compare every model's config with that of the result.

    Equal shapes do not say how many heads a projection is cut into, how positions turn them, or what the norms
    mean. Weights that were learnt under another convention are another function under that of ``into``.

    Args:
        recipe: the recipe.
        opened: its models.

    Returns:
        Problems and notes, one sentence each. What a config leaves out is not compared; of models that are
        aligned the differences are notes, since the maps choose heads by what they do.
    """
    own = opened.get(recipe.skeleton)
    problems: list[str] = []
    notes: list[str] = []
    if own is None or not own.folder.config:
        return problems, notes
    wanted = _conventions(own.folder.config)
    for name, model in opened.items():
        have = _conventions(model.folder.config)
        differing = {
            key: (have[key], wanted[key]) for key in wanted if key in have and have[key] != wanted[key]
        }
        epsilon = differing.get("norm epsilon")
        if epsilon and max(epsilon) <= _SMALL:
            notes.append(
                f"{name}: norm epsilon {epsilon[0]:g}; that of {own.name}, {epsilon[1]:g}, will be used"
            )
            del differing["norm epsilon"]
        if not differing:
            continue
        listed = ", ".join(f"{key} {mine} instead of {theirs}" for key, (mine, theirs) in differing.items())
        said = f"{name}: its config has {listed} in {own.name}"
        if recipe.inputs[name].align:
            notes.append(f"{said}; the result is read as {own.name}'s says")
        else:
            problems.append(
                f"{said}; read as {own.name}'s says, its weights are another function. Merge models of one "
                "convention, or align it"
            )
    return problems, notes


def _conventions(config: dict[str, Any]) -> dict[str, Any]:
    text = {**config, **(config.get("text_config") or {})}
    found: dict[str, Any] = {}
    kind = str(text.get("model_type") or "")
    if kind:
        # Gemma's norms multiply by 1 + w, and its embeddings are scaled.
        found["family"] = "gemma" if kind.startswith("gemma") else "llama-like"
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    if heads:
        found["attention heads"] = heads
        found["key-value heads"] = text.get("num_key_value_heads") or heads
        if text.get("head_dim") or hidden:
            found["head size"] = text.get("head_dim") or hidden // heads
    if act := text.get("hidden_act") or text.get("hidden_activation"):
        found["activation"] = {"swish": "silu"}.get(act, act)
    if (epsilon := text.get("rms_norm_eps")) is not None:
        found["norm epsilon"] = float(epsilon)
    return found | _rope(text)


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes one entry where earlier versions wrote two.
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in given.values()):
        return {
            "rope": {kind: sorted(each.items()) for kind, each in given.items() if isinstance(each, dict)}
        }
    theta = given.get("rope_theta", text.get("rope_theta"))
    kind = given.get("rope_type") or given.get("type") or "default"
    rest = {
        k: v
        for k, v in sorted(given.items())
        if k not in {"rope_theta", "rope_type", "type"} and v is not None
    }
    found: dict[str, Any] = {} if theta is None else {"rope theta": float(theta)}
    if theta is not None or given:
        found["rope scaling"] = "none" if kind == "default" else f"{kind} {rest}"
    return found
