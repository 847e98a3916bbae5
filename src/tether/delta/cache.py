"""What deltas read of a text: hidden states, or those of several layers; in memory, and in files with checksums."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from tether.causal.features import check_layers, join_features
from tether.causal.fingerprint import fingerprint, weights_fingerprint
from tether.causal.losses import IGNORE
from tether.delta.sharded import ShardedStates
from tether.delta.windows import Batch, Windows
from tether.errors import CheckpointError
from tether.reading import Strict, checked, parse_json
from tether.store.writer import write_safetensors

__all__ = [
    "StateCache",
    "backbone_print",
    "cache_states",
    "compute_states",
    "hidden_states",
    "latent_print",
    "load_states",
    "text_inputs",
]

BATCH = 8
"""Windows of a pass at most."""
LEAST_ALIKE = 0.8
"""Length of a window at least, as a share of the longest that it is padded to."""


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
    states: Tensor | ShardedStates
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
        chosen = torch.isin(windows.documents[windows.starts[:-1]], documents)
        kept = chosen.repeat_interleave(windows.starts.diff())
        rest = windows.some(chosen.nonzero().squeeze(-1))
        return StateCache(rest, self.states[kept], self.base, self.layers)


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
        z, shape (B, T, H), or with the middle layers beside it, shape (B, T, H (1 + L)); float32, on the model's
        device.
    """
    asked = {"output_hidden_states": True} if layers else {}
    output = model.backbone(**text_inputs(model, batch), use_cache=False, **asked)
    return join_features(output.last_hidden_state, output.hidden_states, layers).float()


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


@torch.no_grad()
def compute_states(
    model: Any,
    windows: Windows,
    *,
    layers: Sequence[int] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Tensor:
    """Compute the states of a text in one pass of the backbone.

    Args:
        model: a CausalQwenForCausalLM; its fusion, if any, is not used.
        windows: the text.
        layers: middle layers to keep beside the last.
        on_step: called with `done` and `total` tokens after each batch.

    Returns:
        The states, shape (n, H (1 + L)), float16, in memory.

    Raises:
        CheckpointError: a state does not fit float16.
        ConfigError: layers that the backbone does not have.
    """  # noqa: DOC502 - raised by check_layers
    check_layers(layers, model.config.get_text_config(decoder=True).num_hidden_layers)
    count, done = len(windows.input_ids), 0
    states = torch.empty(count, model.abduction.loc.in_features * (1 + len(layers)), dtype=torch.float16)
    for batch in _alike(windows):
        values = hidden_states(model, batch, layers).cpu()[batch.mask]
        if not bool((values.abs() < 65504).all()):
            raise CheckpointError(
                f"a hidden state of size {values.abs().max():.3g} does not fit float16 (largest 65504); this base "
                "needs its states rescaled, which tether does not do"
            )
        states[windows.positions(batch)] = values.half()
        done += len(values)
        if on_step:
            on_step({"done": done, "total": count})
    return states


# A part may hold few windows: short ones beside long ones would cost as much as long ones.
def _alike(windows: Windows) -> Iterator[Batch]:
    lengths = windows.starts.diff()
    order = lengths.argsort(descending=True, stable=True)
    rows: list[int] = []
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if len(rows) == BATCH or (rows and length < LEAST_ALIKE * int(lengths[rows[0]])):
            yield windows.batch(torch.tensor(rows))
            rows = []
        rows.append(row)
    yield windows.batch(torch.tensor(rows))


def cache_states(
    model: Any,
    windows: Windows,
    path: Path,
    *,
    layers: Sequence[int] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> StateCache:
    """Compute the states of a text and publish them as one safetensors file with a checksum.

    Cost: one forward pass of the backbone, n x H (1 + L) x 2 bytes in memory and on disk. Long texts are kept in parts,
    see `tether.delta.shards`.

    Args:
        model: a CausalQwenForCausalLM; its fusion, if any, is not used.
        windows: the text.
        path: the file to write.
        layers: middle layers to keep beside the last.
        on_step: called with `done` and `total` tokens after each batch.

    Returns:
        The cache, memory-mapped.

    Raises:
        CheckpointError: a state does not fit float16, or the disk is full.
        ConfigError: layers that the backbone does not have.
    """  # noqa: DOC502 - raised by what it calls
    tensors = {name: values for name, values in windows._asdict().items() if values is not None}
    tensors["states"] = compute_states(model, windows, layers=layers, on_step=on_step)
    about = {"kind": "states", "base": backbone_print(model), "layers": json.dumps(list(layers))}
    write_safetensors(path, tensors, about | {"sha256": _checksum(tensors, about)})
    return load_states(path, check=False)


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(about.items()))).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def load_states(path: Path, *, check: bool = True) -> StateCache:
    """Open cached states.

    Args:
        path: written by `cache_states`.
        check: whether to compare the content with its checksum, which reads all of it.

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
    about = checked(_About, {**metadata, "layers": parse_json(metadata.get("layers", "[]"), path)}, path)
    if missing := {"states", "input_ids", "targets", "documents", "starts"}.difference(reader.names):
        raise CheckpointError(f"{path}: damaged, {', '.join(sorted(missing))} missing; rebuild it")
    windows = Windows(**{name: reader.tensor(name) for name in Windows._fields if name in reader.names})
    # The reader copies; the states are mapped instead, so that a large text costs pages, not memory.
    with safe_open(path, framework="pt") as stream:
        states = stream.get_tensor("states")
    if not _fits(windows, states):
        raise CheckpointError(f"{path}: damaged, its tensors do not fit together; rebuild it")
    tensors = {name: values for name, values in windows._asdict().items() if values is not None}
    said = {name: metadata[name] for name in ("kind", "base", "layers")}
    if check and about.sha256 != _checksum(tensors | {"states": states}, said):
        raise CheckpointError(f"{path}: damaged, its content is not that of its checksum; rebuild it")
    return StateCache(windows, states, about.base, tuple(about.layers))


class _About(Strict):
    """What the header of cached states says."""

    kind: str
    base: str
    layers: list[Annotated[int, Field(ge=0, lt=2**16)]]
    sha256: str


def _fits(windows: Windows, states: Tensor) -> bool:
    whole = (windows.input_ids, windows.targets, windows.documents, windows.starts)
    if any(values.dtype != torch.int64 or values.dim() != 1 for values in whole):
        return False
    count, starts, values = len(windows.input_ids), windows.starts, windows.numeric_values
    if len(windows.targets) != count or len(windows.documents) != count or len(starts) < 2 or count == 0:
        return False
    if values is not None and (values.shape != (count,) or values.dtype != torch.float64):
        return False
    if states.dim() != 2 or len(states) != count or states.dtype != torch.float16 or 0 in states.shape:
        return False
    least = min(
        int(windows.input_ids.min()), int(windows.documents.min()), int(windows.targets.min()) - IGNORE
    )
    return least >= 0 and int(starts[0]) == 0 and int(starts[-1]) == count and bool((starts.diff() > 0).all())
