"""Controls on a small training: what the cost carries, and what goodness does beside its entropy."""

import importlib.util
import statistics
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "router_tasks.py"


@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("router_tasks", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["router_tasks"] = module
    spec.loader.exec_module(module)
    return module


def outcomes(tasks, arm, steps=400, seeds=3, **options):
    return [tasks.regression(arm, seed, steps=steps, **options) for seed in range(seeds)]


def paired(first, second, metric):
    values = [[o.loss if metric == "loss" else o.metrics[metric] for o in runs] for runs in (first, second)]
    return statistics.mean(a - b for a, b in zip(*values, strict=True))


@pytest.mark.slow
def test_goodness_does_what_its_entropy_alone_does(tasks):
    none = outcomes(tasks, tasks.Arm("none"))
    goodness, control = (outcomes(tasks, tasks.Arm(form, lam=0.1)) for form in ("goodness", "entropy"))
    sharpened = paired(control, none, "eff_k")
    assert sharpened < -0.2
    # Most of what goodness does is that sharpening.
    assert abs(paired(goodness, control, "eff_k")) < 0.5 * abs(sharpened)
    assert abs(paired(goodness, control, "nrmi")) < 0.15


@pytest.mark.slow
def test_the_cost_of_another_expert_revives_none(tasks):
    none, tax, shuffled = (
        outcomes(tasks, arm, steps=500, starved=True)
        for arm in (tasks.Arm("none"), tasks.Arm("tax", lam=0.05), tasks.Arm("tax", "shuffled", lam=0.05))
    )
    alive = [paired(runs, none, "effective_experts") for runs in (tax, shuffled)]
    assert alive[0] > 1
    assert alive[1] < 0.5 * alive[0]
    assert statistics.mean(o.metrics["dead"] for o in none) == 4
