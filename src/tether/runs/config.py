"""``run.json``: the configuration that everything in a run folder was made with."""

import json
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from tether.errors import CheckpointError, ConfigError
from tether.files import read_bytes
from tether.reading import JSON_BYTES, Strict, parse_as
from tether.runs.record import SCHEMA_VERSION, hash_json, write_record

__all__ = ["CONFIG", "read_config", "refuse_other_config", "write_config"]

CONFIG: Final = "run.json"


class _Version(BaseModel):
    """The field that every version has, so that a newer one is told from a damaged one."""

    schema_version: int


class _Config(Strict):
    schema_version: int
    config_hash: str
    config: dict[str, Any]


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a new run.

    Args:
        folder: The run's folder.
        config: JSON.

    Raises:
        CheckpointError: If it cannot be written.
    """  # noqa: DOC502 - raised by write_record
    content = {"schema_version": SCHEMA_VERSION, "config_hash": hash_json(config), "config": config}
    write_record(folder / CONFIG, content)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a run.

    Args:
        folder: The run's folder.

    Returns:
        The configuration.

    Raises:
        CheckpointError: If the folder is not that of a run, or ``run.json`` is damaged or of another version.
    """
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(f"{folder} is not the folder of a run: it has no run.json. Check the path.")
    where = f"{path} is damaged"
    text = read_bytes(path, JSON_BYTES)
    version = parse_as(_Version, text, where, foreign=True).schema_version
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}; expected {SCHEMA_VERSION}. Use the tether that wrote it, "
            "or choose another folder."
        )
    read = parse_as(_Config, text, where, foreign=True)
    config = read.config
    if hash_json(config) != read.config_hash:
        raise CheckpointError(
            f"{path} was changed by hand: its config does not have the config_hash beside it. Undo the "
            "change, or choose another folder."
        )
    return config


def refuse_other_config(folder: Path, there: dict[str, Any], given: dict[str, Any]) -> None:
    """Compare the configuration of a run with the one asked for.

    Args:
        folder: The run's folder, for the message.
        there: What ``run.json`` holds.
        given: What was asked for, after a round trip through JSON.

    Raises:
        ConfigError: If they differ; the message names every differing key with both values.
    """
    before, now = _flat((), there), _flat((), given)
    absent = "(absent)"
    differing = [
        f"{'.'.join(key)} (given {now.get(key, absent)}, there {before.get(key, absent)})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise ConfigError(
            f"run folder {folder} was made with other options: {'; '.join(differing)}. Choose another "
            "folder, or pass the same options."
        )


# The path of keys to the JSON text of the value, so that 1, 1.0 and true differ.
def _flat(path: tuple[str, ...], value: Any) -> dict[tuple[str, ...], str]:
    if isinstance(value, dict) and (value or not path):
        flat: dict[tuple[str, ...], str] = {}
        for key, inner in value.items():
            flat |= _flat((*path, key), inner)
        return flat
    return {path: json.dumps(value, sort_keys=True)}
