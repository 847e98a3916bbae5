"""Domains as a user would learn and combine them: LoRA, its merges, KL replay, against deltas and leashed LoRA.

Long: run `python -m benchmarks.domains --plan full` in pieces (`--minutes 60`); what is done is kept in the folder.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.domain_arms import DELTAS, OTHER, PLANS, Bench, learn_in_a_process
from tether.causal.loading import cache_folder
from tether.demo.corpora import BASE_TEXTS, DOMAINS
from tether.store.publish import write_json

__all__ = ["Results", "rows"]

Row = dict[str, Any]

TEXTS = [*DOMAINS, *BASE_TEXTS, OTHER]


class OutOfTimeError(Exception):
    """The minutes given are over; what is done is kept."""


class Results:
    """All stages of a plan, each kept in the folder when it is done and skipped from then on.

    Args:
        plan: name of the plan.
        folder: where; None takes the cache folder.
        minutes: stop before a stage that would start later than this.
    """

    def __init__(self, plan: str, folder: Path | None = None, minutes: float = float("inf")) -> None:
        self.name, self.plan = plan, PLANS[plan]
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

    def run(self) -> dict[str, Any]:
        """Run every stage that is left.

        Returns:
            `read`, `learnt` and `cells`.
        """
        torch.set_num_threads(1)
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)
        arms = [*self.plan.deltas, *self.bench.arms()]
        read = {
            f"{part}-{features}": self.stage(
                f"read-{part}-{features}", partial(self.bench.read, part, features)
            )
            for features in dict.fromkeys(["last", *(DELTAS[arm][0] for arm in self.plan.deltas)])
            for part in (*DOMAINS, "base", "held-out")
        }
        learnt: dict[str, Any] = {}
        cells: dict[str, Any] = {}
        for seed in range(self.plan.seeds):
            for arm in arms:
                for domain in DOMAINS:
                    key = f"{arm}-{domain}-{seed}"
                    learnt[key] = self.stage(f"learn-{key}", partial(self.learn, arm, domain, seed))
            shrunk = self.stage(f"shrink-{seed}", partial(self.bench.shrink, seed))
            weighed = self.stage(f"weigh-{seed}", partial(self.bench.weigh, seed))
            for text in TEXTS:
                cells[f"{text}-{seed}"] = {
                    **self.stage(
                        f"deltas-{text}-{seed}",
                        partial(self.bench.measure_deltas, text, seed, weighed["weights"]),
                    ),
                    **self.stage(f"gated-{text}-{seed}", partial(self.bench.measure_gated, text, seed)),
                    **self.stage(f"adapters-{text}-{seed}", partial(self.adapters, text, seed, shrunk)),
                }
        return {"read": read, "learnt": learnt, "cells": cells}

    def adapters(self, text: str, seed: int, shrunk: dict[str, Any]) -> dict[str, Any]:
        """Measure what changes the backbone.

        Args:
            text: which.
            seed: which.
            shrunk: factors of the merges.

        Returns:
            Cells.
        """
        return self.bench.measure_runs(text, self.bench.runs(seed, shrunk))


def rate(cell: dict[str, Any], figure: str) -> float:
    """Mean of a figure over the tokens of a text.

    Args:
        cell: of `Bench`.
        figure: `nll` or `kl`.

    Returns:
        Nats.
    """
    return sum(cell[figure]) / sum(cell["scored" if figure == "nll" else "tokens"])


class Table:
    """Figures of the arms, means over seeds.

    Args:
        results: of `Results.run`.
        seeds: how many.
    """

    def __init__(self, results: dict[str, Any], seeds: int) -> None:
        self.results, self.seeds = results, seeds
        self.cells: dict[str, dict[str, Any]] = results["cells"]

    def figure(self, text: str, arm: str, figure: str) -> float:
        """Mean over seeds.

        Args:
            text: which.
            arm: which.
            figure: `nll`, `kl`, `kl_p99` or `kl_max`.

        Returns:
            Nats.
        """
        found = [self.cells[f"{text}-{seed}"][arm] for seed in range(self.seeds)]
        return float(np.mean([rate(c, figure) if figure in ("nll", "kl") else c[figure] for c in found]))

    def single(self) -> Iterable[dict[str, Any]]:
        """Give a line for every way to learn one domain.

        Yields:
            NLL of each domain with its own, change of the other domains, KL on base texts, costs.
        """
        names = [arm for arm in self.cells[f"{TEXTS[0]}-0"] if ":" in arm]
        for arm in dict.fromkeys(arm.partition(":")[0] for arm in names):
            base = {name: self.figure(name, "base", "nll") for name in DOMAINS}
            own = {name: self.figure(name, f"{arm}:{name}", "nll") for name in DOMAINS}
            others = [
                self.figure(text, f"{arm}:{name}", "nll") - base[text]
                for name in DOMAINS
                for text in DOMAINS
                if text != name
            ]
            line: dict[str, Any] = {"arm": arm, **own, "mean": float(np.mean(list(own.values())))}
            line["gain"] = float(np.mean([base[name] - own[name] for name in DOMAINS]))
            line["others"] = float(np.mean(others))
            for text in (*BASE_TEXTS, OTHER):
                for figure, gather in (("kl", np.mean), ("kl_p99", np.max), ("kl_max", np.max)):
                    found = [self.figure(text, f"{arm}:{name}", figure) for name in DOMAINS]
                    line[f"{text} {figure}"] = float(gather(found))
            yield line | self.costs(arm)

    def costs(self, arm: str) -> dict[str, Any]:
        """Give what an arm cost, a domain.

        Args:
            arm: as in `single`.

        Returns:
            CPU seconds cached and cold, peak memory, bytes.
        """
        arm = arm.removesuffix("*s")
        found = [v for k, v in self.results["learnt"].items() if k.rsplit("-", 2)[0] == arm]
        read, features = self.results["read"], DELTAS.get(arm, ("last", False))[0]
        base = read[f"base-{features}"]["cpu"] + read[f"held-out-{features}"]["cpu"]
        own = float(np.mean([read[f"{name}-{features}"]["cpu"] for name in DOMAINS]))
        fit = float(np.mean([v["cpu_fit"] for v in found]))
        # Plain LoRA reads no states; adapters held to base text read its states, deltas their domain's too. All of
        # base text is counted for one domain here, though any number of domains shares it.
        cold = {"delta": own + base, "lora": 0.0}.get(arm.partition("-")[0], base)
        ready = float(np.mean([v["cpu_ready"] for v in found])) if arm in DELTAS else 0.0
        return {
            "cpu_cached": fit,
            "cpu_cold": fit + cold + ready,
            "peak_rss": max(v["peak_rss"] for v in found),
            "bytes": found[0]["bytes"],
        }

    def fused(self) -> Iterable[dict[str, Any]]:
        """Give a line for every way to combine the domains.

        Yields:
            NLL of each domain, NLL and KL on base texts.
        """
        for arm in self.cells[f"{TEXTS[0]}-0"]:
            if ":" in arm:
                continue
            line: dict[str, Any] = {"arm": arm}
            line |= {name: self.figure(name, arm, "nll") for name in DOMAINS}
            line["mean"] = float(np.mean([line[name] for name in DOMAINS]))
            for text in (*BASE_TEXTS, OTHER):
                line |= {
                    f"{text} {figure}": self.figure(text, arm, figure)
                    for figure in ("nll", "kl", "kl_p99", "kl_max")
                }
            yield line

    def matrix(self, arm: str) -> dict[str, dict[str, float]]:
        """Give R(i, j): NLL of text j after learning domain i.

        Args:
            arm: as in `single`.

        Returns:
            By domain, then by text; `base` is the first line.
        """
        found = {"base": {text: self.figure(text, "base", "nll") for text in TEXTS}}
        return found | {
            name: {text: self.figure(text, f"{arm}:{name}", "nll") for text in TEXTS} for name in DOMAINS
        }

    def paired(self, arm: str, other: str) -> tuple[float, float, float]:
        """Compare two arms on the same documents: difference of the mean NLL of domains, each with its own.

        Args:
            arm: as in `single`.
            other: likewise.

        Returns:
            Mean over seeds of arm minus other, and the 95 % interval of a bootstrap of documents, nats.
        """
        generator = np.random.default_rng(0)
        means, draws = [], []
        for name in DOMAINS:
            cells = [self.cells[f"{name}-{seed}"] for seed in range(self.seeds)]
            mine, theirs = (
                np.mean([cell[f"{a}:{name}"]["nll"] for cell in cells], axis=0) for a in (arm, other)
            )
            count = np.asarray(cells[0][f"{arm}:{name}"]["scored"])
            index = generator.integers(len(count), size=(2000, len(count)))
            means.append((mine - theirs).sum() / count.sum())
            draws.append((mine - theirs)[index].sum(1) / count[index].sum(1))
        low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
        return float(np.mean(means)), float(low), float(high)

    def markdown(self) -> str:
        """Write all tables.

        Returns:
            Markdown.
        """
        single = list(self.single())
        text = (
            "NLL with a domain's own adapter or delta, nats; KL(base || tuned): mean, worst p99 and max.\n\n"
        )
        head = ["arm", *DOMAINS, "mean", "other domains"]
        head += [f"{name} KL mean / p99 / max" for name in (*BASE_TEXTS, OTHER)]
        lines = [[*head, "CPU s cached", "cold", "peak GB", "MB"]]
        for line in single:
            cells = [line["arm"], *(f"{line[name]:.3f}" for name in DOMAINS), f"{line['mean']:.3f}"]
            cells.append(f"{line['others']:+.3f}")
            for name in (*BASE_TEXTS, OTHER):
                cells.append(" / ".join(f"{line[f'{name} {f}']:.3g}" for f in ("kl", "kl_p99", "kl_max")))
            cells += [f"{line['cpu_cached']:.0f}", f"{line['cpu_cold']:.0f}"]
            lines.append([*cells, f"{line['peak_rss'] / 1e9:.1f}", f"{line['bytes'] / 1e6:.1f}"])
        text += _table(lines)
        arms = [line["arm"] for line in single]
        text += "\nMean NLL of domains at matched base KL, paired by document and seed (95 % interval):\n\n"
        for arm in ("leashed", "delta", "delta-multi"):
            for other in (name for name in arms if name.endswith("*s") and arm in arms):
                mean, low, high = self.paired(arm, other)
                text += f"- {arm} minus {other}: {mean:+.3f} ({low:+.3f} to {high:+.3f})\n"
        text += "\nAll three domains in one model: NLL of domains; NLL / mean KL of base texts.\n\n"
        lines = [["arm", *DOMAINS, "mean", *BASE_TEXTS, OTHER]]
        for line in self.fused():
            cells = [line["arm"], *(f"{line[name]:.3f}" for name in DOMAINS), f"{line['mean']:.3f}"]
            for name in (*BASE_TEXTS, OTHER):
                cells.append(f"{line[f'{name} nll']:.3f} / {line[f'{name} kl']:.4f}")
            lines.append(cells)
        text += _table(lines)
        for arm in dict.fromkeys(line["arm"] for line in single):
            text += f"\nR(i, j) of {arm}: NLL of the column's text after learning the row's domain.\n\n"
            matrix = self.matrix(arm)
            text += _table(
                [["", *TEXTS], *([row, *(f"{v[t]:.3f}" for t in TEXTS)] for row, v in matrix.items())]
            )
        return text


def _table(lines: list[list[str]]) -> str:
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *body))


def rows(*, fast: bool) -> list[Row]:
    """Run the plan `full` or `fast`, or what is left of it.

    Args:
        fast: a fraction of the text, one seed.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline is the base model, or plain LoRA for costs.
    """
    results = Results("fast" if fast else "full")
    return as_rows(Table(results.run(), results.plan.seeds), results.plan.seeds)


def as_rows(table: Table, seeds: int) -> list[Row]:
    """Put the tables into rows.

    Args:
        table: of a plan.
        seeds: how many.

    Returns:
        Rows.
    """
    found = []

    def add(case: str, metric: str, ours: float, baseline: float) -> None:
        ratio = ours / baseline if baseline else None
        found.append(
            {
                "case": case,
                "metric": metric,
                "ours": ours,
                "baseline": baseline,
                "ratio": ratio,
                "runs": seeds,
            }
        )

    base = float(np.mean([table.figure(name, "base", "nll") for name in DOMAINS]))
    single, fused = list(table.single()), list(table.fused())
    plain = next(line for line in single if line["arm"] == "lora")
    for line in single:
        case = f"one domain, {line['arm']}; baseline: the base, for costs plain LoRA"
        add(case, "mean NLL of the domains, each with its own, nats", line["mean"], base)
        for name in (*BASE_TEXTS, OTHER):
            add(case, f"KL on {name}, nats", line[f"{name} kl"], 0.0)
        for cost in ("cpu_cached", "cpu_cold", "peak_rss", "bytes"):
            add(case, cost, line[cost], plain[cost])
    for line in fused:
        case = f"three domains in one, {line['arm']}; baseline: the base"
        add(case, "mean NLL of the domains, nats", line["mean"], base)
        for name in (*BASE_TEXTS, OTHER):
            add(case, f"KL on {name}, nats", line[f"{name} kl"], 0.0)
    return found


def main() -> None:
    """Run a plan, or a piece of it, and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domains", description=__doc__)
    parser.add_argument("--plan", choices=sorted(PLANS), default="full")
    parser.add_argument("--folder", type=Path, help="where results are kept")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after this many, to go on later"
    )
    arguments = parser.parse_args()
    results = Results(arguments.plan, arguments.folder, arguments.minutes)
    try:
        table = Table(results.run(), results.plan.seeds)
    except OutOfTimeError:
        print("stopped; start the same command again to go on")
        return
    print(table.markdown())


if __name__ == "__main__":
    main()
