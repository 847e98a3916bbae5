"""Texts that cannot be read in any order where they lie: their documents are copied once, into a nameless file."""

import hashlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from tether.errors import ConfigError
from tether.files import LINE_BYTES
from tether.store.marked import Marked
from tether.store.nameless import Nameless
from tether.store.opened import Seen, Text, counted
from tether.store.rows import Rows

__all__ = ["Spooled", "spool"]

WIDEST = 4
"""Bytes of a character in UTF-8 at most."""


@final
class Spooled(Text):
    """Documents of a compressed file, a table or a data set, in a file that goes with the process, however that ends.

    It has the size of the documents, and takes no memory but 16 bytes for each.
    """

    def __init__(
        self, path: Path | None, seen: Seen, file: Nameless, begins: "array[int]", ends: "array[int]"
    ) -> None:
        super().__init__(path, seen)
        self._file, self._begins, self._ends = file, begins, ends

    def __len__(self) -> int:
        return len(self._begins)

    def _read(self, number: int, characters: int | None) -> str:
        begin, size = self._begins[number], self._ends[number] - self._begins[number]
        some = self.kind == "text" and characters is not None and characters * WIDEST < size
        if some and characters is not None:
            size = characters * WIDEST
        data = self._file.read(begin, size)
        if self.kind != "text":
            return Marked(data.decode())
        # Cut anywhere, a beginning may end within a character.
        return data.decode(errors="ignore" if some else "strict")[:characters]

    def _some(self, rows: slice) -> "Spooled":
        seen = self.seen._replace(documents=None)
        return Spooled(self.path, seen, self._file, self._begins[rows], self._ends[rows])


def spool(
    rows: Iterable[tuple[str, Any]],
    name: str,
    *,
    field: str | None = None,
    split: str | None = None,
    path: Path | None = None,
    sha256: str | None = None,
) -> Spooled | None:
    """Copy the documents of rows in one pass.

    Args:
        rows: what to call each in an error, and the row.
        name: of the text.
        field: where the text or the conversation is, if it is not in `text` or `messages`.
        split: of a data set.
        path: the file or folder that they are in, if there is one.
        sha256: its hash.

    Returns:
        The documents, or None if there are none.

    Raises:
        ConfigError: a row is none that a text may have, a document is larger than `tether.files.LINE_BYTES`, or the
            disk is full.
        FieldError: the rows have no field by which they are known.
    """  # noqa: DOC502 - FieldError is raised by `Rows`
    known, digest = Rows(field), hashlib.sha256()
    begins, ends, file = array("q"), array("q"), Nameless()
    for document in known.documents(rows, name if path is None else str(path)):
        data = document.encode()
        if len(data) > LINE_BYTES:
            raise ConfigError(
                f"{name}: a document of {len(data):,} bytes; expected at most {LINE_BYTES:,}, so cut it into several"
            )
        begins.append(file.size)
        try:
            file.write(data)
        except OSError as error:
            raise ConfigError(
                f"{file.folder()}: no room for the documents of {name} ({error.strerror}); free some space, or "
                "name another folder for temporary files (TMPDIR)"
            ) from error
        digest.update(counted(data))
        ends.append(file.size)
    if not begins:
        return None
    documents = f"sha256:{digest.hexdigest()}"
    seen = Seen(name, sha256, documents, kind=known.kind or "text", field=field, split=split)
    return Spooled(path, seen, file, begins, ends)
