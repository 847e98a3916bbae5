import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tether.cauchy.charts import CHARTS
from tether.delta.budget import Budget, meet_budget
from tether.delta.head import Head, Reference, token_drift
from tether.errors import ConfigError


@settings(max_examples=200, deadline=None)
@given(
    budget=st.floats(1e-4, 10),
    size=st.floats(1e-6, 1e4),
    power=st.floats(0.7, 3.5),
    start=st.floats(1e-3, 1.25),
)
def test_the_budget_is_met_from_below_within_5_percent(budget, size, power, start):
    met = meet_budget(lambda factor: size * factor**power, budget, start=start, tries=10)
    assert met.drift <= budget
    assert met.drift == pytest.approx(size * met.scale**power)
    if size * 1.25**power >= 0.95 * budget:
        assert met.drift >= 0.95 * budget
    else:
        # The fit stayed far below its budget: it is stretched a little, not all the way.
        assert met.scale == 1.25


def test_it_fails_closed_where_no_factor_fits():
    assert meet_budget(lambda factor: 0.0 if factor == 0 else 5.0, 1.0).scale == 0.0
    jump = meet_budget(lambda factor: 0.1 if factor < 0.3 else 9.0, 1.0, tries=20)
    assert 0 < jump.scale < 0.3
    assert jump.drift == 0.1


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("start", [1e-7, 1e-4, 1.0])
def test_a_drift_that_grows_with_the_logarithm_is_met_far_below_the_fit(budget, start):
    # Cauchy drift of moves that are thousands of scales long, of very different sizes: its power is 0.1 at 1, 2 below.
    sizes = torch.logspace(0, 4, 576, dtype=torch.float64)

    def drift(factor):
        return float(torch.log1p((factor * sizes).square() / 4).sum())

    met = meet_budget(drift, budget, start=start, power=0.1, ceiling=1e6, tries=40)
    assert 0.95 * budget <= met.drift <= budget
    assert met.evaluations <= 20


@pytest.mark.parametrize("broken", [math.inf, math.nan])
@pytest.mark.parametrize("start", [1.0, 1e-3])
def test_a_drift_that_is_no_number_is_over_the_budget(broken, start):
    def drift(factor):
        return 0.1 * factor**2 if factor < 0.5 else broken

    # 0.02 is reached at 0.447; 0.1 would be reached at 1, where nothing can be measured.
    met = meet_budget(drift, 0.02, start=start, tries=20, ceiling=1e6 if start < 1 else 1.25)
    assert 0.95 * 0.02 <= met.drift <= 0.02
    closed = meet_budget(drift, 0.1, start=start, tries=20)
    assert closed.drift == pytest.approx(drift(closed.scale))
    assert 0 < closed.scale < 0.5
    assert meet_budget(lambda factor: broken, 0.1, start=start) == (0.0, 0.0, 8)


@pytest.fixture
def case(generator):
    states = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    at = Reference(states, states, torch.full_like(states, 0.5))
    head = Head(
        0.1 * torch.randn(5, 5, generator=generator, dtype=torch.float64),
        0.1 * torch.randn(5, 5, generator=generator, dtype=torch.float64),
        "symmetric",
    )
    return at, weight, head


def test_softmax_drift_is_the_kl_of_the_served_softmax(case):
    at, weight, head = case
    _, y = head.displacement(at.states)
    base = torch.distributions.Categorical(logits=at.loc @ weight.T)
    moved = torch.distributions.Categorical(logits=(at.loc + at.scale * y) @ weight.T)
    expected = torch.distributions.kl_divergence(base, moved)
    assert_close(token_drift("softmax", head, at, weight=weight).double(), expected, rtol=1e-4, atol=1e-6)


def test_latent_drift_is_the_kl_of_the_cauchy_laws(case):
    at, _, head = case
    x, y = head.displacement(at.states)
    base = torch.distributions.Cauchy(at.loc, at.scale)
    moved = torch.distributions.Cauchy(at.loc + at.scale * y, at.scale * x.exp())
    assert_close(token_drift("latent", head, at), torch.distributions.kl_divergence(base, moved).sum(-1))


def test_fisher_drift_is_the_quadratic_form(case):
    at, weight, head = case
    fisher = weight.T @ weight
    move = at.scale * head.displacement(at.states)[1]
    expected = torch.stack([0.5 * d @ fisher @ d for d in move])
    assert_close(token_drift("fisher", head, at, fisher=fisher), expected)


@pytest.mark.parametrize("chart", CHARTS)
def test_a_scaled_head_moves_along_the_charts_ray(case, chart):
    at, _, head = case
    ray = Head(head.first, head.second, chart)
    drifts = [float(token_drift("latent", ray.scaled(f), at).mean()) for f in (0.0, 0.25, 0.5, 1.0)]
    assert drifts[0] == 0.0
    assert drifts == sorted(drifts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": 0.0}, "> 0"),
        ({"value": -1.0}, "> 0"),
        ({"value": math.nan}, "> 0"),
        ({"value": math.inf}, "finite"),
        ({"metric": "kl"}, "softmax, fisher, latent"),
        ({"value": None}, "either"),
        ({"value": 0.1, "penalty": 0.1}, "either"),
        ({"value": None, "penalty": -1.0}, ">= 0"),
    ],
)
def test_bad_budgets(options, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**options)


def test_a_metric_without_what_it_needs(case):
    at, weight, head = case
    with pytest.raises(ConfigError, match="softmax, fisher, latent"):
        token_drift("fisher", head, at, weight=weight)
    with pytest.raises(ConfigError, match="linear, symmetric"):
        Head(None, head.second, "polar").displacement(at.states)
