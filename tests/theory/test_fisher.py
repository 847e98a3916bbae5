"""Fusion by Fisher information: the formula, its bounds, and where no bound holds."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tether.cauchy.charts import from_chart
from tether.cauchy.divergence import drift, kl_divergence
from tether.errors import ConfigError, ShapeError
from tether.theory.catalogue import statement
from tether.theory.fisher import cauchy_mean, fisher_mean

LOWERED = 0.99


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def matrices(count, size, rank, generator):
    root = torch.randn(count, size, rank, generator=generator, dtype=torch.float64)
    return root @ root.mT


def form(move, matrix):
    return torch.einsum("...i,...ij,...j->...", move, matrix, move)


def test_the_mean_solves_the_least_squares_problem(generator):
    """The fused point minimises sum (theta - theta_k)^T F_k (theta - theta_k), solved here by its square roots."""
    roots = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    points = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    want = torch.linalg.lstsq(roots.flatten(0, 1), (roots @ points.unsqueeze(-1)).flatten(0, 1)).solution
    assert_close(fisher_mean(points, roots.mT @ roots), want.squeeze(-1), rtol=1e-9, atol=1e-12)


def test_diagonal_matrices_weigh_each_parameter_by_itself(generator):
    diagonal = torch.rand(4, 2, 6, generator=generator, dtype=torch.float64)
    points = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64)
    want = (diagonal * points).sum(0) / diagonal.sum(0)
    assert_close(fisher_mean(points, torch.diag_embed(diagonal)), want, rtol=1e-12, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_the_form_of_the_fused_move_is_at_most_the_sum_of_forms(seed, count, size, rank):
    source = torch.Generator().manual_seed(seed)
    fishers = matrices(count, size, rank, source) + 1e-3 * torch.eye(size)
    moves = torch.randn(count, size, generator=source, dtype=torch.float64)
    fused = fisher_mean(moves, fishers)
    assert form(fused, fishers.sum(0)) <= form(moves, fishers).sum() * (1 + 1e-9)


def test_equal_moves_attain_it(generator):
    fishers = matrices(3, 4, 2, generator)
    moves = torch.randn(1, 4, generator=generator, dtype=torch.float64).expand(3, 4)
    ours, theirs = form(fisher_mean(moves, fishers), fishers.sum(0)), form(moves, fishers).sum()
    assert_close(ours, theirs, rtol=1e-9, atol=0)
    assert ours > LOWERED * theirs
    x = moves[:, None].contiguous()
    y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    moved, bound = statement("fisher").evaluate(x, y, torch.ones(3))
    assert_close(moved, bound, rtol=1e-9, atol=0)
    assert (moved > LOWERED * bound).all()
    assert statement("fisher").slack(x, y, double(1.0, 0.0, 1.0)).isinf().all()


@pytest.mark.parametrize("small", [Fraction(1, 2), Fraction(1, 100), Fraction(1, 10**6)])
def test_the_base_form_has_no_constant(small):
    """F_1 = (1,0)(1,0)^T, F_2 = (1,t)(1,t)^T, moves (1,0) and 0: with fractions the fused move is (1, -1/t)."""
    total = [[Fraction(2), small], [small, small**2]]
    fused = (Fraction(1), -1 / small)
    # sum F v = sum F_k v_k = (1, 0)
    assert [row[0] * fused[0] + row[1] * fused[1] for row in total] == [1, 0]
    assert fused[0] ** 2 + fused[1] ** 2 == 1 + 1 / small**2  # against 1 for the moves
    if small >= Fraction(1, 100):
        directions = double([1.0, 0.0], [1.0, float(small)])
        got = fisher_mean(double([1.0, 0.0], [0.0, 0.0]), directions[:, :, None] * directions[:, None])
        assert_close(got, double(1.0, float(-1 / small)), rtol=1e-8, atol=0)


def test_diagonal_matrices_keep_every_diagonal_form(generator):
    diagonal, moves = torch.randn(2, 5, 300, 4, generator=generator, dtype=torch.float64)
    base = torch.rand(4, generator=generator, dtype=torch.float64)
    fused = fisher_mean(moves, torch.diag_embed(diagonal.square()))
    assert ((base * fused.square()).sum(-1) <= (base * moves.square()).sum((0, -1)) * (1 + 1e-12)).all()


# Cauchy laws


def information(x, y):
    """Fisher information of a moved law about its log scale and location: the Hessian of the divergence from it."""

    def divergence(point):
        base = (double(y), double(x).exp())
        return kl_divergence(*base, point[1:], point[:1].exp()).sum()

    return torch.autograd.functional.hessian(divergence, double(x, y))


def test_cauchy_laws_are_fused_by_their_own_information(generator):
    x, y = torch.randn(2, 3, 1, generator=generator, dtype=torch.float64)
    weights = double(0.2, 0.3, 0.5)
    fishers = torch.stack(
        [w * information(a.item(), b.item()) for w, a, b in zip(weights, x, y, strict=True)]
    )
    want = fisher_mean(torch.cat([x, y], -1), fishers)
    got = torch.cat(cauchy_mean(x, y, weights))
    assert_close(got, want, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 8), st.sampled_from([1, 3, 20]), st.sampled_from([1e-3, 0.5, 3.0])
)
def test_fused_cauchy_laws_keep_their_bounds(seed, count, dimension, size):
    source = torch.Generator().manual_seed(seed)
    x, y = size * torch.randn(2, count, 30, dimension, generator=source, dtype=torch.float64)
    y = y * torch.exp(torch.randn(count, 30, 1, generator=source, dtype=torch.float64))
    weights = (2 * torch.randn(count, 30, generator=source, dtype=torch.float64)).softmax(0)
    moved, bound = statement("fisher-cauchy").evaluate(x, y, weights)
    alone = drift(x, y)
    assert (moved <= bound * (1 + 1e-9)).all()
    assert (bound <= alone.sum((0, -1)) * (1 + 1e-9)).all()
    one = drift(*cauchy_mean(x, y, weights))
    assert (one <= 7 / 4 * alone.amax(0) * (1 + 1e-9)).all()


def test_equal_laws_and_laws_that_share_the_work_attain_the_bounds(generator):
    x, y = torch.randn(2, 1, 30, 3, generator=generator, dtype=torch.float64).expand(2, 4, 30, 3)
    moved, bound = statement("fisher-cauchy").evaluate(x, y, torch.full((4,), 0.25))
    assert_close(moved, bound, rtol=1e-12, atol=0)
    assert (moved > LOWERED * bound).all()
    # One moves the scale, one the location; each has all the weight on what it moves, in coordinates of `symmetric`.
    wide, far = double(1.3), double(-0.8)
    apart = torch.expm1(drift(wide, 0 * wide)) + torch.expm1(drift(*from_chart(0 * far, far, "symmetric")))
    together = torch.expm1(drift(*from_chart(wide, far, "symmetric")))
    assert_close(together, apart, rtol=1e-12, atol=0)


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(ShapeError, match="2 x 2"):
        fisher_mean(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ConfigError, match="not positive definite"):
        fisher_mean(torch.ones(2, 2), torch.diag_embed(double([1.0, 0.0], [2.0, 0.0])))
    with pytest.raises(ConfigError, match="not positive definite"):
        fisher_mean(torch.ones(1, 1), torch.full((1, 1, 1), math.nan))
    with pytest.raises(ConfigError, match="add up to 1"):
        statement("fisher-cauchy").slack(torch.ones(2, 1), torch.ones(2, 1), double(0.5, 0.6))
    with pytest.raises(ConfigError, match="2 dimensions and more"):
        statement("fisher-base").slack(torch.ones(2, 1), torch.ones(2, 1), double(1.0, 1.0))
