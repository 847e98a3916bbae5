"""`--log-with`: the figures of a fit, step by step, in a logger that accelerate knows."""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.added import Option, with_options
from tether.errors import ConfigError
from tether.processes import writes

__all__ = ["LOGGERS", "log", "logged"]

LOGGERS = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}
"""Loggers by name, and the package that each needs."""

With = Annotated[
    str | None, typer.Option(help=f"Log loss, drift and multiplier of each step with {', '.join(LOGGERS)}.")
]
Folder = Annotated[Path, typer.Option(help="Where a logger that keeps files puts them.")]


class _Log:
    """One run of a logger, which begins with the first figures."""

    def __init__(self, logger: str, folder: Path, run: str, settings: Mapping[str, Any]) -> None:
        self.logger, self.folder, self.run, self.settings = logger, folder, run, settings
        self.tracker: Any = None

    def add(self, entry: Mapping[str, float]) -> None:
        if not writes():
            return
        if self.tracker is None:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            keeps_files = {"logging_dir": self.folder} if self.logger == "tensorboard" else {}
            self.tracker = LOGGER_TYPE_TO_CLASS[self.logger](self.run, **keeps_files)
            self.tracker.start()
            self.tracker.store_init_configuration(dict(self.settings))
        figures = {key: value for key, value in entry.items() if key not in ("step", "steps")}
        self.tracker.log(figures, step=int(entry["step"]))

    def end(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()


_LOG: ContextVar[_Log | None] = ContextVar("_LOG", default=None)


def log(entry: Mapping[str, float]) -> None:
    """Log a step of a fit, if the command that runs was asked to.

    Args:
        entry: what the step told: `step`, and figures by their names; without a loss it is no step of a fit.
    """
    asked = _LOG.get()
    if asked is not None and "step" in entry and not {"nll", "loss"}.isdisjoint(entry):
        asked.add(entry)


def logged(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--log-with` and `--log-folder`.

    Args:
        command: fits something, and shows it by `tether.cli.progress.reporter`.

    Returns:
        The command with both options.
    """
    default = Path("runs")

    @functools.wraps(command)
    def run(*args: Any, log_with: str | None = None, log_folder: Path = default, **options: Any) -> Any:
        if log_with is None:
            return command(*args, **options)
        _check(log_with)
        from tether.store.place import check_place

        check_place(log_folder)
        settings = {
            name: value for name, value in options.items() if isinstance(value, str | int | float | bool)
        }
        asked = _Log(log_with, log_folder, Path(options.get("out") or "run").stem, settings)
        before = _LOG.set(asked)
        try:
            return command(*args, **options)
        finally:
            _LOG.reset(before)
            asked.end()

    return with_options(command, run, {"log_with": Option(With, None), "log_folder": Option(Folder, default)})


def _check(logger: str) -> None:
    if logger not in LOGGERS:
        raise ConfigError(f"--log-with {logger}: expected one of {', '.join(LOGGERS)}")
    try:
        from accelerate.tracking import get_available_trackers
    except ImportError as error:
        raise ConfigError(
            "--log-with needs the package accelerate: pip install 'tether[train]', or leave it out"
        ) from error
    if logger not in [str(getattr(each, "value", each)) for each in get_available_trackers()]:
        raise ConfigError(
            f"--log-with {logger}: its package is not installed; pip install {LOGGERS[logger]}, or leave it out"
        )
