"""A checkpoint's folder, looked at before anything is built from it: its files are there, and its config fits them."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

from tether.errors import CheckpointError
from tether.files import check_plain, read_bytes
from tether.reading import JSON_BYTES, parse_json
from tether.store.reader import CheckpointReader

__all__ = ["check_folder"]

LEAST_BOUND: Final = 2**20
"""Widths up to this are taken at their word: what they make is small, and some belong to parts without weights."""
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
        most = len(reader.names) if key in _DEPTHS else numbers if key.endswith(_WIDTHS) else None
        if most is not None and value > most:
            raise CheckpointError(
                f"{file}: {field} is {value}; the weights beside it have {len(reader.names)} tensors and "
                f"{numbers} numbers at most, so take another copy of both"
            )


def _fields(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{before}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{before}{key}", value
