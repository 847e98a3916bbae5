"""What deltas read of a text (hidden states, or those of several layers), computed once and memory-mapped."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tether.causal.features import check_layers, join_features
from tether.causal.fingerprint import fingerprint, weights_fingerprint
from tether.delta.windows import Batch, Windows
from tether.errors import CheckpointError
from tether.store.publish import publish_file

__all__ = [
    "ShardedStates",
    "StateCache",
    "backbone_print",
    "cache_states",
    "cached",
    "hidden_states",
    "latent_print",
    "load_states",
    "text_inputs",
]

logger = logging.getLogger(__name__)

BATCH = 8


class StateCache(NamedTuple):
    """A text's windows with what deltas read at every token.

    Attributes:
        windows: tokens, targets and documents.
        states: z, shape (n, H), or z followed by states of middle layers, shape (n, H (1 + L)); float16,
            memory-mapped when read from disk. In several parts on disk: a `ShardedStates`.
        base: fingerprint of the backbone that made them.
        layers: the middle layers.
    """

    windows: Windows
    states: "Tensor | ShardedStates"
    base: str
    layers: tuple[int, ...] = ()

    def scored(self) -> tuple[Tensor, Tensor]:
        """Pick the tokens that have a next token.

        Returns:
            Features, shape (m, H (1 + L)), float32, and targets, shape (m,).
        """
        kept = self.windows.targets >= 0
        return self.states[kept].float(), self.windows.targets[kept]

    def only(self, documents: Tensor) -> "StateCache":
        """Restrict a text to some of its documents; their states are copied to memory.

        Args:
            documents: numbers of the documents, shape (D,).

        Returns:
            The text of those documents in the same order, documents numbered as before.
        """
        windows = self.windows
        of_window = windows.documents[windows.starts[:-1]]
        chosen = torch.isin(of_window, documents)
        lengths = windows.starts.diff()
        kept = chosen.repeat_interleave(lengths)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[chosen].cumsum(0)])
        values = None if windows.numeric_values is None else windows.numeric_values[kept]
        rest = Windows(
            windows.input_ids[kept], windows.targets[kept], windows.documents[kept], starts, values
        )
        return StateCache(rest, self.states[kept], self.base, self.layers)


class ShardedStates:
    """States that lie in several files, indexed like one tensor; only the rows asked for are read.

    Args:
        parts: memory-mapped tensors, shapes (n_i, F).
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = torch.Size((int(self.ends[-1]), parts[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        elif index.dtype == torch.bool:
            index = index.nonzero().squeeze(-1)
        found = torch.empty(len(index), self.shape[1], dtype=self.parts[0].dtype)
        of_part = torch.searchsorted(self.ends, index.contiguous(), right=True)
        for number in of_part.unique().tolist():
            rows = of_part == number
            begin = int(self.ends[number]) - len(self.parts[number])
            found[rows] = self.parts[number][index[rows] - begin]
        return found

    def float(self) -> Tensor:
        """Read everything.

        Returns:
            All states, shape (n, F), float32.
        """
        return torch.cat([part.float() for part in self.parts])


def backbone_print(model: Any) -> str:
    """Give the fingerprint of a model's backbone, on which its states depend.

    Args:
        model: a CausalQwenForCausalLM.

    Returns:
        The base's fingerprint, without what `align_latent` adds to it for another latent.
    """
    return fingerprint(model).partition("+")[0]


def latent_print(model: Any) -> str:
    """Give the fingerprint of a model's abduction: location, scale and axes of U, in whose units deltas move.

    Args:
        model: a CausalQwenForCausalLM.

    Returns:
        A hash.
    """
    return weights_fingerprint(model.abduction)


@torch.no_grad()
def hidden_states(model: Any, batch: Batch, layers: Sequence[int] = ()) -> Tensor:
    """Run the backbone on a batch.

    Padding is on the right and attention is causal, so no mask is needed and the fast path is taken.

    Args:
        model: a CausalQwenForCausalLM.
        batch: from `Windows.batches`.
        layers: middle layers to read beside the last, see `tether.causal.features`.

    Returns:
        z, shape (B, T, H), or with the middle layers beside it, shape (B, T, H (1 + L)); float32, on the CPU.
    """
    asked = {"output_hidden_states": True} if layers else {}
    output = model.backbone(**text_inputs(model, batch), use_cache=False, **asked)
    return join_features(output.last_hidden_state, output.hidden_states, layers).float().cpu()


def text_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Give a backbone's inputs for a batch: ids, or their embeddings with the numbers in them.

    Args:
        model: a CausalQwenForCausalLM.
        batch: from `Windows.batches`.

    Returns:
        Keyword arguments for the backbone, on the model's device.
    """
    device = model.action.weight.device
    ids = batch.input_ids.to(device)
    if batch.numeric_values is None:
        return {"input_ids": ids}
    return {"inputs_embeds": model.embed(ids, batch.numeric_values.to(device))}


def cache_states(
    model: Any,
    windows: Windows,
    path: Path,
    *,
    layers: Sequence[int] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> StateCache:
    """Compute the states of a text in one backbone pass and publish them as one safetensors file.

    Cost: one forward pass of the backbone, n x H (1 + L) x 2 bytes on disk, one batch in memory.

    Args:
        model: a CausalQwenForCausalLM; its fusion, if any, is not used.
        windows: the text.
        path: the file to write.
        layers: middle layers to keep beside the last.
        on_step: called with `done` and `total` tokens after each batch.

    Returns:
        The cache, memory-mapped.

    Raises:
        CheckpointError: a state does not fit float16.
        ConfigError: layers that the backbone does not have.
    """  # noqa: DOC502 - raised by check_layers
    check_layers(layers, model.config.get_text_config(decoder=True).num_hidden_layers)
    count, width = len(windows.input_ids), model.abduction.loc.in_features * (1 + len(layers))
    tensors = {name: values.numpy() for name, values in windows._asdict().items() if values is not None}
    kinds = {"int64": "I64", "float64": "F64"}
    header, offset = _header(
        {
            **{k: (v.shape, kinds[str(v.dtype)]) for k, v in tensors.items()},
            "states": ((count, width), "F16"),
        },
        model,
        layers,
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
            values = hidden_states(model, batch, layers)[batch.mask]
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


def _header(
    entries: dict[str, tuple[tuple[int, ...], str]], model: Any, layers: Sequence[int]
) -> tuple[bytes, int]:
    # The safetensors layout: tensors laid end to end behind a JSON header; states are the last.
    size = {"I64": 8, "F64": 8, "F16": 2}
    described: dict[str, Any] = {
        "__metadata__": {
            "kind": "states",
            "base": backbone_print(model),
            "layers": json.dumps(list(layers)),
        }
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
    windows = Windows(**{name: reader.tensor(name) for name in Windows._fields if name in reader.names})
    # The reader copies; the states are mapped instead, so that a large text costs pages, not memory.
    with safe_open(path, framework="pt") as stream:
        states = stream.get_tensor("states")
    layers = tuple(json.loads(metadata.get("layers", "[]")))
    return StateCache(windows, states, metadata["base"], layers)


def cached(
    model: Any,
    windows: Windows,
    folder: Path,
    *,
    layers: Sequence[int] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> StateCache:
    """Reuse the states of a text if this folder has them for this base, else compute them.

    A long text, or any text where several processes work together, is kept in parts: see
    `tether.delta.shards`.

    Args:
        model: the base.
        windows: the text.
        folder: where caches are kept, one file or folder for each text, base and choice of layers.
        layers: middle layers to keep beside the last.
        on_step: called with `done` and `total` tokens.

    Returns:
        The cache.
    """
    from tether.delta.shards import PART_TOKENS, cache_shards, load_shards, together

    # States of a model in half precision are not those of the same model in single precision.
    digest = hashlib.sha256(f"{backbone_print(model)} {model.action.weight.dtype}".encode())
    for values in windows:
        digest.update(b"" if values is None else values.numpy().tobytes())
    if windows.numeric_values is not None:
        digest.update(model.numeric.direction.detach().cpu().float().numpy().tobytes())
    if layers:
        digest.update(repr(tuple(layers)).encode())
    name = f"states-{digest.hexdigest()[:16]}"
    path, parts = folder / f"{name}.safetensors", folder / name
    if path.is_file():
        try:
            return load_states(path)
        except CheckpointError:
            logger.warning("%s is damaged and is computed again", path)
    if parts.is_dir() or len(windows.input_ids) > PART_TOKENS or together() > 1:
        return load_shards(cache_shards(model, windows, parts, layers=layers, on_step=on_step))
    return cache_states(model, windows, path, layers=layers, on_step=on_step)
