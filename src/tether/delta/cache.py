"""Hidden states of a text, computed once and memory-mapped from then on."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tether.delta.windows import Batch, Windows
from tether.errors import CheckpointError
from tether.store.publish import publish_file

__all__ = ["StateCache", "cache_states", "cached", "hidden_states", "load_states"]

BATCH = 8


class StateCache(NamedTuple):
    """A text's windows with the backbone's last hidden state at every token.

    Attributes:
        windows: tokens, targets and documents.
        states: z, shape (n, H), float16, memory-mapped when read from disk.
        base: fingerprint of the backbone that made them.
    """

    windows: Windows
    states: Tensor
    base: str

    def scored(self) -> tuple[Tensor, Tensor]:
        """Pick the tokens that have a next token.

        Returns:
            Hidden states, shape (m, H), float32, and targets, shape (m,).
        """
        kept = self.windows.targets >= 0
        return self.states[kept].float(), self.windows.targets[kept]


@torch.no_grad()
def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Run the backbone on a batch.

    Padding is on the right and attention is causal, so no mask is needed and the fast path is taken.

    Args:
        model: a CausalQwenForCausalLM.
        batch: from `Windows.batches`.

    Returns:
        z, shape (B, T, H), float32, on the CPU.
    """
    device = model.action.weight.device
    output = model.backbone(input_ids=batch.input_ids.to(device), use_cache=False)
    states: Tensor = output.last_hidden_state.float().cpu()
    return states


def cache_states(
    model: Any, windows: Windows, path: Path, *, on_step: Callable[[dict[str, float]], None] | None = None
) -> StateCache:
    """Compute the states of a text in one backbone pass and publish them as one safetensors file.

    Cost: one forward pass of the backbone, n x H x 2 bytes on disk, one batch in memory.

    Args:
        model: a CausalQwenForCausalLM; its fusion, if any, is not used.
        windows: the text.
        path: the file to write.
        on_step: called with `done` and `total` tokens after each batch.

    Returns:
        The cache, memory-mapped.

    Raises:
        CheckpointError: a state does not fit float16.
    """
    count, width = len(windows.input_ids), model.abduction.loc.in_features
    tensors = {name: getattr(windows, name).numpy() for name in Windows._fields}
    header, offset = _header(
        {**{k: (v.shape, "I64") for k, v in tensors.items()}, "states": ((count, width), "F16")}, model
    )
    size = offset + count * width * 2
    with publish_file(path, needed=size) as target:
        with target.open("wb") as stream:
            stream.write(header)
            for values in tensors.values():
                stream.write(values.tobytes())
            # Space is taken now: a full disk met later, through the mapping, would kill the process.
            stream.flush()
            os.posix_fallocate(stream.fileno(), 0, size)
        states = np.memmap(target, dtype=np.float16, mode="r+", offset=offset, shape=(count, width))
        done = 0
        for batch in windows.batches(BATCH):
            values = hidden_states(model, batch)[batch.mask]
            if not bool((values.abs() < 65504).all()):
                raise CheckpointError(
                    f"a hidden state of size {values.abs().max():.3g} does not fit float16 (largest 65504); this base "
                    "needs its states rescaled, which tether does not do"
                )
            states[windows.positions(batch).numpy()] = values.numpy().astype(np.float16)
            done += len(values)
            if on_step:
                on_step({"done": done, "total": count})
        states.flush()
        del states
    return load_states(path)


def _header(entries: dict[str, tuple[tuple[int, ...], str]], model: Any) -> tuple[bytes, int]:
    # The safetensors layout: tensors laid end to end behind a JSON header; states are the last.
    size = {"I64": 8, "F16": 2}
    described: dict[str, Any] = {
        "__metadata__": {"kind": "states", "base": str(model.config.base_fingerprint)}
    }
    end = 0
    for name, (shape, dtype) in entries.items():
        begin, end = end, end + int(np.prod(shape)) * size[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        last = begin
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + last


def load_states(path: Path) -> StateCache:
    """Open cached states.

    Args:
        path: written by `cache_states`.

    Returns:
        The cache; states stay on disk until they are used.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
    """
    from tether.store.reader import CheckpointReader

    reader = CheckpointReader(path)
    metadata = reader.metadata()
    if metadata.get("kind") != "states":
        raise CheckpointError(
            f"{path}: expected cached states, found {metadata.get('kind', 'another file')}; rebuild it"
        )
    windows = Windows(*(reader.tensor(name) for name in Windows._fields))
    # The reader copies; the states are mapped instead, so that a large text costs pages, not memory.
    with safe_open(path, framework="pt") as stream:
        states = stream.get_tensor("states")
    return StateCache(windows, states, metadata["base"])


def cached(
    model: Any, windows: Windows, folder: Path, *, on_step: Callable[[dict[str, float]], None] | None = None
) -> StateCache:
    """Reuse the states of a text if this folder has them for this base, else compute them.

    Args:
        model: the base.
        windows: the text.
        folder: where caches are kept, one file for each text and base.
        on_step: called with `done` and `total` tokens.

    Returns:
        The cache.
    """
    digest = hashlib.sha256(str(model.config.base_fingerprint).encode())
    for values in windows:
        digest.update(values.numpy().tobytes())
    path = folder / f"states-{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        return load_states(path)
    return cache_states(model, windows, path, on_step=on_step)
