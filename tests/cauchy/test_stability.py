"""Linear stability against Monte Carlo: quantiles of sums of draws are those of the pushed law, out to the tails."""

import math

import pytest
import torch

from tether.cauchy.functional import cdf, push_linear

DRAWS = 200_000
LEVELS = torch.tensor([0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999], dtype=torch.float64)


def draw(loc, scale, generator):
    """Cauchy variables as ratios of two normal ones, by no quantile function."""
    size = (DRAWS, len(loc))
    above, below = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    return loc + scale * above / below


def check(samples, loc, scale):
    """The law's own probability at an empirical quantile is beta distributed around its level."""
    quantiles = torch.quantile(samples, LEVELS)
    errors = (LEVELS * (1 - LEVELS) / DRAWS).sqrt()
    z = (cdf(quantiles, loc.expand_as(quantiles), scale.expand_as(quantiles)) - LEVELS) / errors
    # Nine correlated levels in each of a few outputs: 4.5 standard errors come up once in some 10,000 runs.
    assert float(z.abs().max()) < 4.5, z


@pytest.mark.parametrize("inputs", [1, 2, 7])
def test_sums_have_the_pushed_law_out_to_one_in_a_thousand(inputs, generator):
    loc = torch.randn(inputs, generator=generator, dtype=torch.float64) * 10
    scale = torch.rand(inputs, generator=generator, dtype=torch.float64) ** 4 + 1e-3
    weight = torch.randn(4, inputs, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    samples = draw(loc, scale, generator) @ weight.mT + bias
    pushed_loc, pushed_scale = push_linear(loc, scale, weight, bias)
    for output in range(4):
        check(samples[:, output], pushed_loc[output], pushed_scale[output])


def test_the_check_would_notice_scales_that_add_as_normal_ones_do(generator):
    loc, scale = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    samples = draw(loc, scale, generator).sum(-1)
    check(samples, loc[0], torch.tensor(2.0, dtype=torch.float64))
    for wrong in (math.sqrt(2), 1.9):
        with pytest.raises(AssertionError):
            check(samples, loc[0], torch.tensor(wrong, dtype=torch.float64))


def test_outputs_share_their_causes(generator):
    """Marginals are pushed; jointly the outputs are dependent: their difference has the law of the difference."""
    loc = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0, -1.0], [1.0, 1.0, -1.5]], dtype=torch.float64)
    samples = draw(loc, scale, generator) @ weight.mT
    pushed_loc, pushed_scale = push_linear(loc, scale, weight[:1] - weight[1:])
    check(samples[:, 0] - samples[:, 1], pushed_loc[0], pushed_scale[0])
    apart = push_linear(loc, scale, weight)[1].sum()
    with pytest.raises(AssertionError):
        check(samples[:, 0] - samples[:, 1], pushed_loc[0], apart)
