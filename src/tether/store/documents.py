"""The documents of a text, however a user names it: the one place where texts are opened."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tether.errors import ConfigError
from tether.files import check_plain
from tether.store.hashing import sha256_file
from tether.store.marked import Controlled, Marked, document_of, kind_of
from tether.store.named import dataset_rows, is_saved, may_be_fetched, name_and_split
from tether.store.opened import Text, hash_documents, read_lines
from tether.store.plain import Plain, read_plain
from tether.store.publish import publish_file
from tether.store.rows import FieldError
from tether.store.several import folder_files, folder_hash, joined
from tether.store.spooled import spool
from tether.store.tables import JSON_LINES, TABLES, rows_of, suffixes

__all__ = [
    "JSON_LINES",
    "beginning",
    "cut_documents",
    "documents_of",
    "read_documents",
    "source_hash",
    "text_hash",
    "write_documents",
]

NAMED = (*JSON_LINES, *TABLES, ".txt", ".md")
"""Suffixes of files that hold text; of others in a folder only those are read that are UTF-8."""


def read_documents(
    name: str | Path, *, field: str | None = None, control: bool = False, fetch: bool = True
) -> Text:
    """Open a text.

    What it is, its name tells:
    - `.jsonl`, `.ndjson`, `.json`: JSON lines, a document each; also compressed, with `.gz` after that.
    - `.parquet`, `.csv`, `.tsv`: a table, a document each row; the last two also compressed.
    - any other file: plain text, which is one document; `.txt.gz` and `.md.gz` too.
    - a folder that `Dataset.save_to_disk` has written: its rows. Any other folder: its files in the order of their
      names, each as above. What is hidden, empty, or no text is passed over; `recognised` says so.
    - what is neither: a name of the library `datasets`, `NAME:SPLIT` (`tether.store.named`). A folder with a split is
      read by that library too.

    Rows have a field `text`, or `prompt` and `completion`, or `messages`, as the first one has it. Of prompts with
    completions and of conversations only the completions and the assistant's turns are learnt, see
    `tether.store.marked`.

    Plain files and JSON lines are read where they lie. Of anything else the documents are copied once into a temporary
    file without a name.

    Args:
        name: of a file, a folder or a data set.
        field: where rows have the text or the conversation, if it is not in `text` or `messages`.
        control: whether control tokens in what prompts, turns and texts say are read as such; else they are letters.
        fetch: whether a name may be asked of the library `datasets`, which asks the hub.

    Returns:
        The documents, none of them empty.

    Raises:
        ConfigError: there is nothing of that name, it is damaged or not UTF-8, a row is none that a text may have, a
            folder holds several kinds, what reads it is not installed, or nothing is in it.
        FieldError: no rows, or rows without that field.
    """  # noqa: DOC502 - FieldError is raised by what it calls
    path, split = Path(name), None
    if not path.exists():
        called, split = name_and_split(str(name))
        path = Path(called)
        if not (is_saved(path) or (fetch and (path.is_dir() or may_be_fetched(called, split)))):
            raise ConfigError(
                f"{name}: no such text file or folder; expected JSON lines, parquet, CSV or plain text, a folder of "
                "such files" + (", or the name of a data set, as org/name:train" if fetch else "")
            )
    if path.is_dir() and split is None and not is_saved(path):
        text: Text | None = _folder(path, field)
    elif path.is_dir() or split is not None or not path.exists():
        text = _dataset(path, str(path) if path.is_dir() else name_and_split(str(name))[0], split, field)
    else:
        text = _file(path, field)
    if text is None:
        raise ConfigError(f"{name}: the file holds no text; expected at least one document")
    return text.with_control() if control else text


def _file(path: Path, field: str | None) -> Text | None:
    check_plain(path, error=ConfigError)
    suffix, packed = suffixes(path)
    try:
        if packed or suffix in TABLES:
            return spool(rows_of(path, field), path.name, field=field, path=path, sha256=sha256_file(path))
        if suffix not in JSON_LINES and field is not None:
            raise FieldError(f"{path}: plain text has no field {field!a}; leave --field out, or give rows")
        read = partial(read_lines, field=field) if suffix in JSON_LINES else read_plain
        with path.open("rb") as stream:
            return read(path, stream)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _folder(folder: Path, field: str | None) -> Text | None:
    parts, passed = [], []
    for path in folder_files(folder):
        named = suffixes(path)[0] in NAMED
        rows = suffixes(path)[0] in (*JSON_LINES, *TABLES)
        try:
            text = _file(path, field if rows else None)
        except ConfigError:
            if named:
                raise
            text = None
        if text is None:
            passed.append(path.name)
        else:
            parts.append(text)
    if not parts:
        return None
    if field is not None and not any(part.seen.field for part in parts):
        raise FieldError(f"{folder}: plain texts have no field {field!a}; leave --field out, or give rows")
    more = f" and {len(passed) - 3} more" if len(passed) > 3 else ""
    note = f"passed over, as empty or no text: {', '.join(passed[:3])}{more}" if passed else ""
    return joined(folder, parts, field=field, note=note)


def _dataset(path: Path, name: str, split: str | None, field: str | None) -> Text | None:
    saved = path.is_dir() and is_saved(path)
    shown = path.name if path.is_dir() else name
    called = shown if split is None else f"{shown}:{split}"
    return spool(
        dataset_rows(name, split, field), called, field=field, split=split,
        # What a folder of data files names may lie anywhere, so its own files say nothing of the rows.
        path=path if saved else None, sha256=folder_hash(path) if saved else None,
    )  # fmt: skip


def source_hash(path: str | Path) -> str:
    """Hash what a text is in, for whoever compares it with `Text.sha256`.

    Args:
        path: the file or folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: there is neither, or it cannot be read.
        ConfigError: a folder of too many files.
    """  # noqa: DOC502 - raised by what it calls
    return folder_hash(Path(path)) if Path(path).is_dir() else sha256_file(path)


def documents_of(text: str | Path | Iterable[str | Mapping[str, Any]]) -> Sequence[str]:
    """Give the documents of a text, however it is named.

    Args:
        text: what `read_documents` takes, an opened text, or the documents themselves: texts, or rows as in a file. A
            list is taken as it is; what is no list, as a data set, is read once and copied to a temporary file.

    Returns:
        The documents; those of a file stay there until they are asked for.

    Raises:
        ConfigError: a row is none that a file may have, or there are none.
    """
    if isinstance(text, str | Path):
        return read_documents(text)
    if isinstance(text, Text):
        return text
    if not isinstance(text, Sequence):
        rows = (
            (f"row {number}", {"text": each} if isinstance(each, str) else each)
            for number, each in enumerate(text)
        )
        copied = spool(rows, "the rows")
        if copied is None:
            raise ConfigError("the rows hold no text; expected at least one document")
        return copied
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
    if isinstance(document, Marked):
        return document
    return Controlled(document[:characters]) if isinstance(document, Controlled) else document[:characters]


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
        first, second = document[:at], document[at:]
        if isinstance(document, Controlled):
            first, second = Controlled(first), Controlled(second)
        return [first], [second]
    cut = max(1, round(len(documents) * share))
    return documents[:cut], documents[cut:]


def write_documents(path: Path, documents: Sequence[str]) -> None:
    """Write documents as JSON lines: texts, or prompts and conversations as the rows that they were.

    Args:
        path: the file, published whole.
        documents: the documents, of one kind.
    """
    with publish_file(path) as target, target.open("w", encoding="utf-8", newline="") as stream:
        for document in documents:
            row = (
                str(document)
                if isinstance(document, Marked)
                else json.dumps({"text": document}, ensure_ascii=False)
            )
            stream.write(f"{row}\n")


def text_hash(documents: Sequence[str]) -> str:
    """Hash documents, whatever file they came from.

    Args:
        documents: the documents in order.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    if isinstance(documents, Text) and documents.documents_hash is not None:
        return documents.documents_hash
    return hash_documents(documents)
