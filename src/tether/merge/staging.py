"""Where a result grows: a hidden folder beside its final name that outlives a crash and is renamed when whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tether.errors import CheckpointError, ConfigError
from tether.store.publish import write_json
from tether.store.system import alone_with, flush

__all__ = ["Staging", "refuse_occupied", "staged"]

_LOCK: Final = "lock"


class Staging(NamedTuple):
    """An unfinished result.

    Attributes:
        final: the name that it will have.
        folder: holds the rest, and what is known about it.
    """

    final: Path
    folder: Path

    @property
    def model(self) -> Path:
        """The folder that will be renamed."""
        return self.folder / "model"

    @property
    def journal(self) -> Path:
        """The record of finished tensors."""
        return self.folder / "journal.jsonl"

    @property
    def survey(self) -> Path:
        """The record of inputs that were looked through."""
        return self.folder / "survey.json"

    def publish(self) -> None:
        """Flush everything to the disk and give the result its name.

        Raises:
            ConfigError: If the name was taken meanwhile.
        """  # noqa: DOC502 - raised by refuse_occupied
        for path in sorted(self.model.rglob("*")):
            flush(path)
        flush(self.model)
        refuse_occupied(self.final)
        if self.final.exists():
            self.final.rmdir()  # it is empty, and not every system renames over it
        self.model.rename(self.final)
        flush(self.final.parent)

    def discard(self) -> None:
        """Remove what was made, finished or not; the folder itself goes when nobody works in it any more."""
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                _remove(path)


def refuse_occupied(final: Path) -> None:
    """Refuse a name that something has.

    Args:
        final: of a folder to be made.

    Raises:
        ConfigError: If it exists and is not an empty folder.
    """
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise ConfigError(f"{final} exists and is not a folder. Choose another name, or remove it.")
    if final.exists() and any(final.iterdir()):
        raise ConfigError(
            f"{final} exists and is not empty; expected a new or empty folder. Choose another name, or remove it."
        )


@contextmanager
def staged(final: Path, digest: str, needed: int) -> Iterator[Staging]:
    """Open the unfinished result of a name, or begin one.

    What an interrupted process of the same plan left is taken up; what one of another plan left is removed.
    Only one process at a time works on a name. On an error the unfinished result stays, to be taken up or
    removed by the next one; ``discard`` removes it at once.

    Args:
        final: the name; missing parents are made.
        digest: of the plan.
        needed: bytes that will be written.

    Yields:
        The unfinished result.

    Raises:
        ConfigError: If the name is taken, another process works on it, or its parent cannot be written to.
        CheckpointError: If the disk has too little space.
    """
    final = final.absolute()
    refuse_occupied(final)
    folder = final.with_name(f".{final.name}.merge")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{final.parent} cannot be written to ({error}). Choose another place.") from error
    try:
        with alone_with(
            folder / _LOCK, f"another process is merging into {final}; wait for it, or choose another"
        ):
            staging = _take_up(Staging(final, folder), digest)
            there = sum(_on_disk(path) for path in staging.model.rglob("*"))
            free = shutil.disk_usage(folder).free
            if needed - there > free:
                raise CheckpointError(
                    f"{final} needs {needed} bytes, but the disk has {free} free. Free some space, or choose another "
                    "place."
                )
            yield staging
    finally:
        if {path.name for path in folder.iterdir()} <= {_LOCK}:
            shutil.rmtree(folder, ignore_errors=True)


def _take_up(staging: Staging, digest: str) -> Staging:
    mark = staging.folder / "plan.json"
    begun = mark.is_file() and mark.read_bytes().strip() == f'"{digest}"'.encode()
    if not begun:
        for path in staging.folder.iterdir():
            if path.name != _LOCK:
                _remove(path)
        write_json(mark, digest)
    staging.model.mkdir(exist_ok=True)
    return staging


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# What a file takes of the disk: one that has been given its size may be filled in part.
def _on_disk(path: Path) -> int:
    found = path.stat()
    blocks = getattr(found, "st_blocks", None)
    return found.st_size if blocks is None else blocks * 512
