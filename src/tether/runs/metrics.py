"""``metrics.jsonl``: one JSON object a line, appended, readable whatever moment its writer was killed at."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tether.errors import CheckpointError, ConfigError
from tether.files import check_plain
from tether.reading import parse_json
from tether.runs.record import to_json, unwritable

__all__ = ["METRICS", "append_metrics", "cut_torn_line", "mark_started", "read_metrics"]

METRICS: Final = "metrics.jsonl"
_STARTED: Final = "stage_started"


def append_metrics(path: Path, stage: str | None, values: Mapping[str, Any]) -> None:
    """Append one line; after an error the file ends where it ended before.

    Args:
        path: The file; made if it does not exist.
        stage: The stage that is being worked on, added to the line under ``stage``; None for none.
        values: JSON; NaN is kept. The keys ``stage`` and ``stage_started`` are taken.

    Raises:
        ConfigError: If the values cannot be JSON, or use a key that is taken.
        CheckpointError: If the line cannot be written.
    """  # noqa: DOC502 - CheckpointError is raised by _append
    if taken := sorted({"stage", _STARTED} & set(values)):
        raise ConfigError(f"a metrics line was given the keys {taken}, which the run sets. Rename them.")
    _append(path, {**({} if stage is None else {"stage": stage}), **values})


def mark_started(path: Path, stage: str) -> None:
    """Note that a stage begins: what an earlier attempt at it logged no longer counts.

    Args:
        path: The file; made if it does not exist.
        stage: The name of the stage.

    Raises:
        CheckpointError: If the line cannot be written.
    """  # noqa: DOC502 - raised by _append
    _append(path, {_STARTED: stage})


def cut_torn_line(path: Path) -> None:
    """Drop what follows the last line end, so that the next line does not continue a torn one.

    Args:
        path: The file; nothing happens if it does not exist.
    """
    whole = sum(len(line) for line in _lines(path) if line.endswith(b"\n"))
    if path.exists() and whole < path.stat().st_size:
        os.truncate(path, whole)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all lines that count: neither torn nor from an attempt at a stage that was begun again.

    Args:
        path: The file; it may be missing, and may be written to meanwhile.

    Returns:
        One dict a line, in order.

    Raises:
        CheckpointError: If a line other than the last is damaged.
    """
    metrics: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            values = parse_json(line, path, foreign=True)
        except CheckpointError:
            values = None
        if not isinstance(values, dict):
            raise CheckpointError(
                f"line {number} of {path} is damaged; expected one JSON object a line. Remove the line."
            )
        if _STARTED in values:
            metrics = [earlier for earlier in metrics if earlier.get("stage") != values[_STARTED]]
        else:
            metrics.append(values)
    return metrics


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        check_plain(path)
        with path.open("rb") as file:
            yield from file


def _append(path: Path, values: dict[str, Any]) -> None:
    line = (to_json(values) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise CheckpointError(unwritable(path, error)) from error
