"""What every test shares: no network, a forked seed, float64 where mathematics is compared."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long a draw takes says more of a busy machine than of the test.
settings.register_profile("tether", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tether")

# Tensors here are small: a second thread waits more than it works, and on a busy machine costs minutes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def forked_seed():
    """Give each test the same global random state and restore it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tether(monkeypatch, capsys):
    """Run a command inside the test's own process; gives exit code, output and errors."""
    from tether.cli.app import main

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["tether", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
