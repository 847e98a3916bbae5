"""Rows of data -> documents: the first row tells what all of them are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from tether.errors import ConfigError
from tether.store.marked import document_of, kind_of

__all__ = ["FieldError", "Rows", "columns"]


class FieldError(ConfigError):
    """Rows do not have the field that was named, or none by which they are known."""


@final
class Rows:
    """What the rows of a text are.

    Args:
        field: where the text or the conversation is, if it is not in `text` or `messages`; or None.

    Attributes:
        field: the same.
        kind: one of `tether.store.marked.KINDS` once the first row was seen, None before.
    """

    def __init__(self, field: str | None = None) -> None:
        self.field = field
        self.kind: str | None = None

    def document(self, row: Any) -> str:
        """Take the document out of the next row.

        Args:
            row: the row, as JSON has it.

        Returns:
            The document; blank where the row's text is.

        Raises:
            ConfigError: it has not the fields that the first one has.
            FieldError: it is the first one, and has none by which rows are known.
        """
        first = self.kind is None
        if self.kind is None:
            self.kind = kind_of(row, self.field) or ("text" if not isinstance(row, Mapping) else None)
            if self.kind is None:
                raise FieldError(_no_field(self.field, list(map(str, row))))
        try:
            return document_of(row, self.kind, self.field)
        except ConfigError as error:
            if first or self.kind == "text":
                raise
            raise ConfigError(f"{error}, as in the first row") from error

    def documents(self, rows: Iterable[tuple[str, Any]], name: str) -> Iterator[str]:
        """Take the documents out of rows.

        Args:
            rows: what to call each in an error, as `row 7`, and the row.
            name: of the text, for errors.

        Yields:
            Documents that are not blank.

        Raises:
            ConfigError: a row is none that the text may have.
            FieldError: the rows have no field by which they are known.
        """
        for where, row in rows:
            try:
                document = self.document(row)
            except FieldError as error:
                raise FieldError(f"{name}: {error}") from error
            except ConfigError as error:
                raise ConfigError(f"{name}, {where}: {error}") from error
            if document.strip():
                yield document


def columns(names: Sequence[str], field: str | None) -> list[str]:
    """Choose the columns of a table that are read.

    Args:
        names: of all its columns.
        field: as for `Rows`.

    Returns:
        Those of the documents.

    Raises:
        FieldError: there are none.
    """
    kind = kind_of(dict.fromkeys(names), field)
    if kind is None:
        raise FieldError(_no_field(field, names))
    if field is not None:
        return [field]
    return [name for name in ("prompt", "completion") if name in names] if kind == "prompt" else [kind]


def _no_field(field: str | None, names: Sequence[str]) -> str:
    there = ", ".join(ascii(name)[1:-1][:64] for name in names[:24]) or "none"
    more = f" and {len(names) - 24} more" if len(names) > 24 else ""
    what = (
        'a text "text", "prompt" with "completion", or "messages"' if field is None else f"a field {field!a}"
    )
    return (
        f"expected {what}; the fields there are {there}{more}: name the one that holds the text (--field NAME, "
        "field=NAME)"
    )
