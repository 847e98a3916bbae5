"""Whether shaping makes over-parameterised experts overfit less: train-test gap over width of experts and data."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.fars_tasks import DIGITS, REGRESSION, Cell, Task, train
from benchmarks.router_tasks import Arm
from tether.runs import Run
from tether.stats import standard_error

__all__ = ["ARMS", "SEEDS", "rows", "verdicts"]

Row = dict[str, Any]
Losses = dict[str, npt.NDArray[np.float64]]
"""`train` and `test` loss, `effective_experts` and `dead`, by seed."""
SEEDS = range(720, 740)
"""No setting was chosen on these, nor had they been run for anything else; settings were looked at on 0 to 7."""
SMALL = range(2)
ARMS = {
    "none": Arm("none"),
    "Switch": Arm("switch", lam=0.01),
    "Switch 0.1": Arm("switch", lam=0.1),
    "paper": Arm("tax", "paper", lam=1.0),
    "paper's code": Arm("goodness", "paper-log", lam=0.1),
    "its control, g=0": Arm("entropy", lam=0.1),
    "direction 1": Arm("tax", "snr", lam=0.01),
    "direction 2": Arm("tax", lam=0.01),
    "balance": Arm("balance", lam=0.01),
    "balance 0.1": Arm("balance", lam=0.1),
}
TASKS = (REGRESSION, DIGITS)
SURE, LIKELY = 3.0, 2.0
"""Standard errors that a change of the gap has to be away from 0, and that a comparison of two arms has to be."""


def rows(*, fast: bool) -> list[Row]:
    """Train every arm from the same starts on the same data, twenty seeds at once, on one thread.

    What a cell gave is kept in the folder that TETHER_STATES names, so that a run can be resumed.

    Args:
        fast: two seeds, a tenth of the steps, the corners of widths and sizes: shows that all runs, not what comes out.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs, and where arms are compared difference and error.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if named := os.environ.get("TETHER_STATES"):
            return _run(Path(named) / f"fars-overfitting{'-fast' if fast else ''}", fast)
        with tempfile.TemporaryDirectory() as folder:
            return _run(Path(folder), fast)
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, fast: bool) -> list[Row]:
    seeds = list(SMALL if fast else SEEDS)
    found: list[Row] = []
    changes: dict[tuple[str, str], Changes] = {}
    arms = {name: arm._asdict() for name, arm in ARMS.items()}
    with Run(folder, {"arms": arms, "seeds": seeds, "tasks": [task[:1] + task[3:] for task in TASKS]}) as run:
        for task in TASKS:
            step = max(len(task.widths) - 1, 1) if fast else 1
            widths, sizes = task.widths[::step], task.sizes[::step]
            losses = {
                (name, width, size): _cell(run, name, Cell(task, width, size), seeds, fast)
                for width in widths
                for size in sizes
                for name in ARMS
            }
            found += _of_cells(task, losses)
            for name in ARMS:
                changes[task.name, name] = Changes(losses, name, widths, sizes)
    return found + _of_tasks(changes) + verdicts(changes)


def _cell(run: Run, name: str, cell: Cell, seeds: Sequence[int], fast: bool) -> Losses:
    stage = f"{cell.task.name}-{cell.width}-{cell.size}-{list(ARMS).index(name)}"
    steps = cell.task.steps // 10 if fast else None
    figures = run.stage(stage, lambda: ([], train(cell, ARMS[name], seeds, steps)))
    return {key: np.asarray(values) for key, values in figures.items()}


class Changes:
    """What an arm changes against no shaping, as a share of what no shaping has in the same cell; paired by seed.

    Args:
        losses: of all arms and cells of a task.
        name: of the arm.
        widths: of experts, narrow to wide.
        sizes: of the data.

    Attributes:
        gap: of test less train loss, shape (widths, sizes, seeds).
        test: of the test loss, likewise.
    """

    def __init__(
        self,
        losses: dict[tuple[str, int, int], Losses],
        name: str,
        widths: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        def change(train_share: float) -> npt.NDArray[np.float64]:
            def measured(arm: str, width: int, size: int) -> npt.NDArray[np.float64]:
                cell = losses[arm, width, size]
                return cell["test"] - train_share * cell["train"]

            return np.asarray([
                [
                    (measured(name, width, size) - measured("none", width, size)) / measured("none", width, size).mean()
                    for size in sizes
                ]
                for width in widths
            ])  # fmt: skip

        self.gap, self.test = change(1.0), change(0.0)

    @property
    def widening(self) -> npt.NDArray[np.float64]:
        """Change of the gap at the widest experts less that at the narrowest, by seed."""
        by_width = self.gap.mean(1)
        return np.asarray(by_width[-1] - by_width[0])


def _of_cells(task: Task, losses: dict[tuple[str, int, int], Losses]) -> list[Row]:
    found = []
    for (name, width, size), cell in losses.items():
        plain = losses["none", width, size]
        for metric in ("gap", "test", "train", "effective_experts"):
            mine, other = (
                one["test"] - one["train"] if metric == "gap" else one[metric] for one in (cell, plain)
            )
            found.append(
                _row(f"{task.name}, width {width}, {size} samples: {name}", "none", metric, mine, other)
            )
    return found


def _of_tasks(changes: dict[tuple[str, str], Changes]) -> list[Row]:
    found = []
    for (task, name), change in changes.items():
        if name == "none":
            continue
        for metric, values in {
            "change of the gap, mean of cells": change.gap.mean((0, 1)),
            "change of the test loss, mean of cells": change.test.mean((0, 1)),
            "change of the gap, widest experts": change.gap[-1].mean(0),
            "change of the gap, widest less narrowest": change.widening,
        }.items():
            found.append(_row(f"{task}: {name}", "none", metric, values, np.zeros_like(values)))
    return found


def _row(
    case: str, against: str, metric: str, mine: npt.NDArray[np.float64], other: npt.NDArray[np.float64]
) -> Row:
    ours, baseline = float(mine.mean()), float(other.mean())
    return {
        "case": f"{case}; baseline: {against}", "metric": metric, "ours": ours, "baseline": baseline,
        "ratio": ours / baseline if baseline else None, "difference": ours - baseline,
        "error": float(standard_error((mine - other).tolist())), "runs": len(mine),
    }  # fmt: skip


def verdicts(changes: dict[tuple[str, str], Changes]) -> list[Row]:
    """Apply the rule that docs/log.md states (2026-12-01): a claim holds if it holds on both tasks.

    Args:
        changes: of every task and arm.

    Returns:
        Rows whose `holds` is the verdict; ours is how many standard errors the worse task is away from 0.
    """
    tasks = sorted({task for task, _ in changes})

    def away(values: dict[str, npt.NDArray[np.float64]]) -> float:
        # Where an arm changes nothing at all, nothing is away from 0.
        errors = {task: float(standard_error(found.tolist())) for task, found in values.items()}
        return max(
            float(found.mean()) / errors[task] if errors[task] else 0.0 for task, found in values.items()
        )

    found = []

    def claim(text: str, score: float, limit: float, also: bool = True) -> None:
        found.append({
            "case": f"claim: {text}; baseline: the limit", "metric": "standard errors from 0, the worse of two tasks",
            "ours": score, "baseline": -limit, "ratio": None, "runs": len(tasks), "holds": score <= -limit and also,
        })  # fmt: skip

    for name in ARMS:
        if name == "none":
            continue
        gap = away({task: changes[task, name].gap.mean((0, 1)) for task in tasks})
        test = away({task: changes[task, name].test.mean((0, 1)) for task in tasks})
        claim(f"{name}: less overfitting (smaller gap, test loss not higher)", gap, SURE, test <= LIKELY)
        wider = away({task: changes[task, name].widening for task in tasks})
        claim(f"{name}: the more so the wider the experts", wider, LIKELY)
    for mine, other, where in (
        ("balance", "Switch", "all"), ("balance 0.1", "Switch 0.1", "all"), ("direction 2", "Switch", "all"),
        ("paper's code", "its control, g=0", "all"), ("direction 2", "direction 1", "widest"),
    ):  # fmt: skip

        def part(task: str, name: str, where: str = where) -> npt.NDArray[np.float64]:
            gap = changes[task, name].gap
            return np.asarray(gap[-1].mean(0) if where == "widest" else gap.mean((0, 1)))

        score = away({task: part(task, mine) - part(task, other) for task in tasks})
        claim(f"{mine}: smaller gap than {other}, {where} experts", score, LIKELY)
    return found
