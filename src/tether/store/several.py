"""A folder as one text: all files in it that hold text, in the order of their names."""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final, final

from tether.errors import ConfigError
from tether.files import is_plain
from tether.store.hashing import sha256_file
from tether.store.opened import Seen, Text, hash_documents

__all__ = ["Several", "folder_files", "folder_hash", "joined"]

MOST_FILES: Final = 100_000
"""Files of a folder that is read as a text."""


@final
class Several(Text):
    """The documents of several texts, one after the other, or some of them."""

    def __init__(self, path: Path | None, seen: Seen, parts: Sequence[Text], rows: "array[int]") -> None:
        super().__init__(path, seen)
        self._parts, self._rows = tuple(parts), rows
        self._begins = list(accumulate(map(len, self._parts[:-1]), initial=0))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def recognised(self) -> str:
        """What was found in it, as one line for a user."""
        found = super().recognised
        if self.kind == "text":
            # Plain files have no field.
            found = f"{self.seen.name}: {len(self):,} document{'' if len(self) == 1 else 's'}"
        files = f"{len(self._parts):,} file{'' if len(self._parts) == 1 else 's'}"
        return f"{found}, of {files}" + (f"; {self.seen.note}" if self.seen.note else "")

    def blocks(self, number: int) -> Iterator[str]:
        """Read a document piece by piece.

        Args:
            number: which.

        Yields:
            Its pieces.
        """
        part, inside = self._place(number)
        yield from part.blocks(inside)

    def _place(self, number: int) -> tuple[Text, int]:
        row = self._rows[number]
        at = bisect_right(self._begins, row) - 1
        return self._parts[at], row - self._begins[at]

    def _read(self, number: int, characters: int | None) -> str:
        part, inside = self._place(number)
        return part.beginning(inside, characters)

    def _some(self, rows: slice) -> "Several":
        return Several(self.path, self.seen._replace(documents=None), self._parts, self._rows[rows])


def joined(folder: Path, parts: Sequence[Text], *, field: str | None = None, note: str = "") -> Several:
    """Make one text of several.

    Args:
        folder: that they lie in.
        parts: the texts, at least one, in order.
        field: that was asked for.
        note: what a user should know beside what was found.

    Returns:
        The text.

    Raises:
        ConfigError: they are of several kinds.
    """
    odd = next((part for part in parts if part.kind != parts[0].kind), None)
    if odd is not None:
        raise ConfigError(
            f"{folder}: {parts[0].recognised}, but {odd.recognised}; expected one kind in a folder, so give the files "
            "apart"
        )
    rows = array("q", range(sum(map(len, parts))))
    seen = Seen(
        folder.name or str(folder), folder_hash(folder), None, kind=parts[0].kind, field=field, note=note
    )
    text = Several(folder, seen, parts, rows)
    text.seen = seen._replace(documents=hash_documents(text))
    return text


def folder_files(folder: Path) -> list[Path]:
    """List the files of a folder and of the folders in it; what is hidden, and folders that are links, are left out.

    Args:
        folder: the folder.

    Returns:
        Paths, by their names relative to the folder.

    Raises:
        ConfigError: more than `MOST_FILES` files, or a folder that cannot be read.
    """
    found: list[Path] = []
    waiting = [folder]
    try:
        while waiting:
            for path in waiting.pop().iterdir():
                if path.name.startswith("."):
                    continue
                if path.is_dir():
                    waiting += [] if path.is_symlink() else [path]
                else:
                    found.append(path)
            if len(found) + len(waiting) > MOST_FILES:
                raise ConfigError(
                    f"{folder}: more than {MOST_FILES:,} files; expected a folder of texts, so name it"
                )
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def folder_hash(folder: Path) -> str:
    """Hash the files of a folder with their names.

    Args:
        folder: the folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        ConfigError: as for `folder_files`.
        CheckpointError: a file cannot be read.
    """  # noqa: DOC502 - raised by what it calls
    digest = hashlib.sha256()
    for path in folder_files(folder):
        if is_plain(path):
            digest.update(
                f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode(
                    errors="surrogateescape"
                )
            )
    return digest.hexdigest()
