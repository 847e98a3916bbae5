"""The processes that `torchrun` or `accelerate launch` started together: who shares the work, who waits, who writes."""

import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tether.errors import ConfigError, GroupError, TetherError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALONE",
    "GONE",
    "Group",
    "alone",
    "begin",
    "current",
    "is_alone",
    "joined",
    "launched",
    "writes",
]

T = TypeVar("T")

PATIENCE: Final = timedelta(days=7)
"""How long one process waits for the others. Their shares may take hours; one that has ended is noticed at once, since
its connections close."""
GONE: Final = (
    "another process of this group has ended, so this one cannot go on; what stopped that one is said there, and no "
    "output is half written: start the same command again"
)


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that do the same work on the same input, each a share of it.

    Every process calls the same methods in the same order. Where one of them has ended, the others are stopped by a
    `GroupError` in whatever they wait for it.

    Attributes:
        count: how many there are, >= 1.
        rank: which one this is, from 0.
    """

    count: int = 1
    rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            with _noticing():
                _state().wait_for_everyone()

    def gather(self, mine: T) -> list[T]:
        """Give every process what each of them has.

        Args:
            mine: anything that can be pickled; tensors on the CPU.

        Returns:
            That of each process, in the order of their ranks.
        """
        if self.count == 1:
            return [mine]
        from accelerate.utils import gather_object

        with _noticing():
            return list(gather_object([mine]))

    def once(self, work: Callable[[], T]) -> T:
        """Let one process do a piece of work that is not worth sharing; the others wait for what it gives.

        Args:
            work: run in the main process, which is alone meanwhile; gives what can be pickled, tensors on the CPU.

        Returns:
            What it gave, in every process.

        Raises:
            TetherError: it ended in an error; the main process has the error itself.
        """  # noqa: DOC502 - raised as it was sent
        if self.count == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None]
        if self.main:
            try:
                with alone():
                    told = [(work(), None)]
            except Exception as error:
                with _noticing():
                    broadcast_object_list([(None, _to_send(error))])
                raise
        with _noticing():
            broadcast_object_list(told)
        found, fault = told[0]
        if fault is not None:
            raise fault
        result: T = found
        return result

    def agree(self, **told: Any) -> None:
        """Refuse processes that were not given the same, before any of them begins the long part.

        Args:
            told: what all must have alike, by its name in a message; compared as it prints.

        Raises:
            ConfigError: something differs.
        """
        everyone = self.gather({name: repr(value) for name, value in told.items()})
        names = dict.fromkeys(name for each in everyone for name in each)
        for name in names:
            spelt = [each.get(name, "nothing") for each in everyone]
            other = next((rank for rank, each in enumerate(spelt) if each != spelt[0]), None)
            if other is not None:
                raise ConfigError(
                    f"the {self.count} processes differ in {name}: process 0 has {_near(spelt[0], spelt[other])}, "
                    f"process {other} has {_near(spelt[other], spelt[0])}; start all with the same command on the same "
                    "files"
                )

    def see(self, folder: Path) -> None:
        """Refuse a folder that not all processes see, before they put shares of the work there.

        Args:
            folder: made where it is missing.

        Raises:
            ConfigError: one of them does not see what another writes there.
        """
        if self.count == 1:
            return
        mark = folder / self.once(lambda: _mark(folder))
        seen = self.gather(mark.is_file())
        self.once(lambda: mark.unlink(missing_ok=True))
        if blind := [rank for rank, sees in enumerate(seen) if not sees]:
            raise ConfigError(
                f"{folder}: process {blind[0]} does not see what process 0 writes there, so they cannot share it; "
                "name a folder on a disk that all of them see"
            )

    def add(self, tensors: Sequence["Tensor"]) -> None:
        """Put sums over all processes in the place of what each of them has.

        Args:
            tensors: floating point, of the same shapes everywhere; changed in place. They travel as one.
        """
        if self.count == 1 or not tensors:
            return
        import torch
        from accelerate.utils import reduce

        device = _state().device
        flat = torch.cat([values.detach().flatten().to(device) for values in tensors])
        with _noticing():
            total = reduce(flat, reduction="sum")
        for values, added in zip(tensors, total.split([values.numel() for values in tensors]), strict=True):
            values.detach().copy_(added.view_as(values))


ALONE: Final = Group()
"""One process that does all of the work."""
_CURRENT: ContextVar[Group | None] = ContextVar("_CURRENT", default=None)
"""None where nothing that is shared is under way."""


def launched() -> Group:
    """Tell what a launcher has started.

    Returns:
        What `torchrun` or `accelerate launch` set in the environment, else one process.

    Raises:
        ConfigError: that is no group.
    """
    said = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK", "0")
    if not all(each.isdecimal() for each in said) or not int(said[1]) < int(said[0]):
        raise ConfigError(
            f"WORLD_SIZE={said[0]!r} and RANK={said[1]!r} in the environment name no process of a group: start it with "
            "torchrun or accelerate launch, or unset both"
        )
    return Group(int(said[0]), int(said[1]))


def current() -> Group:
    """Tell who shares the work that is under way.

    Returns:
        The group inside `joined`; elsewhere, and inside `alone`, one process.
    """
    return _CURRENT.get() or ALONE


def is_alone() -> bool:
    """Tell whether this process has nobody to share with.

    Returns:
        Whether no others were started, or this is inside `alone`.
    """
    return _CURRENT.get() == ALONE or launched().count == 1


def writes() -> bool:
    """Tell whether this process writes results; where several are started, one does.

    Returns:
        The answer; inside `alone` it is yes.
    """
    return (_CURRENT.get() or launched()).main


@contextmanager
def alone() -> Iterator[Group]:
    """Work without the other processes: what is called inside shares nothing and waits for nobody.

    Yields:
        The group of this process.
    """
    before = _CURRENT.set(ALONE)
    try:
        yield ALONE
    finally:
        _CURRENT.reset(before)


@contextmanager
def joined() -> Iterator[Group]:
    """Share the work inside with all processes that were started together; each of them has to come here.

    Yields:
        The group; one process where no others were started, or inside `alone`.

    Raises:
        ConfigError: several processes without accelerate, or more of them than devices.
    """  # noqa: DOC502 - raised by begin
    group = _CURRENT.get() or begin()
    before = _CURRENT.set(group)
    try:
        yield group
    finally:
        _CURRENT.reset(before)


def begin(*, cpu: bool | None = None) -> Group:
    """Connect the processes that were started together, unless they are.

    Args:
        cpu: whether they compute on the CPU; None where there is no accelerator.

    Returns:
        All of them.

    Raises:
        ConfigError: several processes without accelerate or a place to find each other, or more of them on a machine
            than it has devices.
    """
    group = launched()
    if group.count == 1:
        return ALONE
    import torch

    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ConfigError(
            "several processes need accelerate: install 'tether[train]', or start one process"
        ) from error
    there = torch.accelerator.is_available()
    cpu = not there if cpu is None else cpu
    here = int(os.environ.get("LOCAL_WORLD_SIZE", group.count))
    if not cpu and (devices := torch.accelerator.device_count()) < here:
        raise ConfigError(
            f"{here} processes on a machine with {devices} devices: start one process a device "
            f"(--nproc-per-node {devices}), or compute on the CPU (--device cpu)"
        )
    # What is running already, such as a trainer's processes, is taken as it is.
    running = torch.distributed.is_initialized()
    if not running and not os.environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"WORLD_SIZE={group.count} in the environment says that there are several processes, and no MASTER_ADDR "
            "where they find each other: start them with torchrun or accelerate launch, or unset it"
        )
    with warnings.catch_warnings():
        # How many threads a process takes is the launcher's matter.
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        state = PartialState(**({} if running else {"timeout": PATIENCE}), cpu=cpu)
    return Group(state.num_processes, state.process_index)


def _state() -> Any:
    from accelerate import PartialState

    return PartialState()


# What a text has where it begins to differ from another, with as much as tells what that is.
def _near(text: str, other: str) -> str:
    pairs = enumerate(zip(text, other, strict=False))
    at = next((place for place, (own, its) in pairs if own != its), min(len(text), len(other)))
    begin = 0 if at <= 80 else text.rfind(" ", 0, at) + 1
    return ("..." if begin else "") + text[begin : at + 80] + ("..." if len(text) > at + 80 else "")


def _mark(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".seen-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


# Only tether's own errors are known to travel.
def _to_send(error: Exception) -> TetherError:
    if isinstance(error, TetherError):
        return type(error)(str(error))
    return TetherError(f"process 0 was stopped by {type(error).__name__}: {error}")


# A process that waits for one that has ended is told so by the library that connects them, in its own words.
@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise GroupError(GONE) from error
