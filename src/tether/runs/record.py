"""The records of a run: what a stage used, wrote and found, as JSON that is written whole."""

import hashlib
import json
import numbers
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from pydantic import NonNegativeInt

from tether.errors import CheckpointError, ConfigError
from tether.files import is_plain, read_bytes
from tether.reading import JSON_BYTES, Strict, parse_as
from tether.store.hashing import sha256_file
from tether.store.publish import publish_file
from tether.store.system import flush

__all__ = [
    "SCHEMA_VERSION",
    "clean_temporaries",
    "describe_outputs",
    "hash_inputs",
    "hash_json",
    "is_temporary",
    "outputs_stand",
    "read_record",
    "to_json",
    "unwritable",
    "write_record",
]

SCHEMA_VERSION: Final = 1
# The names that store.publish gives to what is not complete yet.
_TEMPORARY = re.compile(r"\..+\.tmp-\d+-[0-9a-f]{8}", re.DOTALL)


class _Output(Strict):
    size: NonNegativeInt
    sha256: str


class _Record(Strict):
    schema_version: int
    stage: str
    config_hash: str
    inputs: dict[str, str]
    outputs: dict[str, _Output]
    figures: dict[str, Any]
    cpu_seconds: float
    wall_seconds: float
    peak_rss_bytes: NonNegativeInt


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text, with NaN and infinity as Python's json writes them, since losses can be either.

    Args:
        value: Dicts with text keys, lists, text, numbers (scalars of numpy too), booleans, None.
        indent: As in json.dumps.

    Returns:
        The text.

    Raises:
        ConfigError: If JSON cannot hold the value.

    Example:
        >>> to_json({"loss": float("nan")})
        '{"loss": NaN}'
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"figures or metrics cannot be JSON ({error}). Expected text keys and text, numbers, booleans, "
            "None, lists or dicts as values. Convert the rest first: call item() on a tensor."
        ) from error


def hash_json(value: Any) -> str:
    """Hash a JSON value; the order of keys does not matter.

    Args:
        value: What json.loads could have returned.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_inputs(folder: Path, inputs: Iterable[Path]) -> dict[str, str]:
    """Identify files and folders by their content.

    Args:
        folder: The run's folder, absolute.
        inputs: Existing files, or folders, of which names and content of all files count.

    Returns:
        Path (relative to the run's folder where it lies inside) to SHA-256.

    Raises:
        CheckpointError: If some are missing; the message names them all.
    """
    paths = list(inputs)
    if missing := [str(path) for path in paths if not path.exists()]:
        raise CheckpointError(f"inputs of a stage are missing: {', '.join(missing)}. Check the paths.")
    hashes = {}
    for path in paths:
        if path.is_dir():
            listing = [[str(file.relative_to(path)), sha256_file(file)] for file in _files(path)]
            hashes[_known_as(folder, path)] = hash_json(listing)
        else:
            hashes[_known_as(folder, path)] = sha256_file(path)
    return hashes


def describe_outputs(folder: Path, stage: str, outputs: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Flush what a stage wrote to the disk, and describe it.

    Args:
        folder: The run's folder, absolute.
        stage: The name of the stage, for the message.
        outputs: Files, or folders with files in them.

    Returns:
        Path of every file (relative to the run's folder where it lies inside) to its ``size`` and ``sha256``.

    Raises:
        CheckpointError: If some are missing or empty folders; the message names them all.
    """
    described: dict[str, dict[str, Any]] = {}
    missing = []
    for output in outputs:
        files = [file for file in _files(output) if file.is_file()]
        if not files:
            missing.append(str(output))
        for file in files:
            # The record must not reach the disk before what it vouches for.
            flush(file)
            described[_known_as(folder, file)] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    if missing:
        raise CheckpointError(
            f"stage {stage} did not write the outputs that it named: {', '.join(missing)}. Expected files, "
            "or folders with files. Return the paths that were written."
        )
    return described


def outputs_stand(folder: Path, record: dict[str, Any]) -> bool:
    """Return whether every output of a record still exists with the bytes that it had.

    Args:
        folder: The run's folder.
        record: What ``read_record`` returned.

    Returns:
        True if none is missing or has other bytes; all of them are read, unless a length tells already.

    Raises:
        CheckpointError: If one cannot be read.
    """  # noqa: DOC502 - raised by sha256_file
    files = [(folder / path, output) for path, output in record["outputs"].items()]
    if not all(is_plain(file) and file.stat().st_size == output["size"] for file, output in files):
        return False
    return all(sha256_file(file) == output["sha256"] for file, output in files)


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the record of a stage.

    Args:
        path: Its file.

    Returns:
        The record; None where there is none that can be used, so that the stage is done again.
    """
    try:
        record = parse_as(_Record, read_bytes(path, JSON_BYTES), path, foreign=True).model_dump()
    except CheckpointError:
        return None
    return record if record["schema_version"] == SCHEMA_VERSION else None


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write JSON, whole or not at all.

    Args:
        path: The file; its folder is made, an existing file is replaced.
        value: What ``to_json`` takes.

    Raises:
        ConfigError: If JSON cannot hold the value.
        CheckpointError: If the file cannot be written.
    """  # noqa: DOC502 - ConfigError is raised by to_json
    data = (to_json(value, indent=2) + "\n").encode()
    try:
        with publish_file(path, needed=len(data)) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise CheckpointError(unwritable(path, error)) from error


def is_temporary(path: Path) -> bool:
    """Return whether a path has the name of something that is not complete yet.

    Args:
        path: A file or folder; only its name is looked at.

    Returns:
        True if a writer would have renamed it at its end.

    Example:
        >>> is_temporary(Path("law.delta")), is_temporary(Path(".law.delta.tmp-77-0a1b2c3d"))
        (False, True)
    """
    return _TEMPORARY.fullmatch(path.name) is not None


def clean_temporaries(folder: Path) -> None:
    """Remove all temporaries in a folder and below it; for a folder in which nobody else works.

    Args:
        folder: The run's folder, locked.
    """
    for path in [path for path in folder.rglob(".*") if is_temporary(path)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> str:
    """Return the message for a file of the run that cannot be written.

    Args:
        path: The file.
        error: What the system said.

    Returns:
        One line.
    """
    return (
        f"{path} cannot be written ({error.strerror}). Nothing that was recorded is lost. Free some space or "
        "check the permissions, then start the run again."
    )


# Runs move: what lies inside the folder is known by its relative path.
def _known_as(folder: Path, path: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


# The scalars of numpy count as numbers, but json does not know them.
def _plain(value: Any) -> int | float:
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
