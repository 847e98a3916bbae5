"""Where an adapter to leash comes from: PEFT's folder, tether's own, or a model that was fine-tuned whole."""

from pathlib import Path
from typing import Any, NamedTuple

from tether.causal.quantising import recorded
from tether.delta.adapter import Adapter, is_adapter
from tether.delta.adapter_layers import Plain
from tether.delta.cache import backbone_print
from tether.delta.difference import check_checkpoint, difference, is_checkpoint
from tether.delta.foreign import Foreign, amounts_to, is_foreign, open_foreign
from tether.delta.foreign_config import read_fields
from tether.errors import CheckpointError

__all__ = ["Source", "Taken", "open_source", "take"]


class Source(NamedTuple):
    """An adapter to leash, read as far as no model is needed.

    Attributes:
        path: its folder.
        what: `adapter` of tether, `foreign` of PEFT, or `checkpoint` of a whole model.
        held: the adapter as it was read; None of a whole model.
    """

    path: Path
    what: str
    held: Any = None


def open_source(path: str | Path, base: str | Path = "") -> Source:
    """Find out what a folder holds, and refuse what can be refused before a model is loaded.

    Args:
        path: folder of an adapter that PEFT or tether wrote, or of a whole model.
        base: folder of the base; another name is not looked at.

    Returns:
        The source.

    Raises:
        CheckpointError: no such folder, neither of the three, or a kind or damage that is refused.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; expected one that PEFT's save_pretrained wrote (of the hub's, download it "
            "first), or that of a fine-tuned model"
        )
    if is_adapter(path):
        return Source(path, "adapter", Adapter.load(path))
    if is_foreign(path):
        return Source(path, "foreign", open_foreign(path))
    if is_checkpoint(path):
        check_checkpoint(path, base)
        return Source(path, "checkpoint")
    raise CheckpointError(
        f"{path}: neither an adapter (adapter_config.json and adapter_model.safetensors) nor a model (config.json); "
        "name the folder that save_pretrained wrote"
    )


class Taken(NamedTuple):
    """What a source is on its base.

    Attributes:
        plain: the LoRA.
        about: what the adapter's record shall say of where it is from.
        tuned: the model that was fine-tuned whole, of transformers, or None.
    """

    plain: Plain
    about: dict[str, Any]
    tuned: Any = None


def take(source: Source, model: Any, rank: int) -> Taken:
    """Find the LoRA that a source is on a base.

    Args:
        source: from `open_source`.
        model: the base, a CausalQwenForCausalLM without a fusion.
        rank: of the LoRA that is taken from a model that was fine-tuned whole.

    Returns:
        The LoRA with what is known of it.

    Raises:
        CheckpointError: it was made on another base, or cannot be a LoRA on this one.
    """
    if source.what == "adapter":
        held: Adapter = source.held
        learnt, given = held.record.get("quantised"), recorded(model)
        if learnt is not None and given is None:
            # Its drift is measured on this base, as that of an adapter which was made elsewhere.
            fields = read_fields(held.config.to_dict(), source.path)
            plain = amounts_to(Foreign(fields, held.tensors, str(source.path)), model)
            return Taken(plain, {"learnt_on": {"base": held.base, "quantised": learnt}})
        if held.base != backbone_print(model):
            raise CheckpointError(
                f"{source.path}: it was made on base {held.base[:19]}..., the model given is "
                f"{backbone_print(model)[:19]}...: name the base that it was made on"
            )
        return Taken(Plain(held.config, held.tensors, "an adapter of tether"), {})
    if source.what == "foreign":
        return Taken(amounts_to(source.held, model), {"made_on": source.held.made_on})
    found = difference(source.path, model, rank)
    about = {"kept": found.kept, "left_out": found.left_out}
    return Taken(found.plain, {"difference": about}, found.tuned)
