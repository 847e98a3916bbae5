"""Options that several commands have in common, put beside those that a command has itself."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["Option", "with_options"]


class Option(NamedTuple):
    """An option.

    Attributes:
        kind: its type with what typer shows of it.
        default: where it is left out.
    """

    kind: Any
    default: Any


def with_options(
    command: Callable[..., Any], run: Callable[..., Any], options: Mapping[str, Option]
) -> Callable[..., Any]:
    """Let typer see more options than a command has.

    Args:
        command: the command.
        run: calls it, and takes the options as keywords; made by `functools.wraps(command)`.
        options: by name.

    Returns:
        `run`, with the command's signature and these options at its end.
    """
    signature = inspect.signature(command)
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind
        )
        for name, option in options.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    run.__annotations__ = command.__annotations__ | {name: option.kind for name, option in options.items()}
    return run
