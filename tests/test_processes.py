"""A group of processes: what they share, what they agree on, and how all of them end with one."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from processes import run_two
from tether.errors import ConfigError, GroupError, TetherError
from tether.processes import ALONE, Group, joined, launched

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_processes as here
from pathlib import Path
here.{name}(Path(sys.argv[1]))
"""


def refused(kind, work):
    try:
        work()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail(error):
    raise error


def share(folder):
    said = {}
    with joined() as group:
        said["gathered"] = group.gather(10 + group.rank)
        said["once"] = group.once(lambda: os.environ["RANK"])
        said["alone"] = group.once(lambda: joined().__enter__().count)
        said["refused"] = refused(TetherError, lambda: group.once(lambda: fail(ConfigError("no such thing"))))
        said["stopped"] = refused(Exception, lambda: group.once(lambda: fail(ZeroDivisionError("x / 0"))))
        group.agree(options={"rank": 8}, text="abc")
        long = " ".join(["same"] * 100)
        said["differ"] = refused(
            ConfigError, lambda: group.agree(text="abc", options=f"{long} rank={group.rank}")
        )
        said["works"] = refused(ConfigError, lambda: group.agree(**{f"work_{group.rank}": "x"}))
        group.see(folder)
        own = folder / f"disk-{group.rank}"
        said["blind"] = refused(ConfigError, lambda: group.see(own))
        sums = [torch.tensor([1.0, 2.0]) + group.rank, torch.tensor(0.5)]
        group.add(sums)
        said["sums"] = [values.tolist() for values in sums]
    (folder / f"said-{group.rank}.json").write_text(json.dumps(said))
    with joined() as group:
        group.wait()
    torch.distributed.destroy_process_group()


def leave(folder):
    with joined() as group:
        group.wait()
        if group.rank == 1:
            (folder / "left").touch()
            os._exit(0)
        began = time.monotonic()
        said = refused(GroupError, lambda: group.gather(0))
        (folder / "said.json").write_text(json.dumps([said, time.monotonic() - began]))
    os._exit(0)


def test_two_processes_share_and_agree(tmp_path):
    run_two(SCRIPT.format(tests=str(Path(__file__).parent), name="share"), tmp_path, tmp_path)
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2))
    assert first["gathered"] == second["gathered"] == [10, 11]
    assert first["once"] == second["once"] == "0"
    assert first["alone"] == second["alone"] == 1
    assert first["refused"] == second["refused"] == "ConfigError: no such thing"
    assert first["stopped"] == "ZeroDivisionError: x / 0"
    assert second["stopped"] == "TetherError: process 0 was stopped by ZeroDivisionError: x / 0"
    assert first["differ"] == second["differ"]
    assert "differ in options: process 0 has ...rank=0', process 1 has ...rank=1'" in first["differ"]
    assert first["works"] == second["works"]
    assert "process 1 has nothing" in first["works"]
    assert "process 1 does not see what process 0 writes there" in first["blind"]
    assert first["blind"] == second["blind"].replace("disk-1", "disk-0")
    assert first["sums"] == second["sums"] == [[3.0, 5.0], 1.0]
    # Marks are taken away.
    assert {path.name for path in tmp_path.iterdir()} == {"run.py", "said-0.json", "said-1.json", "disk-0"}


def test_whoever_waits_for_one_that_has_left_is_told(tmp_path):
    run_two(SCRIPT.format(tests=str(Path(__file__).parent), name="leave"), tmp_path, tmp_path)
    said, seconds = json.loads((tmp_path / "said.json").read_text())
    assert said.startswith("GroupError: another process of this group has ended")
    assert seconds < 10


def test_one_process_is_a_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() == Group() == ALONE
    with joined() as group:
        assert group == ALONE
        assert group.gather(3) == [3]
        assert group.once(lambda: 4) == 4
        group.agree(text="a")
        group.wait()


@pytest.mark.parametrize(("size", "rank"), [("two", "0"), ("2", "2"), ("2", ""), ("0", "0"), ("2", "-1")])
def test_an_environment_that_names_no_process_is_refused(monkeypatch, size, rank):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ConfigError, match="start it with torchrun"):
        launched()


def test_more_processes_than_devices_are_refused(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes on a machine with 1 devices"), joined():
        pass
