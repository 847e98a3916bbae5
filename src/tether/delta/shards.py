"""States of a long text in parts: written by one process or several, taken up again where they stopped."""

import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tether.delta.cache import ShardedStates, StateCache, cache_states, load_states
from tether.delta.windows import Windows
from tether.errors import CheckpointError, ConfigError

__all__ = ["PART_TOKENS", "cache_shards", "load_shards", "together"]

PART_TOKENS = 262_144
"""Tokens of a part: 300 MB of states at width 576."""
LEAST_PARTS = 4
"""Parts for each process at least, so that none waits long for another."""


def together() -> int:
    """Tell how many processes work together.

    Returns:
        What `torchrun` or `accelerate launch` set up, else 1.
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


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


def cache_shards(
    model: Any,
    windows: Windows,
    folder: Path,
    *,
    layers: Sequence[int] = (),
    tokens: int | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Path:
    """Compute the states of a text part by part; parts that are there are left alone.

    Under `accelerate launch` or `torchrun` every process calls this; each computes its share of the parts,
    and all return when the last part is there. A part appears whole or not at all, so whoever was stopped
    begins again at the first missing part.

    Args:
        model: a CausalQwenForCausalLM; its fusion, if any, is not used.
        windows: the text; the same in every process.
        folder: of this text, base and choice of layers alone.
        layers: middle layers to keep beside the last.
        tokens: of a part; None takes `PART_TOKENS`, or less where several processes share a short text. A
            folder that was begun must be gone on with by the same number, and so by as many processes.
        on_step: called with `done` and `total` tokens of this process' own parts.

    Returns:
        The folder, for `load_shards`.

    Raises:
        ConfigError: several processes without accelerate, or a folder begun with parts of another size.
        CheckpointError: a state does not fit float16.
    """  # noqa: DOC502 - CheckpointError is raised by cache_states
    world, rank, wait = _processes()
    if tokens is None:
        tokens = min(PART_TOKENS, max(1, math.ceil(len(windows.input_ids) / (LEAST_PARTS * world))))
        tokens = PART_TOKENS if world == 1 else tokens
    there = sorted(folder.glob("part-*.safetensors"))
    if there and len(there) == int(there[0].stem.rpartition("-of-")[2]):
        wait()
        return folder  # complete, whoever cut it: the folder's name is a hash of the text
    parts = cut(windows, tokens)
    names = [folder / f"part-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(len(parts))]
    if foreign := set(there) - set(names):
        raise ConfigError(
            f"{folder}: begun with other parts ({min(foreign).name}), now {len(parts)} are expected; go on with as "
            "many processes as before, or remove the folder"
        )
    missing = [(part, name) for part, name in zip(parts, names, strict=True) if not name.is_file()]
    wait()  # all have looked before anyone writes, so that all agree on what is missing
    own = missing[rank::world]
    done, total = 0, sum(len(part.input_ids) for part, _ in own)
    for part, name in own:

        def report(step: dict[str, float], before: int = done) -> None:
            if on_step:
                on_step({"done": before + step["done"], "total": total})

        cache_states(model, part, name, layers=layers, on_step=report)
        done += len(part.input_ids)
    wait()
    return folder


def load_shards(folder: Path) -> StateCache:
    """Open states kept in parts.

    Args:
        folder: written by `cache_shards`.

    Returns:
        The text as a whole; states stay on disk until rows of them are asked for.

    Raises:
        CheckpointError: no parts, missing or damaged parts, or parts of several bases.
    """
    names = sorted(folder.glob("part-*.safetensors"))
    promised = int(names[0].stem.rpartition("-of-")[2]) if names else 0
    if len(names) != promised or not names:
        raise CheckpointError(
            f"{folder}: {len(names)} of {promised or 'no'} parts are there; run the caching again to go on with it"
        )
    parts = [load_states(name) for name in names]
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
    tensors = [part.states for part in parts if isinstance(part.states, torch.Tensor)]
    return StateCache(windows, ShardedStates(tensors), parts[0].base, parts[0].layers)


def _processes() -> tuple[int, int, Callable[[], None]]:
    if together() == 1:
        return 1, 0, lambda: None
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ConfigError(
            "several processes need accelerate: install 'tether[train]', or start one process"
        ) from error
    state = PartialState(cpu=not torch.accelerator.is_available())
    return state.num_processes, state.process_index, state.wait_for_everyone
