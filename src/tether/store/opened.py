"""Texts on disk that are read when asked for: their size costs no memory."""

import codecs
import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, final, overload

from tether.errors import ConfigError
from tether.files import text_lines
from tether.store.marked import Marked, document_of, kind_of

__all__ = ["Lines", "Plain", "Text", "counted", "read_lines", "read_plain"]

BLOCK = 1 << 20
"""Bytes or characters that are read at a time."""


class _Seen(NamedTuple):
    """What one pass over a file has found: its state then, its hash, and the hash of its documents."""

    stamp: tuple[int, int]
    sha256: str
    documents: str | None


class Text(ABC, Sequence[str]):
    """The documents of a file, none of them empty, each read from it when it is asked for.

    The whole file is checked and hashed in one pass when it is opened. That pass holds a block of a plain file, or the
    longest line of JSON lines and 8 bytes a document. Whoever reads later is told if the file has changed since then.

    Attributes:
        path: the file.
        sha256: hash of its bytes, 64 hexadecimal digits.
        documents_hash: what `text_hash` gives for all its documents; None for a part of them.
        kind: what its rows are, one of `tether.store.marked.KINDS`.
    """

    kind: str = "text"

    def __init__(self, path: Path, seen: _Seen) -> None:
        self.path, self._seen = path, seen
        self.sha256, self.documents_hash = seen.sha256, seen.documents

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._some(index) if isinstance(index, slice) else self.beginning(index, None)

    def beginning(self, number: int, characters: int | None) -> str:
        """Read the beginning of a document.

        Args:
            number: which document.
            characters: how many characters at most; None for all.

        Returns:
            The beginning.

        Raises:
            ConfigError: the file has changed since it was opened.
        """  # noqa: DOC502 - raised by _unchanged
        return self._read(number, characters)

    @abstractmethod
    def _read(self, number: int, characters: int | None) -> str: ...

    @abstractmethod
    def _some(self, rows: slice) -> Sequence[str]: ...

    def _unchanged(self, stream: IO[Any]) -> None:
        if _stamp(stream) != self._seen.stamp:
            raise ConfigError(
                f"{self.path} has changed while it was in use; start again, and leave it alone meanwhile"
            )


@final
class Lines(Text):
    """Documents that are JSON lines, known by the offsets of their lines."""

    def __init__(self, path: Path, seen: _Seen, offsets: "array[int]", kind: str = "text") -> None:
        super().__init__(path, seen)
        self._offsets, self.kind = offsets, kind

    def __len__(self) -> int:
        return len(self._offsets)

    def _read(self, number: int, characters: int | None) -> str:
        offset = self._offsets[number]
        with self.path.open("rb") as stream:
            self._unchanged(stream)
            stream.seek(offset)
            document = _line_document(stream.readline(), self.kind)
            # What is learnt of a document is known of a whole one alone.
            return document if isinstance(document, Marked) else document[:characters]

    def _some(self, rows: slice) -> "Lines":
        return Lines(self.path, self._seen._replace(documents=None), self._offsets[rows], self.kind)


@final
class Plain(Text):
    """One document: some characters of a plain file from a place that `tell` gave."""

    def __init__(self, path: Path, seen: _Seen, place: int, characters: int) -> None:
        super().__init__(path, seen)
        self._place, self._characters = place, characters

    def __len__(self) -> int:
        return 1

    def _read(self, number: int, characters: int | None) -> str:
        if number not in (0, -1):
            raise IndexError(number)
        with self._open() as stream:
            return stream.read(self._characters if characters is None else min(characters, self._characters))

    def _some(self, rows: slice) -> Sequence[str]:
        return [self[0] for _ in range(*rows.indices(1))]

    def _open(self) -> IO[str]:
        with self.path.open("rb") as stream:
            self._unchanged(stream)
        lines = self.path.open(encoding="utf-8-sig")
        lines.seek(self._place)
        return lines

    def cut(self, share: float) -> "tuple[Plain, Plain]":
        """Cut at the last space or line's end before a share of the characters, or right there if there is none.

        Args:
            share: of the first part, in (0, 1).

        Returns:
            Both parts.
        """
        end, at, known = round(share * self._characters), 0, (self._place, 0)
        with self._open() as stream:
            done = 0
            while done < end:
                place = stream.tell()
                block = stream.read(min(BLOCK, end - done))
                if space := max(block.rfind(" "), block.rfind("\n")) + 1:
                    at, known = done + space, (place, done)
                done += len(block)
            at = at or end
            stream.seek(known[0])
            for begin in range(known[1], at, BLOCK):
                stream.read(min(BLOCK, at - begin))
            place = stream.tell()
        seen = self._seen._replace(documents=None)
        return (
            Plain(self.path, seen, self._place, at),
            Plain(self.path, seen, place, self._characters - at),
        )


def _stamp(stream: IO[Any]) -> tuple[int, int]:
    state = os.fstat(stream.fileno())
    return state.st_size, state.st_mtime_ns


# With or without the mark that some editors begin a file with.
def _mark(stream: IO[bytes]) -> bytes:
    mark = stream.read(len(codecs.BOM_UTF8))
    if mark != codecs.BOM_UTF8:
        stream.seek(0)
        return b""
    return mark


def _not_utf8(path: Path, error: UnicodeDecodeError, before: int) -> str:
    return f"{path}: not UTF-8 text ({error.reason} at byte {before + error.start}); convert it"


def read_lines(path: Path, stream: IO[bytes]) -> Lines | None:
    """Open JSON lines in one pass.

    Args:
        path: the file.
        stream: it, opened.

    Returns:
        Its documents, or None if there are none.

    Raises:
        ConfigError: a line is not a JSON object with the fields that the first one has (`tether.store.marked.KINDS`),
            not UTF-8, or longer than `tether.files.LINE_BYTES`.
    """
    stamp, mark = _stamp(stream), _mark(stream)
    raw, digest, offsets, offset = hashlib.sha256(mark), hashlib.sha256(), array("q"), len(mark)
    kind = ""
    for number, line in enumerate(text_lines(path, stream), start=1):
        raw.update(line)
        try:
            kind = kind or _line_kind(line)
            document = _line_document(line, kind) if line.strip() else ""
            data = document.encode()
        except UnicodeDecodeError as error:
            raise ConfigError(_not_utf8(path, error, offset)) from error
        except (ValueError, RecursionError, ConfigError) as error:
            shown = line[:240].decode(errors="replace")[:60]
            what = str(error) if isinstance(error, ConfigError) else "expected a JSON object"
            first = (
                ", as in the first line"
                if isinstance(error, ConfigError) and kind not in ("", "text")
                else ""
            )
            raise ConfigError(f"{path}, line {number}: {what}{first}; got {shown!r}") from error
        if document.strip():
            offsets.append(offset)
            digest.update(counted(data))
        offset += len(line)
    if not offsets:
        return None
    return Lines(path, _Seen(stamp, raw.hexdigest(), f"sha256:{digest.hexdigest()}"), offsets, kind)


# Not by the strict reader: rows of data sets have fields of any kind, and these texts are all that is taken.
def _line_document(line: bytes, kind: str) -> str:
    return document_of(json.loads(line.decode()), kind)


def _line_kind(line: bytes) -> str:
    if not line.strip():
        return ""
    return kind_of(json.loads(line.decode())) or "text"


def read_plain(path: Path, stream: IO[bytes]) -> Plain | None:
    """Open a plain file in one pass; in two where its lines end in two bytes.

    Args:
        path: the file.
        stream: it, opened.

    Returns:
        Its document, or None if there is nothing but space in it.

    Raises:
        ConfigError: the file is not UTF-8.
    """
    stamp, mark = _stamp(stream), _mark(stream)
    utf8: Any = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    raw, at, characters, size, blank = hashlib.sha256(mark), len(mark), 0, 0, True
    # The hash begins with the size of the text. That of the file is the same where lines end in one byte.
    digest = hashlib.sha256((stamp[0] - at).to_bytes(8, "little"))
    block = b"-"
    while block:
        block = stream.read(BLOCK)
        raw.update(block)
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ConfigError(_not_utf8(path, error, at - len(utf8.getstate()[0]))) from error
        data = piece.encode()
        digest.update(data)
        at, characters, size = at + len(block), characters + len(piece), size + len(data)
        blank = blank and not piece.strip()
    if blank:
        return None
    if size != stamp[0] - len(mark):
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        with path.open(encoding="utf-8-sig") as lines:
            while piece := lines.read(BLOCK):
                digest.update(piece.encode())
    return Plain(path, _Seen(stamp, raw.hexdigest(), f"sha256:{digest.hexdigest()}"), 0, characters)


def counted(document: bytes) -> bytes:
    """Put the size of a document before it, so that a hash tells where one ends.

    Args:
        document: as UTF-8.

    Returns:
        8 bytes and the document.
    """
    return len(document).to_bytes(8, "little") + document
