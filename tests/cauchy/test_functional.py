import math

import mpmath as mp
import pytest
import torch
from torch.testing import assert_close

import oracles
from tether.cauchy import functional
from tether.cauchy.functional import cdf, from_noise, icdf, log_cdf, log_prob, log_sf, push_linear
from tether.errors import ShapeError

DTYPES = [torch.float32, torch.float64]


def standard(t):
    return torch.zeros_like(t), torch.ones_like(t)


def points(dtype):
    fixed = torch.tensor([0.0, 1.0, -1.0, 1 + 1e-6, 1 - 1e-6, -1e8, 1e8, -1e30, 1e30], dtype=dtype)
    return torch.cat([fixed, oracles.spread(300, 1e-12, 1e30, dtype), oracles.spread(300, 0.03, 30, dtype)])


def upper_tail(t):
    with mp.workdps(100):
        return mp.mpf(1) / 2 - mp.atan(t) / mp.pi


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_tails_match_50_digits(dtype):
    t = points(dtype)
    with mp.workdps(100):
        survival = [mp.log(upper_tail(v)) for v in oracles.exact(t)]
        below = [mp.log(upper_tail(-v)) for v in oracles.exact(t)]
    assert max(oracles.ulp_errors(log_sf(t, *standard(t)), survival)) <= 4
    assert max(oracles.ulp_errors(log_cdf(t, *standard(t)), below)) <= 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_cdf_matches_50_digits(dtype):
    t = points(dtype)
    reference = [upper_tail(-v) for v in oracles.exact(t)]
    assert max(oracles.ulp_errors(cdf(t, *standard(t)), reference)) <= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_matches_50_digits(dtype):
    t = points(dtype)
    with mp.workdps(100):
        reference = [-mp.log(mp.pi * (1 + v * v)) for v in oracles.exact(t)]
    assert max(oracles.ulp_errors(log_prob(t, *standard(t)), reference)) <= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_tails_at_infinity(dtype):
    ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
    assert log_sf(ends, *standard(ends)).tolist() == [0, -math.inf]
    assert log_cdf(ends, *standard(ends)).tolist() == [-math.inf, 0]
    assert cdf(ends, *standard(ends)).tolist() == [0, 1]


def test_location_and_scale_move_and_stretch():
    value, loc, scale = (
        oracles.spread(50, 0.1, 10),
        oracles.spread(50, 0.1, 10, seed=1),
        torch.rand(50).double(),
    )
    reference = torch.distributions.Cauchy(loc, scale)
    assert_close(log_prob(value, loc, scale), reference.log_prob(value))
    assert_close(cdf(value, loc, scale), reference.cdf(value))
    assert_close(log_cdf(value, loc, scale), reference.cdf(value).log())
    assert_close(log_sf(value, loc, scale), (1 - reference.cdf(value)).log())
    probability = torch.rand(50).double()
    assert_close(icdf(probability, loc, scale), reference.icdf(probability))


def test_threshold_may_be_a_number():
    loc, scale = torch.randn(3, 4), torch.rand(3, 4)
    assert_close(log_sf(1.5, loc, scale), log_sf(torch.tensor(1.5), loc, scale))
    assert_close(log_cdf(1.5, loc, scale), log_cdf(torch.tensor(1.5), loc, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["log_prob", "log_sf", "log_cdf", "cdf"])
def test_gradients_are_exact_out_to_1e30(dtype, name):
    t = points(dtype)
    t = t[t.abs() < 1.0001e30].requires_grad_()
    values = getattr(functional, name)(t, *standard(t))
    (actual,) = torch.autograd.grad(values.sum(), t)
    reference = []
    for v in oracles.exact(t):
        with mp.workdps(100):
            density = 1 / (mp.pi * (1 + v * v))
            reference.append(
                {
                    "log_prob": -2 * v / (1 + v * v),
                    "log_sf": -density / upper_tail(v),
                    "log_cdf": density / upper_tail(-v),
                    "cdf": density,
                }[name]
            )
    assert torch.isfinite(actual).all()
    expected = torch.tensor([float(r) for r in reference], dtype=torch.float64).to(dtype)
    tiny = torch.finfo(dtype).tiny  # where the exact derivative leaves the range, 0 is as good
    assert_close(actual, expected, rtol=20 * torch.finfo(dtype).eps, atol=tiny)


@pytest.mark.parametrize("name", ["log_prob", "log_sf", "log_cdf"])
def test_gradients_in_loc_and_scale(name):
    value = torch.tensor([-50.0, -1.0, 0.3, 1.0, 2.0, 70.0], dtype=torch.float64)
    loc = torch.full_like(value, 0.5).requires_grad_()
    scale = torch.full_like(value, 0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: getattr(functional, name)(value, a, b), (loc, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_icdf_matches_50_digits(dtype):
    low = oracles.spread(300, 1e-30, 0.5, dtype).abs()
    near_one = 1 - oracles.spread(300, torch.finfo(dtype).eps, 0.5, dtype, seed=1).abs()
    probability = torch.cat([low, near_one[near_one < 1], torch.tensor([0.25, 0.75], dtype=dtype)])
    with mp.workdps(100):
        reference = [mp.tan(mp.pi * (p - mp.mpf(1) / 2)) for p in oracles.exact(probability)]
    # Relative accuracy is lost only where the quantile itself vanishes faster than p - 1/2 is known: nowhere.
    assert max(oracles.ulp_errors(icdf(probability, *standard(probability)), reference)) <= 4


def test_icdf_ends_are_infinite_and_middle_is_exact():
    p = torch.tensor([0.0, 0.5, 1.0])
    assert icdf(p, torch.tensor(2.0), torch.tensor(3.0)).tolist() == [-math.inf, 2.0, math.inf]


def test_icdf_gradient_is_finite_on_both_sides():
    for dtype in DTYPES:
        p = torch.tensor([1e-6, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 1e-6], dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(icdf(p, *standard(p.detach())).sum(), p)
        nearest = torch.minimum(p, 1 - p).detach().double()
        assert_close(gradient, (math.pi / torch.sin(math.pi * nearest) ** 2).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_comes_back_from_its_draw(dtype, generator):
    noise = torch.rand(2000, generator=generator, dtype=dtype).clamp(min=2**-25)
    loc, scale = torch.tensor(-0.5, dtype=dtype), torch.tensor(2.0, dtype=dtype)
    draw = from_noise(noise, loc, scale)
    assert_close(cdf(draw, loc, scale), noise, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0)


def test_from_noise_draws_the_law(generator):
    noise = torch.rand(100_000, generator=generator, dtype=torch.float64)
    draws = from_noise(noise, torch.tensor(3.0).double(), torch.tensor(0.5).double())
    quarters = torch.quantile(draws, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert_close(quarters, torch.tensor([2.5, 3.0, 3.5]).double(), atol=0.02, rtol=0)


def test_from_noise_of_two_laws_shares_the_individual():
    noise, loc, scale = torch.rand(20).double(), torch.randn(20).double(), torch.rand(20).double()
    one, other = from_noise(noise, loc, scale), from_noise(noise, loc + 2, 3 * scale)
    assert_close((other - loc - 2) / (3 * scale), (one - loc) / scale)


def test_from_noise_passes_gradients_to_loc_and_scale():
    noise = torch.tensor([1e-7, 0.3, 0.999], dtype=torch.float64)
    loc, scale = torch.zeros(3).double().requires_grad_(), torch.ones(3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: from_noise(noise, a, b), (loc, scale), atol=1e-3)


def test_push_linear_gives_the_law_of_the_sum(generator):
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, -1.0]], dtype=torch.float64)
    loc = torch.tensor([1.0, -1.0, 4.0], dtype=torch.float64)
    scale = torch.tensor([0.3, 0.2, 1.0], dtype=torch.float64)
    bias = torch.tensor([10.0, 20.0], dtype=torch.float64)
    noise = torch.rand(400_000, 3, generator=generator, dtype=torch.float64)
    samples = from_noise(noise, loc, scale) @ weight.T + bias
    quarters = torch.quantile(samples, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    pushed_loc, pushed_scale = push_linear(loc, scale, weight, bias)
    assert_close(quarters[1], pushed_loc, atol=0.02, rtol=0)
    assert_close((quarters[2] - quarters[0]) / 2, pushed_scale, atol=0.02, rtol=0)


def test_push_linear_in_batches_and_steps():
    loc, scale = torch.randn(2, 5, 4).double(), torch.rand(2, 5, 4).double()
    first, second = torch.randn(6, 4).double(), torch.rand(3, 6).double()
    bias = torch.randn(6).double()
    pushed_loc, pushed_scale = push_linear(loc, scale, first, bias)
    want_loc = torch.stack([first @ row + bias for row in loc.reshape(-1, 4)]).reshape(2, 5, 6)
    want_scale = torch.stack([first.abs() @ row for row in scale.reshape(-1, 4)]).reshape(2, 5, 6)
    assert_close(pushed_loc, want_loc)
    assert_close(pushed_scale, want_scale)
    # Non-negative second steps compose: |W2 W1| = W2 |W1| only where no signs cancel.
    steps = push_linear(*push_linear(loc, scale, first.abs()), second)
    for got, want in zip(steps, push_linear(loc, scale, second @ first.abs()), strict=True):
        assert_close(got, want)


def test_push_linear_takes_one_scale_for_a_batch():
    loc, scale, weight = torch.randn(7, 4), torch.rand(4), torch.randn(3, 4)
    _, shared = push_linear(loc, scale, weight)
    assert_close(shared, push_linear(loc, scale.expand(7, 4), weight)[1][0])


def test_push_linear_refuses_other_widths():
    with pytest.raises(ShapeError, match=r"\(3, 5\).*\(2, 4\)"):
        push_linear(torch.zeros(2, 4), torch.ones(2, 4), torch.zeros(3, 5))
