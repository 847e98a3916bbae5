"""Document 2's first-order bound with its excess: it holds at any size, and no smaller excess does."""

import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracles
from tether.cauchy.divergence import drift
from tether.errors import ConfigError
from tether.theory import local
from tether.theory.bounds import K_INF
from tether.theory.catalogue import statement
from tether.theory.local import local_drift_bound, squared_length_bound


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("weights", [(-0.5, 0.3, 1e-3), (-0.5, 1.5, 0.01)])
def test_the_bound_agrees_with_mpmath(weights):
    nats = (1e-4, 0.03, 4.0)
    with mp.workdps(40):
        slope = 2 / mp.sqrt(27)
        rises = [mp.expm1(v) for v in nats]
        near = [1 + slope * mp.expm1(2 * mp.sqrt(m)) for m in rises]
        far = [mp.exp(2 * mp.asinh(mp.sqrt(m))) for m in rises]
        assert near[0] < far[0]
        assert near[2] > far[2]
        lengths = [m * min(pair) for m, *pair in zip(rises, near, far, strict=True)]
        reach = 2 * sum(abs(mp.mpf(w)) * mp.sqrt(v) for w, v in zip(weights, lengths, strict=True))
        excess = 1 + slope * reach + reach**2 / 16
        assert (excess > K_INF) == (weights[1] > 1)  # the small weights are not capped
        want = double(float(min(mp.mpf(K_INF), excess) * reach**2 / 4))[0]
    assert_close(squared_length_bound(double(*nats)), double(*map(float, lengths)), rtol=1e-13, atol=0)
    assert_close(local_drift_bound(double(*nats), double(*weights)), want, rtol=1e-11, atol=0)


def test_a_drift_bounds_the_length(generator):
    size = torch.exp(8 * torch.rand(200_000, generator=generator, dtype=torch.float64) - 7)
    angle = 2 * math.pi * torch.rand(200_000, generator=generator, dtype=torch.float64)
    x, y = size * angle.cos(), size * angle.sin()
    ratio = (x.square() + y.square()) / 4 / squared_length_bound(drift(x, y))
    assert ratio.max() <= 1 + 1e-12
    assert ratio.max() > 0.999


WORST = {1e-2: 1.173, 1e-3: 1.051, 1e-4: 1.016, 1e-6: 1.0015}
"""What a weight of -1 makes of document 2's form at most."""


@pytest.mark.parametrize("nats", WORST)
def test_the_excess_covers_the_worst_negated_delta(nats):
    worst = float(oracles.largest_scaled_drift(nats, -1) / nats)
    assert worst == pytest.approx(WORST[nats], abs=6e-4)
    bound = local_drift_bound(double(nats), double(-1.0)).item() / nats
    assert worst <= bound <= worst * 1.01


@pytest.mark.parametrize("weight", [-0.5, -1.0, -3.0])
def test_an_excess_one_percent_smaller_is_too_small(weight, monkeypatch):
    nats = 1e-6
    worst = float(oracles.largest_scaled_drift(nats, weight) / (weight**2 * nats))

    def excess():
        return local_drift_bound(double(nats), double(weight)).item() / (weight**2 * nats) - 1

    assert worst - 1 <= excess()
    # The coefficient of sqrt(e) that the page gives.
    assert excess() == pytest.approx(4 / math.sqrt(27) * (1 - weight) * math.sqrt(nats), rel=5e-3)
    monkeypatch.setattr(local, "SLOPE", 0.99 * local.SLOPE)
    assert worst - 1 > excess()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([1e-5, 1e-2, 0.3, 3.0]),
)
def test_weighted_sums_keep_the_bound(seed, count, dimension, size):
    source = torch.Generator().manual_seed(seed)
    x, y = size * torch.randn(2, count, 50, dimension, generator=source, dtype=torch.float64)
    weights = torch.randn(count, 50, generator=source, dtype=torch.float64)
    # A third are alike up to sign, as in the worst case.
    x[:, :17], y[:, :17] = x[:1, :17].abs(), y[:1, :17]
    ratio = statement("weighted-local").ratio(x, y, weights)
    assert (ratio <= 1 + 1e-9).all()


def test_budgets_may_stand_for_drifts():
    """A larger drift never lowers the bound, so one may put budgets in place of what was measured."""
    nats = torch.logspace(-12, 1, 200, dtype=torch.float64)
    assert (local_drift_bound(nats[None], double(0.7)).diff() > 0).all()
    assert local_drift_bound(double(math.inf, 0.1), double(0.0, 1.0)).isfinite()
    assert_close(local_drift_bound(double(0.0), double(3.0)), double(0.0)[0])


def test_bad_drifts_and_weights_are_refused():
    with pytest.raises(ConfigError, match="non-negative"):
        local_drift_bound(double(-1.0), double(1.0))
    with pytest.raises(ConfigError, match="finite"):
        local_drift_bound(double(1.0), double(math.nan))
