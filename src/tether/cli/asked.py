"""Whether somebody has asked the command to end, by Ctrl-C or as batch systems do.

Python tells it by an exception at whatever line is running. Where a library of another language is running it, the
exception can come out as another one, or as a file that seems to be damaged; the request is remembered here.
"""

import signal
from threading import Event
from types import FrameType
from typing import Final

__all__ = ["ASKED", "go_on", "listen"]

ASKED: Final = Event()
"""Set once somebody has."""


def listen() -> None:
    """Remember requests to end from now on, and raise KeyboardInterrupt for each as Python does for Ctrl-C."""
    ASKED.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _told)


def go_on() -> None:
    """Go on unless somebody has asked to end.

    Raises:
        KeyboardInterrupt: somebody has, and what was raised then did not get through.
    """
    if ASKED.is_set():
        raise KeyboardInterrupt


def _told(number: int, frame: FrameType | None) -> None:
    del number, frame
    ASKED.set()
    raise KeyboardInterrupt
