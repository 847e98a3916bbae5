"""The states of a text in small parts: found, written by one process or several, and taken up where they stopped."""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tether.delta.cache import StateCache, backbone_print, cache_states, compute_states, load_states
from tether.delta.sharded import FileRows, ShardedStates
from tether.delta.windows import Windows
from tether.errors import CheckpointError
from tether.processes import Group, joined
from tether.store.nameless import Nameless

__all__ = [
    "PART_TOKENS",
    "cache_shards",
    "cached",
    "load_shards",
    "read_states",
]

logger = logging.getLogger(__name__)

PARTS = 32
"""Parts of a text at least, as far as its windows allow: whoever is stopped loses one of them."""
PART_TOKENS, PART_BYTES = 16_384, 64 * 2**20
"""Tokens, and bytes of states, of a part at most, give or take a window."""


def cut(windows: Windows, tokens: int) -> list[Windows]:
    """Cut a text between windows.

    Args:
        windows: the text.
        tokens: of a part at least, but for the last one.

    Returns:
        The parts in order; documents keep their numbers.
    """
    edges, begin = [0], 0
    for row, end in enumerate(windows.starts[1:].tolist(), start=1):
        if end - begin >= tokens:
            edges.append(row)
            begin = end
    if edges[-1] != len(windows.starts) - 1:
        edges.append(len(windows.starts) - 1)
    parts = []
    for first, last in pairwise(edges):
        span = slice(int(windows.starts[first]), int(windows.starts[last]))
        starts = windows.starts[first : last + 1] - windows.starts[first]
        values = None if windows.numeric_values is None else windows.numeric_values[span]
        of_part = (windows.input_ids[span], windows.targets[span], windows.documents[span])
        parts.append(Windows(*of_part, starts, values))
    return parts


def part_tokens(model: Any, windows: Windows, layers: Sequence[int] = ()) -> int:
    """Tell how many tokens of a text go into a part: it depends on nothing but the text and the width of its states.

    Args:
        model: a CausalQwenForCausalLM.
        windows: the text.
        layers: middle layers that are kept beside the last.

    Returns:
        The number, >= 1.
    """
    width = 2 * int(model.abduction.loc.in_features) * (1 + len(layers))
    return max(1, min(PART_TOKENS, PART_BYTES // width, math.ceil(len(windows.input_ids) / PARTS)))


def cached(
    model: Any,
    windows: Windows,
    folder: Path,
    *,
    layers: Sequence[int] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> StateCache:
    """Reuse the states of a text as far as this folder has them for this base, and compute the others.

    Args:
        model: the base.
        windows: the text.
        folder: where caches are kept, a folder for each text, base and choice of layers.
        layers: middle layers to keep beside the last.
        on_step: called with `done` and `total` tokens of what is computed.

    Returns:
        The cache.
    """
    # States of a model in half precision are not those of the same model in single precision.
    digest = hashlib.sha256(f"{backbone_print(model)} {model.action.weight.dtype}".encode())
    for values in windows:
        digest.update(b"" if values is None else values.contiguous().numpy().data)
    if windows.numeric_values is not None:
        digest.update(model.numeric.direction.detach().cpu().float().numpy().tobytes())
    if layers:
        digest.update(repr(tuple(layers)).encode())
    own = folder / f"states-{digest.hexdigest()[:16]}"
    cache_shards(model, windows, own, layers=layers, on_step=on_step)
    # Every part was checked against the text, or was written just now.
    states = ShardedStates([_rows(name) for name in _part_names(own)])
    return StateCache(windows, states, backbone_print(model), tuple(layers))


def read_states(
    model: Any,
    windows: Windows,
    *,
    layers: Sequence[int] = (),
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> StateCache:
    """Compute the states of a text for this process alone.

    They lie in a file without a name, which goes with the process, however that ends.

    Args:
        model: the base.
        windows: the text.
        layers: middle layers to keep beside the last.
        on_step: called with `done` and `total` tokens.

    Returns:
        The states, the same to the last bit as those of `cached`.

    Raises:
        CheckpointError: the disk is full, or a state does not fit float16.
    """
    total, done = len(windows.input_ids), 0
    file, parts = Nameless(), []
    for part in cut(windows, part_tokens(model, windows, layers)):
        states = compute_states(model, part, layers=layers, on_step=_after(done, total, on_step))
        parts.append(FileRows(file, file.size, (len(states), states.shape[1])))
        done += len(states)
        try:
            file.write(states.numpy().data)
        except OSError as error:
            raise CheckpointError(
                f"{file.folder()}: no room for {2 * total * states.shape[1]} bytes of states ({error.strerror}); "
                "free some space, or name a folder for them (--cache, cache_folder)"
            ) from error
    return StateCache(windows, ShardedStates(parts), backbone_print(model), tuple(layers))


def _after(
    before: int, total: int, on_step: Callable[[dict[str, float]], None] | None
) -> Callable[[dict[str, float]], None]:
    def report(step: dict[str, float]) -> None:
        if on_step:
            on_step({"done": before + step["done"], "total": total})

    return report


def cache_shards(
    model: Any,
    windows: Windows,
    folder: Path,
    *,
    layers: Sequence[int] = (),
    tokens: int | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Path:
    """Compute the states of a text part by part; parts that are there and whole are left alone.

    Under `accelerate launch` or `torchrun` every process calls this; each computes its share of the parts,
    and all return when the last part is there. A part appears whole or not at all, so whoever was stopped
    begins again at the first missing part. Every part that is there is read and compared with its checksum and with
    the text; what is damaged, or of another text or base, is computed again with a warning.

    Args:
        model: a CausalQwenForCausalLM; its fusion, if any, is not used.
        windows: the text; the same in every process.
        folder: of this text, base and choice of layers alone.
        layers: middle layers to keep beside the last.
        tokens: of a part; None takes what `part_tokens` says.
        on_step: called with `done` and `total` tokens of this process' own parts. What was said to be done is not lost
            but for the part in work.

    Returns:
        The folder, for `load_shards`.

    Raises:
        ConfigError: several processes without accelerate.
        CheckpointError: a state does not fit float16, or the disk is full.
    """  # noqa: DOC502 - raised by what it calls
    with joined() as group:
        return _share(group, model, windows, folder, tuple(layers), tokens, on_step)


def _share(
    group: Group,
    model: Any,
    windows: Windows,
    folder: Path,
    layers: tuple[int, ...],
    tokens: int | None,
    on_step: Callable[[dict[str, float]], None] | None,
) -> Path:
    parts = cut(windows, tokens or part_tokens(model, windows, layers))
    names = [folder / f"part-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(len(parts))]
    expected, base = dict(zip(names, parts, strict=True)), backbone_print(model)
    for name in sorted(folder.glob("part-*.safetensors"))[group.rank :: group.count]:
        if fault := _fault(name, expected.get(name), base, layers):
            logger.warning("%s; it is computed again", fault)
            name.unlink(missing_ok=True)
    group.wait()
    missing = [name for name in names if not name.is_file()]
    group.wait()  # all have looked before anyone writes, so that all agree on what is missing
    own = missing[group.rank :: group.count]
    done, total = 0, sum(len(expected[name].input_ids) for name in own)
    for name in own:
        report = _after(done, total, on_step)
        size = len(expected[name].input_ids)
        cache_states(model, expected[name], name, layers=layers, on_step=_but_last(size, report))
        report({"done": size})
        done += size
    group.wait()
    return folder


# The last batch of a part counts as done once the part is there.
def _but_last(size: int, report: Callable[[dict[str, float]], None]) -> Callable[[dict[str, float]], None]:
    return lambda step: report(step) if step["done"] < size else None


def _fault(name: Path, text: Windows | None, base: str, layers: tuple[int, ...]) -> str | None:
    try:
        part = load_states(name)
    except CheckpointError as error:
        return str(error)
    same = text is not None and all(
        own is its is None or (own is not None and its is not None and torch.equal(own, its))
        for own, its in zip(part.windows, text, strict=True)
    )
    return None if same and (part.base, part.layers) == (base, layers) else f"{name}: not a part of this text"


def load_shards(folder: Path, *, check: bool = True) -> StateCache:
    """Open states kept in parts.

    Args:
        folder: written by `cache_shards`.
        check: whether to compare each part with its checksum, which reads all of it.

    Returns:
        The text as a whole; states stay on disk until rows of them are asked for.

    Raises:
        CheckpointError: no parts, missing or damaged parts, or parts of several bases.
    """
    names = _part_names(folder)
    parts = [load_states(name, check=check) for name in names]
    if len({(part.base, part.layers) for part in parts}) > 1:
        raise CheckpointError(
            f"{folder}: its parts are of several bases or layers; remove it and cache again"
        )
    texts = [part.windows for part in parts]
    ids = torch.cat([text.input_ids for text in texts])
    targets = torch.cat([text.targets for text in texts])
    documents = torch.cat([text.documents for text in texts])
    offsets = torch.tensor([0, *(len(part.windows.input_ids) for part in parts)]).cumsum(0)
    starts = [part.windows.starts[:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
    values = [text.numeric_values for text in texts if text.numeric_values is not None]
    numbers = torch.cat(values) if values else None
    windows = Windows(ids, targets, documents, torch.cat([*starts, offsets[-1:]]), numbers)
    return StateCache(windows, ShardedStates(list(map(_rows, names))), parts[0].base, parts[0].layers)


def _part_names(folder: Path) -> list[Path]:
    names = sorted(folder.glob("part-*.safetensors"))
    promised = int(names[0].stem.rpartition("-of-")[2]) if names else 0
    if len(names) != promised or not names:
        raise CheckpointError(
            f"{folder}: {len(names)} of {promised or 'no'} parts are there; run the caching again to go on with it"
        )
    return names


# The states of a part, which `load_states` has looked at.
def _rows(name: Path) -> FileRows:
    from tether.store.reader import CheckpointReader

    reader = CheckpointReader(name)
    file, begin, _ = reader.span("states")
    rows, width = reader.shape("states")
    return FileRows(file, begin, (rows, width))
