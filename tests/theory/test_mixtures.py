"""Mixtures of any laws, the loss of weights that follow a text, and where both are attained."""

import itertools
import math
from fractions import Fraction

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tether.causal import evidence
from tether.theory.catalogue import statement
from tether.theory.mixtures import divergence, log_law, mixture_loss
from tether.theory.search import TOLERANCE, falsify

LOWERED = 0.99
NAMES = (
    "mixture",
    "mixture-sleeping",
    "mixture-leash",
    "mixture-means-sum",
    "regret",
    "regret-sleeping",
    "switching",
)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def shares(count, generator):
    return torch.rand(count, generator=generator, dtype=torch.float64).softmax(0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(2, 9),
    st.sampled_from([0.01, 1.0, 30.0]),
)
def test_statements_about_mixtures_hold(name, seed, count, size, spread):
    source = torch.Generator().manual_seed(seed)
    x, y = spread * torch.randn(2, count, 40, size, generator=source, dtype=torch.float64)
    weights = torch.randn(count, 40, generator=source, dtype=torch.float64)
    one = statement(name)
    if one.weights == "unit":
        weights = torch.ones_like(weights)
    ratio = one.ratio(*one.place(x, y, weights))
    assert (ratio <= 1 + TOLERANCE).all()


# In one context


def test_laws_and_divergences_agree_with_mpmath(generator):
    scores = torch.tensor([[3.0, -40.0], [3.0 + 1e-7, -40.0], [-1.0, 2.0]], dtype=torch.float64)
    laws = log_law(scores)
    with mp.workdps(50):
        exact = []
        for row in scores.tolist():
            powers = [mp.exp(v) for v in (*row, 0)]
            exact.append([p / sum(powers) for p in powers])
        for other in (1, 2):
            want = sum(p * mp.log(p / q) for p, q in zip(exact[0], exact[other], strict=True))
            assert divergence(laws[0], laws[other]).item() == pytest.approx(float(want), rel=1e-7)


def test_a_mixture_of_cauchy_laws_drifts_less_than_its_parts_on_average():
    """Continuous laws, by an integral over the densities themselves."""
    base, parts, weights = (0.0, 1.0), [(2.0, 0.3), (-0.5, 4.0), (0.0, 1.0)], [0.5, 0.2, 0.3]

    def density(u, law):
        return law[1] / (mp.pi * (law[1] ** 2 + (u - law[0]) ** 2))

    def drift_to(q):
        def integrand(angle):
            u = mp.tan(angle)
            return mp.log(density(u, base) / q(u)) / mp.pi

        return mp.quad(integrand, [-mp.pi / 2, -1, 0, mp.atan(2), mp.pi / 2])

    with mp.workdps(20):
        mixed = drift_to(lambda u: sum(w * density(u, p) for w, p in zip(weights, parts, strict=True)))
        alone = [drift_to(lambda u, p=p: density(u, p)) for p in parts]
        mean = sum(w * d for w, d in zip(weights, alone, strict=True))
        assert 0 < mixed < mean
        # Equal laws attain it: a constant below 1 would be wrong.
        doubled = drift_to(lambda u: 0.4 * density(u, parts[0]) + 0.6 * density(u, parts[0]))
        assert doubled > LOWERED * alone[0]


def test_equal_laws_attain_the_mixture_bound(generator):
    x = torch.randn(1, 5, generator=generator, dtype=torch.float64).expand(4, 30, 5)
    y = torch.randn(4, 30, 5, generator=generator, dtype=torch.float64)
    moved, bound = statement("mixture").evaluate(x, y, shares(4, generator))
    assert_close(moved, bound, rtol=1e-12, atol=0)
    assert (moved > LOWERED * bound).all()


def test_who_sleeps_does_not_count(generator):
    x, y = torch.randn(2, 4, 30, 5, generator=generator, dtype=torch.float64)
    weights = double(0.2, -3.0, 0.6, 0.0)
    moved, bound = statement("mixture-sleeping").evaluate(x, y, weights)
    awake = statement("mixture").evaluate(x[[0, 2]], y[[0, 2]], double(0.25, 0.75))
    assert_close(moved, awake[0], rtol=1e-12, atol=0)
    assert_close(bound, awake[1], rtol=1e-12, atol=0)
    x[2] = x[0]
    moved, bound = statement("mixture-sleeping").evaluate(x, y, weights)
    assert (moved > LOWERED * bound).all()
    assert statement("mixture-sleeping").slack(x, y, -weights.abs()).isinf().all()


def test_an_outcome_that_the_others_rule_out_attains_the_leash():
    x = double(300.0, -300.0, -300.0)[:, None, None]  # log probabilities of 0 and -300
    weights = double(0.05, 0.9, 0.05)
    moved, bound = statement("mixture-leash").evaluate(x, x, weights)
    assert_close(bound, double(-math.log(0.05)))
    assert_close(moved, bound, rtol=1e-12, atol=0)
    assert (moved > LOWERED * bound).all()


# Means over contexts


@pytest.mark.parametrize("count", [2, 3, 7])
def test_means_miss_by_the_factor_n_where_experts_move_in_disjoint_contexts(count):
    """Expert k gives (1/4, 3/4) where the base gives halves, in context k alone, and has all the weight there."""
    # With fractions: 2 N times each mean is a logarithm of a rational number.
    moved = [[Fraction(4, 3) if k == c else Fraction(1) for c in range(count)] for k in range(count)]
    mixture = math.prod(moved[c][c] for c in range(count))
    assert all(mixture == math.prod(row) ** count for row in moved)
    on = torch.eye(count, dtype=torch.float64)[:, None]
    x, y = math.log(3) * on, 1e3 * on
    ones = torch.ones(count)
    mean, largest = statement("mixture-means").evaluate(x, y, ones)
    assert mean.item() == pytest.approx(math.log(4 / 3) / 2, rel=1e-13)
    assert_close(mean, count * largest, rtol=1e-13, atol=0)
    # The same point attains what is true.
    mean, total = statement("mixture-means-sum").evaluate(x, y, ones)
    assert_close(mean, total, rtol=1e-13, atol=0)
    assert mean > LOWERED * total


def test_means_are_off_by_n_at_most(generator):
    x, y = 3 * torch.randn(2, 5, 20_000, 6, generator=generator, dtype=torch.float64)
    assert statement("mixture-means").ratio(x, y, torch.ones(5)).max() < 5


def test_a_search_finds_the_factor():
    found = falsify(statement("mixture-means"))
    assert found.violated
    assert found.ratio == pytest.approx(2, rel=1e-4)
    assert len(found.x[0]) == 2  # contexts, though one dimension was asked for


# The loss of a text


def test_without_restarts_the_text_has_the_mean_of_its_probabilities(generator):
    loss = torch.rand(3, 4, 6, generator=generator, dtype=torch.float64) * 5
    prior = shares(3, generator)
    want = -torch.log((prior[:, None] * torch.exp(-loss.sum(-1))).sum(0))
    assert_close(mixture_loss(loss, prior).sum(-1), want, rtol=1e-12, atol=0)


def paths(count, length):
    return list(itertools.product(range(count), repeat=length))


def test_restarts_are_a_mean_over_all_sequences_of_experts(generator):
    """All 3^4 sequences with their prior probabilities, against weights that are updated token by token."""
    loss = torch.rand(3, 4, generator=generator, dtype=torch.float64) * 5
    prior, share = shares(3, generator).tolist(), 0.2
    logit = math.log(share / (1 - share))
    terms = []
    for path in paths(3, 4):
        price = -math.log(prior[path[0]])
        for before, after in itertools.pairwise(path):
            price -= math.log(share * prior[after] + (1 - share) * (before == after))
        terms.append(price + sum(loss[k, t].item() for t, k in enumerate(path)))
    x = loss[:, None]
    y = torch.full_like(x, logit)
    moved, bound = statement("switching").evaluate(x, y, double(*prior))
    assert moved.item() == pytest.approx(-math.log(sum(map(math.exp, (-v for v in terms)))), rel=1e-12)
    assert bound.item() == pytest.approx(min(terms), rel=1e-12)


def one_possible(path, count):
    """Losses of 0 along a sequence of experts, and beyond all others' means."""
    loss = torch.full((count, 1, len(path)), 600.0, dtype=torch.float64)
    for at, who in enumerate(path):
        loss[who, 0, at] = 0
    return loss


@pytest.mark.parametrize("name", ["regret", "regret-sleeping", "switching"])
def test_a_text_that_one_expert_alone_holds_for_possible_attains_its_bound(name):
    prior = double(0.7, 0.2, 0.1)
    loss = one_possible([1, 1, 1], 3)
    awake = torch.ones_like(loss)
    if name == "regret-sleeping":
        awake[1, 0, 1] = -1
        loss[:, 0, 1] = 0.3  # nobody learns from a token that all others held for equally likely
    moved, bound = statement(name).evaluate(loss, awake, prior)
    assert_close(moved, bound, rtol=1e-12, atol=0)
    price = bound - loss[1].sum(-1) if name != "regret-sleeping" else bound
    assert price >= -math.log(0.2) - 1e-12
    assert moved > LOWERED * bound


def test_a_text_that_changes_hands_attains_the_price_of_its_switches():
    prior, share = double(0.7, 0.2, 0.1), 0.1
    loss = one_possible([1, 1, 0, 2], 3)
    y = torch.full_like(loss, math.log(share / (1 - share)))
    moved, bound = statement("switching").evaluate(loss, y, prior)
    stays = -math.log(1 - share + share * 0.2)
    want = -math.log(0.2) + stays - math.log(share * 0.7) - math.log(share * 0.1)
    assert bound.item() == pytest.approx(want, rel=1e-12)
    assert_close(moved, bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_the_served_weights_are_these(rate, generator):
    """What fusion by evidence serves, with sleepers and restarts, pays exactly this."""
    loss = torch.rand(3, 2, 12, generator=generator, dtype=torch.float64) * 4
    awake = torch.rand(3, 2, 12, generator=generator) < 0.6
    awake[0] = True
    prior = double(0.5, 0.3, 0.2)
    state = evidence.begin(prior.log().expand(2, 3), (rate,))
    served = []
    for at in range(12):
        here = awake[..., at].T
        weights = evidence.serve(state, here)
        served.append(-(weights - loss[..., at].T).logsumexp(-1))
        state = evidence.update(
            state, evidence.gains(-loss[..., at].T, here), here, (rate,), prior.log().expand(2, 1, 3)
        )
    assert_close(mixture_loss(loss, prior, awake, rate), torch.stack(served, -1), rtol=1e-12, atol=1e-12)


def test_what_certificates_allow_is_the_price_of_staying_with_one_expert():
    """Against the base alone, with one rate; four rates side by side cost at most log 4 more than the best."""
    share, prior, tokens = 0.1, 0.9, 5
    loss = one_possible([0] * tokens, 2)
    y = torch.full_like(loss, math.log(share / (1 - share)))
    _, bound = statement("switching").evaluate(loss, y, double(prior, 1 - prior))
    rule = evidence.Rule(restarts=(share,))
    assert bound.item() == pytest.approx(evidence.regret_allowed(rule, prior, tokens), rel=1e-12)
    several = evidence.Rule(restarts=(0.0, 0.001, 0.01, share))
    assert evidence.regret_allowed(several, prior, tokens) <= -math.log(prior) + math.log(4)
