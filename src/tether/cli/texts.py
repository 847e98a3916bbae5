"""`--field` and `--control-tokens`: how a command reads its texts, the same for every one that has some."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tether.cli.added import Option, with_options
from tether.cli.output import tell

if TYPE_CHECKING:
    from tether.store.opened import Text

__all__ = ["TEXT", "hashes_of", "open_text", "open_texts", "reads_texts", "text_name"]

TEXT: Final = (
    "JSON lines, parquet, CSV or plain text, a folder of such files, or a data set as NAME:SPLIT; rows with text, with "
    "prompt and completion, or with messages"
)
"""What a text may be, for help."""

Field = Annotated[
    str | None, typer.Option(help="Of texts in rows: the field that holds the text, or the conversation.")
]
Control = Annotated[
    bool,
    typer.Option(
        "--control-tokens",
        help="Read control tokens in texts as such: a prompt or turn that spells one is then no letters.",
    ),
]

_ASKED: ContextVar[tuple[str | None, bool]] = ContextVar("_ASKED", default=(None, False))
"""What the command that runs was given."""


def reads_texts(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of its texts.

    Args:
        command: opens its texts by `open_texts`.

    Returns:
        The command with `--field` and `--control-tokens`.
    """

    @functools.wraps(command)
    def run(*args: Any, field: str | None = None, control_tokens: bool = False, **options: Any) -> Any:
        before = _ASKED.set((field, control_tokens))
        try:
            return command(*args, **options)
        finally:
            _ASKED.reset(before)

    return with_options(
        command, run, {"field": Option(Field, None), "control_tokens": Option(Control, False)}
    )


def open_texts(names: Sequence[str]) -> "list[Text]":
    """Open all texts of a command, and print of each what was found in it.

    A text without the field that was asked for is read by the fields it has, as the base text beside a table: but one
    of them has to have it.

    Args:
        names: as the user gave them.

    Returns:
        The texts, in that order.

    Raises:
        FieldError: none of them has the field.
        ConfigError: a text cannot be used, see `tether.store.documents.read_documents`.
    """
    from tether.store.documents import read_documents
    from tether.store.rows import FieldError

    field, control = _ASKED.get()
    opened, without = [], []
    for name in names:
        try:
            opened.append(read_documents(name, field=field, control=control))
        except FieldError as error:
            if field is None:
                raise
            without.append(error)
            try:
                opened.append(read_documents(name, control=control))
            except FieldError:
                raise error from None
    if without and len(without) == len(names):
        raise without[0]
    for text in opened:
        tell(text.recognised, "none")
    return opened


def open_text(name: str) -> "Text":
    """Open the one text of a command; see `open_texts`.

    Args:
        name: as the user gave it.

    Returns:
        The text.
    """
    (text,) = open_texts([name])
    return text


def text_name(name: str) -> str:
    """Give a text a short name.

    Args:
        name: as the user gave it.

    Returns:
        The file's name without its ending, of a data set the last part of its name.

    Example:
        >>> text_name("texts/law.jsonl"), text_name("org/talks:train[:100]")
        ('law', 'talks')
    """
    from tether.store.named import name_and_split

    return Path(name).stem if Path(name).exists() else Path(name_and_split(name)[0]).stem


def hashes_of(texts: "Mapping[str, Text]") -> dict[str, str]:
    """Hash the files of texts, for the list of what something was made of.

    Args:
        texts: by their role.

    Returns:
        The hashes; a text that is in no file has none.
    """
    return {role: text.sha256 for role, text in texts.items() if text.sha256 is not None}
