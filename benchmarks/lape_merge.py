"""Experiment: merges of two fine-tunes of SmolLM2-135M against tuned baselines, with an ablation of every phase."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune import BASE, FineTune
from benchmarks.lape_ablation import document_variants, fisher_variants, flat_variants, shared_path_variants
from benchmarks.lape_table import Table
from benchmarks.lape_trial import PAIR, State, Trial
from tether.causal.loading import cache_folder

__all__ = ["experiment", "rows", "trial_rows"]

Row = dict[str, Any]

SCALES = (1.0, 1.15, 1.3)
BASELINES: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "task arithmetic": [("task_arithmetic", {"lambda": x}, {"weight": 1.0}) for x in (0.5, 0.6, 0.75, 1.0)],
    "TIES": [
        ("ties/mergekit", {"lambda": x}, {"weight": 1.0, "density": d})
        for d in (0.3, 0.6)
        for x in (0.7, 1.0)
    ],
    "DARE-TIES": [
        ("dare_ties", {"lambda": x}, {"weight": 1.0, "density": d}) for d in (0.6, 0.9) for x in (0.6, 0.8)
    ],
}
"""Grids, chosen on the validation windows; the average is task arithmetic at 0.5."""


def rows(*, fast: bool) -> list[Row]:
    """Run the experiment on one thread; what an earlier run measured is kept in the cache folder.

    Args:
        fast: one seed, without the ablation.

    Returns:
        Of `experiment`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return experiment(seeds=(0,), full=()) if fast else experiment()
    finally:
        torch.set_num_threads(threads)


def tuned_baseline(table: Table, name: str) -> None:
    """Choose a baseline's options on the validation windows and measure it.

    Args:
        table: of the trial.
        name: key of BASELINES.
    """
    trial, grid = table.trial, BASELINES[name]
    scores = [
        table.value(f"validation {name} {i}", lambda c=c: trial.validate(trial.baseline(*c), f"{name} {c}"))
        for i, c in enumerate(grid)
    ]
    best = grid[min(range(len(grid)), key=scores.__getitem__)]
    table.value(f"chosen {name}", lambda: [best[1], best[2]])
    table.test(name, lambda: trial.baseline(*best))


def gram_variants(table: Table) -> tuple[list[Path], list[Path]]:
    """Measure the regression mean: own paths, its scale tuned like a baseline's, and what it is made of.

    Args:
        table: of the trial.

    Returns:
        Folders of A's and B's Gram matrices on their own paths over the probes of both domains.
    """
    trial = table.trial
    folders = [
        [trial.grams(m, trial.half(trial.bank(m), d), f"{m}-own-{PAIR[d]}") for d in (0, 1)] for m in (0, 1)
    ]
    first, second = folders
    plain = trial.gram_merge(first, second)
    table.test("regression mean", lambda: plain)
    tuned_scale(table, "both domains", plain)
    return first, second


def closed_form_variants(table: Table, first: list[Path], second: list[Path]) -> None:
    """Measure what the regression mean is made of: probes of the own domain, the head, the shrinkage.

    Args:
        table: of the trial.
        first: A's Gram matrices, a folder a domain of probes.
        second: B's.
    """
    trial = table.trial
    own = trial.gram_merge(first[:1], second[1:])
    table.test("regression mean, probes of own domain", lambda: own)
    tuned_scale(table, "own domain", own)
    table.test("regression mean, head averaged", lambda: trial.gram_merge(first, second, head=False))
    table.test("regression mean, a = 0.5", lambda: trial.gram_merge(first, second, shrinkage=0.5))


def tuned_scale(table: Table, name: str, state: State) -> None:
    """Choose the factor on a merge's change from the parent on the validation windows and measure it.

    Args:
        table: of the trial.
        name: of the merge.
        state: the merge.
    """
    trial = table.trial
    scores = [
        table.value(
            f"validation regression {name} {scale}",
            lambda s=scale: trial.validate(trial.scaled(state, s), name),
        )
        for scale in SCALES
    ]
    best = SCALES[min(range(len(SCALES)), key=scores.__getitem__)]
    table.value(f"chosen regression {name}", lambda: best)
    table.test(f"regression mean, {name}, tuned scale", lambda: trial.scaled(state, best))


def trial_rows(
    seed: int, *, full: bool, samples: int, tests: int, on_step: Callable[[str], None]
) -> dict[str, Any]:
    """Run one trial, or read what an earlier run measured.

    Args:
        seed: of the trial.
        full: with the ablation.
        samples: probes of each domain.
        tests: held-out windows of each domain.
        on_step: called between costly parts.

    Returns:
        All figures by name.
    """
    folder = _folder(seed, samples, tests)
    trial = Trial(seed, folder, samples, tests, on_step)
    table = Table(trial, folder / "table.json")
    for name, state in (("C", trial.parent), ("A", trial.tuned[0]), ("B", trial.tuned[1])):
        table.test(name, lambda s=state: s)
    table.test("average", lambda: trial.merge(lambda m, i, a, b, c: (a + b) / 2))
    first, second = gram_variants(table)
    for name in BASELINES:
        tuned_baseline(table, name)
    if full:
        closed_form_variants(table, first, second)
        encoded = fisher_variants(table, first, second)
        document_variants(table, encoded, first, second)
        flat_variants(table, trial.gram_merge(first, second))
        shared_path_variants(table)
    return table.found


def _folder(seed: int, samples: int, tests: int) -> Path:
    tuned = FineTune(PAIR[0], seed).name.removeprefix(f"finetune-{BASE}-{PAIR[0]}-")
    return cache_folder() / f"lape-merge-{'-'.join(PAIR)}-{tuned}-{samples}-{tests}"


def experiment(
    *, seeds: tuple[int, ...] = (0, 1, 2), full: tuple[int, ...] = (0,), samples: int = 8, tests: int = 16,
    keep: bool = False, on_step: Callable[[str], None] = lambda name: None,
) -> list[Row]:  # fmt: skip
    """Run the trials and put each method beside the best tuned baseline of its seed.

    Args:
        seeds: of the trials.
        full: seeds with the ablation.
        samples: probes of each domain.
        tests: held-out windows of each domain.
        keep: leave Gram matrices and signatures in the cache folder (2 GB a seed); figures always stay.
        on_step: called between costly parts.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs; `difference` has the paired standard error.
    """
    tables = [trial_rows(s, full=s in full, samples=samples, tests=tests, on_step=on_step) for s in seeds]
    for seed in () if keep else seeds:
        for part in _folder(seed, samples, tests).iterdir():
            if part.is_dir():
                shutil.rmtree(part)
    names = list(dict.fromkeys(name for table in tables for name in table if name.startswith("test ")))
    found = []
    for name in names:
        mine, theirs, pairs, texts = [], [], [], []
        for table in tables:
            if name not in table:
                continue
            rivals = [table[f"test {rival}"] for rival in ("average", *BASELINES)]
            best = min(rivals, key=lambda r: float(torch.tensor(r[:2]).mean()))
            both, other = torch.tensor(table[name][:2]), torch.tensor(best[:2])
            mine.append(float(both.mean()))
            theirs.append(float(other.mean()))
            pairs.append((both - other).flatten())
            texts.append([float(torch.tensor(part).mean()) for part in table[name]])
        gap = torch.cat(pairs)
        text = torch.tensor(texts).mean(0).tolist()
        found.append(
            {
                "case": f"{name.removeprefix('test ')}; baseline: best of average and tuned baselines",
                "metric": "mean NLL of both domains, nats a token",
                "ours": sum(mine) / len(mine),
                "baseline": sum(theirs) / len(theirs),
                "ratio": sum(mine) / sum(theirs),
                "runs": mine,
                "difference": [float(gap.mean()), float(gap.std() / len(gap) ** 0.5)],
                "texts": dict(zip((*PAIR, "wiki"), text, strict=True)),
            }
        )
    return found
