"""A model that was fine-tuned whole, as a LoRA on its base: what its linear layers have moved by, in low rank."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.loading import load_backbone
from tether.delta.adapter_layers import Plain, Update, as_lora, linear_layers
from tether.delta.foreign import refuse_quantised
from tether.errors import CheckpointError, ConfigError
from tether.files import read_bytes
from tether.reading import JSON_BYTES, parse_json

__all__ = ["Difference", "check_checkpoint", "difference", "is_checkpoint"]

SPARE = 8
"""Columns beyond the rank that the decomposition looks at, and how often it goes back and forth: the error of a kept
singular value is then far below that of leaving the others out (Halko et al. 2011, arXiv:0909.4061, section 4.5)."""
ROUNDS = 4


class Difference(NamedTuple):
    """What was taken from a fine-tuned model.

    Attributes:
        plain: the LoRA.
        kept: share of the squared size of all linear layers' changes that it holds, in [0, 1].
        left_out: for other weights that changed (norms, embeddings, the output head), the size of the change over their
            own; the LoRA has none of it.
        tuned: the fine-tuned model, of transformers.
    """

    plain: Plain
    kept: float
    left_out: dict[str, float]
    tuned: Any


def is_checkpoint(path: str | Path) -> bool:
    """Tell whether a path is the folder of a whole model.

    Args:
        path: any path.

    Returns:
        Whether it has a config.
    """
    return (Path(path) / "config.json").is_file()


def check_checkpoint(folder: str | Path, base: str | Path) -> None:
    """Refuse by their configs what cannot be the same model fine-tuned, before either is loaded.

    Args:
        folder: of the fine-tuned model.
        base: folder of the base; another name is not looked at.

    Raises:
        CheckpointError: quantised weights, or sizes that differ.
    """
    tuned = _config(Path(folder))
    if tuned.get("quantization_config"):
        raise CheckpointError(
            f"{folder}: its weights are quantised, so what was learnt cannot be told from rounding; give the "
            "checkpoint that it was quantised from"
        )
    if not is_checkpoint(base):
        return
    own = _config(Path(base))
    sizes = (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    differ = [name for name in sizes if tuned.get(name) != own.get(name)]
    if differ:
        named = ", ".join(
            f"{name} {tuned.get(name)!a:.40} where the base has {own.get(name)!a:.40}" for name in differ
        )
        raise CheckpointError(
            f"{folder}: {named}: expected the same model, fine-tuned; name the base that it was made of, and train "
            "without new tokens"
        )


def _config(folder: Path) -> dict[str, Any]:
    content = parse_json(read_bytes(folder / "config.json", JSON_BYTES), folder / "config.json", foreign=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected a JSON object; take another copy")
    return content


@torch.no_grad()
def difference(folder: str | Path, model: Any, rank: int, seed: int = 0) -> Difference:
    """Take a LoRA from a fine-tuned model: of each linear layer's change the part of largest singular values.

    That is the best approximation of its rank (Eckart and Young). What changed elsewhere is left out. Changes of biases
    are kept whole.

    Cost: the fine-tuned model in memory, and for each layer 2 ROUNDS + 2 products of its change with rank + SPARE
    columns.

    Args:
        folder: of the fine-tuned model.
        model: the base, a CausalQwenForCausalLM without a fusion.
        rank: of the LoRA, >= 1; layers with a smaller side have that one.
        seed: of the columns that the decomposition begins with.

    Returns:
        The LoRA and what it has of the change.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, has other parts or sizes than the base, holds values that are
            no numbers, or is the base.
        ConfigError: a rank below 1, or weights of the base that are quantised.
    """
    refuse_quantised(model)
    if rank < 1:
        raise ConfigError(f"rank={rank}: expected a positive number")
    tuned, _ = load_backbone(str(folder))
    refuse_quantised(tuned)
    if isinstance(tuned, type(model)):
        raise CheckpointError(
            f"{folder}: a checkpoint of tether, with heads of its own; expected a fine-tuned causal LM as transformers "
            "has it"
        )
    inner = getattr(tuned, tuned.base_model_prefix)
    own, other = model.backbone.state_dict(), inner.state_dict()
    unlike = sorted(name for name in own.keys() | other.keys() if _shape(own, name) != _shape(other, name))
    if type(inner) is not type(model.backbone) or unlike:
        named = ", ".join(
            f"{name} {_shape(other, name)} where the base has {_shape(own, name)}" for name in unlike[:3]
        )
        kinds = f"a {type(inner).__name__}, the base is a {type(model.backbone).__name__}"
        raise CheckpointError(
            f"{folder}: {kinds}; {named or 'other parts'}: expected the same model, fine-tuned; name the base that "
            "it was made of"
        )
    inside = f"{model.backbone.base_model_prefix}."
    updates: dict[str, Update] = {}
    done: set[str] = set()
    whole = kept = 0.0
    for name, module in linear_layers(model).items():
        at = name.removeprefix(inside)
        done |= {f"{at}.weight", f"{at}.bias"}
        weight: Any = module.weight
        change = _change(other[f"{at}.weight"], weight, folder, name)
        change = change if isinstance(module, torch.nn.Linear) else change.T
        bias: Any = getattr(module, "bias", None)
        moved = None if bias is None else _change(other[f"{at}.bias"], bias, folder, name)
        moved = None if moved is None or not bool(moved.any()) else moved
        size = float(change.double().square().sum())
        if size == 0 and moved is None:
            continue
        b, a, held = _truncated(change, rank, seed)
        updates[name] = Update(a, b, moved)
        whole, kept = whole + size, kept + held
    left_out = {
        inside + name: _relative(other[name], values) for name, values in own.items() if name not in done
    } | {"the output head": _relative(tuned.get_output_embeddings().weight, model.action.weight)}
    left_out = {name: size for name, size in left_out.items() if size > 0}
    if not updates:
        changed = f" (what changed: {', '.join(left_out)})" if left_out else ""
        raise CheckpointError(
            f"{folder}: its linear layers are those of the base{changed}: there is nothing to leash"
        )
    plain = as_lora(updates, model, kind=f"a fine-tuned model, in rank {rank}")
    return Difference(plain, kept / whole if whole else 1.0, left_out, tuned)


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _change(after: Tensor, before: Tensor, folder: str | Path, name: str) -> Tensor:
    change = after.float() - before.detach().float().to(after.device)
    if not bool(change.isfinite().all()):
        raise CheckpointError(f"{folder}: {name} holds values that are not numbers; take another copy")
    return change


def _relative(after: Tensor, before: Tensor) -> float:
    own = before.detach().double().to(after.device)
    change = float(torch.linalg.norm(after.detach().double() - own))
    return change / max(float(torch.linalg.norm(own)), 1e-30)


# B, A and the squared size of their product.
def _truncated(change: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, float]:
    rank = min(rank, *change.shape)
    if rank + SPARE >= min(change.shape):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        # torch draws from the global generator; it is put back.
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)
            u, s, v = torch.svd_lowrank(change.cpu(), rank + SPARE, niter=ROUNDS)
        vh = v.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank], float(s[:rank].double().square().sum())
