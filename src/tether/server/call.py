"""A request on its way through the server, known to whoever works on it."""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar

__all__ = ["CALL", "Call"]


class Call:
    """One request.

    Attributes:
        model: name of the model that it is for, once that is known.
        status: of the answer, once it has begun.
        ended: whether all of the answer was sent.
        left: set once the client has gone.
    """

    def __init__(self) -> None:
        self.model: str | None = None
        self.status: int | None = None
        self.ended = False
        self.left = asyncio.Event()
        self._told: list[Callable[[], None]] = []

    def at_leave(self, tell: Callable[[], None]) -> None:
        """Ask to be told when the client goes before it has its answer.

        Args:
            tell: called then, or at once where it has gone already.
        """
        self._told.append(tell)
        if self.left.is_set():
            tell()

    def leave(self) -> None:
        """Say that the client has gone."""
        self.left.set()
        if not self.ended:
            for each in self._told:
                each()


CALL: ContextVar[Call] = ContextVar("CALL")
"""The request that is worked on."""
