import math
from fractions import Fraction

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Cauchy
from torch.distributions import kl_divergence as torch_kl
from torch.testing import assert_close

import oracles
from tether.cauchy.divergence import distance, drift, kl_divergence

DTYPES = [torch.float32, torch.float64]
finite = st.floats(-12, 12, allow_subnormal=False)


def grid(dtype):
    """Magnitudes from 1e-12 to 1e4 in every combination, and the seams of the two forms."""
    x = [oracles.spread(400, 1e-12, 1e4, dtype, 1), oracles.spread(200, 0.1, 8, dtype, 2)]
    y = [oracles.spread(400, 1e-12, 1e4, dtype, 3), oracles.spread(200, 0.1, 8, dtype, 4)]
    x.append(
        30 * torch.sign(oracles.spread(60, 1, 2, dtype, 5)) * (1 + oracles.spread(60, 1e-7, 0.1, dtype, 6))
    )
    y.append(oracles.spread(60, 1e-6, 1e12, dtype, 7))
    x.append(oracles.spread(60, 1e-6, 40, dtype, 8))
    y.append(1e6 * (1 + oracles.spread(60, 1e-7, 0.1, dtype, 9)))
    return torch.cat(x), torch.cat(y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "reference", "ulps"), [(drift, oracles.drift, 4), (distance, oracles.distance, 3)]
)
def test_matches_60_digits(dtype, function, reference, ulps):
    x, y = grid(dtype)
    want = [reference(a, b) for a, b in zip(oracles.exact(x), oracles.exact(y), strict=True)]
    errors = oracles.ulp_errors(function(x, y), want)
    assert max(errors) <= ulps


def test_tiny_deltas_survive_float32():
    tiny = torch.tensor([1e-4, 1e-8, 1e-12, 1e-18])
    assert_close(drift(tiny, torch.zeros(4)), tiny.double().square().div(4).float(), rtol=2e-4, atol=0)
    assert_close(distance(tiny / 1e18, torch.zeros(4)), tiny / 1e18, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize(("x", "y"), [(0.0, 1.0), (0.7, -0.4), (-1.5, 2.0), (2.5, 0.1)])
def test_is_the_kl_divergence(x, y):
    want = torch.tensor(float(oracles.drift_by_integration(x, y)), dtype=torch.float64)
    got = drift(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    assert_close(got, want, rtol=1e-10, atol=0)


def test_exact_value_of_the_refutation():
    """Two deltas (-log 2, 1/2): e^D of the sum is 41/16, above (5/4)^4 = 625/256 = e^{2 (D_1 + D_2)}."""

    def exp_drift(scale, shift):
        return ((1 + scale) ** 2 + shift**2) / (4 * scale)

    alone, both = exp_drift(Fraction(1, 2), Fraction(1, 2)), exp_drift(Fraction(1, 4), Fraction(1))
    assert (alone, both) == (Fraction(5, 4), Fraction(41, 16))
    assert both > alone**4
    x, y = -torch.tensor(2.0, dtype=torch.float64).log(), torch.tensor(0.5, dtype=torch.float64)
    assert_close(drift(x, y).exp(), torch.tensor(float(alone), dtype=torch.float64))
    assert_close(drift(2 * x, 2 * y).exp(), torch.tensor(float(both), dtype=torch.float64))
    assert drift(2 * x, 2 * y) > 2 * (drift(x, y) + drift(x, y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", [0.0, 1e-30, 1e-12, 1e-3, 1.0, 29.9, 30.1, 100.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_are_right_everywhere(dtype, x, sign):
    y = torch.tensor([0.0, 1e-12, 1e-3, 1.0, 9e5, 1.1e6, 1e15], dtype=dtype)
    x = torch.full_like(y, sign * x).requires_grad_()
    y.requires_grad_()
    in_x, in_y = torch.autograd.grad(drift(x, y).sum(), (x, y))
    for got, which in ((in_x, 0), (in_y, 1)):
        want = []
        for a, b in zip(oracles.exact(x), oracles.exact(y), strict=True):
            with mp.workdps(100):
                u = mp.exp(a)
                norm = (1 + u) ** 2 + b * b
                want.append(float(((u - 1) * (u + 1) - b * b) / norm if which == 0 else 2 * b / norm))
        want = torch.tensor(want, dtype=torch.float64).to(dtype)
        # Where the two legs of S balance, their difference is known to rounding of the legs only.
        eps = torch.finfo(dtype).eps
        assert_close(got, want, rtol=100 * eps, atol=1e-37 if which else 4 * eps * float(want.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_vanishes_at_the_base(dtype):
    x, y = (torch.zeros(3, dtype=dtype, requires_grad=True) for _ in range(2))
    for function in (drift, distance):
        in_x, in_y = torch.autograd.grad(function(x, y).sum(), (x, y))
        assert not in_x.any()
        assert not in_y.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_gradients_are_bounded_by_the_metric(dtype):
    """A move of x costs |dx|, a move of y costs e^-x |dy|: no gradient is larger."""
    values = torch.tensor([0.0, 1e-30, 1e-12, 1.0, 29.9, 30.1, 80.0], dtype=dtype)
    x, y = torch.meshgrid(torch.cat([values, -values]), torch.cat([values, -values]), indexing="ij")
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    in_x, in_y = torch.autograd.grad(distance(x, y).sum(), (x, y))
    assert (in_x.abs() <= 1 + 1e-5).all()
    assert (in_y.abs() <= torch.exp(-x) * (1 + 1e-4)).all()


def test_derivatives_agree_with_differences():
    x = torch.tensor([0.3, -2.0, 4.0, 31.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([-0.2, 3.0, 0.0, 1e7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(distance, (x, y))
    assert torch.autograd.gradcheck(drift, (x, y))
    assert torch.autograd.gradgradcheck(drift, (x[:3], y[:3]))


@settings(max_examples=60, deadline=None)
@given(finite, finite, finite, finite)
def test_distance_is_left_invariant_and_a_metric(x1, y1, x2, y2):
    """Moves compose like affine maps; sqrt(drift) and the distance obey the triangle inequality."""
    a, b, c, d = (torch.tensor(v, dtype=torch.float64) for v in (x1, y1, x2, y2))
    x, y = a + c, b + a.exp() * d
    assert distance(x, y) <= distance(a, b) + distance(c, d) + 1e-9
    assert drift(x, y).sqrt() <= drift(a, b).sqrt() + drift(c, d).sqrt() + 1e-9
    # The inverse move is equally far.
    assert_close(distance(-a, -b * (-a).exp()), distance(a, b), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(finite, finite)
def test_drift_is_a_function_of_the_distance(x, y):
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    rho = distance(x, y)
    half = rho / 2
    want = 2 * (half + torch.log1p(torch.exp(-2 * half)) - math.log(2))
    assert_close(drift(x, y), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_divergence_matches_60_digits(dtype):
    p_scale, q_scale = (oracles.spread(300, 1e-6, 1e6, dtype, seed).abs() for seed in (1, 2))
    q_scale[:100] = p_scale[:100] * (1 + oracles.spread(100, 1e-6, 0.5, dtype, 3))
    p_loc, q_loc = (oracles.spread(300, 1e-3, 1e6, dtype, seed) for seed in (4, 5))
    q_loc[:150] = p_loc[:150]
    p_loc[-20:] = 1e25
    want = []
    for l1, s1, l2, s2 in zip(*(oracles.exact(v) for v in (p_loc, p_scale, q_loc, q_scale)), strict=True):
        with mp.workdps(120):
            want.append(mp.log(((s1 + s2) ** 2 + (l1 - l2) ** 2) / (4 * s1 * s2)))
    # The difference of two locations is rounded before it is squared: half an ulp, twice.
    assert max(oracles.ulp_errors(kl_divergence(p_loc, p_scale, q_loc, q_scale), want)) <= 5


def test_kl_divergence_is_the_drift_from_q_to_p():
    p_loc, q_loc = torch.randn(50).double(), torch.randn(50).double()
    p_scale, q_scale = torch.rand(50).double(), torch.rand(50).double()
    got = kl_divergence(p_loc, p_scale, q_loc, q_scale)
    assert_close(got, drift((p_scale / q_scale).log(), (p_loc - q_loc) / q_scale))
    assert_close(got, kl_divergence(q_loc, q_scale, p_loc, p_scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_divergence_gradients_are_finite(dtype):
    loc = torch.tensor([0.0, 0.0, 1.0, 1e25, 1e25], dtype=dtype, requires_grad=True)
    scale = torch.tensor([1.0, 1e-10, 1e10, 1.0, 1e-3], dtype=dtype, requires_grad=True)
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    for gradient in torch.autograd.grad(kl_divergence(loc, scale, zero, one).sum(), (loc, scale)):
        assert torch.isfinite(gradient).all()
        assert gradient[0] == 0


def test_torch_registers_the_divergence_itself():
    """So this package registers nothing; torch's own form is what loses small drifts."""
    base, moved = Cauchy(0.5, 2.0), Cauchy(-1.0, 3.0)
    ours = kl_divergence(*(torch.tensor(v) for v in (-1.0, 3.0, 0.5, 2.0)))
    assert_close(torch_kl(moved, base), ours)
    near = Cauchy(1e-4, 1.0)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert_close(kl_divergence(torch.tensor(1e-4), one, zero, one), torch.tensor(2.5e-9), rtol=1e-6, atol=0)
    assert abs(torch_kl(near, Cauchy(0.0, 1.0)) - 2.5e-9) > 2e-9
