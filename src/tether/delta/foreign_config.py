"""The configuration of an adapter that PEFT has written elsewhere: which kinds a LoRA on the base stands for."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tether.delta.peft_config import MEMORIES, LoraFields, neutral
from tether.errors import CheckpointError
from tether.reading import checked

__all__ = ["MERGE", "REDONE", "Fields", "read_fields"]

_NAME = re.compile(r"\^?[A-Za-z0-9_.]{1,256}\$?")
_FREE = ("gaussian", "eva", "orthogonal", "mica")
"""Starts that leave the base as it is."""
REDONE = ("pissa", "olora")
"""Starts that take something from the base which can be computed from it again."""
MERGE = (
    "merge it into its model (PEFT: merge_and_unload, then save_pretrained, and save the tokenizer there) and leash "
    "that folder, from which a LoRA is taken"
)
"""The way out for whatever PEFT can add to weights."""
_WHICH = MEMORIES | {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
"""Fields that say which layers are adapted, how a training began, or where an adapter is from: weights say the first,
and the rest changes nothing."""

_Pattern = dict[Annotated[str, Field(max_length=256)], Annotated[float, Field(gt=0, le=1e6)]]


class Fields(LoraFields):
    """What is read of `adapter_config.json`; the rest must be empty, or is of `_WHICH`."""

    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | Annotated[str, Field(max_length=64)] = True
    rank_pattern: _Pattern | None = None
    alpha_pattern: _Pattern | None = None
    modules_to_save: list[Annotated[str, Field(max_length=256)]] | None = None
    trainable_token_indices: Any = None
    task_type: str | None = None

    @property
    def kind(self) -> str:
        """What a user would call it."""
        name = "DoRA" if self.use_dora else "LoRA"
        name = f"rs{name}" if self.use_rslora else name
        more = [self.init_lora_weights] if isinstance(self.init_lora_weights, str) else []
        more += ["bias"] if self.bias != "none" or self.lora_bias else []
        more += ["patterns"] if self.rank_pattern or self.alpha_pattern else []
        return " ".join([name, *(f"with {each}" for each in more)])


def read_fields(content: Any, where: str | Path) -> Fields:
    """Check the configuration of an adapter.

    Args:
        content: of `adapter_config.json`.
        where: what to call it in an error.

    Returns:
        Its fields.

    Raises:
        CheckpointError: another method than LoRA, another task, a start or an option that no LoRA on the base stands
            for, or no such configuration; with the reason and the way out.
    """
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise CheckpointError(
            f"{where}: expected PEFT's description of an adapter, with peft_type; take another copy"
        )
    if content["peft_type"] != "LORA":
        raise CheckpointError(
            f"{where}: {content['peft_type'][:40]!a} does more than to add a low-rank matrix to weights, which is "
            f"all that can be served and shrunk here; {MERGE}"
        )
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    known = set(Fields.model_fields)
    more = [
        field
        for field in content
        if field not in known | _WHICH and not neutral(content[field], defaults.get(field))
    ]
    if more:
        raise CheckpointError(
            f"{where}: {', '.join(map(ascii, more[:12]))}: no LoRA alone does what is asked for there; {MERGE}"
        )
    fields = checked(Fields, {field: content[field] for field in content if field in known}, where)
    _check_start(fields, where)
    if fields.task_type not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{where}: task_type {fields.task_type[:40]!a}: expected CAUSAL_LM, an adapter of a model that writes text"
        )
    odd = [
        key
        for pattern in (fields.rank_pattern, fields.alpha_pattern)
        for key in pattern or ()
        if not _NAME.fullmatch(key)
    ]
    if odd:
        raise CheckpointError(
            f"{where}: {', '.join(map(ascii, odd[:4]))} in rank_pattern or alpha_pattern: expected names of layers, "
            "since patterns from files are not searched for; write the names out, as in model.layers.0.self_attn.q_proj"
        )
    return fields


def _check_start(fields: Fields, where: str | Path) -> None:
    start = fields.init_lora_weights
    if not isinstance(start, str) or start.lower() in _FREE:
        return
    if start.lower() not in REDONE:
        raise CheckpointError(
            f"{where}: init_lora_weights {start!a}: that start changed the base, by what cannot be computed again; "
            "save the adapter with path_initial_model_for_weight_conversion, which makes it a LoRA on the base itself"
        )
    if fields.use_dora:
        raise CheckpointError(
            f"{where}: DoRA that started as {start!a} is no DoRA on the base itself; {MERGE}"
        )
