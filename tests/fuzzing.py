"""Readers on files that strangers or accidents have changed: damage by seed, devices and pipes.

200 cases a reader; `TETHER_FUZZ=4000` for more. A case that fails is named by its number, which is its seed.
"""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from damage import damaged
from tether.errors import TetherError

CASES = int(os.environ.get("TETHER_FUZZ", "200"))
SECONDS = 10.0
"""Of processor time that a damaged file may take."""
DEVICE_SECONDS = 5.0
"""Of time that a device or a pipe may take."""

devices = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has other devices")


@dataclass(frozen=True)
class Reader:
    """A reader, the files that are damaged for it, one at a time, and the share of cases that it must refuse.

    `same` is for files that carry a hash: what is read of a damaged one, if anything, is what was read of the whole.
    """

    read: Callable[[Path], object]
    files: dict[str, str]
    refused: float
    same: Callable[[object, object], bool] | None = None


def equal(found, undamaged):
    return found == undamaged


def cases(name, reader, whole, folder):
    """Put one damaged file after another in place; gives the seed of each."""
    shutil.copytree(whole, folder)
    contents = {file: (folder / file).read_bytes() for file in reader.files}
    for seed in range(CASES):
        draw = random.Random(f"{name} {seed}")
        file = draw.choice(list(contents))
        changed = damaged(reader.files[file], contents[file], draw)
        if changed == contents[file]:
            continue
        (folder / file).write_bytes(changed)
        yield seed
        (folder / file).write_bytes(contents[file])


def survive(name, reader, whole, tmp_path):
    """Every case is refused with a tether error or read, soon; nothing is written elsewhere."""
    refused, count = 0, 0
    undamaged = reader.read(whole)
    for seed in cases(name, reader, whole, tmp_path / "read"):
        count += 1
        before = time.process_time()
        try:
            found = reader.read(tmp_path / "read")
        except TetherError:
            refused += 1
        except Exception as error:
            pytest.fail(f"case {seed} of {name}: {type(error).__name__}: {str(error)[:400]}")
        else:
            assert reader.same is None or reader.same(found, undamaged), f"case {seed} of {name} is believed"
        assert time.process_time() - before < SECONDS, f"case {seed} of {name}"
    print(f"{name}: {count} damaged, {refused} refused, {count - refused} read")
    assert refused >= reader.refused * count, (refused, count)
    assert {path.name for path in tmp_path.iterdir()} <= {"read", "again"}


def refuse_devices(reader, whole, tmp_path):
    """Each file as a pipe without a writer, then as a device without an end: refused before either is waited for."""
    shutil.copytree(whole, tmp_path / "read")
    for file in reader.files:
        path = tmp_path / "read" / file
        content = path.read_bytes()
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            path.unlink()
            make(path)
            with pytest.raises(TetherError), within(DEVICE_SECONDS, file):
                reader.read(tmp_path / "read")
        path.unlink()
        path.write_bytes(content)


@contextlib.contextmanager
def within(seconds, what):
    """Fail after so much time, whatever is waited for."""

    def late(number, frame):
        del number, frame
        pytest.fail(f"{what}: nothing after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
