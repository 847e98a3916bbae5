"""Texts on disk that are read when asked for: their size costs no memory."""

import codecs
import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, final, overload

from tether.errors import ConfigError
from tether.files import text_lines
from tether.store.marked import Marked, controlled, document_of
from tether.store.rows import FieldError, Rows

__all__ = [
    "Lines",
    "Seen",
    "Text",
    "counted",
    "file_stamp",
    "hash_documents",
    "not_utf8",
    "read_lines",
    "skip_mark",
]


class Seen(NamedTuple):
    """What is known of a text since it was opened.

    Attributes:
        name: what to call it.
        sha256: hash of the bytes it is in, 64 hexadecimal digits; None where it is in no file or folder.
        documents: hash of all its documents, as `text_hash` gives it; None for a part of them.
        stamp: size and time of the file then.
        kind: what its rows are, one of `tether.store.marked.KINDS`.
        field: where the text or the conversation is in its rows, if a user named it.
        split: of a data set.
        control: whether control tokens in it are read as such.
        note: what a user should know beside what was found.
    """

    name: str
    sha256: str | None
    documents: str | None
    stamp: tuple[int, int] = (0, 0)
    kind: str = "text"
    field: str | None = None
    split: str | None = None
    control: bool = False
    note: str = ""


class Text(ABC, Sequence[str]):
    """The documents of a text, none of them empty, each read when it is asked for.

    A file is checked and hashed in one pass when it is opened. That pass holds a block of a plain file, or the
    longest line of JSON lines and 8 bytes a document. Whoever reads later is told if the file has changed since then.

    Attributes:
        path: the file or folder; None where the text is in neither.
        seen: what is known of it.
    """

    def __init__(self, path: Path | None, seen: Seen) -> None:
        self.path, self.seen = path, seen

    @property
    def sha256(self) -> str | None:
        """Hash of the bytes it is in, 64 hexadecimal digits; None where it is in no file or folder."""
        return self.seen.sha256

    @property
    def documents_hash(self) -> str | None:
        """What `text_hash` gives for all its documents; None for a part of them."""
        return self.seen.documents

    @property
    def kind(self) -> str:
        """What its rows are, one of `tether.store.marked.KINDS`."""
        return self.seen.kind

    @property
    def recognised(self) -> str:
        """What was found in it, as one line for a user."""
        field = self.seen.field or self.kind
        what, where = {
            "text": ("document", f"`{field}`"),
            "prompt": ("prompt", "`prompt`, each with its `completion`"),
            "messages": ("conversation", f"`{field}`"),
        }[self.kind]
        return f"{self.seen.name}: {len(self):,} {what}{'' if len(self) == 1 else 's'} in {where}"

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._some(index) if isinstance(index, slice) else self.beginning(index, None)

    def beginning(self, number: int, characters: int | None) -> str:
        """Read the beginning of a document; a `Marked` comes whole, since what is learnt is known of a whole one alone.

        Args:
            number: which document.
            characters: how many characters at most; None for all.

        Returns:
            The beginning.

        Raises:
            ConfigError: the file has changed since it was opened.
        """  # noqa: DOC502 - raised by _unchanged
        document = self._read(number, characters)
        return controlled(document) if self.seen.control else document

    def blocks(self, number: int) -> Iterator[str]:
        """Read a document piece by piece, where it may be larger than memory should hold.

        Args:
            number: which document.

        Yields:
            Its pieces in order; what is no plain file comes in one.
        """
        yield self[number]

    def with_control(self) -> Self:
        """Ask for control tokens in the text to be read as such.

        Returns:
            Itself.
        """
        self.seen = self.seen._replace(control=True)
        return self

    @abstractmethod
    def _read(self, number: int, characters: int | None) -> str: ...

    @abstractmethod
    def _some(self, rows: slice) -> Sequence[str]: ...

    def _unchanged(self, stream: IO[Any]) -> None:
        if file_stamp(stream) != self.seen.stamp:
            raise ConfigError(
                f"{self.path} has changed while it was in use; start again, and leave it alone meanwhile"
            )


@final
class Lines(Text):
    """Documents that are JSON lines, known by the offsets of their lines."""

    def __init__(self, path: Path, seen: Seen, offsets: "array[int]") -> None:
        super().__init__(path, seen)
        self._file, self._offsets = path, offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def _read(self, number: int, characters: int | None) -> str:
        offset = self._offsets[number]
        with self._file.open("rb") as stream:
            self._unchanged(stream)
            stream.seek(offset)
            row = json.loads(stream.readline().decode())
        document = document_of(row, self.kind, self.seen.field)
        return document if isinstance(document, Marked) else document[:characters]

    def _some(self, rows: slice) -> "Lines":
        return Lines(self._file, self.seen._replace(documents=None), self._offsets[rows])


def file_stamp(stream: IO[Any]) -> tuple[int, int]:
    """Tell by what a change of a file is noticed.

    Args:
        stream: the file.

    Returns:
        Size, and time of the last change in nanoseconds.
    """
    state = os.fstat(stream.fileno())
    return state.st_size, state.st_mtime_ns


def skip_mark(stream: IO[bytes]) -> bytes:
    """Pass over the mark that some editors begin a file with.

    Args:
        stream: the file at its beginning.

    Returns:
        The mark, or nothing.
    """
    mark = stream.read(len(codecs.BOM_UTF8))
    if mark != codecs.BOM_UTF8:
        stream.seek(0)
        return b""
    return mark


def not_utf8(path: Path, error: UnicodeDecodeError, before: int) -> str:
    """Say that a file is no UTF-8.

    Args:
        path: the file.
        error: what was found.
        before: bytes of the file before those that were decoded.

    Returns:
        The message.
    """
    return f"{path}: not UTF-8 text ({error.reason} at byte {before + error.start}); convert it"


def read_lines(path: Path, stream: IO[bytes], field: str | None = None) -> Lines | None:
    """Open JSON lines in one pass.

    Args:
        path: the file.
        stream: it, opened.
        field: where the text or the conversation is, if it is not in `text` or `messages`.

    Returns:
        Its documents, or None if there are none.

    Raises:
        ConfigError: a line is not a JSON object with the fields that the first one has (`tether.store.marked.KINDS`),
            not UTF-8, or longer than `tether.files.LINE_BYTES`.
        FieldError: the first line has no field by which rows are known.
    """
    stamp, mark = file_stamp(stream), skip_mark(stream)
    raw, digest, offsets, offset = hashlib.sha256(mark), hashlib.sha256(), array("q"), len(mark)
    rows = Rows(field)
    for number, line in enumerate(text_lines(path, stream), start=1):
        raw.update(line)
        try:
            # Not by the strict reader: rows have fields of any kind, and these texts are all that is taken.
            document = rows.document(json.loads(line.decode())) if line.strip() else ""
        except UnicodeDecodeError as error:
            raise ConfigError(not_utf8(path, error, offset)) from error
        except (ValueError, RecursionError, ConfigError) as error:
            shown = line[:240].decode(errors="replace")[:60]
            what = str(error) if isinstance(error, ConfigError) else "expected a JSON object"
            told = f"{path}, line {number}: {what}; got {shown!r}"
            if isinstance(error, FieldError):
                raise FieldError(told) from error
            raise ConfigError(told) from error
        if document.strip():
            offsets.append(offset)
            digest.update(counted(document.encode()))
        offset += len(line)
    if not offsets:
        return None
    documents = f"sha256:{digest.hexdigest()}"
    seen = Seen(path.name, raw.hexdigest(), documents, stamp, rows.kind or "text", field)
    return Lines(path, seen, offsets)


def hash_documents(documents: Sequence[str]) -> str:
    """Hash documents one after the other; of a `Text` no more is held than a block of a plain file.

    Args:
        documents: the documents in order.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for number in range(len(documents)):
        pieces = documents.blocks(number) if isinstance(documents, Text) else iter((documents[number],))
        first, second = next(pieces, ""), next(pieces, None)
        if second is None:
            digest.update(counted(first.encode()))
            continue
        # The size comes first, and is known after a first pass.
        size = len(first.encode()) + len(second.encode()) + sum(len(piece.encode()) for piece in pieces)
        digest.update(size.to_bytes(8, "little"))
        for piece in documents.blocks(number) if isinstance(documents, Text) else ():
            digest.update(piece.encode())
    return f"sha256:{digest.hexdigest()}"


def counted(document: bytes) -> bytes:
    """Put the size of a document before it, so that a hash tells where one ends.

    Args:
        document: as UTF-8.

    Returns:
        8 bytes and the document.
    """
    return len(document).to_bytes(8, "little") + document
