"""Two gloo processes on this machine, for tests of what several processes do together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

# Autograd's and gloo's threads may outlive the work; torn down with the interpreter they end some runs in
# std::terminate, so a process whose work is done leaves without that.
LEAVE = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_two(script, folder, *arguments, timeout=120):
    """Run a script in two processes that can find each other and the tests' own modules.

    Fails with what the first failing process said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = folder / "run.py"
    file.write_text(script + LEAVE)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(file), *map(str, arguments)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            said = rank.communicate(timeout=timeout)[1]
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
