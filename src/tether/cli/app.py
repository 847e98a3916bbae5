"""The root command: options, errors and exit codes. Heavy imports happen inside the commands."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperCommand

from tether._version import __version__
from tether.cli import (
    causal,
    doctor,
    domains,
    export,
    learn,
    leash,
    ledger,
    merge,
    push,
    router,
    serve,
    theory,
    training,
)
from tether.cli.asked import listen
from tether.cli.codes import run, stop
from tether.cli.logged import logged
from tether.cli.output import plain
from tether.cli.placing import placed
from tether.cli.several import by_one
from tether.cli.texts import reads_texts
from tether.errors import ConfigError

__all__ = ["app", "main"]

TEXTS = ("--text", "--base-text", "--probes")
"""Options of which a user who gives two expects both to be read."""

SHARED = frozenset({"certify", "learn", "leash", "observe", "train"})
"""Commands whose work several processes share; of every other command one process does all."""


class Once(TyperCommand):
    """A command that refuses a text given twice where it would silently take the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, after a look at what is given.

        Args:
            ctx: of the call.
            args: of the command line.

        Returns:
            What is left over.

        Raises:
            ConfigError: a text is given twice where one is read.
        """
        single = {
            name for param in self.params for name in param.opts if not getattr(param, "multiple", False)
        }
        given = Counter(arg.partition("=")[0] for arg in itertools.takewhile(lambda arg: arg != "--", args))
        if twice := [name for name in given if name in TEXTS and name in single and given[name] > 1]:
            raise ConfigError(f"{', '.join(twice)} given twice: expected one")
        left: list[str] = super().parse_args(ctx, args)
        return left


app = typer.Typer(
    name="tether",
    help="Teach a language model new domains on a KL leash, fuse them, and certify how far the model has moved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(domains.demo)
_LOADING: tuple[Callable[..., Any], ...] = (
    causal.convert, learn.learn, leash.leash, domains.fuse, domains.certify, router.route, ledger.ledger, export.export,
    causal.generate, causal.counterfactual, training.evaluate, serve.serve,
)  # fmt: skip
_OF_ONE_FORMAT: tuple[Callable[..., Any], ...] = (domains.verify, training.train)
"""A certificate names its number format, and a training keeps weights in float32."""
_QUANTISING: tuple[Callable[..., Any], ...] = (learn.learn, domains.fuse, causal.generate)
"""Of what these have written it is known how the base was quantised, and it is loaded so."""
_SPREADING: tuple[Callable[..., Any], ...] = (
    learn.learn, domains.fuse, domains.certify, domains.verify, causal.generate, ledger.ledger,
)  # fmt: skip
_READING: tuple[Callable[..., Any], ...] = (
    causal.convert, learn.learn, domains.fuse, domains.certify, router.route, ledger.ledger, leash.leash,
    training.train, training.evaluate,
)  # fmt: skip
_FITTING: tuple[Callable[..., Any], ...] = (learn.learn, training.train)
for number_formats, commands in ((True, _LOADING), (False, _OF_ONE_FORMAT)):
    for each in commands:
        fit = logged(each) if each in _FITTING else each
        read = reads_texts(fit) if each in _READING else fit
        more = {"quantise": each in _QUANTISING, "spread": each in _SPREADING}
        app.command()(placed(read, dtype=number_formats, **more))
app.command()(push.push)
app.command()(doctor.doctor)
app.add_typer(theory.app)
app.add_typer(merge.merge_app, name="merge")
for group in (app, theory.app, merge.merge_app):
    for command in group.registered_commands:
        command.cls = Once
        if command.callback is not None and (command.name or command.callback.__name__) not in SHARED:
            command.callback = by_one(command.callback)


class _Plain(logging.Formatter):
    """Messages name files, and what is in them."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Say more on stderr."),
) -> None:
    """Teach a language model new domains on a KL leash, fuse them, and certify how far the model has moved."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


def main() -> None:
    """Run the command line; nothing but a code of `tether.cli.codes` and a message on stderr gets out."""
    # Asked to end, as by a batch system, it leaves as after Ctrl-C: unfinished files are taken away.
    listen()
    stop(run(app))


if __name__ == "__main__":
    main()
