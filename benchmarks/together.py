"""An adapter's fit by one process and by two of `torch.distributed.run`, of one thread each: `docs/processes.md`."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch

from tether.causal.loading import load
from tether.delta.adapter_learning import fit_adapter
from tether.delta.adapter_training import AdapterFit
from tether.delta.budget import Budget
from tether.delta.material import states_of
from tether.delta.windows import window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.processes import joined

__all__ = ["rows"]

IMPORTED = (accelerate, peft)
"""Before anything is timed."""

BATCH = 8
"""Domain windows a step; beside them is one of base text. Of 8 + 1 windows one of two processes has 5."""
WINDOW, PROBE = 64, 512
"""Tokens of a window, and of base text that the budget is met on: small, so that a run takes minutes."""
TOKENS = 2_000
"""Of the domain; each part of the base text has half as many."""


def rows(fast: bool = False) -> list[dict[str, Any]]:
    """Fit the same adapter with one process and with two, and compare what they took and what they found.

    Args:
        fast: half of the texts.

    Returns:
        A row: seconds of the clock until the last process is done, of the steps alone and of the whole fit with its
        measurements, CPU seconds of each process, and the largest difference of losses of steps.
    """
    tokens = TOKENS // (2 if fast else 1)
    with tempfile.TemporaryDirectory() as folder:
        ranks = {world: _run(Path(folder), world, tokens) for world in (1, 2)}
    wall, steps, cpu = (
        {world: max(rank[what] for rank in each) for world, each in ranks.items()}
        for what in ("fit", "steps", "cpu")
    )
    losses = [torch.tensor(each[0]["curve"]) for each in ranks.values()]
    return [{
        "case": f"an adapter's fit, {BATCH} + 1 windows a step, two processes; baseline: one process",
        "metric": "seconds of the clock",
        "ours": wall[2],
        "baseline": wall[1],
        "ratio": wall[2] / wall[1],
        "ratio_of_steps": steps[2] / steps[1],
        "ratio_of_cpu": cpu[2] / cpu[1],
        "runs": 1,
        "cpu": {str(world): [rank["cpu"] for rank in each] for world, each in ranks.items()},
        "cpu_of_steps": {str(world): [rank["cpu_steps"] for rank in each] for world, each in ranks.items()},
        "steps": len(losses[0]),
        "largest_difference": float((losses[0] - losses[1]).abs().max()),
        "drift_base": [each[0]["drift_base"] for each in ranks.values()],
    }]  # fmt: skip


def _run(folder: Path, world: int, tokens: int) -> list[dict[str, Any]]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["-m", "benchmarks.together", str(folder), str(tokens)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return [json.loads((folder / f"rank-{rank}").read_text()) for rank in range(world)]


def main() -> None:
    """Take this process's share of a fit, and write what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load("smollm2-135m")
    own, base = given.tokens, given.tokens // 2
    texts = [(DOMAINS["bible"], own), (BASE_TEXTS["news"], base), (BASE_TEXTS["wiki"], base)]
    windows = [
        window_text(documents(recipe), tokenizer, length=WINDOW, tokens=tokens) for recipe, tokens in texts
    ]
    fit = AdapterFit(budget=Budget(value=0.01), batch=BATCH, gate=False, probe=PROBE)
    steps = []
    with joined() as group:
        states = states_of(model, windows, given.folder / "states")
        group.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        made = fit_adapter(
            model,
            *states,
            "bible",
            fit,
            lambda entry: steps.append((time.perf_counter(), time.process_time(), entry["nll"])),
        )
        took = {
            "fit": time.perf_counter() - wall,
            "steps": steps[-1][0] - wall,
            "cpu": time.process_time() - cpu,
            "cpu_steps": steps[-1][1] - cpu,
            "curve": [nll for _, _, nll in steps],
            "drift_base": made.record["drift_base"],
        }
        (given.folder / f"rank-{group.rank}").write_text(json.dumps(took))
        group.wait()


if __name__ == "__main__":
    main()
