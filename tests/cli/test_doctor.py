"""`tether doctor`: what it says of this machine, and that what is missing is named with what to do."""

import importlib.util
import json
import os

import pytest
import torch
import transformers

from tether.cli import doctor


def test_it_says_what_is_here(tether):
    code, out, err = tether("doctor", "--json")
    found = json.loads(out)
    assert code == (1 if found["missing"] else 0), err
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["transformers"] == transformers.__version__
    assert found["memory"] > found["memory_free"] > 0
    assert found["device"].split()[0] == str(torch.accelerator.current_accelerator() or "cpu")
    told = tether("doctor")[1]
    assert f"with {found['cores']} cores" in told
    assert found["cache"] in told


@pytest.mark.parametrize("module", doctor.OPTIONAL)
def test_what_is_missing_is_named_with_what_it_is_for(tether, monkeypatch, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    package, what = doctor.OPTIONAL[module]
    code, out, _ = tether("doctor")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith(f"{package} is not installed")]
    assert what in line
    assert line.endswith(f"pip install {package}")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_to(tether, monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    code, out, _ = tether("doctor")
    assert code == 1
    assert f"{tmp_path} cannot be written to" in out
    assert not (tmp_path / "cache").exists()


def test_a_full_disk(tether, monkeypatch, tmp_path):
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "ROOM", 2**62)
    code, out, _ = tether("doctor")
    assert code == 1
    assert f"the disk of {tmp_path} has" in out
