"""Plans use the bound of the certificates."""

import math

import pytest
import torch

from tether.cauchy.charts import CHARTS
from tether.errors import ConfigError
from tether.theory.bounds import fused_drift_bound
from tether.theory.plan import how_many_fit, plan_fusion


@pytest.mark.parametrize("chart", CHARTS)
def test_the_bound_is_the_one_certificates_use(chart):
    budgets, weights = [0.1, 0.2, 0.1], [1.0, 0.5, -1.0]
    plan = plan_fusion(budgets, weights, chart, leash=2.0)
    want = fused_drift_bound(torch.tensor(budgets).double(), torch.tensor(weights).double(), chart).item()
    assert plan.bound == pytest.approx(want, rel=1e-6)
    assert plan.within == (want <= 2.0)
    assert sum(domain.share for domain in plan.domains) == pytest.approx(1)
    assert all(domain.alone <= plan.bound for domain in plan.domains)


def test_by_hand():
    plan = plan_fusion([0.1, 0.4], None, "rootkl")
    assert plan.bound == pytest.approx((math.sqrt(0.1) + math.sqrt(0.4)) ** 2)
    assert [domain.share for domain in plan.domains] == pytest.approx([1 / 3, 2 / 3])
    assert plan.describe()["domains"][0]["weight"] == 1


def test_how_many_domains_fit():
    assert how_many_fit(0.01, 1.0, "symmetric", 1.0) == 10  # exactly at the leash
    assert how_many_fit(0.01, 1.0, "linear", 1.0) == 8  # 8.64 by the constant 1.338534
    assert how_many_fit(2.0, 1.0, "symmetric", 1.0) == 0
    assert how_many_fit(0.0, 1.0, "symmetric", 1.0) is None
    assert how_many_fit(0.1, 0.0, "geodesic", 1.0) is None
    for chart in CHARTS:
        count = how_many_fit(0.03, 0.7, chart, 1.0)
        bounds = [plan_fusion([0.03] * n, [0.7] * n, chart).bound for n in (count, count + 1)]
        assert bounds[0] <= 1 + 1e-9 < bounds[1]


def test_wrong_plans_are_refused():
    for budgets, weights, chart, leash, said in (
        ([], None, "symmetric", 1.0, "0 budgets"),
        ([0.1], [1.0, 1.0], "symmetric", 1.0, "2 weights"),
        ([-0.1], None, "symmetric", 1.0, "negative"),
        ([math.inf], None, "symmetric", 1.0, "finite"),
        ([0.1], [math.nan], "symmetric", 1.0, "weights"),
        ([0.1], None, "flat", 1.0, "unknown chart"),
        ([0.1], None, "symmetric", 0.0, "leash"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan_fusion(budgets, weights, chart, leash)
