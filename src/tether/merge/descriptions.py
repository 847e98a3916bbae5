"""JSON files that describe what lies beside them: read as a mapping, or refused with the field that is wrong."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tether.errors import CheckpointError
from tether.files import read_bytes
from tether.reading import JSON_BYTES, parse_as

__all__ = ["read_description"]


def read_description(
    file: Path, again: str, schema: type[BaseModel], most: int = JSON_BYTES
) -> dict[str, Any]:
    """Read a description.

    Args:
        file: of JSON.
        again: what to do if it cannot be used, a sentence.
        schema: its fields.
        most: bytes that it may have.

    Returns:
        The fields that are in it, under the names that they have there.

    Raises:
        CheckpointError: It cannot be read, is no JSON, or has fields that are missing, unknown or wrong.
    """
    where = f"{file} is damaged"
    try:
        fields = parse_as(schema, read_bytes(file, most), where)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {again}") from error
    return fields.model_dump(by_alias=True, exclude_unset=True)
