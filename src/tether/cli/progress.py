"""Progress on stderr, with the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tether.cli.asked import go_on
from tether.cli.logged import log
from tether.cli.output import plain
from tether.cli.several import go_on as go_on_together

__all__ = ["Reporter", "reporter"]

Reporter = Callable[[str], Callable[[dict[str, float]], None]]
"""Given the name of a piece of work, gives the callback that its steps are reported to."""


@contextmanager
def reporter() -> Iterator[Reporter]:
    """Show one bar for each piece of work that reports steps.

    Yields:
        A function from a name, which may come from a file, to an `on_step` callback; the callback reads done/total or
        step/steps, and shows nll and drift where they are given.
    """
    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        known: dict[str, TaskID] = {}

        def start(name: str) -> Callable[[dict[str, float]], None]:
            def on_step(entry: dict[str, float]) -> None:
                go_on()
                log(entry)
                go_on_together()
                done, total = (
                    (entry.get("done"), entry.get("total"))
                    if "done" in entry
                    else (entry["step"], entry["steps"])
                )
                # A fit follows a pass over the text under the same name: each gets its own bar.
                key = f"{name}/{'text' if 'done' in entry else 'fit'}/{total}"
                if key not in known:
                    known[key] = bars.add_task(plain(name), note="")
                note = f"nll {entry['nll']:.3f}  drift {entry['drift']:.3g}" if "nll" in entry else ""
                bars.update(known[key], completed=done, total=total, note=note)

            return on_step

        yield start
