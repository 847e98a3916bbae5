"""Cover a region by cells in each of which something is proved: branch and bound, with counts, resumable."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

from pydantic import Field

from tether.errors import CheckpointError
from tether.reading import Strict, checked, read_json
from tether.store.publish import write_json

__all__ = ["Cell", "Cover", "Prove", "cover", "merged"]

Cell: TypeAlias = tuple[float, ...]
"""Lower and upper ends, one pair a variable: (a0, a1, b0, b1, ...)."""
Prove: TypeAlias = Callable[[Cell], str | int | dict[str, int]]
"""Returns what proves a cell, an argument's name or counts by name, or the number of the variable to split."""

LIMIT = 10**6
"""Cells that one starting cell may be split into before it counts as failed."""
SAVE_EVERY = 200
"""Starting cells between two writes of the state."""


class Cover(NamedTuple):
    """What a branch and bound did."""

    proofs: dict[str, int]
    """Cells proved, by argument."""
    failures: int
    """Starting cells that were not covered."""
    cells: int
    """Cells looked at, those that were split included."""

    @property
    def holds(self) -> bool:
        """Whether every cell is proved."""
        return self.failures == 0


def cover(
    starts: Sequence[Cell],
    prove: Prove,
    *,
    state: str | os.PathLike[str] | None = None,
    key: str = "",
    limit: int = LIMIT,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Cover:
    """Prove all starting cells, splitting those that resist.

    Args:
        starts: cells that cover the region.
        prove: the arguments to try on a cell.
        state: a JSON file that keeps what is done; a run that is started again with it goes on from there.
        key: what the state is about: a state of something else is refused.
        limit: cells that one starting cell may take.
        on_step: called with done and total starting cells.

    Returns:
        The counts.

    Raises:
        CheckpointError: the state belongs to another region or cannot be read.
    """  # noqa: DOC502 - raised by _load
    key = f"{key}, {len(starts)} starting cells"
    done, proofs, failures, cells = _load(state, key)
    for start in starts[done:]:
        stack, used = [start], 0
        while stack:
            cell = stack.pop()
            used += 1
            if used > limit:
                failures += 1
                break
            answer = prove(cell)
            if not isinstance(answer, int):
                proofs.update([answer] if isinstance(answer, str) else answer)
                continue
            low, high = 2 * answer, 2 * answer + 1
            middle = (cell[low] + cell[high]) / 2
            if not cell[low] < middle < cell[high]:
                failures += 1
                break
            stack.append((*cell[:high], middle, *cell[high + 1 :]))
            stack.append((*cell[:low], middle, *cell[low + 1 :]))
        cells += used
        done += 1
        if on_step is not None:
            on_step({"done": done, "total": len(starts)})
        if state is not None and (done % SAVE_EVERY == 0 or done == len(starts)):
            write_json(
                Path(state),
                {"key": key, "done": done, "proofs": dict(proofs), "failures": failures, "cells": cells},
            )
    return Cover(dict(proofs), failures, cells)


def merged(covers: Sequence[Cover]) -> Cover:
    """Add up the counts of several covers.

    Args:
        covers: of the parts of a proof.

    Returns:
        Their sums.
    """
    proofs: Counter[str] = Counter()
    for one in covers:
        proofs.update(one.proofs)
    return Cover(dict(proofs), sum(one.failures for one in covers), sum(one.cells for one in covers))


class _State(Strict):
    """What a cover has counted so far."""

    key: str
    done: Annotated[int, Field(ge=0)]
    proofs: dict[str, Annotated[int, Field(ge=0)]]
    failures: Annotated[int, Field(ge=0)]
    cells: Annotated[int, Field(ge=0)]


def _load(state: str | os.PathLike[str] | None, key: str) -> tuple[int, Counter[str], int, int]:
    if state is None or not Path(state).exists():
        return 0, Counter(), 0, 0
    try:
        record = checked(_State, read_json(Path(state)), Path(state))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: not a state of a branch and bound; delete it to start anew"
        ) from error
    if record.key != key:
        raise CheckpointError(
            f"{state}: a state of {ascii(record.key)[:80]}, expected '{key}': name another file, or delete it to "
            "start anew"
        )
    return record.done, Counter(record.proofs), record.failures, record.cells
