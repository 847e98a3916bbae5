"""An adapter that PEFT has written elsewhere: read, and made the LoRA that it amounts to, or refused with the reason.

What it amounts to is exact: on every layer B A x is added (and a bias), with scalings multiplied into B, ranks filled
up with zeros to the largest, and of starts that changed the base (PiSSA, OLoRA) what they took from it taken off again.
DoRA stays DoRA. The configuration is read by a schema, and no pattern in it is searched for: which layers are adapted
is told by the weights.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.causal.quantising import packed
from tether.delta.adapter_layers import PREFIX, Plain, Update, as_lora, linear_layers, linear_sizes
from tether.delta.foreign_config import REDONE, Fields, read_fields
from tether.errors import CheckpointError, ConfigError
from tether.reading import read_json
from tether.store.reader import CheckpointReader

__all__ = ["CONFIG", "WEIGHTS", "Foreign", "amounts_to", "is_foreign", "open_foreign", "refuse_quantised"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's names."""
_PART = re.compile(
    r"(?P<module>[A-Za-z0-9_.]+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?|(base_layer\.)?bias)"
)


class Foreign(NamedTuple):
    """An adapter as PEFT has it.

    Attributes:
        fields: of its configuration.
        tensors: its weights, under the names of PEFT's files.
        where: what to call it in an error.
        made_on: the base that it names; only said, never followed.
    """

    fields: Fields
    tensors: Mapping[str, Tensor]
    where: str
    made_on: str | None = None


def is_foreign(path: str | Path) -> bool:
    """Tell whether a path looks like PEFT's folder of an adapter, whoever wrote it.

    Args:
        path: any path.

    Returns:
        Whether one of PEFT's files is there.
    """
    return any((Path(path) / name).is_file() for name in (CONFIG, WEIGHTS, "adapter_model.bin"))


def open_foreign(folder: str | Path) -> Foreign:
    """Read an adapter's folder, which needs no model.

    Args:
        folder: written by PEFT's `save_pretrained`.

    Returns:
        The adapter.

    Raises:
        CheckpointError: a file is missing or damaged, weights are in a pickle, are quantised or hold values that are no
            numbers, or the kind is one that no LoRA stands for; with the reason and the way out.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: no {CONFIG} beside the weights: rank, scaling and kind are not known; copy the whole folder "
            "that save_pretrained wrote"
        )
    content = read_json(folder / CONFIG)
    fields = read_fields(content, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickled = (
            "the weights are in adapter_model.bin, a pickle"
            if (folder / "adapter_model.bin").is_file()
            else "none"
        )
        raise CheckpointError(
            f"{folder}: expected {WEIGHTS} ({pickled}); save it with safe_serialization=True, which is PEFT's default"
        )
    reader = CheckpointReader(folder / WEIGHTS)
    tensors = {name: reader.tensor(name) for name in reader.names}
    return Foreign(fields, tensors, str(folder), _text(content.get("base_model_name_or_path")))


@torch.no_grad()
def amounts_to(foreign: Foreign, model: Any) -> Plain:
    """Find the LoRA on a base that an adapter amounts to.

    Args:
        foreign: the adapter.
        model: the base, a CausalQwenForCausalLM without a fusion.

    Returns:
        Configuration and weights, in float32.

    Raises:
        CheckpointError: the weights are damaged or do not fit the base, or more was trained than layers below the
            output head; with the reason and the way out.
        ConfigError: the base's weights are quantised.
    """  # noqa: DOC502 - raised by refuse_quantised
    refuse_quantised(model)
    fields, where = foreign.fields, foreign.where
    backbone = model.backbone
    inside = f"{backbone.base_model_prefix}."
    modules = {inside + name: module for name, module in backbone.named_modules()}
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, values in foreign.tensors.items():
        if not values.is_floating_point():
            raise CheckpointError(
                f"{where}: {key!a} is of {values.dtype}, quantised or no weights at all; save the adapter in float32, "
                "bfloat16 or float16"
            )
        if not bool(values.float().isfinite().all()):
            raise CheckpointError(f"{where}: {key!a} holds values that are not numbers; take another copy")
        found = _PART.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if found is None:
            whole[key] = values.float()
        else:
            parts.setdefault(found["module"], {})[found["part"].removeprefix("base_layer.")] = values.float()
    _check_whole(foreign, whole, parts, model)
    updates, unfit = {}, []
    for name, some in parts.items():
        reason = _unfit(name, some, modules, fields)
        if reason is None:
            updates[name] = _update(name, some, modules[name], fields)
        elif reason:
            unfit.append(f"{name}: {reason}")
    if unfit:
        raise CheckpointError(_not_of(foreign, unfit, len(parts)))
    if not updates:
        raise CheckpointError(f"{where}: no weights of a LoRA; take another copy")
    return as_lora(updates, model, kind=fields.kind)


def refuse_quantised(model: Any) -> None:
    """Refuse a base whose weights are packed: its fingerprint and what is added to it would be of other weights.

    Args:
        model: any model of transformers, or a CausalQwenForCausalLM.

    Raises:
        ConfigError: it is.
    """
    backbone = getattr(model, "backbone", None)
    if getattr(model, "is_quantized", False) or (backbone is not None and packed(backbone) is not None):
        raise ConfigError(
            "the base's weights are quantised: expected them in float32, bfloat16 or float16, as the adapter's "
            "strength is measured on; name the checkpoint that it was quantised from"
        )


# What was trained whole is refused, unless it is the base's own, as PEFT saves embeddings beside adapters of them.
def _check_whole(foreign: Foreign, whole: dict[str, Tensor], parts: dict[str, Any], model: Any) -> None:
    inside = f"{model.backbone.base_model_prefix}."
    own = {inside + name: values for name, values in model.backbone.state_dict().items()}
    linear = linear_layers(model)
    trained = []
    for name, some in list(parts.items()):
        bias = some.get("bias")
        if bias is not None and _same(bias, own.get(f"{name}.bias")):
            del some["bias"]
        elif bias is not None and name not in linear and f"{name}.bias" in own:
            del some["bias"]
            trained.append(f"{name}.bias")
        if not some:
            del parts[name]
    for key, values in whole.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if not _same(values, own.get(name, model.action.weight)):
            trained.append(name)
    if not trained:
        return
    named = ", ".join(map(ascii, trained[:4])) + (f" and {len(trained) - 4} more" if len(trained) > 4 else "")
    if not all(key.startswith(PREFIX) for key in whole):
        raise CheckpointError(
            f"{foreign.where}: {named}: no names of a causal LM's adapter ({PREFIX}...); take another copy"
        )
    if any("embed" in name or "lora_embedding" in name or "token_adapter" in name for name in trained):
        why = "the embedding of tokens was trained, which base and domains share here, often with the output head"
    else:
        why = "it was trained whole; what is shrunk and served here is what is added to layers below the output head"
    raise CheckpointError(
        f"{foreign.where}: {named}: {why}; train without modules_to_save, trainable_token_indices, embeddings among "
        "the target_modules, and with bias='none' or 'lora_only'"
    )


def _same(values: Tensor, own: Tensor | None) -> bool:
    return own is not None and own.shape == values.shape and torch.equal(values.to(own), own)


# Why a layer's weights cannot be what is read of them; None where they can, empty where they say nothing.
def _unfit(
    name: str, some: dict[str, Tensor], modules: Mapping[str, nn.Module], fields: Fields
) -> str | None:
    module = modules.get(name)
    if module is None:
        return "the base has no such layer"
    weight = getattr(module, "weight", None)
    sizes = linear_sizes(module)
    if sizes is None:
        return f"in the base it is a {type(module).__name__}, no linear layer"
    a, b, bias = some.get("lora_A.weight"), some.get("lora_B.weight"), some.get("bias")
    if a is None and b is None and bias is not None:
        return None if bias.shape == (sizes[1],) else "its bias has another size"
    if a is None or b is None:
        return "one of lora_A and lora_B is missing"
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
        return f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not multiply"
    if not fields.rank_pattern and a.shape[0] != fields.r:
        return f"rank {a.shape[0]}, where {fields.r} is described"
    if (a.shape[1], b.shape[0]) != sizes:
        return f"made for {a.shape[1]} to {b.shape[0]} numbers, in the base it is {sizes[0]} to {sizes[1]}"
    lengths = some.get("lora_magnitude_vector", some.get("lora_magnitude_vector.weight"))
    for values in (bias, some.get("lora_B.bias"), lengths):
        if values is not None and values.shape != (sizes[1],):
            return f"a vector of {tuple(values.shape)}, where the layer gives {sizes[1]} numbers"
    if (lengths is not None) != fields.use_dora:
        return "lengths of rows are there where no DoRA is described, or the other way round"
    if bias is not None and getattr(module, "bias", None) is None:
        return "a bias, where the base has none"
    return None if weight is not None else "the base's layer has no weight"


def _update(name: str, some: dict[str, Tensor], module: nn.Module, fields: Fields) -> Update:
    sizes = linear_sizes(module)
    assert sizes is not None
    weight: Any = module.weight
    own: Any = getattr(module, "bias", None)
    moved = None if "bias" not in some else some["bias"] - own.float().cpu()
    if "lora_A.weight" not in some:
        return Update(torch.zeros(1, sizes[0]), torch.zeros(sizes[1], 1), moved)
    a, b, rank = some["lora_A.weight"], some["lora_B.weight"], some["lora_A.weight"].shape[0]
    scaling = _alpha(name, fields) / (rank**0.5 if fields.use_rslora else rank)
    a, b = a, scaling * b
    if "lora_B.bias" in some:
        moved = scaling * some["lora_B.bias"] + (0.0 if moved is None else moved)
    start = fields.init_lora_weights
    if isinstance(start, str) and start.lower() in REDONE:
        whole = (weight if isinstance(module, nn.Linear) else weight.T).float()
        first, second = _pissa(whole, rank) if start.lower() == "pissa" else _olora(whole, rank, scaling)
        a, b = torch.cat([a, first.cpu()]), torch.cat([b, -second.cpu()], dim=1)
    lengths = some.get("lora_magnitude_vector", some.get("lora_magnitude_vector.weight"))
    return Update(a, b, moved, lengths)


# As PEFT has it: the first pattern that names the layer, else the one for all.
def _alpha(name: str, fields: Fields) -> float:
    for key, alpha in (fields.alpha_pattern or {}).items():
        plain = key.strip("^$")
        if name == plain or (not key.startswith("^") and name.endswith(f".{plain}")):
            return alpha
    return fields.lora_alpha


# What PiSSA takes from a weight: its largest singular values (Meng et al. 2024, arXiv:2404.02948).
def _pissa(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


# What OLoRA takes from it: the first columns and rows of its QR (Büyükakyüz 2024, arXiv:2406.01775).
def _olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank], scaling * q[:, :rank]


def _not_of(foreign: Foreign, unfit: list[str], count: int) -> str:
    said = f" It says that it was made on {foreign.made_on!a}." if foreign.made_on else ""
    heads = [line for line in unfit if "lm_head" in line or "embed_out" in line]
    out = (
        "train it without the output head among its target_modules, which base and domains share here"
        if len(heads) == len(unfit)
        else "name the base that it was made on, or take another copy"
    )
    first = "; ".join(unfit[:3])
    return f"{foreign.where}: {len(unfit)} of its {count} layers do not fit this base: {first}.{said} {out}"


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value else None
