"""Two checkpoints read the same text, and the units of one are found in the other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError
from tether.merge.alignment import Activations, align_units, record, write_maps
from tether.merge.axes import Sizes
from tether.merge.check import load_checkpoint, load_tokenizer
from tether.merge.companions import differing_tokens, locate, read_folder
from tether.merge.opening import Opened, open_model
from tether.store.documents import documents_of

__all__ = ["align_checkpoints"]

_WINDOW = 64


def align_checkpoints(
    target: str,
    source: str,
    text: str | Path | Sequence[str],
    out: Path,
    *,
    tokens: int = 2048,
    device: torch.device | str | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Align one checkpoint with another and write the maps.

    Args:
        target: the model in whose coordinates a merge will be: a path, alias or hub id.
        source: the model that will be brought there, of the same tokenizer.
        text: what both read, as `tether.store.documents.documents_of` takes it.
        out: the file of maps.
        tokens: about how many tokens.
        device: where the models run, one after the other; None is the CPU.
        on_step: called with `done` and `total` models.

    Returns:
        JSON: mean similarity and number of unmatched units, for each space; how many tokens were read.

    Raises:
        ConfigError: If the tokenizers differ, the text is too short, or heads cannot correspond.
        CheckpointError: If a model cannot be read, or has no structure that is known.
    """  # noqa: DOC502 - CheckpointError is raised by _sizes and what it calls
    documents = documents_of(text)
    folders = [read_folder(locate(name)) for name in (target, source)]
    if difference := differing_tokens(*folders):
        raise ConfigError(
            f"the vocabularies of {target} and {source} differ: {difference}. Models are aligned on tokens that both "
            "read; expected one tokenizer"
        )
    lengths = [
        _sizes(open_model(name, folder)) for name, folder in zip((target, source), folders, strict=True)
    ]
    windows = window_text(documents, load_tokenizer(folders[0].weights), length=_WINDOW, tokens=tokens)
    # Windows of one length go side by side, so that documents shorter than a window count too.
    spans = windows.starts.diff()
    groups = [
        windows.input_ids[windows.starts[:-1][spans == length].unsqueeze(-1) + torch.arange(length)]
        for length in spans.unique().tolist()
    ]
    seen = []
    for number, folder in enumerate(folders):
        model = load_checkpoint(folder.weights).to(device or "cpu")
        seen.append(_joined([record(model, group) for group in groups]))
        if on_step:
            on_step({"done": number + 1.0, "total": 2.0})
    found = align_units(seen[0], seen[1], lengths[0], lengths[1])
    write_maps(out, found.maps)
    return {"similarity": found.similarity, "unmatched": found.unmatched, "tokens": len(windows.input_ids)}


def _joined(parts: list[Activations]) -> Activations:
    spaces = (zip(*layers, strict=True) for layers in zip(*parts, strict=True))
    return Activations(*([torch.cat(layer) for layer in layers] for layers in spaces))


def _sizes(model: Opened) -> Sizes:
    if not model.recognised:
        raise CheckpointError(
            f"{model.name}: no language tower found; expected a Llama- or Qwen-like decoder, or a wrapper of one"
        )
    return model.sizes()
