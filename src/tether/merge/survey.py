"""One reading of all inputs before the work: their hashes, and that every weight is a number."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from tether.errors import CheckpointError
from tether.merge.floats import BYTES, finite
from tether.merge.opening import Opened
from tether.store.publish import write_json
from tether.store.reader import CheckpointReader

__all__ = ["OBSERVATION", "check_observed", "survey"]

OBSERVATION: Final = "observation.json"
"""Describes a folder of Gram matrices, see `tether.merge.observation`."""


def survey(
    opened: dict[str, Opened],
    record: Path | None,
    threads: int,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, str]:
    """Hash the inputs and look for NaN and infinity.

    Args:
        opened: the models.
        record: keeps the result for a resumed merge; it belongs to one plan, and so to unchanged files;
            None to read in any case and keep nothing.
        threads: how many models are read at once.
        on_step: called with `done` and `total` bytes.

    Returns:
        Model name to fingerprint.

    Raises:
        CheckpointError: If a file cannot be read, or holds NaN or infinity; one message names all tensors.
    """
    if record and record.is_file():
        known: dict[str, str] = json.loads(record.read_bytes())
        return known
    total = sum(file.stat().st_size for model in opened.values() for file in model.reader.files)
    done, lock = [0], threading.Lock()

    def report(count: int) -> None:
        with lock:
            done[0] += count
            if on_step:
                on_step({"done": float(done[0]), "total": float(total)})

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda model: _read(model.reader, report), opened.values()))
    wrong = {name: bad for name, (_, bad) in zip(opened, results, strict=True) if bad}
    if wrong:
        listed = "; ".join(
            f"{name}: {', '.join(bad[:5])}{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}"
            for name, bad in wrong.items()
        )
        raise CheckpointError(
            f"NaN or infinite weights in {listed}. Expected finite numbers; nothing was merged. The checkpoint is "
            "damaged, or its training diverged: take another one."
        )
    fingerprints = {name: fingerprint for name, (fingerprint, _) in zip(opened, results, strict=True)}
    if record:
        write_json(record, fingerprints)
    return fingerprints


def _read(reader: CheckpointReader, report: Callable[[int], None]) -> tuple[str, list[str]]:
    bad: dict[str, None] = {}
    dtypes = {name: reader.dtype(name) for name in reader.names}

    def inspect(name: str, chunk: memoryview) -> None:
        if dtypes[name] in BYTES and not finite(np.frombuffer(chunk, np.uint8), dtypes[name]):
            bad[name] = None
        report(len(chunk))

    return reader.fingerprint(inspect), list(bad)


def check_observed(folder: str | Path, fingerprint: str, name: str) -> None:
    """Refuse Gram matrices that were observed on another checkpoint than the one they are used for.

    Args:
        folder: of the matrices; without a description, or with one of a model from no files, nothing is known.
        fingerprint: of the checkpoint.
        name: what to call it in an error.

    Raises:
        CheckpointError: the description names another checkpoint, or cannot be read.
    """
    file = Path(folder) / OBSERVATION
    if not file.is_file():
        return
    try:
        observed = json.loads(file.read_text(encoding="utf-8")).get("checkpoint")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not the description of an observation; observe {name} again"
        ) from error
    if observed is not None and observed != fingerprint:
        raise CheckpointError(
            f"{folder} was observed on another checkpoint ({str(observed)[:19]}...) than {name} "
            f"({fingerprint[:19]}...): its matrices would weigh the wrong inputs; observe {name} again"
        )
