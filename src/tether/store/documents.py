"""The documents of a text: given as a list, or in a file with one a JSON line or a single one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tether.errors import ConfigError
from tether.store.marked import Marked, document_of, kind_of
from tether.store.opened import Plain, Text, counted, read_lines, read_plain
from tether.store.publish import publish_file

__all__ = [
    "JSON_LINES",
    "beginning",
    "cut_documents",
    "documents_of",
    "read_documents",
    "text_hash",
    "write_documents",
]

JSON_LINES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files with a JSON object a line, in any case of letters."""


def read_documents(path: str | Path) -> Text:
    """Open a text: JSON lines, one document each, or a plain file, which is one document.

    A line has a field `text`, or `prompt` and `completion`, or `messages`, as the first line has it. Of prompts with
    completions and of conversations only the completions and the assistant's turns are learnt, see
    `tether.store.marked`.

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
        with path.open("rb") as stream:
            text = (read_lines if path.suffix.lower() in JSON_LINES else read_plain)(path, stream)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if text is None:
        raise ConfigError(f"{path}: the file holds no text; expected at least one document")
    return text


def documents_of(text: str | Path | Sequence[str | Mapping[str, Any]]) -> Sequence[str]:
    """Give the documents of a text, however it is named.

    Args:
        text: a file, an opened one, or the documents themselves: texts, or rows as in a file.

    Returns:
        The documents; those of a file stay there until they are asked for.

    Raises:
        ConfigError: a row is none that a file may have.
    """
    if isinstance(text, str | Path):
        return read_documents(text)
    if isinstance(text, Text):
        return text
    found = []
    for number, each in enumerate(text):
        if isinstance(each, str):
            found.append(each)
            continue
        try:
            found.append(document_of(each, kind_of(each) or "text"))
        except ConfigError as error:
            raise ConfigError(f"row {number}: {error}") from error
    return found


def beginning(documents: Sequence[str], number: int, characters: int) -> str:
    """Read the beginning of a document, and of a file no more than that.

    Args:
        documents: the documents.
        number: which.
        characters: how many characters at most.

    Returns:
        The beginning.
    """
    if isinstance(documents, Text):
        return documents.beginning(number, characters)
    document = documents[number]
    return document if isinstance(document, Marked) else document[:characters]


def cut_documents(documents: Sequence[str], share: float) -> tuple[Sequence[str], Sequence[str]]:
    """Cut a text in two between documents, or at a word where it is only one.

    Args:
        documents: the documents.
        share: of the first part, in (0, 1).

    Returns:
        Both parts; neither is without a document.

    Raises:
        ConfigError: the only document is a prompt with its completion, or a conversation.
    """
    if isinstance(documents, Plain):
        return documents.cut(share)
    if len(documents) == 1:
        (document,) = documents
        if isinstance(document, Marked):
            raise ConfigError("one conversation cannot be cut in two; give at least two")
        at = round(share * len(document))
        at = max(document.rfind(" ", 0, at), document.rfind("\n", 0, at)) + 1 or at
        return [document[:at]], [document[at:]]
    cut = max(1, round(len(documents) * share))
    return documents[:cut], documents[cut:]


def write_documents(path: Path, documents: Sequence[str]) -> None:
    """Write documents as JSON lines.

    Args:
        path: the file, published whole.
        documents: the documents.
    """
    with publish_file(path) as target:
        lines = (json.dumps({"text": document}, ensure_ascii=False) for document in documents)
        target.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


def text_hash(documents: Sequence[str]) -> str:
    """Hash documents, whatever file they came from.

    Args:
        documents: the documents in order.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    if isinstance(documents, Text) and documents.documents_hash is not None:
        return documents.documents_hash
    digest = hashlib.sha256()
    for document in documents:
        digest.update(counted(document.encode()))
    return f"sha256:{digest.hexdigest()}"
