import math

import mpmath as mp
import pytest
import torch
from torch.testing import assert_close

import oracles
from tether.cauchy.truncated import interval_mass, sample_truncated
from tether.errors import ConfigError

DTYPES = [torch.float32, torch.float64]
INF = math.inf
INTERVALS = [
    (1e8, 1e8 * (1 + 1e-3)),
    (-1e8 * (1 + 1e-3), -1e8),
    (-INF, -1e12),
    (3.0, INF),
    (-INF, INF),
    (-INF, 0.3),
    (-2.0, INF),
    (-1e8, 1e8),
    (1e-30, 2e-30),
    (-1e-9, 3e-9),
    (0.3, 0.3 * (1 + 1e-4)),
    (0.9, 1.1),
    (-1.1, -0.9),
    (-1e3, 1e-3),
    (1.0, 1.0),
    (1e30, INF),
]


def angle(x):
    return mp.atan(mp.mpf(x)) if math.isfinite(x) else mp.sign(x) * mp.pi / 2


def uniforms(dtype):
    fixed = torch.tensor([1e-12, 1e-6, 0.25, 0.5, 0.75, 1 - 1e-6], dtype=dtype)
    return torch.cat([fixed, torch.rand(50, dtype=dtype).clamp(min=2**-25)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", INTERVALS)
def test_draws_match_60_digits(dtype, ends):
    lower, upper = (torch.tensor(end, dtype=dtype) for end in ends)
    uniform = uniforms(dtype)
    draws = sample_truncated(uniform, lower, upper)
    assert draws.dtype == dtype
    assert bool(((draws >= lower) & (draws <= upper)).all())
    a, b = float(lower), float(upper)
    with mp.workdps(100):
        reference = [
            mp.tan((1 - mp.mpf(p)) * angle(a) + mp.mpf(p) * angle(b)) if a < b else mp.mpf(a)
            for p in uniform.tolist()
        ]
        # Near zero the unit is the last place of the wider end: a draw of 1e-9 from [-1, 1] has no more.
        floor = mp.mpf(min(1.0, max(abs(a), abs(b))))
        unit = [max(abs(x), floor) for x in reference]
    assert max(oracles.ulp_errors(draws, reference, unit)) <= 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", INTERVALS)
def test_mass_matches_60_digits(dtype, ends):
    lower, upper = (torch.tensor([end], dtype=dtype) for end in ends)
    with mp.workdps(100):
        reference = [(angle(float(upper)) - angle(float(lower))) / mp.pi]
    if reference[0] == 0:
        assert interval_mass(lower, upper).item() == 0
    else:
        assert max(oracles.ulp_errors(interval_mass(lower, upper), reference)) <= 6


def test_draws_follow_the_truncated_law():
    lower, upper = torch.tensor(-0.7, dtype=torch.float64), torch.tensor(40.0, dtype=torch.float64)
    draws = sample_truncated((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000, lower, upper)
    law = torch.distributions.Cauchy(torch.zeros((), dtype=torch.float64), 1.0)
    for point in (-0.5, 0.0, 1.0, 10.0):
        expected = (law.cdf(torch.tensor(point)) - law.cdf(lower)) / (law.cdf(upper) - law.cdf(lower))
        assert_close((draws < point).double().mean(), expected, atol=1e-3, rtol=0)


def test_ends_broadcast_and_may_be_reached():
    uniform = torch.tensor([[0.0], [1.0]])
    lower, upper = torch.tensor([-INF, -3.0, 2e7]), torch.tensor([1.0, INF, 3e7])
    assert torch.equal(sample_truncated(uniform, lower, upper), torch.stack([lower, upper]))


@pytest.mark.parametrize("ends", [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)])
def test_empty_intervals_are_refused(ends):
    with pytest.raises(ConfigError, match="lower <= upper"):
        sample_truncated(torch.tensor([0.5]), torch.tensor([ends[0]]), torch.tensor([ends[1]]))
