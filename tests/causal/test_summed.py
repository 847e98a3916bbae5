"""The law that a sum of deltas serves, against its definition in many digits."""

import math

import pytest
import torch
from torch.testing import assert_close

import oracles
from tether.cauchy.charts import CHARTS
from tether.cauchy.divergence import drift
from tether.causal.summed import Sum, bound_chart

WEIGHTS = (1.0, -0.5, 2.0)


@pytest.fixture
def case(generator):
    """Base laws of 5 contexts in 4 dimensions, moves of 3 deltas, gates of which some are closed."""
    loc, log_scale = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    x, y = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    gates = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    gates[1, 2] = gates[2, 0] = 0
    gates[:, 4] = 0
    return loc, log_scale, x, y, gates


@pytest.mark.parametrize("chart", CHARTS)
def test_it_is_the_weighted_sum_in_the_chart(case, chart):
    loc, log_scale, x, y, gates = case
    law = Sum(weights=WEIGHTS, chart=chart).law(loc, log_scale, x, y, gates)
    for row in range(4):
        weights = [w * float(g) for w, g in zip(WEIGHTS, gates[:, row], strict=True)]
        for i in range(4):
            dx, dy = map(float, oracles.fuse(x[:, row, i].tolist(), y[:, row, i].tolist(), weights, chart))
            assert float(law.log_scale[row, i]) == pytest.approx(float(log_scale[row, i]) + dx, rel=1e-9)
            moved = float(loc[row, i]) + math.exp(float(log_scale[row, i])) * dy
            assert float(law.loc[row, i]) == pytest.approx(moved, rel=1e-9)
            assert (float(law.x[row, i]), float(law.y[row, i])) == pytest.approx((dx, dy), rel=1e-9)
    # Where every gate is closed it is the base bit for bit.
    assert torch.equal(law.loc[4], loc[4])
    assert torch.equal(law.log_scale[4], log_scale[4])
    assert bool((law.factor == 1).all())


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("metric", ["latent", "softmax"])
def test_what_is_left_of_a_move_is_that_of_the_law_that_is_served(case, chart, metric, generator):
    loc, log_scale, x, y, gates = (part.float() for part in case)
    head = torch.randn(30, 4, generator=generator), torch.randn(30, generator=generator)
    leashed = Sum(weights=WEIGHTS, chart=chart, leash=(0.05, metric))
    law = leashed.law(loc, log_scale, x, y, gates, head, keep_scores=True)
    pulled = law.factor < 1
    assert 2 <= int(pulled.sum()) <= 4
    assert_close(law.x, law.log_scale - log_scale, rtol=1e-4, atol=1e-6)
    assert_close(law.y, (law.loc - loc) / log_scale.exp(), rtol=1e-4, atol=1e-5)
    if metric == "latent":
        assert law.scores is None
        assert_close(
            drift(law.x, law.y).sum(-1)[pulled], torch.full((int(pulled.sum()),), 0.05), rtol=1e-3, atol=0
        )
        return
    fused = leashed.add(x, y, gates)[1]
    assert_close(law.y, law.factor.unsqueeze(-1) * fused, rtol=1e-5, atol=1e-6)
    # Scores of the base that are at hand are not computed again, and change nothing.
    base = torch.nn.functional.linear(loc, *head)
    given = leashed.law(loc, log_scale, x, y, gates, head, base_scores=base, keep_scores=True)
    assert_close(given.scores, law.scores, rtol=1e-5, atol=1e-5)
    assert_close(given.factor, law.factor, rtol=1e-5, atol=0)
    laws = (torch.distributions.Categorical(logits=scores.double()) for scores in (base, law.scores))
    kl = torch.distributions.kl_divergence(*laws)[pulled]
    assert_close(kl, torch.full_like(kl, 0.05), rtol=5e-3, atol=0)


def test_the_chart_of_the_bound():
    assert [bound_chart(chart, True) for chart in CHARTS] == ["symmetric", "symmetric", "geodesic", "rootkl"]
    assert [bound_chart(chart, False) for chart in CHARTS] == list(CHARTS)
