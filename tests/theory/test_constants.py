"""Sharp constants against mpmath, the published table, and random deltas."""

import math
from itertools import pairwise

import mpmath as mp
import pytest
import torch

import oracles
from tether.cauchy.divergence import drift
from tether.errors import ConfigError
from tether.theory.bounds import scaling_bound
from tether.theory.constants import (
    equal_constant,
    local_constant,
    many_constant,
    negation_constant,
    shrinking_threshold,
    split_constant,
)

PUBLISHED = {2: 1.10767457463, 3: 1.16428205089, 4: 1.19881617535, 10: 1.27495826442}


@pytest.mark.parametrize("count", PUBLISHED)
def test_equal_constants(count):
    found = equal_constant(count)
    assert found.value == pytest.approx(PUBLISHED[count], abs=5e-12)
    with mp.workdps(40):

        def ratio(x, y):
            return oracles.drift(count * x, count * y) / (count**2 * oracles.drift(x, y))

        x, y = mp.mpf(found.x), mp.mpf(found.y)
        assert abs(ratio(x, y) - found.value) < 1e-14
        steps = [
            (mp.mpf(dx) * abs(x), mp.mpf(dy) * y) for dx, dy in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3))
        ]
        assert all(ratio(x + dx, y + dy) < ratio(x, y) for dx, dy in steps)


def test_equal_constants_rise_to_the_limit():
    values = [equal_constant(n).value for n in range(1, 101)]
    assert values[0] == 1
    assert all(a < b for a, b in pairwise(values))
    limit = many_constant().value
    assert limit == pytest.approx(1.338533402074355, abs=1e-14)
    assert 100 * (limit - values[-1]) == pytest.approx(0.697, abs=0.01)
    assert values[-1] < limit < 1.338534


def test_equal_constants_are_not_exceeded_by_random_equal_deltas(generator):
    x, y = 1.5 * torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    for count in (2, 5, 30):
        ratio = drift(count * x, count * y) / (count**2 * drift(x, y))
        assert ratio.max() <= equal_constant(count).value
        assert 4 * drift(x, y).div(x * x + y * y).max() <= many_constant().value


def test_other_extrema(generator):
    x, y = torch.randn(2, 300_000, generator=generator, dtype=torch.float64)
    assert (
        (drift(-3 * x, -8 * y) / drift(3 * x, 8 * y)).max()
        <= negation_constant().value
        == pytest.approx(3.341584, abs=1e-6)
    )
    s, y = 2 * x.abs(), 3 * y.abs()
    split = drift(-s, y) / (drift(s, 0 * y) + drift(0 * s, y))
    assert 1.51 < split.max() <= split_constant().value == pytest.approx(1.511801, abs=1e-6)


def test_the_shrinking_threshold_is_where_shrinking_starts_to_raise_drift():
    edge = shrinking_threshold()
    assert edge == pytest.approx((2.9115713362, 2.6141562, 28.0978024), rel=1e-7)
    with mp.workdps(30):

        def slope(stretch):
            return mp.diff(lambda a: oracles.drift(a * mp.mpf(edge.x), a * mp.mpf(edge.y) * stretch), 1)

        assert abs(slope(1)) < 1e-6
        assert slope(mp.mpf("1.01")) < 0 < slope(mp.mpf("0.99"))


def test_local_constants():
    for radius, want in ((0.1, 1.03838), (0.3, 1.11314), (0.5, 1.18208), (1.0, 1.30556)):
        assert local_constant(radius) == pytest.approx(want, abs=1e-5)
        assert local_constant(radius) <= 1 + 2 * radius / math.sqrt(27) + radius**2 / 16
    assert local_constant(3.0) == many_constant().value


@pytest.mark.slow
@pytest.mark.parametrize("weight", [-1.0, 0.25, 0.5, 2.0])
def test_the_scaling_bound_is_above_the_best_of_a_million(weight, generator):
    for nats in (1e-4, 0.01, 0.1, 1.0, 10.0, 100.0):
        rho = 2 * math.asinh(math.sqrt(math.expm1(nats)))
        x = rho * (2 * torch.rand(10**6, generator=generator, dtype=torch.float64) - 1)
        room = math.expm1(nats) - torch.sinh(x / 2).square()
        y = (
            2
            * torch.exp(x / 2)
            * room.clamp(min=0).sqrt()
            * torch.rand(10**6, generator=generator).double().sqrt()
        )
        feasible = drift(x, y) <= nats
        best = drift(weight * x, weight * y)[feasible].max()
        bound = scaling_bound(torch.tensor(nats).double(), weight)
        assert 0.9 * bound < best <= bound


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="N=0"):
        equal_constant(0)
    with pytest.raises(ConfigError, match="radius"):
        local_constant(0.0)
