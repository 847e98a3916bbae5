"""Tables on disk -> rows: parquet, CSV, TSV, and compressed files, read a piece at a time."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

from tether.errors import ConfigError
from tether.files import LINE_BYTES, text_lines
from tether.store.opened import skip_mark
from tether.store.rows import FieldError, columns

__all__ = ["INSTALL", "JSON_LINES", "TABLES", "rows_of", "suffixes"]

JSON_LINES: Final = (".jsonl", ".ndjson", ".json")
"""Suffixes of files with a JSON object a line, in any case of letters."""
TABLES: Final = {".csv": ",", ".tsv": "\t", ".parquet": ""}
"""Suffixes of tables, with what parts the cells."""
PACKED: Final = ".gz"
BATCH: Final = 64
"""Rows of a parquet file that are held at a time."""
INSTALL: Final = "pip install 'tether[data]'"


def suffixes(path: Path) -> tuple[str, bool]:
    """Tell by a file's name what it holds.

    Args:
        path: the file.

    Returns:
        Its suffix in small letters, without `.gz`, and whether it had that.
    """
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), True) if suffix == PACKED else (suffix, False)


def rows_of(path: Path, field: str | None = None) -> Iterator[tuple[str, Any]]:
    """Read a table, or a compressed file, row by row.

    Args:
        path: a parquet, CSV or TSV file, or any text file compressed by gzip.
        field: where the text or the conversation is, if it is not in `text` or `messages`.

    Yields:
        What to call a row in an error, and the row. A compressed plain file is one row.

    Raises:
        ConfigError: the file is damaged, not UTF-8, has rows of other lengths than its header, or what reads parquet is
            not installed.
        FieldError: it has no such field.
    """
    suffix, packed = suffixes(path)
    try:
        if suffix == ".parquet" and not packed:
            yield from _parquet(path, field)
            return
        with gzip.open(path, "rb") if packed else path.open("rb") as opened:
            stream = cast("IO[bytes]", opened)
            if suffix in TABLES:
                yield from _cells(path, stream, TABLES[suffix], field)
            elif suffix in JSON_LINES:
                yield from _lines(path, stream)
            else:
                yield "it", {"text": _whole(path, stream)}
    except FieldError as error:
        raise FieldError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}); convert it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{path}: damaged, or not compressed by gzip ({error}); take another copy"
        ) from error


def _lines(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    skip_mark(stream)
    for number, line in enumerate(text_lines(path, stream), start=1):
        try:
            if line.strip():
                yield f"line {number}", json.loads(line.decode())
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}, line {number}: expected a JSON object; got {line[:60].decode(errors='replace')!r}"
            ) from error


def _whole(path: Path, stream: IO[bytes]) -> str:
    data = stream.read(LINE_BYTES + 1)
    if len(data) > LINE_BYTES:
        raise ConfigError(f"{path}: more than {LINE_BYTES:,} bytes when it is unpacked; unpack it first")
    with io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig") as text:
        return text.read()


def _cells(path: Path, stream: IO[bytes], comma: str, field: str | None) -> Iterator[tuple[str, Any]]:
    header: list[str] = []
    wanted: list[str] = []
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        for number, cells in _rows(path, text, comma):
            if not header:
                header, wanted = cells, columns(cells, field)
                if twice := [name for name in wanted if header.count(name) > 1]:
                    raise ConfigError(
                        f"{path}: several columns are called {', '.join(map(ascii, twice))}; rename them"
                    )
            elif len(cells) != len(header):
                raise ConfigError(
                    f"{path}, line {number}: {len(cells)} cells, and the header has {len(header)}; mend the line, or "
                    "quote the cells that hold what parts cells"
                )
            else:
                yield f"line {number}", {name: cells[header.index(name)] for name in wanted}


# The module csv has one limit for a cell for all who use it: it is put back.
def _rows(path: Path, text: IO[str], comma: str) -> Iterator[tuple[int, list[str]]]:
    before = csv.field_size_limit(LINE_BYTES)
    table = csv.reader(text, delimiter=comma, strict=True)
    try:
        yield from ((table.line_num, cells) for cells in table if cells)
    except csv.Error as error:
        raise ConfigError(
            f"{path}, line {table.line_num}: no row of a table ({error}); mend the line"
        ) from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{path}: reading parquet takes pyarrow; {INSTALL}") from error
    number = 0
    try:
        with ParquetFile(path) as table:
            wanted = columns(table.schema_arrow.names, field)
            for batch in table.iter_batches(BATCH, columns=wanted):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    # pyarrow says that bytes are no text, or that there is no such memory, in Python's own errors too.
    except (ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: damaged, or no parquet file ({said}); take another copy") from error
