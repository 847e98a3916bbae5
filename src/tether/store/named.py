"""Data sets of the library `datasets` -> rows: a folder it has saved, a folder of data files, or a name on the hub.

A split that ends at a row, as `train[:5000]`, is streamed: only the rows up to there are fetched. Any other is fetched
whole, once, into the library's own cache.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tether.errors import ConfigError, TetherError
from tether.files import check_plain
from tether.names import inside
from tether.reading import read_json
from tether.store.rows import columns
from tether.store.tables import INSTALL, JSON_LINES, PACKED, TABLES

__all__ = ["dataset_rows", "is_saved", "may_be_fetched", "name_and_split"]

_NAME: Final = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*){0,2}")
_WITH_SPLIT: Final = re.compile(r"(?P<name>.+):(?P<split>[A-Za-z_][\w.]*(?:\[[^\[\]]*\])?)", re.DOTALL)
_BOUNDED: Final = re.compile(r"(?P<split>[\w.]+)\[(?P<begin>\d*):(?P<end>\d+)\]")
_SAVED: Final = "state.json"
_SEVERAL: Final = "dataset_dict.json"
BATCH: Final = 64
"""Rows that are held at a time."""


def name_and_split(name: str) -> tuple[str, str | None]:
    """Part a name from its split.

    Args:
        name: `NAME` or `NAME:SPLIT`.

    Returns:
        Both; a name without a split has None.

    Example:
        >>> name_and_split("org/talks:train[:100]"), name_and_split("law.jsonl")
        (('org/talks', 'train[:100]'), ('law.jsonl', None))
    """
    found = _WITH_SPLIT.fullmatch(name)
    return (found["name"], found["split"]) if found else (name, None)


def is_saved(folder: Path) -> bool:
    """Tell whether `Dataset.save_to_disk`, or that of several splits, has written a folder.

    Args:
        folder: any folder.

    Returns:
        Whether it has.
    """
    return (folder / _SAVED).is_file() or (folder / _SEVERAL).is_file()


def may_be_fetched(name: str, split: str | None) -> bool:
    """Tell whether the library may know something by a name that is no file or folder here.

    Args:
        name: without a split.
        split: that was named with it.

    Returns:
        False for what looks like a file's name or like a path: a word alone without a split, a known ending, or
        something in a folder that is here.
    """
    endings = (*JSON_LINES, *TABLES, PACKED, ".txt", ".md")
    owner, slash, _ = name.partition("/")
    if not _NAME.fullmatch(name) or name.lower().endswith(endings):
        return False
    return not Path(owner).exists() if slash else split is not None


def dataset_rows(name: str, split: str | None, field: str | None) -> Iterator[tuple[str, Any]]:
    """Read a data set row by row.

    Args:
        name: a folder, or a name on the hub, `org/name` or `org/name/configuration`.
        split: as the library spells it, as `train` or `train[:5000]`; None where there is one.
        field: where the text or the conversation is, if it is not in `text` or `messages`.

    Yields:
        What to call a row in an error, and the row: only the fields that are needed of it.

    Raises:
        ConfigError: the library is not installed, there is no such data set or split, or its files are damaged.
        FieldError: it has no such field.
    """  # noqa: DOC501, DOC502 - errors of tether's own pass
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{name}: reading a data set takes the library datasets; {INSTALL}. A file of rows takes nothing more"
        ) from error
    number = 0
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = _opened(datasets, name, split)
        for rows in _batches(datasets, found, field):
            for row in rows:
                number += 1
                yield f"row {number}", row
    except TetherError:
        raise
    except Exception as error:
        # The library, and those below it, say in dozens of ways that a file is damaged or a name unknown.
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = (
            "cannot be read"
            if Path(name).is_dir()
            else "no such file or folder here, and datasets cannot load it"
        )
        raise ConfigError(f"{name}{_told(split)}: {what} ({said.strip()[:200]}); check the name") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _told(split: str | None) -> str:
    return "" if split is None else f":{split}"


def _opened(datasets: Any, name: str, split: str | None) -> Any:
    folder = Path(name)
    bounded = _BOUNDED.fullmatch(split or "")
    begin, end = (int(bounded["begin"] or 0), int(bounded["end"])) if bounded else (0, None)
    wanted = bounded["split"] if bounded else split
    if folder.is_dir() and is_saved(folder):
        found = _saved(datasets, folder, wanted)
        return found.select(range(begin, min(end, len(found)))) if end is not None else found
    path, configuration = name, None
    if name.count("/") == 2 and not folder.exists():
        path, _, configuration = name.rpartition("/")
    if end is not None:
        rows = datasets.load_dataset(path, configuration, split=wanted, streaming=True)
        return (rows.skip(begin) if begin else rows).take(max(0, end - begin))
    if wanted is None:
        wanted = _only(name, None, datasets.get_dataset_split_names(path, configuration))
    return datasets.load_dataset(path, configuration, split=wanted)


def _saved(datasets: Any, folder: Path, split: str | None) -> Any:
    if (folder / _SEVERAL).is_file():
        about = read_json(folder / _SEVERAL, error=ConfigError)
        known = about.get("splits") if isinstance(about, dict) else None
        splits = [str(each) for each in known] if isinstance(known, list) else []
        folder = inside(folder, _only(str(folder), split, splits))
    elif split not in (None, "train"):
        raise ConfigError(f"{folder}: one table without splits, and {split} was asked for; leave it out")
    # The files that its description names are opened by the library: none of them lies elsewhere, or has no end.
    about = read_json(folder / _SAVED, error=ConfigError)
    files = about.get("_data_files") if isinstance(about, dict) else None
    for each in files if isinstance(files, list) else []:
        check_plain(
            inside(folder, str(each.get("filename") if isinstance(each, dict) else each)), error=ConfigError
        )
    check_plain(folder / "dataset_info.json", error=ConfigError)
    return datasets.load_from_disk(str(folder.absolute()))


def _only(name: str, split: str | None, splits: list[str]) -> str:
    if split in splits or (split is None and len(splits) == 1):
        return split or splits[0]
    there = ", ".join(ascii(each)[1:-1] for each in splits) or "none"
    raise ConfigError(
        f"{name}: {'no split was named' if split is None else f'no split {split}'}; it has {there}: name one, as "
        f"{name}:{splits[0] if splits else 'train'}"
    )


# Rows of a table on disk, a batch at a time, or of a stream. What lies on disk is checked before it is taken apart:
# the format's own reader believes any offset.
def _batches(datasets: Any, found: Any, field: str | None) -> Iterator[Any]:
    if not isinstance(found, datasets.Dataset):
        names = found.column_names or list(next(iter(found), {}))
        yield from ([row] for row in found.select_columns(columns(names, field)))
        return
    found = found.select_columns(columns(found.column_names, field)).with_format(None)
    stored = found.with_format("arrow")
    for begin in range(0, len(found), BATCH):
        end = min(begin + BATCH, len(found))
        stored[begin:end].validate(full=True)
        cells = found[begin:end]
        yield [{name: cells[name][row] for name in cells} for row in range(end - begin)]
