"""Domains as a user would learn and combine them: LoRA, its merges, KL replay, against deltas and leashed LoRA.

Long: run `python -m benchmarks.domains --plan full` in pieces (`--minutes 60`); what is done is kept in the folder.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.domain_arms import Bench, learn_in_a_process
from benchmarks.domain_figure import tradeoff_png
from benchmarks.domain_measure import (
    adapter_runs,
    measure_curve,
    measure_deltas,
    measure_evidence,
    measure_gated,
    measure_runs,
)
from benchmarks.domain_plan import DELTAS, OTHER, PLANS
from benchmarks.domain_table import TEXTS, Table
from benchmarks.record import write_rows
from benchmarks.trial_texts import TRIAL as DOMAINS
from tether.causal.loading import cache_folder
from tether.demo.corpora import BASE_TEXTS
from tether.store.publish import publish_file, write_json

__all__ = ["Results", "rows"]

Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The minutes given are over; what is done is kept."""


class Results:
    """All stages of a plan, each kept in the folder when it is done and skipped from then on.

    Args:
        plan: name of the plan.
        folder: where; None takes the cache folder.
        minutes: stop before a stage that would start later than this.
        seeds: which; None takes the plan's first ones.
    """

    def __init__(
        self,
        plan: str,
        folder: Path | None = None,
        minutes: float = float("inf"),
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.name, self.plan = plan, PLANS[plan]
        self.seeds = list(range(self.plan.seeds) if seeds is None else seeds)
        self.folder = folder or cache_folder() / "benchmarks" / f"domains-{plan}"
        self.until = time.monotonic() + 60 * minutes

    # Loading takes seconds and a gigabyte, so it waits for the first stage that needs it.
    @cached_property
    def bench(self) -> Bench:
        """The work."""
        return Bench(self.plan, self.folder)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a piece of work, or read what it gave.

        Args:
            name: of the piece.
            work: gives something JSON can hold.

        Returns:
            What it gave.

        Raises:
            OutOfTimeError: it would start too late.
        """
        path = self.folder / "stages" / f"{name}.json"
        if not path.is_file():
            if time.monotonic() > self.until:
                raise OutOfTimeError
            started = time.process_time()
            result = work()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"result": result, "cpu": time.process_time() - started})
            print(f"{name}: done", flush=True)
        return json.loads(path.read_text())["result"]

    def learn(self, arm: str, domain: str, seed: int) -> dict[str, Any]:
        """Learn an arm in a process of its own.

        Args:
            arm: which.
            domain: which.
            seed: which.

        Returns:
            Costs and record.
        """
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            made = pool.submit(learn_in_a_process, self.name, str(self.folder), arm, domain, seed).result()
        found: dict[str, Any] = json.loads(made)
        return found

    def read(self) -> dict[str, Any]:
        """Compute all states.

        Returns:
            Tokens and CPU seconds by text and features.
        """
        torch.set_num_threads(1)
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)
        return {
            f"{part}-{features}": self.stage(
                f"read-{part}-{features}", partial(self.bench.read, part, features)
            )
            for features in dict.fromkeys(["last", *(DELTAS[arm][0] for arm in self.plan.deltas)])
            for part in (*DOMAINS, "base", "held-out")
        }

    def run_seed(self, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run every stage of a seed that is left; several seeds may run at once, each in a process.

        Args:
            seed: which.

        Returns:
            `learnt` and `cells`.
        """
        learnt: dict[str, Any] = {}
        cells: dict[str, Any] = {}
        for arm in (*self.plan.deltas, *self.bench.arms()):
            for domain in DOMAINS:
                key = f"{arm}-{domain}-{seed}"
                learnt[key] = self.stage(f"learn-{key}", partial(self.learn, arm, domain, seed))
        shrunk = self.stage(f"shrink-{seed}", partial(self.bench.shrink, seed))
        fused = [arm for arm in ("lora", "leashed") if arm in self.plan.adapters]
        for text in TEXTS:
            cells[f"{text}-{seed}"] = {
                **self.stage(
                    f"deltas-{text}-{seed}",
                    partial(measure_deltas, self.bench, text, seed),
                ),
                **self.stage(f"gated-{text}-{seed}", partial(measure_gated, self.bench, text, seed, fused)),
                **self.stage(
                    f"evidence-{text}-{seed}", partial(measure_evidence, self.bench, text, seed, fused)
                ),
                **self.stage(
                    f"adapters-{text}-{seed}",
                    partial(self.adapters, text, seed, self.bench.arms(), shrunk),
                ),
            }
        return learnt, cells

    def run(self) -> dict[str, Any]:
        """Run every stage that is left.

        Returns:
            `read`, `learnt` and `cells`.
        """
        read = self.read()
        learnt: dict[str, Any] = {}
        cells: dict[str, Any] = {}
        for seed in self.seeds:
            some, more = self.run_seed(seed)
            learnt |= some
            cells |= more
        extras, first = self.bench.extras(), self.seeds[0]
        for arm in extras:
            for domain in DOMAINS:
                key = f"{arm}-{domain}-{first}"
                learnt[key] = self.stage(f"learn-{key}", partial(self.learn, arm, domain, first))
        for text in TEXTS if extras else ():
            found = self.stage(f"extras-{text}", partial(self.adapters, text, first, extras, None))
            cells[f"{text}-{first}"] = {**found, **cells[f"{text}-{first}"]}
        return {"read": read, "learnt": learnt, "cells": cells}

    def curves(self) -> dict[str, Any]:
        """Measure what the first seed learnt at several factors, for the figure.

        Returns:
            Cells by text and domain.
        """
        return {
            f"{text}-{name}": self.stage(
                f"curve-{text}-{name}", partial(measure_curve, self.bench, text, name, self.seeds[0])
            )
            for name in DOMAINS
            for text in (name, *BASE_TEXTS)
        }

    def adapters(
        self, text: str, seed: int, arms: list[str], shrunk: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Measure what changes the backbone.

        Args:
            text: which.
            seed: which.
            arms: which.
            shrunk: factors of the merges, or None without them.

        Returns:
            Cells.
        """
        return measure_runs(self.bench, text, adapter_runs(self.bench, seed, arms, shrunk))


def rows(*, fast: bool) -> list[Row]:
    """Run the plan `full` or `fast`, or what is left of it.

    Args:
        fast: a fraction of the text, one seed.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline is the base model, or plain LoRA for costs.
    """
    results = Results("fast" if fast else "full")
    return as_rows(Table(results.run(), results.seeds))


def as_rows(table: Table) -> list[Row]:
    """Put the tables into rows.

    Args:
        table: of a plan.

    Returns:
        Rows.
    """
    found = []

    def add(arm: str, case: str, metric: str, ours: float, baseline: float) -> None:
        ratio = ours / baseline if baseline else None
        found.append(
            {
                "case": case,
                "metric": metric,
                "ours": ours,
                "baseline": baseline,
                "ratio": ratio,
                "runs": table.runs(arm),
            }
        )

    base = float(np.mean([table.figure(name, "base", "nll") for name in DOMAINS]))
    single, fused = list(table.single()), list(table.fused())
    plain = next(line for line in single if line["arm"] == "lora")
    for line in single:
        case = f"one domain, {line['arm']}; baseline: the base, for costs plain LoRA"
        add(line["arm"], case, "mean NLL of the domains, each with its own, nats", line["mean"], base)
        for name in (*BASE_TEXTS, OTHER):
            add(line["arm"], case, f"KL on {name}, nats", line[f"{name} kl"], 0.0)
        for cost in ("cpu_cached", "cpu_cold", "cpu_first", "peak_rss", "bytes"):
            add(line["arm"], case, cost, line[cost], plain[cost])
    for line in fused:
        case = f"three domains in one, {line['arm']}; baseline: the base"
        add(line["arm"], case, "mean NLL of the domains, nats", line["mean"], base)
        for name in (*BASE_TEXTS, OTHER):
            add(line["arm"], case, f"KL on {name}, nats", line[f"{name} kl"], 0.0)
    return found


def main() -> None:
    """Run a plan, or a piece of it, and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domains", description=__doc__)
    parser.add_argument("--plan", choices=sorted(PLANS), default="full")
    parser.add_argument("--folder", type=Path, help="where results are kept")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after this many, to go on later"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="these in place of the plan's")
    parser.add_argument(
        "--only",
        type=int,
        help="do no more than this seed's stages; several processes may do that at once, then start without it",
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--figure", type=Path, help="write the figure of domain loss against base drift here")
    arguments = parser.parse_args()
    results = Results(arguments.plan, arguments.folder, arguments.minutes, arguments.seeds)
    try:
        if arguments.only is not None:
            results.read()
            results.run_seed(arguments.only)
            return
        found = results.run()
        curves = results.curves() if arguments.figure else None
    except OutOfTimeError:
        print("stopped; start the same command again to go on")
        return
    table = Table(found, results.seeds)
    print(table.markdown())
    if arguments.json:
        write_rows(arguments.json, f"domains, plan {arguments.plan}", as_rows(table))
    if curves is not None:
        with publish_file(arguments.figure) as target:
            target.write_bytes(tradeoff_png(curves))


if __name__ == "__main__":
    main()
