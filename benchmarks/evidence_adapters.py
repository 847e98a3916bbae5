"""Three leashed adapters in one model, on the texts of `benchmarks.domains`: alone, gated as a sum, by evidence."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.corpus import states_folder
from benchmarks.domain_arms import Bench
from benchmarks.domain_measure import adapter_runs, measure_evidence, measure_gated, measure_runs
from benchmarks.domain_plan import PLANS
from benchmarks.domain_table import rate
from benchmarks.trial_texts import TRIAL as DOMAINS
from tether.demo.corpora import BASE_TEXTS

__all__ = ["rows"]

Row = dict[str, Any]
ARM = "leashed"


def rows(*, fast: bool) -> Iterator[Row]:
    """Learn the adapters with the settings of the plan `long`, or find them, and measure.

    Args:
        fast: a fraction of the text.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline is the sum behind gates.
    """
    torch.set_num_threads(1)
    plan = PLANS["fast" if fast else "long"]
    with states_folder() as folder:
        bench = Bench(plan, folder / f"adapters{'-fast' if fast else ''}")
        for name in DOMAINS:
            if not (bench.folder / "learnt" / f"{ARM}-{name}-0").is_dir():
                made = bench.learn(ARM, name, 0)
                yield _row(name, "CPU seconds of the fit", made["cpu_fit"], None)
        cells = {}
        for text in (*DOMAINS, *BASE_TEXTS):
            alone = measure_runs(bench, text, adapter_runs(bench, 0, [ARM], None))
            cells[text] = (
                alone | measure_gated(bench, text, 0, [ARM]) | measure_evidence(bench, text, 0, [ARM])
            )
        means = {}
        for arm in ("base", "alone", f"{ARM}, gated", f"{ARM}, evidence"):
            own = {
                name: rate(cells[name][f"{ARM}:{name}" if arm == "alone" else arm], "nll") for name in DOMAINS
            }
            means[arm] = own | {"mean": float(np.mean(list(own.values())))}
        for arm, figures in means.items():
            for name, figure in figures.items():
                yield _row(
                    f"three leashed adapters, {arm}", f"NLL {name}", figure, means[f"{ARM}, gated"][name]
                )
        for text in BASE_TEXTS:
            gated, evidence = (rate(cells[text][f"{ARM}, {by}"], "kl") for by in ("gated", "evidence"))
            yield _row("three leashed adapters, by evidence", f"KL {text}", evidence, gated)
            fused, plain = (rate(cells[text][arm], "nll") for arm in (f"{ARM}, evidence", "base"))
            yield _row("three leashed adapters, by evidence; baseline: base", f"NLL {text}", fused, plain)


def _row(case: str, metric: str, ours: float, baseline: float | None) -> Row:
    ratio = ours / baseline if baseline else None
    return {"case": case, "metric": metric, "ours": ours, "baseline": baseline, "ratio": ratio, "runs": 1}
