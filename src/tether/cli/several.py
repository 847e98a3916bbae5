"""A command that runs in several processes: one of them prints and writes, and all leave with the same exit code.

What becomes of each process is told in the store that connects them, a table of texts which torch keeps for every
group. A process that fails says so there before it leaves, so that the others leave with it and add no message.
"""

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import IO, Any

from tether.errors import ConfigError, GroupError, TetherError
from tether.processes import GONE, Group, alone, begin, is_alone, launched, writes

__all__ = ["Peers", "by_one", "connect", "ended", "go_on", "together"]

EVERY, LOOK = 0.05, 1.0
"""Seconds between two looks at what becomes of the others: while nothing else is done, and while work goes on."""
FIRST, LAST = 2.0, 4.0
"""Seconds that the main process has to say what others would say too, and that it stays to be heard."""


class Peers:
    """The processes of a command, as one of them sees them.

    Args:
        group: all of them.

    Raises:
        ConfigError: there is nothing at the address by which they are to find each other.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._others = [rank for rank in range(group.count) if rank != group.rank]
        self._heard: IO[bytes] | None = None
        self._mark, self._looked = 0, 0.0
        if not group.main:
            # Nothing is seen of it unless it fails alone.
            self._heard = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
            self._voice = os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self._heard.fileno(), 2)
        self._store = _store()

    def meet(self) -> None:
        """Wait until all are here, before libraries connect them: these could not be told that one has failed.

        Raises:
            GroupError: one of them has ended.
        """
        self._store.set(f"here/{self.group.rank}", "")
        while not self._store.check([f"here/{rank}" for rank in self._others]):
            self.look()
            time.sleep(EVERY)

    def look(self) -> None:
        """Look whether the others are well.

        Raises:
            GroupError: one of them has failed.
        """
        self._looked = time.monotonic()
        if self._failed() is not None:
            raise GroupError(GONE)

    def look_again(self) -> None:
        """Look whether the others are well, unless that was done just now."""
        if time.monotonic() - self._looked > LOOK:
            self.look()

    def ended(self, say: Callable[[], int], error: BaseException | None) -> int:
        """Leave, with the others.

        Args:
            say: says what has become of the work, and gives its exit code.
            error: that stopped it, or None.

        Returns:
            The exit code of the whole group.
        """
        say = functools.cache(say)  # once, also where the store goes after it
        try:
            code = self._main(say, error) if self.group.main else self._other(say, error)
        except KeyboardInterrupt:
            return 130
        except (RuntimeError, OSError):
            # The store is gone, and with it the main process.
            code = say()
        return code

    def _main(self, say: Callable[[], int], error: BaseException | None) -> int:
        own = isinstance(error, TetherError) and not isinstance(error, GroupError)
        code = None
        if error is not None and not own:
            code = self._wait_for_fault()
        elif own and not self._first():
            code = self._failed()
        if code is None:
            self._first()
            code = say()
        self._tell("ended", code)
        if code == 0:
            while not self._all("ended"):
                if (fault := self._failed()) is not None:
                    code = fault
                    break
                time.sleep(EVERY)
        else:
            _hang_up()
        until = time.monotonic() + LAST
        while not self._all("left") and time.monotonic() < until:
            time.sleep(EVERY)
        return code

    def _other(self, say: Callable[[], int], error: BaseException | None) -> int:
        own = error is not None and not isinstance(error, GroupError)
        if error is not None:
            sys.stderr.flush()
            self._mark = os.lseek(2, 0, os.SEEK_END)
        code = say()
        fault = self._failed() if own or code == 0 else self._wait_for_fault()
        if code == 0 and fault is None:
            self._tell("ended", code)
            while (ended := self._ended(0)) is None:
                if (fault := self._failed()) is not None:
                    ended = fault
                    break
                time.sleep(EVERY)
            code = ended
        elif fault is not None:
            code = fault
        else:
            self._tell("ended", code)
            until = time.monotonic() + FIRST
            while self._ended(0) is None and time.monotonic() < until and self._store.add("voice", 0) == 0:
                time.sleep(EVERY)
            if self._first():
                self._speak()
        self._store.set(f"left/{self.group.rank}", "")
        return code

    # Whether this is the process that says what went wrong.
    def _first(self) -> bool:
        return int(self._store.add("voice", 1)) == 1

    def _tell(self, what: str, code: int) -> None:
        self._store.set(f"{what}/{self.group.rank}", str(code))

    def _ended(self, rank: int) -> int | None:
        key = f"ended/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else None

    def _failed(self) -> int | None:
        codes = [self._ended(rank) for rank in self._others]
        return next((code for code in codes if code), None)

    # An error that comes of another's may be there before the other has been told of.
    def _wait_for_fault(self) -> int | None:
        until = time.monotonic() + FIRST
        while (code := self._failed()) is None and time.monotonic() < until:
            time.sleep(EVERY)
        return code

    def _all(self, what: str) -> bool:
        return bool(self._store.check([f"{what}/{rank}" for rank in self._others]))

    def _speak(self) -> None:
        if self._heard is None:
            return
        sys.stderr.flush()
        self._heard.seek(self._mark)
        said = f"in process {self.group.rank} of {self.group.count}: ".encode() + self._heard.read()
        os.write(self._voice, said)


_PEERS: ContextVar[Peers | None] = ContextVar("_PEERS", default=None)


@contextmanager
def together() -> Iterator[Peers | None]:
    """Run a command as one process of those that were started together.

    Yields:
        All of them; None where it is the only one.
    """
    group = launched()
    before = _PEERS.set(Peers(group) if group.count > 1 else None)
    try:
        yield _PEERS.get()
    finally:
        _PEERS.reset(before)


def ended(say: Callable[[], int], error: BaseException | None = None) -> int:
    """Leave, with all processes of the command.

    Args:
        say: says what has become of the work, and gives its exit code.
        error: that stopped it, or None.

    Returns:
        The exit code.
    """
    peers = _PEERS.get()
    return say() if peers is None else peers.ended(say, error)


def connect(device: str) -> None:
    """Connect the processes of a command that is shared, before it loads a model.

    Args:
        device: as the user named it.
    """
    peers = _PEERS.get()
    if peers is None or is_alone():
        return
    import torch

    peers.meet()
    begin(cpu=device == "cpu" or not torch.accelerator.is_available())


def go_on() -> None:
    """Go on unless another process of the command has failed."""
    if (peers := _PEERS.get()) is not None:
        peers.look_again()


def by_one(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let the main process run a command that is not shared; the others wait for its exit code.

    Args:
        command: any.

    Returns:
        The command.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        if not writes():
            return None
        with alone():
            return command(*args, **options)

    return run


def _store() -> Any:
    import torch

    distributed: Any = torch.distributed
    try:
        store, _, _ = next(distributed.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE in the environment says that there are several processes, but they do not find each other "
            f"({str(error).splitlines()[0][:200]}): start them with torchrun or accelerate launch, or unset it"
        ) from error
    return distributed.PrefixStore("tether", store)


# Those that wait for this process are told so by their connections.
def _hang_up() -> None:
    import torch.distributed as distributed

    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        with suppress(RuntimeError):
            distributed.destroy_process_group()
