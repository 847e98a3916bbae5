"""`--config` and `--print-config`: the options of a command as one YAML file."""

from pathlib import Path
from typing import Any

import typer
import yaml

from tether.errors import ConfigError

__all__ = ["printed", "read_config"]

_ITSELF = {"config", "print_config"}


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a file for those that the command line leaves out.

    Args:
        ctx: of the command.
        path: a YAML file of `name: value` lines, named as the options are, with `_` or `-`; or None.

    Returns:
        The path.

    Raises:
        ConfigError: the file is no such file, or names an option that the command does not have.
    """
    if path is None:
        return None
    from tether.reading import read_yaml

    content = read_yaml(path, error=ConfigError) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected options as 'name: value' lines; got {type(content).__name__}")
    known = {str(param.name) for param in ctx.command.params} - _ITSELF - {"help"}
    given = {str(name).replace("-", "_"): value for name, value in content.items()}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(
            f"{path}: no option {', '.join(map(ascii, unknown))}; expected {', '.join(sorted(known))}"
        )
    # What is null is left out, as it is on the command line.
    ctx.default_map = {name: value for name, value in given.items() if value is not None}
    return path


def printed(ctx: typer.Context) -> str:
    """Write down what a command was given, wherever from.

    Args:
        ctx: of the command.

    Returns:
        YAML that `read_config` takes.
    """
    plain: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in ctx.params.items()
        if name not in _ITSELF and value is not None
    }
    return yaml.safe_dump(plain, sort_keys=True, allow_unicode=True)
