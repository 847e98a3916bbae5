"""JSON files that describe what lies beside them: read as a mapping, or refused with the field that is wrong."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tether.errors import CheckpointError

__all__ = ["damage", "read_description"]


def read_description(file: Path, again: str, schema: Any = dict[str, Any]) -> dict[str, Any]:
    """Read a description.

    Args:
        file: of JSON.
        again: what to do if it cannot be used.
        schema: a type of mapping; its fields have to be there, and others may be.

    Returns:
        The mapping in it.

    Raises:
        CheckpointError: It cannot be read, is no JSON, no mapping, or has fields that are missing or wrong.
    """
    try:
        content = file.read_bytes()
        TypeAdapter(schema).validate_json(content)
        return TypeAdapter(dict[str, Any]).validate_json(content)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged ({damage(error)}); expected a JSON mapping. {again}"
        ) from error


def damage(error: Exception) -> str:
    """Say what is wrong with a file that does not fit its schema.

    Args:
        error: what its reading raised.

    Returns:
        The first fields that are wrong, or what the error says.
    """
    if not isinstance(error, ValidationError):
        return str(error)
    listed = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()[:3]]
    return "; ".join(listed)
