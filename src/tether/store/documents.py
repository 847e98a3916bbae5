"""Text on disk: one document a JSON line, or a plain file."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tether.errors import ConfigError
from tether.store.publish import publish_file

__all__ = ["JSON_LINES", "read_documents", "text_hash", "write_documents"]

JSON_LINES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files with a JSON object a line, in any case of letters."""


def read_documents(path: str | Path) -> list[str]:
    """Read a text: JSON lines with a field `text` (one document a line), or a plain file (one document).

    Args:
        path: a file of JSON lines by its suffix, see `JSON_LINES`, or any other file as UTF-8 text.

    Returns:
        The documents, none of them empty.

    Raises:
        ConfigError: the file is missing, is not UTF-8, a line is not such JSON, or nothing is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such text file; expected JSON lines with a field 'text', or plain text"
        )
    try:
        content = path.read_text(
            encoding="utf-8-sig"
        )  # with or without the mark that some editors begin a file with
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    if path.suffix.lower() not in JSON_LINES:
        documents = [content]
    else:
        documents = []
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                document = "" + json.loads(line)["text"]  # a number is no text
                document.encode()  # half a character (a lone surrogate) is none either
                documents.append(document)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f'{path}, line {number}: expected a JSON object with a field "text"; got {line[:60]!r}'
                ) from error
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ConfigError(f"{path}: the file holds no text; expected at least one document")
    return documents


def write_documents(path: Path, documents: Sequence[str]) -> None:
    """Write documents as JSON lines.

    Args:
        path: the file, published whole.
        documents: the documents.
    """
    with publish_file(path) as target:
        lines = (json.dumps({"text": document}, ensure_ascii=False) for document in documents)
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def text_hash(documents: Sequence[str]) -> str:
    """Hash documents, whatever file they came from.

    Args:
        documents: the documents in order.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.encode()).to_bytes(8, "little") + document.encode())
    return f"sha256:{digest.hexdigest()}"
