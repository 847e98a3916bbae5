"""Which axis of which tensor indexes what: the structure of a decoder, as data.

Two axes that index the same units must be permuted, cut and matched together. Each axis of a tensor is given
as the factors of its index, outermost first:

| factor | what it counts | a map of it | may differ by |
|---|---|---|---|
| ``vocab`` | tokens: rows of the embedding and of the head | reorders tokens | - |
| ``residual`` | the stream that all layers read and write | one for the whole model | - |
| ``mlp`` | hidden units: row of gate, row of up, column of down | a layer | - |
| ``group`` | key-value heads, each with its query heads | a layer | - |
| ``query`` | query heads within a group | a layer | group |
| ``value`` | dimensions of a value head | a layer | group |
| ``rope`` | dimensions of a query or key head | fixed: each pair has its own frequency | - |

Tied embeddings share one tensor and so its axes. RMS norms commute with permutations of what they normalise.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from tether.errors import CheckpointError

__all__ = ["AXES", "FACTORS", "Sizes", "Tower", "axes_of", "find_tower", "layer_of", "sizes"]

Axis = tuple[str, ...]

FACTORS: Final = ("vocab", "residual", "mlp", "group", "query", "value", "rope")
"""All factors of axes."""

_RESIDUAL: Axis = ("residual",)
_QUERIES: Axis = ("group", "query", "rope")

AXES: Final[dict[str, tuple[Axis, ...]]] = {
    "embed_tokens.weight": (("vocab",), _RESIDUAL),
    "lm_head.weight": (("vocab",), _RESIDUAL),
    "norm.weight": (_RESIDUAL,),
    "layers.*.input_layernorm.weight": (_RESIDUAL,),
    "layers.*.post_attention_layernorm.weight": (_RESIDUAL,),
    "layers.*.self_attn.q_proj.weight": (_QUERIES, _RESIDUAL),
    "layers.*.self_attn.q_proj.bias": (_QUERIES,),
    "layers.*.self_attn.k_proj.weight": (("group", "rope"), _RESIDUAL),
    "layers.*.self_attn.k_proj.bias": (("group", "rope"),),
    "layers.*.self_attn.v_proj.weight": (("group", "value"), _RESIDUAL),
    "layers.*.self_attn.v_proj.bias": (("group", "value"),),
    "layers.*.self_attn.o_proj.weight": (_RESIDUAL, ("group", "query", "value")),
    "layers.*.self_attn.o_proj.bias": (_RESIDUAL,),
    "layers.*.self_attn.q_norm.weight": (("rope",),),
    "layers.*.self_attn.k_norm.weight": (("rope",),),
    "layers.*.mlp.gate_proj.weight": (("mlp",), _RESIDUAL),
    "layers.*.mlp.gate_proj.bias": (("mlp",),),
    "layers.*.mlp.up_proj.weight": (("mlp",), _RESIDUAL),
    "layers.*.mlp.up_proj.bias": (("mlp",),),
    "layers.*.mlp.down_proj.weight": (_RESIDUAL, ("mlp",)),
    "layers.*.mlp.down_proj.bias": (_RESIDUAL,),
}
"""Canonical tensor name, ``*`` for the layer, to its axes: Llama, Mistral, Qwen2, Qwen3 and their relatives."""

# Last linear maps of what feeds a vision tower's output into the stream, by the end of their names.
_PROJECTORS: Final = (
    "multi_modal_projector.linear_2",  # Llava
    "multi_modal_projector.linear",
    "visual.merger.mlp.2",  # Qwen2-VL, Qwen2.5-VL
    "visual.merger.linear_fc2",  # Qwen3-VL
)
_DEEPSTACK: Final = re.compile(r"visual\.deepstack_merger_list\.\d+\.linear_fc2$")
_LAYER: Final = re.compile(r"layers\.(\d+)\.")
_FIRST: Final = "layers.0.self_attn.q_proj.weight"


class Tower(NamedTuple):
    """Where the language model lies among the tensors of a checkpoint.

    Attributes:
        names: canonical name (``layers.0.mlp.up_proj.weight``, ``lm_head.weight``) to the checkpoint's own.
        others: names outside it: vision towers, projectors.
        layers: how many layers it has.
    """

    names: dict[str, str]
    others: tuple[str, ...]
    layers: int


class Sizes(NamedTuple):
    """Lengths of the factors of one decoder; ``query`` counts the query heads of a group."""

    vocab: int
    residual: int
    mlp: int
    group: int
    query: int
    value: int
    rope: int


def find_tower(names: Iterable[str]) -> Tower | None:
    """Find the language model by its structure, whatever its prefix.

    It is what has decoder layers with gated MLPs and an embedding beside them; a vision tower has not.

    Args:
        names: of all tensors.

    Returns:
        The tower; None where nothing looks like one, or several things do.

    Example:
        >>> parts = ("embed_tokens", "layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj")
        >>> tower = find_tower([f"model.language_model.{part}.weight" for part in parts] + ["lm_head.weight"])
        >>> tower.layers, sorted(tower.names)[-1], tower.names["lm_head.weight"]
        (1, 'lm_head.weight', 'lm_head.weight')
    """
    names = tuple(names)
    present = set(names)
    prefixes = [
        prefix
        for prefix in (name.removesuffix(_FIRST) for name in names if name.endswith(_FIRST))
        if {f"{prefix}layers.0.mlp.gate_proj.weight", f"{prefix}embed_tokens.weight"} <= present
    ]
    if len(prefixes) != 1:
        return None
    prefix = prefixes[0]
    stems = tuple(prefix + stem for stem in ("layers.", "embed_tokens.", "norm."))
    inside = {name.removeprefix(prefix): name for name in names if name.startswith(stems)}
    heads = [name for name in names if name.split(".")[-2:] == ["lm_head", "weight"]]
    if len(heads) == 1:
        inside["lm_head.weight"] = heads[0]
    taken = set(inside.values())
    layers = {int(found[1]) for name in inside if (found := _LAYER.match(name))}
    return Tower(inside, tuple(name for name in names if name not in taken), max(layers) + 1)


def layer_of(canonical: str) -> int | None:
    """Give the layer of a canonical name.

    Args:
        canonical: such as ``layers.3.mlp.up_proj.weight``.

    Returns:
        Its number from 0; None outside the layers.
    """
    found = _LAYER.match(canonical)
    return int(found[1]) if found else None


def axes_of(name: str) -> tuple[Axis, ...] | None:
    """Look up the axes of a tensor.

    Args:
        name: canonical inside a language tower, the checkpoint's own outside it.

    Returns:
        Its axes; None where none of them indexes units of the language tower, or it is not known.

    Example:
        >>> axes_of("layers.7.mlp.down_proj.weight")
        (('residual',), ('mlp',))
        >>> axes_of("model.multi_modal_projector.linear_2.bias")
        (('residual',),)
    """
    known = AXES.get(_LAYER.sub("layers.*.", name, count=1) if name.startswith("layers.") else name)
    if known:
        return known
    module, _, kind = name.rpartition(".")
    if module.endswith(_PROJECTORS) or _DEEPSTACK.search(module):
        return {"weight": (_RESIDUAL, ()), "bias": (_RESIDUAL,)}.get(kind)
    return None


def sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str) -> Sizes:
    """Read the lengths of the factors from a model's config and the shapes of its tensors.

    Args:
        config: ``config.json``; of a vision-language model too.
        shapes: canonical name to shape.
        what: what to call the model in an error.

    Returns:
        The lengths.

    Raises:
        CheckpointError: If the config names no heads, or the shapes do not fit it.
    """
    text = config.get("text_config") or config
    heads: Any = text.get("num_attention_heads")
    groups: Any = text.get("num_key_value_heads") or heads
    size = text.get("head_dim") or 1
    if any(
        not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in (heads, groups, size)
    ):
        raise CheckpointError(
            f"{what}: config.json has num_attention_heads {heads!r}, num_key_value_heads {groups!r} and head_dim "
            f"{size!r}; expected the positive whole numbers of a Llama- or Qwen-like decoder"
        )
    rows = shapes[_FIRST][0]
    rope = text.get("head_dim") or rows // heads
    vocab, residual = shapes["embed_tokens.weight"]
    values = shapes["layers.0.self_attn.v_proj.weight"][0]
    found = Sizes(
        vocab=vocab,
        residual=residual,
        mlp=shapes["layers.0.mlp.gate_proj.weight"][0],
        group=groups,
        query=heads // groups,
        value=values // groups,
        rope=rope,
    )
    lengths = found._asdict()
    wrong = []
    for name, shape in shapes.items():
        axes = axes_of(name)
        expected = tuple(_product(lengths, axis) for axis in axes) if axes else shape
        if expected != shape:
            wrong.append(f"{name} {shape}, expected {expected}")
    if wrong:
        raise CheckpointError(
            f"{what}: {len(wrong)} tensors do not fit config.json ({'; '.join(wrong[:4])}); check that they "
            "belong together"
        )
    return found


def _product(lengths: Mapping[str, int], axis: Axis) -> int:
    product = 1
    for factor in axis:
        product *= lengths[factor]
    return product
