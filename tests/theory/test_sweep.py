"""Sweeps see violations where there are any, and none in the repaired charts."""

import numpy as np
import pytest
import torch

from tether.cauchy.charts import from_chart
from tether.errors import ConfigError
from tether.theory import sweep
from tether.theory.catalogue import statement
from tether.theory.sweep import PAIRED, SHAPES, sweep_pairs, sweep_points

SHARE = {"symmetric": 0.9999, "geodesic": 0.9999, "rootkl": 1 - 1e-9}  # of the bound that some pair reaches


@pytest.mark.parametrize("chart", PAIRED)
def test_pairs_keep_the_bound(chart):
    seen = sweep_pairs(chart, 10**6, np.random.default_rng(0))
    assert seen.points >= 10**6
    assert seen.violations == 0
    assert SHARE[chart] < seen.worst <= 1 + 1e-12


@pytest.mark.parametrize("chart", PAIRED)
def test_pairs_are_evaluated_as_the_library_fuses_them(chart):
    """The shortened arithmetic of a sweep against charts, fusion and bound, at the same deltas."""
    cloud = sweep._cloud(np.random.default_rng(3), 400)
    cloud = cloud[:, np.hypot(*cloud) < 4]
    half = cloud.shape[1] // 2
    left, right = cloud[:, :half], cloud[:, half : 2 * half]
    moved = sweep._drift_of_sums(chart, left, right)
    points = [from_chart(torch.tensor(c[0]), torch.tensor(c[1]), chart) for c in (left, right)]
    x, y = (torch.stack([p[i] for p in points]).unsqueeze(-1) for i in (0, 1))
    want, bound = statement(chart).evaluate(x, y, torch.ones(2))
    torch.testing.assert_close(torch.tensor(moved), want, rtol=1e-9, atol=1e-18)
    singles = [sweep._drift_of_sums(chart, c, np.zeros_like(c)) for c in (left, right)]
    root = np.sqrt(singles[0]) + np.sqrt(singles[1])
    torch.testing.assert_close(torch.tensor(root * root), bound, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("name", ["main", "sqrt", "weighted", "positive-scale"])
def test_points_of_false_statements_are_counted(name):
    seen = sweep_points(statement(name), 4000, seed=0, shapes=[(2, 1), (3, 1)])
    assert seen.violations > 50
    assert seen.worst > 1


@pytest.mark.parametrize("name", ["symmetric", "geodesic", "rootkl", "k-inf", "four", "signs"])
def test_points_of_true_statements_hold(name):
    seen = sweep_points(statement(name), 20_000, seed=1)
    assert seen.points >= 20_000
    assert seen.violations == 0


def test_a_violation_is_counted_whatever_it_is():
    """nan and inf count as violations: they must not pass unseen."""
    broken = statement("main")
    for bad in (torch.nan, torch.inf):
        one = type(broken)(
            **{f: getattr(broken, f) for f in broken.__slots__}
            | {"sides": lambda x, y, w, bad=bad: (x.sum((0, 2)) * 0 + bad, y.sum((0, 2)) * 0 + 1)}
        )
        assert sweep_points(one, 100, seed=0, shapes=[(2, 1)]).violations == 100


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("chart", PAIRED)
def test_a_billion_pairs(chart):
    seen = sweep_pairs(chart, 10**9, np.random.default_rng(1))
    assert seen.points >= 10**9
    assert seen.violations == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("chart", PAIRED)
def test_ten_million_points_of_many_deltas_and_dimensions(chart):
    assert (max(n for n, _ in SHAPES), max(d for _, d in SHAPES)) == (20, 64)
    seen = sweep_points(statement(chart), 10**7, seed=2)
    assert seen.points >= 10**7
    assert seen.violations == 0


def test_wrong_sweeps_are_refused():
    with pytest.raises(ConfigError, match="'linear'"):
        sweep_pairs("linear", 10, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="at least 1"):
        sweep_points(statement("main"), 0, seed=0)
