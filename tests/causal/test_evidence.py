"""Weights by evidence, against plain probabilities in fractions; every promise of docs/evidence.md, with its limit."""

import itertools
import math
from fractions import Fraction

import mpmath as mp
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tether.causal.choice import choice, choice_gain, spread
from tether.causal.evidence import (
    Rule,
    begin,
    gains,
    onward,
    prior,
    regret_allowed,
    scan,
    serve,
    target,
    update,
)
from tether.errors import ConfigError

INF = math.inf
DOUBLE = torch.float64


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


def everybody(log_prob):
    return torch.ones_like(log_prob, dtype=torch.bool)


def run(log_prob, rule, log_prior, awake=None, written=None):
    """Weights served with before each token of one text, and what each token cost; shape (T, K) and (T,)."""
    awake = everybody(log_prob) if awake is None else awake
    size = len(log_prob)
    start = begin(log_prior, rule.restarts)
    yes, no = torch.ones(1, size, dtype=torch.bool), torch.zeros(1, size, dtype=torch.bool)
    after, _ = scan(
        start[None], gains(log_prob, awake)[None], awake[None], yes, no, rule.restarts, log_prior,
        written=written,
    )  # fmt: skip
    weights = serve(torch.cat([start[None], after[0, :-1]]), awake, rule.floor)
    return weights, -(weights + log_prob.masked_fill(~awake, -INF)).logsumexp(-1)


def regrets(cost, log_prob, awake):
    """How much more was paid than by each expert where it was awake; minus infinity where it paid infinitely much."""
    found = []
    for k in range(log_prob.shape[1]):
        own = log_prob[awake[:, k], k]
        found.append((cost[awake[:, k]] + own).sum() if bool(own.isfinite().all()) else tensor(-INF))
    return torch.stack(found)


# Against plain probabilities


def by_hand(shares, restarts, prob, awake, scored, fresh, written=None, start=None, towards=None, whole=True):
    """The same from the definition, with weights as fractions that add up to one; no logarithm anywhere."""
    rates, experts = range(len(restarts)), range(len(shares))
    begun = [[share / len(restarts) for share in shares] for _ in rates]
    weights, after = start or begun, []
    for t, told in enumerate(prob):
        if t == written and towards is None:
            towards = [[w / sum(row) for w in row] if sum(row) else row for row in weights]
        if fresh[t]:
            weights = begun
        elif scored[t]:
            up = [k for k in experts if awake[t][k]]
            heard = sum(weights[j][k] for j in rates for k in up)
            came = sum(weights[j][k] * told[k] for j in rates for k in up)
            moved = [
                [w * told[k] * heard / came if came and k in up else w for k, w in enumerate(row)]
                for row in weights
            ]
            aim = towards if written is not None and t >= written else [shares] * len(rates)
            weights = [
                [(1 - s) * v + s * sum(row) * aim[j][k] for k, v in enumerate(row)]
                for j, (s, row) in enumerate(zip(restarts, moved, strict=True))
            ]
        if whole and t + 1 == written:
            # The rate that forgets least has seen the whole; where it has no weight left all rates together have.
            least = weights[restarts.index(min(restarts))]
            least = least if sum(least) else [sum(row[k] for row in weights) for k in experts]
            weights = [[w / sum(least) / len(restarts) for w in least] for _ in rates]
        after.append(weights)
    return after, towards


def served_by_hand(weights, awake, floor):
    total = sum(row[k] for row in weights for k, up in enumerate(awake) if up)
    share = [sum(row[k] for row in weights) / total if up else Fraction(0) for k, up in enumerate(awake)]
    return [(1 - floor) * w + (floor if k == 0 else 0) for k, w in enumerate(share)]


def logs(value):
    """Logarithms of nested lists of fractions."""
    if isinstance(value, list):
        return [logs(each) for each in value]
    return float(mp.log(mp.mpf(value.numerator) / value.denominator)) if value else -INF


SIXTEENTHS = st.integers(0, 16).map(lambda n: Fraction(n, 16))
RATES = st.lists(
    st.sampled_from([Fraction(0), Fraction(1, 100), Fraction(1, 4), Fraction(9, 10)]), min_size=1, max_size=3
)


@st.composite
def texts(draw, experts=3, longest=9):
    length = draw(st.integers(1, longest))

    def rows(one, width):
        return draw(st.lists(st.lists(one, min_size=width, max_size=width), min_size=length, max_size=length))

    awake = [[True, *row] for row in rows(st.booleans(), experts - 1)]
    flags = rows(st.booleans(), 2)
    return {
        "prob": rows(SIXTEENTHS, experts),
        "awake": awake,
        "scored": [row[0] or draw(st.booleans()) for row in flags],
        "fresh": [row[1] and draw(st.booleans()) and draw(st.booleans()) for row in flags],
    }


@settings(max_examples=150, deadline=None)
@given(
    text=texts(),
    restarts=RATES,
    written=st.none() | st.integers(0, 9),
    floor=st.sampled_from([Fraction(0), Fraction(1, 7)]),
    whole=st.booleans(),
)
def test_weights_are_those_of_plain_probabilities(text, restarts, written, floor, whole):
    shares = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    after, towards = by_hand(shares, restarts, **text, written=written, whole=whole)
    rates = [float(rate) for rate in restarts]
    log_prior = tensor(logs(shares))
    awake = torch.tensor(text["awake"])
    found, aim = scan(
        begin(log_prior, rates)[None],
        gains(tensor(logs(text["prob"])), awake)[None],
        awake[None],
        torch.tensor(text["scored"])[None],
        torch.tensor(text["fresh"])[None],
        rates,
        log_prior,
        written=written,
        whole=whole,
    )
    assert_close(found[0], tensor(logs(after)), rtol=1e-9, atol=1e-10)
    assert_close(found[0].exp().sum((-2, -1)), torch.ones(len(awake), dtype=DOUBLE), rtol=1e-12, atol=0)
    assert (aim is None) == (towards is None)
    if aim is not None:
        assert_close(aim[0], tensor(logs(towards)), rtol=1e-9, atol=1e-10)
    for weights, state, up in zip(after, found[0], text["awake"], strict=True):
        total = sum(row[k] for row in weights for k in range(3) if up[k])
        expected = served_by_hand(weights, up, floor) if total else [Fraction(1), Fraction(0), Fraction(0)]
        assert_close(
            serve(state, torch.tensor(up), float(floor)), tensor(logs(expected)), rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize("written", [None, 0, 3, 6])
@pytest.mark.parametrize("cut", range(11))
def test_a_text_may_be_cut_anywhere(generator, cut, written):
    rule, log_prior = Rule(restarts=(0.0, 0.05)), prior(0.6, [2, 1])
    log_prob = -3 * torch.rand(2, 10, 4, generator=generator, dtype=DOUBLE)
    awake = torch.rand(2, 10, 4, generator=generator) < 0.7
    awake[..., 0] = True
    gain, scored = gains(log_prob, awake), torch.rand(2, 10, generator=generator) < 0.8
    fresh = torch.zeros(2, 10, dtype=torch.bool)
    fresh[1, 4] = True
    start = begin(log_prior, rule.restarts).expand(2, -1, -1)

    def part(state, first, last, towards):
        pieces = (each[:, first:last] for each in (gain, awake, scored, fresh))
        own = None if written is None or written > last else max(written - first, 0)
        return scan(state, *pieces, rule.restarts, log_prior, towards, own)

    whole, aim = part(start, 0, 10, None)
    one, towards = part(start, 0, cut, None)
    two, towards = part(one[:, -1] if cut else start, cut, 10, towards)
    assert one.shape == (2, cut, 2, 4)
    assert torch.equal(torch.cat([one, two], 1), whole)
    assert (aim is None) == (towards is None) == (written is None)
    assert aim is None or torch.equal(aim, towards)


# 1. Regret


LOSSES = st.sampled_from([0.0, -1e-9, -0.5, -1.0, -7.0, -700.0, -1e4, -INF]) | st.floats(-30, 0)


@st.composite
def likelihoods(draw, sleep=False, longest=25):
    length, experts = draw(st.integers(1, longest)), draw(st.integers(2, 4))
    row = st.lists(LOSSES, min_size=experts, max_size=experts)
    log_prob = tensor(draw(st.lists(row, min_size=length, max_size=length)))
    up = st.lists(st.booleans(), min_size=experts, max_size=experts)
    awake = everybody(log_prob)
    if sleep:
        awake = torch.tensor(draw(st.lists(up, min_size=length, max_size=length)))
        awake[:, 0] = True
    return log_prob, awake


def slack(log_prob):
    return 1e-11 * (1 + log_prob[log_prob.isfinite()].abs().sum())


@settings(max_examples=200, deadline=None)
@given(text=likelihoods(), base=st.sampled_from([1e-6, 0.5, 0.9, 1 - 1e-6]))
def test_nobody_is_regretted_by_more_than_its_share_of_the_prior(text, base):
    log_prob, awake = text
    log_prior = prior(base, [1] * (log_prob.shape[1] - 1))
    _, cost = run(log_prob, Rule(restarts=(0.0,)), log_prior)
    assert not bool(cost.isnan().any())
    # prod q = sum of prior x prod p: not a bound only, the whole loss is known.
    total = -(log_prior + log_prob.sum(0)).logsumexp(-1)
    assert_close(cost.sum(), total, rtol=1e-10, atol=float(slack(log_prob)))
    assert bool((regrets(cost, log_prob, awake) <= -log_prior + slack(log_prob)).all())


def test_the_whole_prior_is_paid_where_the_others_are_nearly_always_wrong():
    log_prior = prior(0.3, [2])
    log_prob = tensor([[-1.0, -50.0, -80.0]] * 20)
    _, cost = run(log_prob, Rule(restarts=(0.0,)), log_prior)
    assert_close(regrets(cost, log_prob, everybody(log_prob))[0], tensor(-math.log(0.3)), rtol=1e-12, atol=0)
    assert regret_allowed(Rule(restarts=(0.0,)), 0.3, 20) == pytest.approx(-math.log(0.3), rel=1e-15)


@settings(max_examples=200, deadline=None)
@given(
    text=likelihoods(sleep=True),
    base=st.sampled_from([0.1, 0.9]),
    restarts=st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.3, 0.99]), min_size=1, max_size=4),
    floor=st.sampled_from([0.0, 0.2]),
    strengths=st.booleans(),
)
def test_regret_stays_below_what_is_allowed_whatever_the_text_who_sleeps_and_the_rates(
    text, base, restarts, floor, strengths
):
    log_prob, awake = text
    others = log_prob.shape[1] - 1
    log_prior = prior(base, [others] if strengths else [1] * others)
    rule = Rule(prior=base, restarts=tuple(restarts), floor=floor)
    weights, cost = run(log_prob, rule, log_prior, awake)
    assert not bool(cost.isnan().any())
    assert bool((weights.exp().sum(-1) - 1).abs().max() < 1e-12)
    for k, regret in enumerate(regrets(cost, log_prob, awake)):
        share = math.exp(log_prior[k])
        assert regret <= regret_allowed(rule, share, len(log_prob), floored=k > 0) + slack(log_prob)


@pytest.mark.parametrize("restarts", [(0.0,), (0.01,), (0.5,), (0.001, 0.01, 0.03, 0.1), (0.0, 0.9)])
@pytest.mark.parametrize("tokens", [1, 2, 60])
@pytest.mark.parametrize("expert", [0, 1, 3])
def test_what_is_allowed_is_paid_where_all_others_hold_the_token_for_impossible(restarts, tokens, expert):
    log_prior, floor = prior(0.7, [1, 2]), 0.25
    log_prob = torch.full((tokens, 4), -INF, dtype=DOUBLE)
    log_prob[:, expert] = -0.5
    share = math.exp(log_prior[expert])
    _, cost = run(log_prob, Rule(restarts=restarts), log_prior)
    allowed = regret_allowed(Rule(restarts=restarts), share, tokens)
    assert float(cost.sum()) - 0.5 * tokens == pytest.approx(allowed, rel=1e-12)
    # With a floor an expert pays for it at every token, and the base does not.
    rule = Rule(restarts=restarts, floor=floor)
    _, cost = run(log_prob, rule, log_prior)
    regret, floored = float(cost.sum()) - 0.5 * tokens, regret_allowed(rule, share, tokens, floored=True)
    assert floored == pytest.approx(allowed - tokens * math.log(1 - floor), rel=1e-12)
    assert regret_allowed(rule, share, tokens) == allowed
    if expert:
        assert regret == pytest.approx(floored, rel=1e-12)
    else:
        assert regret < allowed


def test_what_is_allowed_is_the_formula():
    rule = Rule(restarts=(0.001, 0.01, 0.03, 0.1))
    with mp.workdps(40):
        for share, tokens in itertools.product((0.9, 0.5, 1e-9, 1.0), (1, 2, 1000, 10**6)):
            mean = (
                mp.fsum((1 - mp.mpf(s) + mp.mpf(s) * mp.mpf(share)) ** (tokens - 1) for s in rule.restarts)
                / 4
            )
            expected = -mp.log(mp.mpf(share)) - mp.log(mean)
            assert regret_allowed(rule, share, tokens) == pytest.approx(float(expected), rel=1e-10, abs=1e-12)
    assert regret_allowed(rule, 0.1, 0) == 0
    assert regret_allowed(Rule(floor=0.5), 0.1, 0, floored=True) == 0
    # In the long run s (1 - prior) a token, a tenth of a delta's budget of 0.01, at the rate of 0.01.
    single = Rule(restarts=(0.01,))
    longer = regret_allowed(single, 0.9, 2001) - regret_allowed(single, 0.9, 1001)
    assert longer / 1000 == pytest.approx(0.001, rel=1e-3)


# 2. Switching


@settings(max_examples=100, deadline=None)
@given(
    text=likelihoods(longest=6),
    restarts=st.lists(st.sampled_from([0.0, 0.01, 0.3]), min_size=1, max_size=2, unique=True),
)
def test_the_loss_is_that_of_all_paths_through_the_experts(text, restarts):
    log_prob, _ = text
    length, experts = log_prob.shape
    shares = prior(0.6, [1] * (experts - 1)).exp().tolist()
    _, cost = run(log_prob, Rule(restarts=tuple(restarts)), prior(0.6, [1] * (experts - 1)))
    likelihood = 0
    with mp.workdps(30):
        for s, path in itertools.product(restarts, itertools.product(range(experts), repeat=length)):
            steps = (((1 - s) * (a == b) + s * shares[b]) for a, b in itertools.pairwise(path))
            loss = mp.fsum(mp.mpf(float(log_prob[t, k])) for t, k in enumerate(path))
            likelihood += shares[path[0]] * mp.fprod(steps) * mp.exp(loss) / len(restarts)
        expected = float(-mp.log(likelihood)) if likelihood else INF
    assert float(cost.sum()) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    text=likelihoods(longest=40),
    restarts=st.lists(st.sampled_from([0.001, 0.01, 0.3]), min_size=1, max_size=3, unique=True),
)
def test_no_way_of_switching_is_regretted_by_more_than_its_switches_cost(text, restarts):
    log_prob, _ = text
    experts = log_prob.shape[1]
    log_prior = prior(0.6, [1] * (experts - 1))
    _, cost = run(log_prob, Rule(restarts=tuple(restarts)), log_prior)
    for s in restarts:
        # Least loss plus price over all paths that end in each expert: a start, a switch, a token without one.
        best = -log_prob[0] - log_prior
        for row in log_prob[1:]:
            stay = best - math.log1p(-s)
            switch = best.min() - math.log(s) - log_prior
            best = torch.minimum(stay, switch) - row
        assert float(cost.sum()) <= float(best.min()) + math.log(len(restarts)) + float(slack(log_prob))


def test_a_switch_costs_what_it_is_allowed_to():
    # Two experts that take turns, each impossible in the other's part: regret approaches the bound as shares do 0.
    s, part = 0.05, 10
    log_prior = tensor([1e-4, 1e-4, 1 - 2e-4]).log()
    log_prob = torch.full((4 * part, 3), -INF, dtype=DOUBLE)
    for turn in range(4):
        log_prob[turn * part : (turn + 1) * part, turn % 2] = 0.0
    _, cost = run(log_prob, Rule(restarts=(s,)), log_prior)
    allowed = -4 * math.log(1e-4) - 3 * math.log(s) - (4 * part - 1 - 3) * math.log1p(-s)
    assert float(cost.sum()) <= allowed
    assert float(cost.sum()) == pytest.approx(allowed, rel=1e-4)


def test_several_rates_are_nearly_as_good_as_the_best_of_them(generator):
    log_prior, rates = prior(0.5, [1, 1]), (0.0, 0.01, 0.1, 0.5)
    steady = -torch.rand(400, 3, generator=generator, dtype=DOUBLE) - tensor([0.3, 0.0, 0.3])
    turns = torch.arange(400) // 20 % 2
    switching = torch.where(turns.unsqueeze(-1) == tensor([-1, 0, 1]), -0.1, -3.0).to(DOUBLE)
    best = []
    for log_prob in (steady, switching):
        each = [float(run(log_prob, Rule(restarts=(s,)), log_prior)[1].sum()) for s in rates]
        mixed = float(run(log_prob, Rule(restarts=rates), log_prior)[1].sum())
        assert mixed <= min(each) + math.log(len(rates)) + 1e-9
        assert mixed < sorted(each)[1]
        best.append(each.index(min(each)))
    assert best == [0, 2]


# 3. The leash on every token


@settings(max_examples=150, deadline=None)
@given(text=likelihoods(sleep=True), s=st.sampled_from([0.0, 0.01, 0.5]), floor=st.sampled_from([0.0, 0.1]))
def test_no_token_costs_more_against_the_base_than_its_weight(text, s, floor):
    log_prob, awake = text
    rule, log_prior = Rule(restarts=(s,), floor=floor), prior(0.8, [1] * (log_prob.shape[1] - 1))
    weights, cost = run(log_prob, rule, log_prior, awake)
    lost = cost + log_prob[:, 0]
    fine = log_prob[:, 0].isfinite()
    assert bool((lost <= -weights[:, 0] + slack(log_prob))[fine].all())
    least = max(floor, s * 0.8)
    assert bool((weights[:, 0].exp() >= least * (1 - 1e-12)).all())


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("s", [0.001, 0.3])
def test_the_leash_is_reached(s, floor):
    # The base was wrong by ten thousand nats, and then it alone is right.
    log_prob = tensor([[-1e4, -1.0], [-2.0, -INF]])
    weights, cost = run(log_prob, Rule(restarts=(s,), floor=floor), prior(0.8, [1]))
    least = floor + (1 - floor) * s * 0.8
    assert float(weights[1, 0]) == pytest.approx(math.log(least), rel=1e-12)
    assert float(cost[1]) == pytest.approx(2.0 - math.log(least), rel=1e-12)


def laws(experts, classes, generator, holes=0.0):
    found = torch.randn(experts, classes, generator=generator, dtype=DOUBLE).mul(3).softmax(-1)
    kept = torch.rand(experts, classes, generator=generator) >= holes
    kept[:, 0] = True
    found = found * kept
    return found / found.sum(-1, keepdim=True)


def kl(p, q):
    return (p * torch.where(p > 0, (p / q).log(), 0.0)).sum(-1)


def test_drift_is_at_most_the_weight_of_the_base_allows_and_at_most_the_mean_of_the_parts(generator):
    """Facts 3 and 4, in contexts drawn at random, some classes being impossible for some."""
    state = begin(prior(0.4, [2, 1]), (0.0, 0.1))
    ratios = []
    for number in range(300):
        p = laws(4, 6, generator, holes=0.3 if number % 2 else 0.0)
        awake = torch.rand(4, generator=generator) < 0.7
        awake[0] = True
        weights = serve(state, awake, 0.1 if number % 3 else 0.0)
        share = weights.exp()
        q = share @ p
        drift = kl(p[0], q)
        parts = torch.stack([kl(p[0], each) for each in p])
        assert drift <= -weights[0] + 1e-12
        mean = (share * parts)[awake].sum()
        assert drift <= mean + 1e-12
        assert bool(awake[share > 0].all())
        ratios.append(float(drift / mean) if 0 < mean < INF else 0.0)
        token = torch.multinomial(q, 1, generator=generator).item()
        gain = gains(p[:, token].log(), awake)
        state = update(state, gain, awake, (0.0, 0.1), prior(0.4, [2, 1]))
    assert 0.5 < max(ratios) <= 1 + 1e-9
    # Where the others share no class with the base the first is reached.
    p = tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    weights = serve(begin(prior(0.4, [1]), (0.0,)), torch.tensor([True, True]))
    assert_close(kl(p[0], weights.exp() @ p), -weights[0], rtol=1e-14, atol=0)


# 5. In expectation, over all texts


def all_texts(classes, length, laws_of, rule, log_prior):
    """Expected sum of drifts over every text that the base writes."""
    awake = torch.ones(len(log_prior), dtype=torch.bool)
    todo = [((), 1.0, begin(log_prior, rule.restarts))]
    drift = 0.0
    for _ in range(length):
        following = []
        for prefix, chance, state in todo:
            p = laws_of(prefix)
            drift += chance * float(kl(p[0], serve(state, awake, rule.floor).exp() @ p))
            for x in p[0].nonzero().squeeze(-1).tolist():
                moved = update(state, gains(p[:, x].log(), awake), awake, rule.restarts, log_prior)
                following.append(((*prefix, x), chance * float(p[0, x]), moved))
        todo = following
    assert sum(chance for _, chance, _ in todo) == pytest.approx(1, abs=1e-12)
    return drift


def context_laws(classes, experts, seed):
    known = {}

    def laws_of(prefix):
        if prefix not in known:
            generator = torch.Generator().manual_seed(hash(prefix) % 2**31 + seed)
            known[prefix] = laws(experts, classes, generator)
        return known[prefix]

    return laws_of


@pytest.mark.parametrize(("classes", "length"), [(2, 7), (3, 4)])
@pytest.mark.parametrize("restarts", [(0.0,), (0.05,), (0.0, 0.2)])
def test_on_text_of_the_base_all_drift_together_is_at_most_what_one_text_may_lose(classes, length, restarts):
    rule, log_prior = Rule(prior=0.5, restarts=restarts), prior(0.5, [1, 1])
    drift = all_texts(classes, length, context_laws(classes, 3, 1), rule, log_prior)
    assert 0.1 < drift <= regret_allowed(rule, 0.5, length)
    # Where nobody else expects anything that the base writes all of it is spent.
    drift = all_texts(classes, length, lambda prefix: torch.eye(3, dtype=DOUBLE), rule, log_prior)
    assert drift == pytest.approx(regret_allowed(rule, 0.5, length), rel=1e-12)


@pytest.mark.parametrize("aim", [True, False])
def test_after_a_prompt_the_mean_weights_stay_only_with_the_target(aim):
    log_prior, s = prior(0.9, [1, 1]), 0.2
    awake = torch.ones(3, dtype=torch.bool)
    state = begin(log_prior, (s,))
    for _ in range(3):  # a prompt for the second
        state = update(state, gains(tensor([-3.0, -1.0, -2.0]), awake), awake, (s,), log_prior)
    before = state.exp().sum(0)
    towards, laws_of = target(state) if aim else log_prior, context_laws(3, 3, 11)
    todo = [((), 1.0, state)]
    for step in range(1, 5):
        todo = [
            (
                (*prefix, x),
                chance * float(q[x]),
                update(now, gains(p[:, x].log(), awake), awake, (s,), towards),
            )
            for prefix, chance, now in todo
            for p in [laws_of(prefix)]
            for q in [serve(now, awake).exp() @ p]
            for x in range(3)
        ]
        mean = sum(chance * now.exp().sum(0) for _, chance, now in todo)
        # Without it, the distance to the prior shrinks by the rate at every token.
        expected = before if aim else log_prior.exp() + (1 - s) ** step * (before - log_prior.exp())
        assert_close(mean, expected, rtol=1e-11, atol=1e-13)


def test_towards_the_weights_at_the_end_of_the_given_text_the_base_keeps_its_share():
    """r = weights at the end keeps the leash: w_0 >= s r_0, and at s = 0 an answer is held to those weights."""
    log_prior = prior(0.9, [1])
    given, own = [[-2.0, -1.0]] * 4, [[-1e4, -1.0]] * 5
    weights, _ = run(tensor(given + own), Rule(restarts=(0.1,)), log_prior, written=4)
    end = float(weights[4, 0])
    assert end < math.log(0.9)
    assert_close(weights[5:, 0], torch.full((4,), math.log(0.1) + end, dtype=DOUBLE), rtol=1e-9, atol=0)
    weights, _ = run(tensor(given + own), Rule(restarts=(0.1,)), log_prior)
    assert_close(weights[5:, 0], torch.full((4,), math.log(0.09), dtype=DOUBLE), rtol=1e-9, atol=0)


# 6. Sleep


def test_who_sleeps_keeps_its_weight_and_takes_no_part():
    log_prior, awake = prior(0.5, [1, 1]), torch.tensor([True, True, False])
    state = begin(log_prior, (0.0, 0.0))
    weights = serve(state, awake)
    assert_close(weights.exp(), tensor([2 / 3, 1 / 3, 0]))
    loud = update(state, gains(tensor([-1.0, -3.0, 0.0]), awake), awake, (0.0, 0.0), log_prior)
    assert_close(loud[..., 2], state[..., 2], rtol=0, atol=1e-15)
    assert_close(loud.exp().sum(), tensor(1.0))
    odds = loud[..., 0] - loud[..., 1]
    assert_close(odds, torch.full((2,), math.log(2) + 2, dtype=DOUBLE))
    # Only the base is awake: what comes says nothing.
    alone = torch.tensor([True, False, False])
    assert torch.equal(
        update(state, gains(tensor([-9.0, 0.0, 0.0]), alone), alone, (0.0, 0.0), log_prior), state
    )
    assert torch.equal(serve(state, alone, 0.3).exp(), tensor([1.0, 0.0, 0.0]))
    # A restart is for everyone.
    drawn = update(loud, gains(tensor([-1.0, -1.0, 0.0]), awake), awake, (0.5, 0.5), log_prior)
    assert_close(drawn.exp().sum(0), (loud.exp().sum(0) + log_prior.exp()) / 2)


def test_an_expert_that_never_wakes_changes_nothing(generator):
    log_prob = -4 * torch.rand(50, 3, generator=generator, dtype=DOUBLE)
    awake = everybody(log_prob)
    awake[:, 2] = False
    for restarts in ((0.0,), (0.0, 0.0)):
        weights, cost = run(log_prob, Rule(restarts=restarts), tensor([0.6, 0.2, 0.2]).log(), awake)
        fewer, same = run(log_prob[:, :2], Rule(restarts=restarts), tensor([0.75, 0.25]).log())
        assert_close(cost, same)
        assert_close(weights[:, :2], fewer)
        assert bool((weights[:, 2] == -INF).all())


# A hundred thousand tokens, floats and tokens that nobody expected


def test_a_hundred_thousand_tokens(generator):
    """Bounds and sums hold where logs go down to minus millions; sums of differences lose nothing."""
    length, rule, log_prior = 100_000, Rule(restarts=(0.0, 0.01)), prior(0.5, [1, 1])
    turn = torch.arange(length) // 1000 % 3
    noise = -3 * torch.rand(length, 3, generator=generator, dtype=DOUBLE)
    rows = {
        "alternating": torch.where((torch.arange(length) % 2).unsqueeze(-1) == tensor([0, 1, 0]), -1e4, -0.1),
        "long parts": torch.where(turn.unsqueeze(-1) == torch.arange(3), -0.2, -9.0),
        "random": noise,
        "ties": noise[:, :1].expand(-1, 3),
        "impossible now and then": torch.where(noise < -2.99, -INF, noise),
        "sleeping": noise - tensor([0.0, 5.0, -0.5]),
    }
    log_prob = torch.stack([row.to(DOUBLE) for row in rows.values()])
    awake = everybody(log_prob)
    awake[-1, :, 1:] = torch.rand(length, 2, generator=generator) < 0.4
    start = begin(log_prior, rule.restarts).expand(len(rows), -1, -1)
    yes = torch.ones(len(rows), length, dtype=torch.bool)
    after, _ = scan(start, gains(log_prob, awake), awake, yes, ~yes, rule.restarts, log_prior)
    assert_close(after.logsumexp((-2, -1)), torch.zeros(len(rows), length, dtype=DOUBLE), rtol=0, atol=1e-9)
    weights = serve(torch.cat([start[:, None], after[:, :-1]], 1), awake)
    cost = -(weights + log_prob.masked_fill(~awake, -INF)).logsumexp(-1)
    allowed = [regret_allowed(rule, share, length) for share in (0.5, 0.25, 0.25)]
    for name, row, paid, up in zip(rows, log_prob, cost, awake, strict=True):
        found = regrets(paid, row, up)
        room = 1e-12 * float(row[row.isfinite()].abs().sum())
        assert all(float(r) <= a + room for r, a in zip(found, allowed, strict=True)), name
    # Where all say the same the mixture says it too.
    assert_close(cost[3], -noise[:, 0], rtol=1e-9, atol=1e-9)
    switching = cost[1].sum() - 0.2 * length
    assert switching <= 99 * -math.log(0.01 * 0.25) - length * math.log(0.99) + math.log(2) + 1


def test_a_weight_of_e_to_the_minus_eight_hundred_comes_back():
    log_prior = prior(0.5, [1])
    log_prob = tensor([[-1.0, -3.0]] * 400 + [[-3.0, -1.0]] * 400)
    weights, _ = run(torch.cat([log_prob, log_prob[:1]]), Rule(restarts=(0.0,)), log_prior)
    assert float(weights[400, 1]) == pytest.approx(-800, rel=1e-12)
    assert_close(weights[800], log_prior, rtol=1e-9, atol=0)


def test_a_token_that_nobody_held_for_possible_says_nothing():
    log_prior, awake = prior(0.5, [1, 1]), torch.ones(3, dtype=torch.bool)
    nothing = gains(tensor([-INF, -INF, -INF]), awake)
    assert torch.equal(nothing, torch.zeros(3, dtype=DOUBLE))
    state = begin(log_prior, (0.0,))
    assert torch.equal(update(state, nothing, awake, (0.0,), log_prior), state)
    # Nor does one that only those without any weight expected.
    state = tensor([[-INF, math.log(0.5), math.log(0.5)]])
    gain = gains(tensor([-1.0, -INF, -INF]), awake)
    assert torch.equal(update(state, gain, awake, (0.0,), log_prior), state)
    restarted = update(state, gain, awake, (0.5,), log_prior).exp()
    assert_close(restarted, (state.exp() + log_prior.exp()) / 2)


def test_an_expert_may_expect_what_is_impossible_for_the_base():
    log_prior, awake = prior(0.5, [1, 1]), torch.ones(3, dtype=torch.bool)
    gain = gains(tensor([-INF, -2.0, -3.0]), awake)
    assert_close(gain, tensor([-INF, 0.0, -1.0]))
    state = update(begin(log_prior, (0.0,)), gain, awake, (0.0,), log_prior)
    odds = 1 / (1 + math.exp(-1))
    assert_close(state.exp(), tensor([[0.0, odds, 1 - odds]]))
    # Without restarts it has no weight any more: where all others sleep it speaks all the same.
    alone = torch.tensor([True, False, False])
    for floor in (0.0, 0.2):
        assert_close(serve(state, alone, floor).exp(), tensor([1.0, 0.0, 0.0]))
    again = update(state, gains(tensor([-1.0, 0.0, 0.0]), alone), alone, (0.0,), log_prior)
    assert torch.equal(again, state)


def test_a_rate_without_any_weight_stays_without():
    log_prior, awake, rates = prior(0.5, [1]), torch.ones(2, dtype=torch.bool), (0.0, 0.1)
    state = begin(log_prior, rates)
    for told in ([-INF, -1.0], [-1.0, -INF]):
        state = update(state, gains(tensor(told), awake), awake, rates, log_prior)
    assert bool((state[0] == -INF).all())
    aim = target(state)
    assert_close(aim[1].exp().sum(), tensor(1.0))
    later = update(state, gains(tensor([-1.0, -2.0]), awake), awake, rates, aim)
    assert bool((later[0] == -INF).all())
    assert_close(later.exp().sum(), tensor(1.0))


def test_own_text_begins_with_all_rates_together_where_the_slowest_has_no_weight_left():
    log_prior, awake, rates = prior(0.5, [1]), torch.ones(2, dtype=torch.bool), (0.0, 0.5)
    state = begin(log_prior, rates)
    for told in ([-1.0, -INF], [-INF, -1.0]):
        state = update(state, gains(tensor(told), awake), awake, rates, log_prior)
    assert bool((state[0] == -INF).all())
    # By hand: the second rate gave the other expert 1/8 back after the first token, and the base 1/4 after the next.
    assert_close(onward(state, rates).exp(), tensor([[0.125, 0.375]] * 2))


# Parts


def test_gains_are_differences_to_the_base():
    awake = torch.tensor([True, True, False])
    assert torch.equal(gains(tensor([-3.0, -1.0, -9.0]), awake), tensor([0.0, 2.0, 0.0]))
    assert gains(torch.tensor([-3.0, -1.0, -9.0]), awake).dtype == DOUBLE
    assert torch.equal(gains(tensor([-3.0, -INF, -9.0]), awake), tensor([0.0, -INF, 0.0]))
    # Who sleeps is no reference, however well it would have done.
    assert torch.equal(gains(tensor([-INF, -2.0, 0.0]), awake), tensor([-INF, 0.0, 0.0]))
    assert torch.equal(gains(tensor([-INF, -INF, 0.0]), awake), tensor([0.0, 0.0, 0.0]))


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-1e3, 0), text=likelihoods(longest=5))
@example(shift=-1e3, text=(tensor([[-1.0, -2.0]]), None))
def test_only_differences_count(shift, text):
    log_prob, _ = text
    rule, log_prior = Rule(), prior(0.9, [1] * (log_prob.shape[1] - 1))
    one, _ = run(log_prob, rule, log_prior)
    two, _ = run(log_prob + shift, rule, log_prior)
    assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_prior_is_divided_by_domain_then_by_strength():
    assert_close(prior(0.9, [2, 1, 4]).exp(), tensor([0.9, *[0.1 / 6] * 2, 0.1 / 3, *[0.1 / 12] * 4]))
    assert prior(0.9, [1]).dtype == DOUBLE
    start = begin(prior(0.9, [2, 1]), (0.1, 0.2, 0.0))
    assert start.shape == (3, 4)
    assert_close(start.exp().sum(0), prior(0.9, [2, 1]).exp())
    assert torch.equal(start[0], start[2])


def test_the_gates_choice_has_half_of_what_the_base_leaves():
    assert_close(prior(0.6, [1, 2], choice=True).exp(), tensor([0.6, 0.1, 0.05, 0.05, 0.2]))


def random_choice(generator, size, experts):
    awake = torch.rand(size, experts, generator=generator) < 0.5
    awake[:, 0] = True
    density = 40 * torch.randn(size, experts, generator=generator, dtype=DOUBLE)
    return awake, density


def test_the_gates_choice_is_the_posterior_of_those_awake(generator):
    awake, density = random_choice(generator, 200, 4)
    found = choice(density, awake)
    for row in range(200):
        up = [k for k in range(1, 4) if awake[row, k]]
        total = sum(mp.exp(mp.mpf(float(density[row, k]))) for k in up)
        for k in range(4):
            expected = mp.exp(mp.mpf(float(density[row, k]))) / total if k in up else 0
            assert float(found[row, k].exp()) == pytest.approx(float(expected), rel=1e-12)
    assert bool((~awake[:, 1:].any(1)).any())
    # Very unlikely everywhere is no reason to say nothing.
    assert_close(choice(density - 1e6, awake), found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_what_the_gates_choice_weighs_is_handed_to_those_it_consists_of(generator, floor):
    """Mixing K experts and the choice gives the same law as the K experts with the weights handed on."""
    awake, density = random_choice(generator, 300, 4)
    shares = choice(density, awake)
    log_prob = torch.log_softmax(2 * torch.randn(300, 4, 5, generator=generator, dtype=DOUBLE), -1)
    some = awake[:, 1:].any(-1, keepdim=True)
    state = torch.randn(300, 2, 5, generator=generator, dtype=DOUBLE)
    state = state - state.logsumexp((-2, -1), keepdim=True)
    weights = serve(state, torch.cat([awake, some], -1), floor)
    chosen = (shares.exp().unsqueeze(-1) * log_prob.exp()).sum(1)
    law = (weights[:, :4].exp().unsqueeze(-1) * log_prob.exp()).sum(1) + weights[:, 4:].exp() * chosen
    handed = spread(weights, shares)
    assert_close((handed.exp().unsqueeze(-1) * log_prob.exp()).sum(1), law)
    assert_close(handed.exp().sum(-1), torch.ones(300, dtype=DOUBLE))
    assert bool((handed[~awake] == -INF).all())
    assert_close(handed[:, 0], weights[:, 0])
    # What a token says of the choice is what its own law gave to the token.
    came = gains(log_prob[..., 2], awake)
    own = choice_gain(came, shares)
    assert_close(own[some[:, 0]], (chosen[:, 2].log() - log_prob[:, 0, 2])[some[:, 0]])
    assert bool((own[~some[:, 0]] == 0).all())


def test_the_gates_choice_is_regretted_by_no_more_than_its_share(generator):
    """Whatever the gates say, and a domain that they never choose by no more than its own."""
    rule, size = Rule(prior=0.5), 60
    log_prior = prior(rule.prior, [1, 1, 1], choice=True)
    largest = 0.0
    for _ in range(40):
        awake, density = random_choice(generator, size, 4)
        sharp = torch.rand(1, generator=generator) * 12
        log_prob = torch.log_softmax(sharp * torch.randn(size, 4, 2, generator=generator, dtype=DOUBLE), -1)[
            ..., 0
        ]
        shares = choice(density, awake)
        came = gains(log_prob, awake)
        voters = torch.cat([came, choice_gain(came, shares).unsqueeze(-1)], -1)
        up = torch.cat([awake, awake[:, 1:].any(-1, keepdim=True)], -1)
        _, cost = run(voters + log_prob[:, :1], rule, log_prior, up)
        lost = regrets(cost, voters + log_prob[:, :1], up)
        for k, share in enumerate(log_prior.exp().tolist()):
            allowed = regret_allowed(rule, share, int(up[:, k].sum()))
            assert float(lost[k]) <= regret_allowed(rule, share, size) + 1e-9
            largest = max(largest, float(lost[k]) / allowed)
    assert largest > 0.3


def test_the_floor_is_what_the_base_has_at_least():
    state = begin(tensor([1e-9, 1 - 1e-9]).log(), (0.0,))
    both = torch.tensor([True, True])
    assert_close(serve(state, both, 0.25).exp(), tensor([0.25 + 0.75e-9, 0.75 * (1 - 1e-9)]))
    assert_close(serve(state, both).exp(), tensor([1e-9, 1 - 1e-9]))


def test_tokens_that_are_not_scored_leave_weights_and_a_new_text_begins_with_the_prior():
    log_prior, restarts = prior(0.5, [1]), (0.5,)
    awake, gain = torch.ones(2, 3, 2, dtype=torch.bool), torch.tensor([[[0.0, 3.0]] * 3] * 2, dtype=DOUBLE)
    start = tensor([0.01, 0.99]).log()[None].expand(2, 1, 2)
    scored = torch.tensor([[False, True, False], [True, True, True]])
    fresh = torch.tensor([[False, False, False], [False, True, False]])
    after, towards = scan(start, gain, awake, scored, fresh, restarts, log_prior)
    assert towards is None
    assert torch.equal(after[0, 0], start[0])
    assert not torch.equal(after[0, 1], start[0])
    assert torch.equal(after[0, 2], after[0, 1])
    # What would have been evidence is none for a text that it begins.
    assert torch.equal(after[1, 1], begin(log_prior, restarts))
    expected = update(after[1, 1], gain[1, 2], awake[1, 2], restarts, log_prior)
    assert torch.equal(after[1, 2], expected)
    none, towards = scan(start, gain[:, :0], awake[:, :0], scored[:, :0], fresh[:, :0], restarts, log_prior)
    assert none.shape == (2, 0, 1, 2)
    assert towards is None


def test_given_text_restarts_towards_the_prior_also_where_a_target_is_known():
    log_prior, restarts = prior(0.5, [1]), (0.5,)
    awake, gain = torch.ones(1, 4, 2, dtype=torch.bool), torch.zeros(1, 4, 2, dtype=DOUBLE)
    yes = torch.ones(1, 4, dtype=torch.bool)
    start, towards = tensor([[[0.5, 0.5]]]).log(), tensor([[[0.1, 0.9]]]).log()
    for written, moved in ((None, 4), (2, 2), (0, 0)):
        after, kept = scan(start, gain, awake, yes, ~yes, restarts, log_prior, towards, written)
        assert kept is towards
        assert_close(after[0, :moved].exp(), torch.full((moved, 1, 2), 0.5, dtype=DOUBLE))
        assert bool((after[0, moved:, 0, 0].exp() < 0.45).all())


def test_the_models_own_text_begins_with_what_all_of_the_given_text_supports():
    """Sixty tokens of one expert and four of another: the fast rate has gone over to that one, the slow one has not."""
    log_prior, restarts = prior(0.5, [1]), (0.2, 0.0, 0.01)
    told = tensor([[0.0, 0.5]] * 60 + [[0.0, -2.5]] * 4)
    yes = torch.ones(1, len(told), dtype=torch.bool)
    awake = torch.ones(1, len(told), 2, dtype=torch.bool)
    start = begin(log_prior, restarts)[None]
    last = scan(start, told[None], awake, yes, ~yes, restarts, log_prior, None, len(told), whole=False)[0][
        0, -1
    ]
    found, towards = scan(start, told[None], awake, yes, ~yes, restarts, log_prior, None, len(told))
    assert towards is None  # the next call asks for it
    end = found[0, -1]
    assert float(last.logsumexp(0)[1].exp()) < 0.5
    # By Bayes' rule, from the whole: 60 x .5 - 4 x 2.5 nats for the other expert.
    expected = 1 / (1 + math.exp(-20))
    assert float(end.logsumexp(0)[1].exp()) == pytest.approx(expected, rel=1e-12)
    assert_close(end, begin(end.logsumexp(0), restarts), rtol=1e-12, atol=1e-12)
    assert_close(onward(end, restarts), end, rtol=1e-12, atol=1e-12)
    # Only the last position is another one.
    assert torch.equal(
        found[0, :-1], scan(start, told[None], awake, yes, ~yes, restarts, log_prior)[0][0, :-1]
    )


def test_a_rule_is_read_back_and_an_older_one_is_what_it_was():
    for rule in (
        Rule(),
        Rule(prior=0.2, restarts=(0.1,), floor=0.3, choice=False, hold=5, grace=3, stay=1.5, whole=False),
    ):
        assert Rule.of(rule.described()) == rule
    # Written before there was a choice of the gates, and when who slept fell asleep at once.
    older = {"prior": 0.9, "restarts": [0.0, 0.1], "floor": 0.0}
    assert Rule.of(older) == Rule(
        prior=0.9, restarts=(0.0, 0.1), choice=False, hold=0, grace=0, stay=1.0, whole=False
    )


def test_a_rule_out_of_range_is_refused():
    for base in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="prior"):
            Rule(prior=base)
    for restarts in ((), (1.0,), (0.1, -0.1), (math.nan,), (0.1, 1.5)):
        with pytest.raises(ConfigError, match="restarts"):
            Rule(restarts=restarts)
    for name in ("hold", "grace"):
        with pytest.raises(ConfigError, match=f"{name}=-1"):
            Rule(**{name: -1})
    for stay in (0.9, math.inf, math.nan):
        with pytest.raises(ConfigError, match="stay"):
            Rule(stay=stay)
    for floor in (-0.1, 1.0, math.nan):
        with pytest.raises(ConfigError, match="floor"):
            Rule(floor=floor)
    assert Rule(prior=1e-9, restarts=(0.0, 0.999), floor=0.0) == Rule(prior=1e-9, restarts=(0.0, 0.999))
