"""PEFT's `adapter_config.json`, read without PEFT: LoRA alone, and no field that could run or search anything.

PEFT's own reader imports the package that `megatron_core` names, and searches the model's modules by regular
expressions from the file. Neither can be reached from here.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from tether.errors import CheckpointError, ConfigError
from tether.reading import Strict, checked, read_json

__all__ = ["MEMORIES", "LoraFields", "check_ranks", "neutral", "read_lora"]

MODULES = 4096
"""Names of modules in a configuration at most."""
MEMORIES = {
    "peft_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
}
"""Fields that say where an adapter came from, or how it was last used: they are not followed."""

_Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,256}$")]


class LoraFields(Strict):
    """The fields that are read of any LoRA."""

    r: Annotated[int, Field(ge=1, le=65_536)]
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False


class _Lora(LoraFields):
    """The fields that are used."""

    target_modules: Annotated[list[_Module], Field(min_length=1, max_length=MODULES)] | Literal["all-linear"]
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"


def read_lora(path: Path) -> Any:
    """Read the configuration of a LoRA adapter.

    Args:
        path: `adapter_config.json`.

    Returns:
        PEFT's `LoraConfig`, with the fields r, lora_alpha, lora_dropout, use_rslora, use_dora, lora_bias,
        fan_in_fan_out, target_modules and task_type from the file.

    Raises:
        CheckpointError: the file cannot be read, describes anything but a LoRA, names modules by a pattern, or sets a
            field of PEFT's that is not among these to anything but its default.
        ConfigError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            "adapters need the package peft, which is not installed: pip install 'tether[adapters]'"
        ) from error
    content = read_json(path)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: expected PEFT's description of a LoRA; other adapters are not read")
    if isinstance(content.get("target_modules"), str) and content["target_modules"] != "all-linear":
        raise CheckpointError(
            f"{path}: target_modules is a pattern; expected a list of names, or all-linear: patterns from files are "
            "not searched for"
        )
    defaults = LoraConfig(task_type="CAUSAL_LM").to_dict()
    used, other = set(_Lora.model_fields), MEMORIES
    refused = [
        field
        for field, value in content.items()
        if field not in used | other and not neutral(value, defaults.get(field))
    ]
    if refused:
        raise CheckpointError(
            f"{path}: {', '.join(map(ascii, refused[:12]))}: expected a plain LoRA, which leaves these out; of an "
            "adapter made elsewhere 'tether leash' makes one, or learn it again with 'tether learn --adapter lora'"
        )
    lora = checked(_Lora, {field: content[field] for field in content if field in used}, path)
    whole = lora.lora_alpha.is_integer()
    fields = {**lora.model_dump(), "lora_alpha": int(lora.lora_alpha) if whole else lora.lora_alpha}
    return LoraConfig(**fields, inference_mode=bool(content.get("inference_mode")))


def neutral(value: Any, default: Any) -> bool:
    """Tell whether a field of a configuration says nothing, whether this version of PEFT knows it or not.

    Args:
        value: of the field.
        default: PEFT's, None where it knows none.

    Returns:
        Whether it is empty, or the default.
    """
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        default = dataclasses.asdict(default)
    return (
        value in (None, False) or value in ([], {}, "") or (type(value) is type(default) and value == default)
    )


def check_ranks(config: Any, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse weights of another rank than is described, before a model is given layers of that rank.

    Args:
        config: from `read_lora`.
        tensors: PEFT's state dict of the adapter.
        where: the folder, for the message.

    Raises:
        CheckpointError: tensors that are none of a LoRA's, are of another rank, or hold no numbers.
    """
    ranks: dict[str, tuple[int | None, ...]] = {
        ".lora_A.weight": (config.r, None),
        ".lora_B.weight": (None, config.r),
    }
    if config.lora_bias:
        ranks[".lora_B.bias"] = (None,)
    if config.use_dora:
        ranks[".lora_magnitude_vector"] = (None,)
    for name, values in tensors.items():
        expected = next((sizes for end, sizes in ranks.items() if name.endswith(end)), None)
        sizes = tuple(values.shape)
        if (
            expected is None
            or len(sizes) != len(expected)
            or any(size not in (None, found) for size, found in zip(expected, sizes, strict=True))
            or not values.is_floating_point()
        ):
            raise CheckpointError(
                f"{where}: {name!a} of shape {tuple(values.shape)}: expected a LoRA of rank {config.r}; take "
                "another copy, or learn it again"
            )
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{where}: {name!a} holds values that are not numbers; take another copy")
    if not tensors:
        raise CheckpointError(f"{where}: no weights; take another copy, or learn it again")
