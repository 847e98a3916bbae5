"""The command line, run inside the test's own process."""

import sys

import pytest

from tether.cli.app import main


@pytest.fixture
def tether(monkeypatch, capsys):
    """Run a command; gives exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tether", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
