"""A checkpoint's folder, looked at before anything is built from it: its files are there, and its config fits them."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

from tether.errors import CheckpointError
from tether.files import check_plain, read_bytes
from tether.reading import JSON_BYTES, parse_json
from tether.store.reader import CheckpointReader

__all__ = ["check_folder", "check_size"]

LEAST_BOUND: Final = 2**20
"""Widths up to this are taken at their word here: some belong to parts without weights."""
PACKED: Final = 16
"""Numbers of a model for one that is stored, at most: quantised weights are packed, eight and more in one."""
EXPERTS: Final = 4096
"""Experts of a layer at most: some families make a module for each."""
SPARE: Final = 2**24
"""Numbers of a model without any that are stored: positions and other tables that are made."""
_WIDTHS: Final = (
    "_size",
    "_dim",
    "_heads",
    "_experts",
    "_rank",
    "n_embd",
    "n_head",
    "n_inner",
    "d_model",
    "d_ff",
    "d_kv",
)
# Whole names: `max_window_layers` and the like count no layers that are made.
_DEPTHS: Final = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
)


def check_folder(path: str, name: str) -> None:
    """Refuse what loading would stumble over only after the long part, or never come back from.

    Args:
        path: of the folder; where nothing is there, as at a hub id, nothing is checked.
        name: what the user calls it.

    Raises:
        CheckpointError: no config, no tokenizer, a file that is a device or a pipe, or a config that is damaged or asks
            for more layers than the weights have tensors, or for more width than they have numbers.
    """
    folder = Path(path)
    if not folder.exists():
        return
    config = folder / "config.json"
    if not config.exists():
        raise CheckpointError(
            f"{name}: expected a checkpoint folder with config.json; found none in {folder}"
        )
    for file in folder.iterdir():
        if file.exists() and not file.is_dir():
            check_plain(file)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(
            f"{name}: no tokenizer in {folder} (expected tokenizer.json or tokenizer_config.json); copy the "
            "base model's tokenizer files there"
        )
    # By no schema, since any architecture's config is good here; some have infinity in theirs.
    content = parse_json(read_bytes(config, JSON_BYTES), config, foreign=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{config}: expected a JSON object; take another copy")
    _check_sizes(folder, config, content)


# Weights that are missing are made, and layers are made before weights are looked for: a number is all it takes to fill
# the memory.
def _check_sizes(folder: Path, file: Path, content: dict[str, Any]) -> None:
    if not any(folder.glob("model*.safetensors*")):
        return
    reader = CheckpointReader(folder)
    numbers = max(sum(prod(reader.shape(name)) for name in reader.names), LEAST_BOUND)
    for field, value in _fields(content):
        key = field.rpartition(".")[2]
        most = numbers if key.endswith(_WIDTHS) else None
        most = len(reader.names) if key in _DEPTHS else EXPERTS if key.endswith("_experts") else most
        if most is not None and value > most:
            raise CheckpointError(
                f"{file}: {field} is {value}; the weights beside it have {len(reader.names)} tensors and "
                f"{numbers} numbers at most, so take another copy of both"
            )


def check_size(path: str, name: str, loader: Any = None) -> None:
    """Refuse a config that makes a model of far more numbers than its weights have.

    What a config makes is counted on the meta device, without memory: the product of two widths that are each harmless
    may be more than any machine has. Cost: the modules without their weights, about a tenth of a second.

    Args:
        path: of a folder that `check_folder` has passed, or a hub id, at which nothing is checked.
        name: what the user calls it.
        loader: of transformers, `AutoModelForCausalLM` if left out.

    Raises:
        CheckpointError: the config makes too large a model.
    """
    folder = Path(path)
    if not any(folder.glob("model*.safetensors*")):
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = CheckpointReader(folder)
    stored = sum(prod(reader.shape(each)) for each in reader.names)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = (loader or AutoModelForCausalLM).from_config(config, trust_remote_code=False)
        made = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    except Exception as error:
        # Whatever is wrong with it, loading says so; only what it says without an end is of interest here.
        if isinstance(error, OverflowError) or "overflow" in str(error).lower():
            raise CheckpointError(
                f"{name}: no model can be made of its config ({str(error).splitlines()[0][:200]}); take another copy"
            ) from error
        return
    if made > PACKED * stored + SPARE:
        raise CheckpointError(
            f"{name}: its config makes a model of {made:,} numbers, the weights beside it have {stored:,}; take "
            "another copy of both"
        )


def _fields(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{before}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{before}{key}", value
