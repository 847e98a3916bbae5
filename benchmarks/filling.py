"""Filling a cache of states with one process and with two of `torch.distributed.run`."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from tether.causal.loading import load
from tether.delta.shards import cache_shards
from tether.delta.windows import window_text
from tether.demo.corpora import DOMAINS, documents

__all__ = ["filling"]

PART = 1000
"""Tokens of a part: small, so that a share of parts is near to half of the text."""


def filling(tokens: int) -> dict[str, Any]:
    """Fill one cache with one process, then another with two.

    Args:
        tokens: of the text.

    Returns:
        A row: seconds until the last process is done, and each process' CPU seconds.
    """
    found = {}
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            command += ["-m", "benchmarks.filling", folder, str(tokens)]
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            found[world] = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*"))]
    one, two = ([max(rank["wall"] for rank in found[world])] for world in (1, 2))
    return {
        "case": f"filling a cache of {tokens} tokens, two processes of one thread; baseline: one process",
        "metric": "seconds of the clock",
        "ours": two[0],
        "baseline": one[0],
        "ratio": two[0] / one[0],
        "runs": 1,
        "cpu": {str(world): [rank["cpu"] for rank in ranks] for world, ranks in found.items()},
    }


def main() -> None:
    """Fill this process' share and write what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=int)
    given = parser.parse_args()
    state = PartialState(cpu=True)
    torch.set_num_threads(1)  # after the state, which gives a lone process all cores
    model, tokenizer = load("smollm2-135m")
    windows = window_text(documents(DOMAINS["bible"]), tokenizer, tokens=given.tokens)
    state.wait_for_everyone()
    wall, cpu = time.perf_counter(), time.process_time()
    cache_shards(model, windows, given.folder / "states", tokens=PART)
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    (given.folder / f"rank-{state.process_index}").write_text(json.dumps(took))


if __name__ == "__main__":
    main()
