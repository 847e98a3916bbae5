import math

import pytest
import torch
from torch.testing import assert_close

from tether.cauchy.charts import CHARTS
from tether.delta.budget import Budget
from tether.delta.head import Head, Reference, token_drift
from tether.delta.output_head import OutputHead
from tether.errors import ConfigError


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
    assert_close(
        token_drift("softmax", head, at, output=OutputHead(weight)).double(), expected, rtol=1e-4, atol=1e-6
    )


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
        token_drift("fisher", head, at, output=OutputHead(weight))
    with pytest.raises(ConfigError, match="linear, symmetric"):
        Head(None, head.second, "polar").displacement(at.states)
