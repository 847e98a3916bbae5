"""What a block of code costs: processor time, clock time, memory."""

import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, final

import psutil

# Windows has no such module.
resource: Any = import_module("resource") if find_spec("resource") else None

__all__ = ["Usage"]


@final
class Usage:
    """What a block of code costs; the figures are set when it ends.

    Attributes:
        cpu_seconds: Processor time of this process and of the children that it has waited for.
        wall_seconds: Time on the clock.
        peak_rss_bytes: The most memory this process, or any child it has waited for, has held since its
            start: an upper limit for the block.

    Example:
        >>> with Usage() as usage:
        ...     _ = sum(range(1000))
        >>> usage.wall_seconds >= 0 and usage.peak_rss_bytes > 0
        True
    """

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        self.wall_seconds = 0.0
        self.peak_rss_bytes = 0

    def __enter__(self) -> "Usage":
        self._cpu_start = _cpu_seconds()
        self._wall_start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cpu_seconds = _cpu_seconds() - self._cpu_start
        self.wall_seconds = time.perf_counter() - self._wall_start
        self.peak_rss_bytes = _peak_rss_bytes()


def _cpu_seconds() -> float:
    if resource is None:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return float(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime)


def _peak_rss_bytes() -> int:
    if resource is None:
        # Windows keeps no account of children that have ended.
        found = psutil.Process().memory_info()
        return int(getattr(found, "peak_wset", found.rss))
    unit = 1 if sys.platform == "darwin" else 1024
    children = int(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * unit
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss starts at the size of the parent at the fork; this one starts at the exec.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return max(int(line.split()[1]) * 1024, children)
    return max(int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit, children)
