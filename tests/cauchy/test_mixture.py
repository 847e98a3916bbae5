"""Mixtures of Cauchy laws against 40 digits."""

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tether.cauchy.functional import icdf
from tether.cauchy.mixture import mixture_cdf, quantile

PARTS = st.lists(
    st.tuples(
        st.floats(-1e6, 1e6) | st.floats(-1, 1),
        st.floats(-14, 14).map(lambda x: float(mp.exp(x))),
        st.floats(1e-6, 1),
    ),
    min_size=1,
    max_size=5,
)


def tensors(parts):
    loc, scale, share = (torch.tensor(each, dtype=torch.float64) for each in zip(*parts, strict=True))
    return loc, scale, (share / share.sum()).log()


def below(value, loc, scale, log_weights):
    """The distribution function by its textbook formula."""
    return mp.fsum(
        mp.exp(w) * (mp.mpf(1) / 2 + mp.atan((mp.mpf(value) - m) / s) / mp.pi)
        for m, s, w in zip(*(map(mp.mpf, each.tolist()) for each in (loc, scale, log_weights)), strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(parts=PARTS, value=st.floats(-1e7, 1e7))
def test_the_distribution_function(parts, value):
    loc, scale, log_weights = tensors(parts)
    with mp.workdps(40):
        expected = float(below(value, loc, scale, log_weights))
    found = mixture_cdf(torch.tensor(value, dtype=torch.float64), loc, scale, log_weights)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(parts=PARTS, level=st.sampled_from([1e-6, 0.25, 0.5, 0.75, 0.999]))
def test_the_quantile_is_where_the_distribution_function_has_its_level(parts, level):
    loc, scale, log_weights = tensors(parts)
    found = float(quantile(level, loc, scale, log_weights))
    own = icdf(torch.full_like(loc, level), loc, scale)
    assert float(own.min()) <= found <= float(own.max())
    # Within rounding of the value, or of the level.
    step = 1e-12 * (abs(found) + 1e-300)
    with mp.workdps(40):
        low, high = (below(mp.mpf(found) + sign * step, loc, scale, log_weights) for sign in (-1, 1))
    assert float(low) <= level * (1 + 1e-12)
    assert float(high) >= level * (1 - 1e-12)


def test_a_part_that_has_all_the_weight_gives_its_own_quantile_exactly(generator):
    loc, scale = torch.randn(50, 3, generator=generator), torch.rand(50, 3, generator=generator) + 0.1
    log_weights = torch.full((50, 3), -torch.inf, dtype=torch.float64)
    log_weights[:, 1] = 0
    for level in (0.1, 0.5, 0.9):
        own = icdf(torch.full((50,), level, dtype=torch.float64), loc[:, 1].double(), scale[:, 1].double())
        assert torch.equal(quantile(level, loc, scale, log_weights), own)


def test_rows_are_alone_and_symmetric_mixtures_have_their_centre(generator):
    loc, scale = 5 * torch.randn(20, 2, generator=generator, dtype=torch.float64), torch.ones(20, 2)
    log_weights = torch.full((20, 2), 0.5, dtype=torch.float64).log()
    middle = quantile(0.5, loc, scale, log_weights)
    assert_close(middle, loc.mean(-1), rtol=1e-9, atol=1e-9)
    assert middle.dtype == torch.float64
    one_by_one = [quantile(0.2, *(each[row] for each in (loc, scale, log_weights))) for row in range(20)]
    assert torch.equal(torch.stack(one_by_one), quantile(0.2, loc, scale, log_weights))


@pytest.mark.parametrize("far", [1e3, 1e20, -1e37, 1e300])
def test_a_part_that_is_very_far_away_costs_the_others_no_digits(far):
    loc, scale = torch.tensor([0.0, far], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    log_weights = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    expected = float(mp.tan(mp.pi * ((0.5 - 0.1 * (far < 0)) / 0.9 - 0.5)))
    assert float(quantile(0.5, loc, scale, log_weights)) == pytest.approx(
        expected, rel=1e-2 if abs(far) < 1e4 else 1e-9
    )
