"""One set of checkpoints and one server for all tests of a worker."""

import pytest

from server_tools import KEY, Running, make


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def running(work):
    """One server for all tests; it must be well at the end, and have had no fault of its own."""
    models = ("fused", "numeric", "causal", "plain")
    server = Running(
        work, *models, "--port", 0, "--max-tokens", 480, environment={"TETHER_API_KEY": KEY}.items()
    )
    try:
        yield server
    finally:
        code = server.end()
    assert code == 0, server.text()
    assert "Traceback" not in server.text(), server.text()
