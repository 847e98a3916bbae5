"""``tether.json``: what made an artifact, from which inputs, by which recipe."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tether._version import __version__
from tether.errors import CheckpointError
from tether.files import read_bytes
from tether.reading import JSON_BYTES, parse_json
from tether.store.publish import write_json

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Input",
    "Manifest",
    "read_manifest",
    "versions",
    "write_manifest",
]

MANIFEST: Final = "tether.json"
SCHEMA_VERSION: Final = 1
_OPTIONAL: Final = {"outputs", "seal"}


class Input(BaseModel):
    """One file that an artifact was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Annotated[str, Field(min_length=1)]
    """What it was used as: ``base``, ``delta``, ``text`` and so on."""
    path: str
    """Where it was; to help a reader find it, not to identify it."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """The hash of its bytes, or the fingerprint of a checkpoint: what identifies it."""


def versions() -> dict[str, str]:
    """Return the versions of what computes and writes, without importing any of it.

    Returns:
        Of tether, torch, transformers, safetensors and python; ``"not installed"`` where it is not.

    Example:
        >>> sorted(versions())
        ['python', 'safetensors', 'tether', 'torch', 'transformers']
    """
    found = {"tether": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class Manifest(BaseModel):
    """The record beside an artifact's weights: schema version, kind, versions, inputs, recipe.

    It carries no time and no machine: equal work gives equal bytes.

    Raises:
        pydantic.ValidationError: If a field is missing, unknown or of the wrong type.

    Example:
        >>> Manifest(kind="delta", recipe={"chart": "symmetric"}).recipe["chart"]
        'symmetric'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Annotated[str, Field(min_length=1)]
    """``delta``, ``checkpoint``, ``certificate``, ``run`` and so on."""
    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    """The version of this layout; a reader refuses newer ones."""
    versions: dict[str, str] = Field(default_factory=versions)
    """Package to version, as ``versions()`` gives them."""
    inputs: tuple[Input, ...] = ()
    """Every file it was made from."""
    recipe: dict[str, Any] = {}
    """The options it was made with, as JSON."""
    outputs: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = {}
    """Files of the artifact to the SHA-256 of their bytes, for artifacts that are compared with it later."""
    seal: str = ""
    """SHA-256 of the other fields; only where there are outputs, so that no damage to the record itself passes."""

    @property
    def changed(self) -> bool:
        """Whether a seal that was written is not that of the other fields."""
        return bool(self.outputs or self.seal) and self.seal != self.sealed().seal

    def sealed(self) -> "Manifest":
        """Give the same record with its seal.

        Returns:
            A new manifest.
        """
        content = json.dumps(self.model_dump(exclude={"seal"}), sort_keys=True, allow_nan=False)
        return self.model_copy(update={"seal": hashlib.sha256(content.encode()).hexdigest()})


def write_manifest(folder: str | PathLike[str], manifest: Manifest) -> None:
    """Write ``tether.json`` into a folder, whole or not at all.

    Args:
        folder: Where the artifact is; while it is being published, its temporary folder.
        manifest: What to record.

    Raises:
        ConfigError: If the recipe holds something that JSON cannot.
        CheckpointError: If the disk is full.
    """  # noqa: DOC502 - raised by write_json
    manifest = manifest.sealed() if manifest.outputs else manifest
    content = manifest.model_dump(mode="python")
    write_json(
        Path(folder) / MANIFEST,
        {key: value for key, value in content.items() if value or key not in _OPTIONAL},
    )


def read_manifest(folder: str | PathLike[str]) -> Manifest:
    """Read the ``tether.json`` of a folder.

    Args:
        folder: The folder of an artifact.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: If it is missing, unreadable, of a newer schema, or has fields that are wrong.
    """
    path = Path(folder) / MANIFEST
    if Path(folder).is_dir() and not path.exists():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}; expected a folder that tether wrote. Check the path."
        )
    text = read_bytes(path, JSON_BYTES)
    parse_json(text, path)
    try:
        header = _Header.model_validate_json(text)
        if header.schema_version <= SCHEMA_VERSION:
            return Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()
        )
        raise CheckpointError(
            f"{path} is not a manifest that tether {__version__} can use ({details}). Expected the fields "
            f"{', '.join(Manifest.model_fields)}. Copy it again from its source, or make the artifact again."
        ) from error
    raise CheckpointError(
        f"{path} has schema version {header.schema_version}; tether {__version__} reads up to "
        f"{SCHEMA_VERSION}. Upgrade tether, or make the artifact again with this version."
    )


class _Header(BaseModel):
    """The one field that every version of the schema has, so that a newer one is told from a damaged one."""

    schema_version: int
