"""Who is awake, their scores and the law that is served, against dense sums in double precision."""

import math

import pytest
import torch
from torch.testing import assert_close

from tether.causal.action import Action
from tether.causal.experts import FEW, TINY, Experts, Scores, fired

CLASSES = 40


def experts(entry, size=4, generator=None):
    """Experts in the contexts of a table of who is awake, numbered context by context, laws at random."""
    awake = torch.tensor(entry).bool()
    count, width = awake.shape
    numbers = torch.full((count, width), -1, dtype=torch.long)
    numbers[:, 0] = torch.arange(count)
    others = awake[:, 1:].nonzero()
    # In an order that is not that of the contexts.
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(5))
    others = others[order]
    numbers[others[:, 0], others[:, 1] + 1] = torch.arange(count, count + len(others))
    row = torch.cat([torch.arange(count), others[:, 0]])
    return Experts(
        row=row,
        expert=torch.cat([torch.zeros(count, dtype=torch.long), others[:, 1] + 1]),
        loc=torch.randn(len(row), size, generator=generator),
        log_scale=torch.randn(len(row), size, generator=generator),
        entry=numbers,
    )


TABLE = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0]]


def log_shares(awake, generator, spread=3.0):
    drawn = spread * torch.randn(awake.shape, generator=generator, dtype=torch.float64)
    return drawn.masked_fill(~awake, -math.inf).log_softmax(-1)


def scores(found, base, moved):
    return Scores(found, base, moved)


def dense(found, base, moved, log_weights):
    """log q of every class by log-sum-exp over experts, float64."""
    laws = torch.cat([base, moved]).double().log_softmax(-1)
    result = torch.full(base.shape, -math.inf, dtype=torch.float64)
    for entry, (row, number) in enumerate(zip(found.row.tolist(), found.expert.tolist(), strict=True)):
        result[row] = torch.logaddexp(result[row], log_weights[row, number] + laws[entry])
    return result


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0, 3000.0])
@pytest.mark.parametrize("weights", [1.0, 300.0])
def test_what_is_served_is_the_mixture_also_of_classes_that_nobody_expects(generator, spread, weights):
    found = experts(TABLE, generator=generator)
    drawn = spread * torch.randn(len(found.row), CLASSES, generator=generator)
    base, moved = drawn[:6], drawn[6:]
    log_weights = log_shares(found.awake, generator, weights)
    served = scores(found, base, moved).served(log_weights)
    assert served.dtype == torch.float32
    log_norm = base.double().logsumexp(-1, keepdim=True)
    expected = dense(found, base, moved, log_weights)
    # Half a unit of the sizes that meet: a score, its normaliser, a log weight.
    room = 4e-7 * (1 + 3 * drawn.abs().max() + log_weights[found.awake].abs().max())
    assert float((served.double() - log_norm - expected).abs().max()) < room
    if spread >= 60:
        assert float(expected.exp().min()) < TINY
    # Alone, the base's own, bit for bit.
    assert torch.equal(served[[1, 4]], base[[1, 4]])
    assert bool(served.isfinite().all())


def test_a_class_that_is_impossible_for_everyone_stays_so(generator):
    found = experts(TABLE, generator=generator)
    drawn = torch.randn(len(found.row), CLASSES, generator=generator)
    drawn[:, 7] = -math.inf
    drawn[:6, 8] = -math.inf  # for the base alone
    log_weights = log_shares(found.awake, generator)
    served = scores(found, drawn[:6], drawn[6:]).served(log_weights)
    expected = dense(found, drawn[:6], drawn[6:], log_weights) + drawn[:6].double().logsumexp(
        -1, keepdim=True
    )
    assert_close(served.double(), expected, rtol=1e-5, atol=1e-5)
    assert not bool(served.isnan().any())
    assert bool((served[:, 7] == -math.inf).all())
    assert bool(served[[0, 2, 3, 5], 8].isfinite().all())


def test_half_precision_scores_are_mixed_in_single(generator):
    found = experts(TABLE, generator=generator)
    drawn = torch.randn(len(found.row), CLASSES, generator=generator).mul(3).bfloat16()
    log_weights = log_shares(found.awake, generator)
    served = scores(found, drawn[:6], drawn[6:]).served(log_weights)
    expected = dense(found, drawn[:6], drawn[6:], log_weights) + drawn[:6].double().logsumexp(
        -1, keepdim=True
    )
    assert_close(served.double(), expected, rtol=1e-5, atol=1e-5)


def test_log_probabilities_and_normalisers(generator):
    found = experts(TABLE, generator=generator)
    drawn = 5 * torch.randn(len(found.row), CLASSES, generator=generator)
    made = scores(found, drawn[:6], drawn[6:])
    tokens = torch.randint(CLASSES, (6,), generator=generator)
    own = drawn.double().log_softmax(-1)
    expected = torch.full((6, 4), -math.inf, dtype=torch.float64)
    expected[:, 0] = 0
    excess = torch.zeros(6, 4, dtype=torch.float64)
    norms = drawn.double().logsumexp(-1)
    for entry, (row, number) in enumerate(zip(found.row.tolist(), found.expert.tolist(), strict=True)):
        excess[row, number] = norms[entry] - norms[row]
        if row not in (1, 4):
            expected[row, number] = own[entry, tokens[row]]
    assert_close(made.log_prob(tokens), expected, rtol=1e-5, atol=1e-5)
    assert_close(made.excess().double(), excess, rtol=1e-5, atol=1e-5)
    assert made.mixed.tolist() == [True, False, True, True, False, True]
    assert_close(made.log_norm[6:].double(), norms[6:], rtol=1e-6, atol=1e-6)
    assert not bool(made.broken.any())
    # Where nobody but the base is awake anywhere there is nothing to say.
    alone = experts([[1, 0, 0]] * 3, generator=generator)
    quiet = scores(alone, drawn[:3], drawn[:0])
    assert torch.equal(quiet.log_prob(tokens[:3]), torch.tensor([[0.0, -math.inf, -math.inf]] * 3).double())
    assert torch.equal(quiet.served(torch.zeros(3, 3)), drawn[:3])
    assert not bool(quiet.excess().any())


def test_laws_that_are_warped_are_warped_each_alone(generator):
    found = experts(TABLE, generator=generator)
    drawn = 2 * torch.randn(len(found.row), CLASSES, generator=generator)
    log_weights = log_shares(found.awake, generator)

    def warp(scores):
        kept = scores >= scores.topk(5, dim=-1).values[:, -1:]
        return (scores / 0.5).masked_fill(~kept, -math.inf)

    served = scores(found, drawn[:6], drawn[6:]).warped(log_weights, warp)
    warped = warp(drawn).double()
    law = dense(found, warped[:6], warped[6:], log_weights)
    expected = law + warped[:6].logsumexp(-1, keepdim=True)
    kept = expected > -math.inf
    assert_close(served[kept].double(), expected[kept], rtol=1e-5, atol=1e-5)
    own = warp(drawn)[[1, 4]]
    assert torch.equal(served[[1, 4]][own > -math.inf], own[own > -math.inf])
    # What everybody cuts off has no probability, and stands in the order of the mixture without any cut.
    assert bool((~kept).any())
    assert float(served[~kept].max()) < -9e3
    assert float(served.softmax(-1)[~kept].max()) == 0
    whole = scores(found, drawn[:6], drawn[6:]).served(log_weights)
    for row in range(6):
        away = ~kept[row]
        assert torch.equal(served[row, away].argsort(), whole[row, away].argsort())
    alone = experts([[1, 0, 0]] * 3, generator=generator)
    quiet = scores(alone, drawn[:3], drawn[:0]).warped(torch.zeros(3, 3), warp)
    assert torch.equal(quiet.softmax(-1), warp(drawn[:3]).softmax(-1))


def test_who_speaks_is_drawn_by_weight_with_the_base_first(generator):
    found = experts(TABLE, generator=generator)
    log_weights = log_shares(found.awake, generator, spread=1.0)
    draws = 4000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    said = torch.stack([found.speaker(log_weights, u.expand(6)) for u in uniform], 1)
    assert torch.equal(found.row[said], torch.arange(6)[:, None].expand(-1, draws))
    numbers = found.expert[said]
    # One after the other, in order, each as often as it weighs, and nobody who sleeps.
    assert bool((numbers.diff(dim=1) >= 0).all())
    frequency = torch.nn.functional.one_hot(numbers, 4).double().mean(1)
    assert_close(frequency, log_weights.exp(), rtol=0, atol=1.5 / draws)
    assert bool((frequency[~found.awake] == 0).all())
    # Whatever rounding leaves is the last one's who is awake.
    short = (log_weights.exp() * (1 - 1e-9)).log()
    last = found.speaker(short, torch.full((6,), 1 - 1e-12, dtype=torch.float64))
    assert found.expert[last].tolist() == [2, 0, 3, 3, 0, 2]
    # The base speaks as long as the number is below its weight.
    base = log_weights[:, 0].exp()
    assert not bool(found.expert[found.speaker(log_weights, base * (1 - 1e-12))].any())
    after = found.expert[found.speaker(log_weights, (base * (1 + 1e-12)).clamp(max=1 - 1e-16))]
    assert after.tolist() == [1, 0, 3, 1, 0, 2]
    # At the edge itself the next one who is awake speaks.
    half = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    edge = experts([[1, 0, 1]], generator=generator)
    assert edge.expert[edge.speaker(half, torch.tensor([0.5], dtype=torch.float64))].tolist() == [2]


def test_whoever_is_put_to_sleep_is_out_and_the_others_stay(generator):
    found = experts(TABLE, generator=generator)
    entries = torch.zeros(len(found.row), dtype=torch.bool)
    out = [(0, 2), (2, 3), (3, 1)]
    for row, number in out:
        entries[found.entry[row, number]] = True
    entries[3] = True  # a base's, which is never put to sleep
    left = found.without(entries)
    awake = found.awake.clone()
    for row, number in out:
        awake[row, number] = False
    assert torch.equal(left.awake, awake)
    assert len(left.row) == len(found.row) - 3
    for row, number in awake.nonzero().tolist():
        old, new = found.entry[row, number], left.entry[row, number]
        assert (int(left.row[new]), int(left.expert[new])) == (row, number)
        assert torch.equal(left.loc[new], found.loc[old])
        assert torch.equal(left.log_scale[new], found.log_scale[old])
    same = found.without(torch.zeros_like(entries))
    assert torch.equal(same.entry, found.entry)


def action(generator, size=4):
    made = Action(size, CLASSES, 0.1, "constant", 1.0, "constant", "raw", True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs())
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator))
    return made


@pytest.mark.parametrize(
    "table", [TABLE, TABLE[:2], TABLE[2:4], TABLE[1:2]], ids=["many", "few", "few and mixed", "alone"]
)
@pytest.mark.parametrize("cap", [None, 0.7])
def test_scores_are_those_of_each_alone(generator, table, cap):
    found, head = experts(table, generator=generator), action(generator)
    head.logit_cap = cap
    assert (len(found.row) <= FEW) == (table is not TABLE)
    made = found.score(head)
    expected = found.loc.double() @ head.weight.detach().double().T + head.bias.detach().double()
    expected = (expected if cap is None else cap * torch.tanh(expected / cap)).float()
    assert_close(made.base, expected[: len(table)], rtol=1e-5, atol=1e-5)
    if len(found.row) > len(table):
        assert_close(made.moved, expected[len(table) :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("table", [TABLE, TABLE[:2]], ids=["many", "few"])
def test_scores_that_are_no_finite_numbers_put_their_expert_to_sleep(generator, table, value):
    found, head = experts(table, generator=generator), action(generator)
    bad = int(found.entry[0, 2])
    found.loc[bad] = value
    made = found.score(head)
    awake = found.awake.clone()
    awake[0, 2] = False
    assert torch.equal(made.experts.awake, awake)
    served = made.served(log_shares(awake, generator))
    assert bool(served.isfinite().all())
    assert bool(made.log_prob(torch.zeros(len(table), dtype=torch.long))[awake].isfinite().all())


def test_the_laws_of_one_vs_rest_are_mixed_by_weight(generator):
    found, head = experts(TABLE, generator=generator), action(generator)
    log_weights = log_shares(found.awake, generator)
    own = head.log_prob(found.loc, found.log_scale.exp()).double()
    expected = torch.full((6, CLASSES), -math.inf, dtype=torch.float64)
    for entry, (row, number) in enumerate(zip(found.row.tolist(), found.expert.tolist(), strict=True)):
        expected[row] = torch.logaddexp(expected[row], own[entry] + log_weights[row, number])
    assert_close(fired(found, head, log_weights).double(), expected, rtol=1e-5, atol=1e-5)
    alone = experts([[1, 0]] * 3, generator=generator)
    assert torch.equal(fired(alone, head, torch.zeros(3, 2)), head.log_prob(alone.loc, alone.log_scale.exp()))


@torch.no_grad()
def test_values_are_those_of_each_and_the_bases_of_who_sleeps(generator):
    found, head = experts(TABLE, generator=generator), action(generator)
    loc, scale = found.values(head)
    own = head.values(found.loc, found.log_scale.exp())
    for row in range(6):
        for number in range(4):
            entry = found.entry[row, number] if found.awake[row, number] else found.entry[row, 0]
            assert torch.equal(loc[row, number], own[0][entry])
            assert torch.equal(scale[row, number], own[1][entry])
    numbers = torch.tensor([0.0, 1e30, -3.0, 1e-3, 5.0, math.nan], dtype=torch.float64)
    gain = found.value_gain(head, numbers)
    assert gain.dtype == torch.float64
    assert bool(gain.isfinite().all())
    assert float(gain.abs().max()) <= 1
    assert not bool(gain[:, 0].any())
    assert not bool(gain[~found.awake].any())
    law = torch.distributions.Cauchy(loc[:5].double(), scale[:5].double())
    density = law.log_prob(head.transform(numbers[:5]).double()[:, None])
    expected = (density - density[:, :1]).clamp(-1, 1)
    assert_close(gain[:5], expected, rtol=1e-4, atol=1e-4)
    # Quantiles of the base alone are its own.
    alone = experts([[1, 0]] * 3, generator=generator)
    low, middle = alone.value_quantiles(head, torch.zeros(3, 2, dtype=torch.float64), (0.25, 0.5))
    own = head.values(alone.loc, alone.log_scale.exp())
    assert_close(middle, own[0], rtol=1e-6, atol=1e-6)
    assert_close(low, own[0] - own[1], rtol=1e-5, atol=1e-5)


def test_who_holds_everything_for_impossible_is_broken_and_the_base_never_is(generator):
    found = experts(TABLE, generator=generator)
    drawn = torch.randn(len(found.row), CLASSES, generator=generator)
    drawn[7], drawn[9, 3], drawn[2] = -math.inf, math.inf, math.nan
    assert scores(found, drawn[:6], drawn[6:]).broken.nonzero().flatten().tolist() == [7, 9]
    # A base with an infinite score is certain of that class, and holds each other one for impossible.
    sure = torch.randn(len(found.row), CLASSES, generator=generator)
    sure[0, 3] = math.inf
    told = scores(found, sure[:6], sure[6:]).log_prob(torch.full((6,), 5))
    assert float(told[0, 0]) == -math.inf
    assert bool(told[0, found.awake[0]][1:].isfinite().all())
    # A base that is no law at all ends in no endless search for others.
    found.loc[0] = math.nan
    made = found.score(action(generator))
    assert torch.equal(made.experts.awake[1:], found.awake[1:])
