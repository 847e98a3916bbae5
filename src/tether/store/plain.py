"""A plain text on disk: one document, read in blocks."""

import codecs
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, final

from tether.errors import ConfigError
from tether.store.opened import Seen, Text, file_stamp, not_utf8, skip_mark

__all__ = ["Plain", "read_plain"]

BLOCK = 1 << 20
"""Bytes or characters that are read at a time."""


@final
class Plain(Text):
    """One document: some characters of a plain file from a place that `tell` gave."""

    def __init__(self, path: Path, seen: Seen, place: int, characters: int) -> None:
        super().__init__(path, seen)
        self._file, self._place, self._characters = path, place, characters

    def __len__(self) -> int:
        return 1

    def _read(self, number: int, characters: int | None) -> str:
        if number not in (0, -1):
            raise IndexError(number)
        with self._open() as stream:
            return stream.read(self._characters if characters is None else min(characters, self._characters))

    @property
    def recognised(self) -> str:
        """What was found in it, as one line for a user."""
        return f"{self.seen.name}: one document of {self._characters:,} characters"

    def blocks(self, number: int) -> Iterator[str]:
        """Read the document piece by piece.

        Args:
            number: 0, or -1.

        Yields:
            Pieces of at most `BLOCK` characters.

        Raises:
            IndexError: there is one document.
        """
        if number not in (0, -1):
            raise IndexError(number)
        with self._open() as stream:
            for begin in range(0, self._characters, BLOCK):
                yield stream.read(min(BLOCK, self._characters - begin))

    def _some(self, rows: slice) -> Sequence[str]:
        return [self[0] for _ in range(*rows.indices(1))]

    def _open(self) -> IO[str]:
        with self._file.open("rb") as stream:
            self._unchanged(stream)
        lines = self._file.open(encoding="utf-8-sig")
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
        seen = self.seen._replace(documents=None)
        return (
            Plain(self._file, seen, self._place, at),
            Plain(self._file, seen, place, self._characters - at),
        )


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
    stamp, mark = file_stamp(stream), skip_mark(stream)
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
            raise ConfigError(not_utf8(path, error, at - len(utf8.getstate()[0]))) from error
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
    seen = Seen(path.name, raw.hexdigest(), f"sha256:{digest.hexdigest()}", stamp)
    return Plain(path, seen, 0, characters)
