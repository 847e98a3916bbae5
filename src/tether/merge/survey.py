"""One reading of all inputs before the work: their hashes, and that every weight is a number."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import Field, NonNegativeInt

from tether.errors import CheckpointError
from tether.merge.descriptions import read_description
from tether.merge.files import Seen, block_bytes, hash_array, read_extra
from tether.merge.floats import BYTES, finite
from tether.merge.opening import Opened
from tether.merge.operator import Extra
from tether.reading import Strict
from tether.store.hashing import sha256_file
from tether.store.publish import write_json
from tether.store.reader import CheckpointReader

__all__ = ["OBSERVATION", "Survey", "check_observed", "read_observation", "survey"]

OBSERVATION: Final = "observation.json"
"""Describes a folder of Gram matrices, see `tether.merge.observation`."""

RECORD_BYTES: Final = 2**30
"""Size of the record of a reading at most; it has 64 bytes for each 512 KiB of bfloat16."""

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Blocks = Annotated[str, Field(pattern="^([0-9a-f]{64})*$")]


class _Observation(Strict):
    """How Gram matrices were observed; folders that are made by hand may say less."""

    model: str | None = None
    probes: str | None = None
    samples: NonNegativeInt | None = None
    paths: NonNegativeInt | None = None
    shortest: NonNegativeInt | None = None
    longest: NonNegativeInt | None = None
    top_p: float | None = None
    seed: int | None = None
    checkpoint: str | None = None


class _Record(Strict):
    """What a resumed merge is told of the reading; its seal is the SHA-256 of the other fields."""

    fingerprints: dict[str, _Digest]
    blocks: dict[str, dict[str, _Blocks]]
    files: dict[str, _Digest]
    extras: dict[str, dict[str, _Digest]]
    seal: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What one reading of all inputs found.

    Attributes:
        fingerprints: model name to fingerprint, see `CheckpointReader.fingerprint`.
        blocks: model name to tensor name to the SHA-256 of its blocks, one after the other.
        files: path of a file of Gram matrices to its SHA-256.
        extras: path of such a file to tensor name to the SHA-256 of what is needed of it.
    """

    fingerprints: dict[str, str]
    blocks: dict[str, dict[str, bytes]]
    files: dict[str, str]
    extras: dict[str, dict[str, bytes]]

    def keep(self, record: Path) -> None:
        """Write down what was found, for a resumed merge.

        Args:
            record: the file.
        """
        write_json(record, _sealed(self))

    def beside(self, extras: Iterable[Extra]) -> "Survey":
        """Take in further tensors beside the weights, which a merge has made itself and no input holds.

        Args:
            extras: all that will be read; those that are known are not read again.

        Returns:
            The same with their hashes; `files` stays as it is.
        """
        known = {file: dict(tensors) for file, tensors in self.extras.items()}
        _hash_extras(extras, known)
        return replace(self, extras=known)

    def seen(self, opened: dict[str, Opened]) -> Seen:
        """Give the hashes under the places that a merge reads.

        Args:
            opened: the models.

        Returns:
            The hashes.

        Raises:
            CheckpointError: If two models are one file and it was changed between their readings.
        """
        places: dict[tuple[Path, int], bytes] = {}
        for name, model in opened.items():
            for tensor, digests in self.blocks[name].items():
                file, start, _ = model.reader.span(tensor)
                step = block_bytes(model.reader.dtype(tensor))
                for number in range(len(digests) // 32):
                    digest = digests[number * 32 : number * 32 + 32]
                    if places.setdefault((file, start + number * step), digest) != digest:
                        raise CheckpointError(
                            f"{file} was changed while the inputs were read: {tensor} is not the same for every model "
                            "that is read from it. Nothing was merged. Start again when nothing writes to it."
                        )
        extras = {(file, name): digest for file, each in self.extras.items() for name, digest in each.items()}
        return Seen(places, extras)


def survey(
    opened: dict[str, Opened],
    extras: Iterable[Extra],
    record: Path | None,
    threads: int,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Survey:
    """Hash the inputs and look for NaN and infinity.

    Args:
        opened: the models.
        extras: tensors beside the weights that will be read.
        record: keeps the result for a resumed merge; it belongs to one plan, and so to unchanged files;
            None to read in any case and keep nothing.
        threads: how many models are read at once.
        on_step: called with `done` and `total` bytes.

    Returns:
        The hashes.

    Raises:
        CheckpointError: If a file cannot be read, was changed since it was opened, or holds NaN or infinity (one
            message names all tensors); if the record is damaged.
    """
    if record and record.exists():
        return _recorded(record)
    total = sum(file.stat().st_size for model in opened.values() for file in model.reader.files)
    done, lock = [0], threading.Lock()

    def report(count: int) -> None:
        with lock:
            done[0] += count
            if on_step:
                on_step({"done": float(done[0]), "total": float(total)})

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda model: _read(model, report), opened.values()))
    wrong = {name: bad for name, (_, _, bad) in zip(opened, results, strict=True) if bad}
    if wrong:
        listed = "; ".join(
            f"{name}: {', '.join(bad[:5])}{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}"
            for name, bad in wrong.items()
        )
        raise CheckpointError(
            f"NaN or infinite weights in {listed}. Expected finite numbers; nothing was merged. The checkpoint is "
            "damaged, or its training diverged: take another one."
        )
    needed: dict[str, dict[str, bytes]] = {}
    _hash_extras(extras, needed)
    found = Survey(
        fingerprints={name: fingerprint for name, (fingerprint, _, _) in zip(opened, results, strict=True)},
        blocks={name: blocks for name, (_, blocks, _) in zip(opened, results, strict=True)},
        files={file: sha256_file(file) for file in needed},
        extras=needed,
    )
    if record:
        found.keep(record)
    return found


# Add what is not yet known: file to tensor to hash.
def _hash_extras(extras: Iterable[Extra], known: dict[str, dict[str, bytes]]) -> None:
    for extra in extras:
        tensors = known.setdefault(extra.file, {})
        if extra.tensor not in tensors:
            values = read_extra(extra.file, extra.tensor)
            if values.dtype.kind != "f" or not np.isfinite(values).all():
                raise CheckpointError(
                    f"{extra.file}: {extra.tensor} is of {values.dtype} or holds NaN or infinity, expected finite "
                    "floats; observe the model again"
                )
            tensors[extra.tensor] = hash_array(values)


def _read(model: Opened, report: Callable[[int], None]) -> tuple[str, dict[str, bytes], list[str]]:
    reader = model.reader
    # Places and types are those of the plan: of another file they would be some other bytes.
    now = CheckpointReader(reader.path)
    if [(name, now.span(name), now.shape(name), now.dtype(name)) for name in now.names] != [
        (name, reader.span(name), reader.shape(name), reader.dtype(name)) for name in reader.names
    ]:
        raise CheckpointError(
            f"{reader.path} was changed since the merge was planned: its tensors are others. Nothing was merged. Start "
            "again when nothing writes to it."
        )
    bad: dict[str, None] = {}
    dtypes = {name: reader.dtype(name) for name in reader.names}
    blocks: dict[str, list[bytes]] = {name: [] for name in reader.names}

    def inspect(name: str, chunk: memoryview) -> None:
        if dtypes[name] in BYTES and not finite(np.frombuffer(chunk, np.uint8), dtypes[name]):
            bad[name] = None
        # Chunks are whole numbers of blocks, but for the last one of a tensor.
        step = block_bytes(dtypes[name])
        blocks[name] += [
            hashlib.sha256(chunk[start : start + step]).digest() for start in range(0, len(chunk), step)
        ]
        report(len(chunk))

    fingerprint = reader.fingerprint(inspect)
    return fingerprint, {name: b"".join(digests) for name, digests in blocks.items()}, list(bad)


def _sealed(found: Survey) -> dict[str, Any]:
    content = {
        "fingerprints": found.fingerprints,
        "blocks": {
            name: {each: value.hex() for each, value in of.items()} for name, of in found.blocks.items()
        },
        "files": found.files,
        "extras": {
            file: {each: value.hex() for each, value in of.items()} for file, of in found.extras.items()
        },
    }
    return content | {"seal": _seal(content)}


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _recorded(record: Path) -> Survey:
    again = (
        "Expected what the interrupted merge had read of its inputs. What that merge had finished is removed: start "
        "the same merge again"
    )
    content = read_description(record, again, _Record, RECORD_BYTES)
    if content.pop("seal") != _seal(content):
        raise CheckpointError(f"{record} is damaged: seal: the other fields do not have this hash. {again}")
    nested = {
        field: {
            name: {each: bytes.fromhex(text) for each, text in of.items()}
            for name, of in content[field].items()
        }
        for field in ("blocks", "extras")
    }
    return Survey(fingerprints=content["fingerprints"], files=content["files"], **nested)


def read_observation(folder: str | Path) -> dict[str, Any] | None:
    """Read the description of a folder of Gram matrices.

    Args:
        folder: of the matrices.

    Returns:
        The description; None where there is none.

    Raises:
        CheckpointError: It cannot be read, or has fields that are unknown or wrong.
    """  # noqa: DOC502 - raised by read_description
    file = Path(folder) / OBSERVATION
    return read_description(file, "Observe the model again.", _Observation) if file.exists() else None


def check_observed(folder: str | Path, fingerprint: str, name: str) -> None:
    """Refuse Gram matrices that were observed on another checkpoint than the one they are used for.

    Args:
        folder: of the matrices; without a description, or with one of a model from no files, nothing is known.
        fingerprint: of the checkpoint.
        name: what to call it in an error.

    Raises:
        CheckpointError: the description names another checkpoint, or cannot be read.
    """
    observed = (read_observation(folder) or {}).get("checkpoint")
    if observed is not None and observed != fingerprint:
        raise CheckpointError(
            f"{folder} was observed on another checkpoint ({str(observed)[:19]}...) than {name} "
            f"({fingerprint[:19]}...): its matrices would weigh the wrong inputs; observe {name} again"
        )
