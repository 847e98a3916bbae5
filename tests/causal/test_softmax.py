"""KL(p || q) over a vocabulary, against torch in float64 and against the definition in 50 digits."""

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tether.causal.softmax import softmax_kl


def exact(log_p, log_q):
    """Sum of p (log p - log q) by its definition, of the numbers as they are given, in 50 digits."""
    with mp.workdps(50):
        rows = zip(log_p.double().tolist(), log_q.double().tolist(), strict=True)
        return [
            float(mp.fsum(mp.exp(a) * (mp.mpf(a) - mp.mpf(b)) for a, b in zip(*row, strict=True)))
            for row in rows
        ]


@settings(max_examples=60, deadline=None)
@given(st.floats(-6, 1), st.integers(0, 10_000))
def test_it_is_the_divergence_in_float64(power, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(4, 50, generator=generator, dtype=torch.float64)
    other = scores + 10**power * torch.randn(4, 50, generator=generator, dtype=torch.float64)
    p, q = scores.log_softmax(-1), other.log_softmax(-1)
    expected = torch.tensor(exact(p, q), dtype=torch.float64)
    # The definition takes p and q to add up to 1, which they do to about 1e-16.
    assert_close(softmax_kl(p, q), expected, rtol=1e-9, atol=3e-15)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e-1])
def test_in_float32_it_errs_less_than_the_plain_sum(size, generator):
    scores = 5 * torch.randn(20, 20_000, generator=generator)
    p, q = (s.log_softmax(-1) for s in (scores, scores + size * torch.randn(20, 20_000, generator=generator)))
    # Exact laws near those of float32, which add up to 1 only to about 1e-6.
    true = softmax_kl(*(law.double().log_softmax(-1) for law in (p, q)))
    error = (softmax_kl(p, q).double() - true).abs()
    plain = ((p.exp() * (p - q)).sum(-1).double() - true).abs()
    assert float(error.max()) < 2e-6 * size
    assert float(error.max()) < 0.3 * float(plain.max())


def test_equal_laws_have_none_bit_for_bit(generator):
    p = torch.randn(5, 1000, generator=generator).log_softmax(-1)
    assert torch.equal(softmax_kl(p, p), torch.zeros(5))
    assert bool((softmax_kl(p, (p + 1e-4).log_softmax(-1)) >= 0).all())


def test_classes_that_are_impossible():
    p = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]]).log()
    q = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.0, 0.5], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]).log()
    expected = torch.tensor([0.5 * torch.tensor(4 / 3).log(), torch.inf, torch.tensor(4.0).log(), 0.0])
    assert_close(softmax_kl(p, q), expected)
    # A class that p hardly has, and q has not at all.
    rare, without = torch.tensor([[-0.6931472, -0.6931472, -120.0]]), torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert bool((softmax_kl(rare, without) == torch.inf).all())
    assert bool(softmax_kl(torch.full((1, 3), torch.nan), q[:1]).isnan())


def test_laws_that_are_far_apart_are_measured_beside_near_ones(generator):
    """Ratios that overflow single precision, in some contexts only; each context is as it is alone."""
    scores = torch.randn(6, 40, generator=generator)
    other = scores + 0.01 * torch.randn(6, 40, generator=generator)
    other[1, 7] += 90.0
    other[4] = -60 * other[4]
    p, q = scores.log_softmax(-1), other.log_softmax(-1)
    found = softmax_kl(p, q)
    assert_close(found.double(), torch.tensor(exact(p, q), dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert float(found[1]) > 60
    assert torch.equal(found, torch.cat([softmax_kl(p[row, None], q[row, None]) for row in range(6)]))


def test_gradients_are_the_closed_form_near_and_far(generator):
    scores, base = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)
    scores[1, 3] += 100.0
    scores.requires_grad_()
    (found,) = torch.autograd.grad(softmax_kl(base.log_softmax(-1), scores.log_softmax(-1)).sum(), scores)
    assert_close(found, scores.detach().softmax(-1) - base.softmax(-1))
