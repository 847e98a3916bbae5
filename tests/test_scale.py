"""Holding a drift to a budget: the ascent of a multiplier, and the factor that meets the budget."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import ConfigError
from tether.scale import DualAscent, meet_budget


def test_a_multiplier_rises_above_the_budget_and_falls_below_it():
    dual = DualAscent(2.0, budget=0.1, rise=0.3, fall=0.05)
    assert dual.step(0.2) == pytest.approx(2.0 * 2**0.3)
    assert dual.step(0.05) == pytest.approx(2.0 * 2**0.3 * 0.5**0.05)
    # However far the drift is from its budget, the pace has an end: e^2 times is as far as it looks.
    assert DualAscent(1.0, budget=0.1).step(50.0) == pytest.approx(math.exp(0.6))
    assert DualAscent(1.0, budget=0.1).step(0.0) == pytest.approx(math.exp(-0.6))


@pytest.mark.parametrize(("drift", "end"), [(9.0, 300.0), (0.0, 0.03)])
def test_a_multiplier_stays_within_a_hundredfold_of_its_start(drift, end):
    dual = DualAscent(3.0, budget=0.1)
    for _ in range(50):
        dual.step(drift)
    assert dual.multiplier == pytest.approx(end)


def test_the_ascent_finds_the_multiplier_that_meets_a_budget():
    # A drift that falls with the multiplier, as a fit's does: 0.05 is met at 4.
    dual = DualAscent(0.5, budget=0.05)
    for _ in range(200):
        dual.step(0.2 / dual.multiplier)
    assert dual.multiplier == pytest.approx(4.0, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    budget=st.floats(1e-4, 10),
    size=st.floats(1e-6, 1e4),
    power=st.floats(0.7, 3.5),
    start=st.floats(1e-3, 1.25),
)
def test_the_budget_is_met_from_below_within_5_percent(budget, size, power, start):
    met = meet_budget(lambda factor: size * factor**power, budget, start=start, ceiling=1.25, tries=10)
    assert met.drift <= budget
    assert met.drift == pytest.approx(size * met.scale**power)
    if size * 1.25**power >= 0.95 * budget:
        assert met.drift >= 0.95 * budget
    else:
        # The fit stayed far below its budget: it is stretched a little, not all the way.
        assert met.scale == 1.25
        assert [factor for factor, _ in met.tried].count(1.25) == 1


def test_it_fails_closed_where_no_factor_fits():
    assert meet_budget(lambda factor: 0.0 if factor == 0 else 5.0, 1.0).scale == 0.0
    jump = meet_budget(lambda factor: 0.1 if factor < 0.3 else 9.0, 1.0, ceiling=1.25, tries=20)
    assert 0 < jump.scale < 0.3
    assert jump.drift == 0.1
    none = meet_budget(lambda factor: 1.0, 0.01, tries=4)
    assert (none.scale, none.drift, len(none.tried)) == (0.0, 0.0, 4)


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("start", [1e-7, 1e-4, 1.0])
def test_a_drift_that_grows_with_the_logarithm_is_met_far_below_the_fit(budget, start):
    # Cauchy drift of moves that are thousands of scales long, of very different sizes: its power is 0.1 at 1, 2 below.
    sizes = torch.logspace(0, 4, 576, dtype=torch.float64)

    def drift(factor):
        return float(torch.log1p((factor * sizes).square() / 4).sum())

    met = meet_budget(drift, budget, start=start, power=0.1, ceiling=1e6, tries=40)
    assert 0.95 * budget <= met.drift <= budget
    assert len(met.tried) <= 20


@pytest.mark.parametrize("broken", [math.inf, math.nan])
@pytest.mark.parametrize("start", [1.0, 1e-3])
def test_a_drift_that_is_no_number_is_over_the_budget(broken, start):
    def drift(factor):
        return 0.1 * factor**2 if factor < 0.5 else broken

    # 0.02 is reached at 0.447; 0.1 would be reached at 1, where nothing can be measured.
    met = meet_budget(drift, 0.02, start=start, tries=20, ceiling=1e6 if start < 1 else 1.25)
    assert 0.95 * 0.02 <= met.drift <= 0.02
    closed = meet_budget(drift, 0.1, start=start, ceiling=1.25, tries=20)
    assert closed.drift == pytest.approx(drift(closed.scale))
    assert 0 < closed.scale < 0.5
    nothing = meet_budget(lambda factor: broken, 0.1, start=start)
    assert (nothing.scale, nothing.drift, len(nothing.tried)) == (0.0, 0.0, 8)


LAWS = {
    "quadratic": lambda scale: 0.4 * scale**2,
    "steeper": lambda scale: 2e-3 * scale**3.4,
    "flatter": lambda scale: 0.05 * scale**1.3,
    "with a floor from rounding": lambda scale: 5.7e-5 + 0.02 * scale**2,
    "quadratic, then steeper": lambda scale: 0.02 * scale**2 + 0.5 * scale**5,
    "of another size": lambda scale: 80 * scale**2,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("budget", [1e-3, 0.02])
def test_where_each_try_is_a_whole_merge_four_are_enough(law, budget):
    met = meet_budget(LAWS[law], budget, tries=4, enough=0.9, aim=0.97)
    assert len(met.tried) <= 4
    assert met.drift == LAWS[law](met.scale) <= budget
    assert met.drift >= 0.85 * budget
    assert met.scale == max(scale for scale, drift in met.tried if drift <= budget)


def test_drifts_that_hardly_differ_mislead_only_so_far():
    for slope in (1e-9, -1e-9, 1e-15):
        met = meet_budget(lambda factor, slope=slope: 0.2 + slope * factor, 0.1, tries=12)
        assert (met.scale, met.drift) == (0.0, 0.0)
        assert 0 < min(factor for factor, _ in met.tried) < 0.01
    # The second step goes no further than a drift that grows like the root of the factor would need.
    jumpy = meet_budget(lambda factor: 0.2 + 1e-9 * factor, 0.1, tries=3)
    assert jumpy.tried[1][0] * 0.2 < jumpy.tried[2][0] < jumpy.tried[1][0]


def test_a_change_that_moves_nothing_is_scaled_up_a_little_way():
    met = meet_budget(lambda scale: 0.0, 0.01, tries=4)
    assert (met.scale, met.drift) == (512.0, 0.0)


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"start": -1.0}, {"ceiling": 0.0}, {"tries": 0}])
def test_what_cannot_be_searched(wrong):
    given = {"budget": 1.0, **wrong}
    with pytest.raises(ConfigError, match="expected positive numbers"):
        meet_budget(lambda scale: scale, given.pop("budget"), **given)
