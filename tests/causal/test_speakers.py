"""Who speaks, abducted with the noise, against draws from the prior that act as observed and closed forms."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from tether.cauchy.functional import from_noise
from tether.causal import speaking, start
from tether.causal.experts import Experts
from tether.causal.gibbs import Chain
from tether.causal.observation import Observation
from tether.causal.posterior import sample_posterior
from tether.causal.speakers import CLEAR, Speakers
from tether.causal.speaking import SpeakingChain
from tether.errors import ConfigError, ShapeError

DRAWS = 1_000_000
COPIES = 128


def make(seed, rows, experts, size, vocab, apart=1.5):
    source = torch.Generator().manual_seed(seed)
    loc = torch.randn(rows, 1, size, generator=source)
    loc = loc + apart * torch.randn(rows, experts, size, generator=source)
    scale = torch.rand(rows, experts, size, generator=source) + 0.3
    weight = torch.randn(vocab, size, generator=source)
    weights = (torch.randn(rows, experts, generator=source, dtype=torch.float64)).softmax(-1)
    return loc, scale, weight, weights.log(), source


def prior(source, loc, scale, log_weights, shared, draws=DRAWS):
    """e, u, who speaks and the U that acts: (D, N), (D, N, C), (D, R), (D, R, C)."""
    rows, _, size = loc.shape
    chains = 1 if shared else rows
    e = torch.rand(draws, chains, dtype=torch.float64, generator=source)
    u = torch.rand(draws, chains, size, dtype=torch.float64, generator=source).clamp(min=2.0**-54)
    ends = log_weights.exp().cumsum(-1)[:, :-1]
    who = (e.expand(-1, rows).unsqueeze(-1) >= ends).sum(-1)
    row = torch.arange(rows)
    t = torch.tan(torch.pi * (u - 0.5)).expand(-1, rows, -1)
    return e, u, who, loc[row, who].double() + scale[row, who].double() * t


def features(e, u, who):
    """Bounded functions of the individual, (..., F): who speaks, e, u, and u of each expert."""
    who = who.double()
    t = torch.tan(torch.pi * (u - 0.5))
    parts = [who, e, e.square(), u.flatten(-1), u.square().flatten(-1), torch.sin(t).flatten(-1)]
    parts += [(u > level).double().flatten(-1) for level in (0.1, 0.25, 0.5, 0.75, 0.9)]
    parts += [(u.flatten(-1).unsqueeze(-1) * who.unsqueeze(-2)).flatten(-2), e * who[..., :1]]
    return torch.cat(parts, -1)


def agree(chains, reference, floor=2e-4):
    """Means of independent chains, (chains, F) each, match draws of the reference, (D, F), within 4.5 errors."""
    error = chains.var(0) / len(chains) + reference.var(0) / len(reference)
    # Floor: e keeps clear of the ends of its cells.
    distance = (chains.mean(0) - reference.mean(0)).abs() / error.sqrt().clamp(min=floor)
    assert float(distance.max()) < 4.5, distance


def check_alone(post, row, e, u, who, kept):
    at = slice(row * COPIES, (row + 1) * COPIES)
    got = features(post.speaker[:, at, None], post.noise[:, at], post.expert[:, at, None]).mean(0)
    chosen = kept[:, row]
    assert int(chosen.sum()) > 1000
    agree(got, features(e[chosen, row, None], u[chosen, row], who[chosen, row, None]))


def copied(*tensors):
    return [None if each is None else each.repeat_interleave(COPIES, 0) for each in tensors]


@pytest.mark.parametrize("candidates", [3, 2])
@pytest.mark.parametrize("apart", [0.3, 3.0])
def test_each_position_alone_matches_rejection(candidates, apart, generator):
    loc, scale, weight, log_weights, source = make(1, 3, 2, 2, 3, apart)
    e, u, who, latent = prior(source, loc, scale, log_weights, shared=False)
    winners = (latent.float() @ weight.T).argmax(-1)
    tokens = winners[5]
    laws = copied(loc, scale, log_weights)
    post = sample_posterior(
        *laws[:2], weight, log_weights=laws[2], tokens=tokens.repeat_interleave(COPIES), samples=150, burn_in=30,
        candidates=candidates, generator=generator,
    )  # fmt: skip
    for row in range(3):
        check_alone(post, row, e, u, who, winners == tokens)


def test_noises_that_do_not_meet_still_have_their_shares(generator):
    """One dimension; class 1 wins in (-1, 1). The intervals of the noise are apart, so nobody else explains it."""
    weight, bias = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([0.0, 1.0, 0.0])
    loc, scale = torch.tensor([[[-4.0], [6.0], [0.0]]]), torch.tensor([[[0.5], [1.0], [9.0]]])
    weights = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    ends = [torch.atan((end - loc[0, :, 0]) / scale[0, :, 0]).double() / math.pi + 0.5 for end in (-1, 1)]
    assert ends[0][0] > ends[1][2]
    assert ends[0][2] > ends[1][1]
    mass = weights[0] * (ends[1] - ends[0])
    laws = [each.expand(COPIES, -1, -1) for each in (loc, scale)]
    post = sample_posterior(
        *laws, weight, log_weights=weights.log().expand(COPIES, -1), bias=bias,
        tokens=torch.ones(COPIES, dtype=torch.long), samples=200, generator=generator,
    )  # fmt: skip
    share = torch.stack([(post.expert == k).double().mean(0) for k in range(3)], -1)
    distance = (share.mean(0) - mass / mass.sum()) / (share.std(0) / COPIES**0.5)
    assert float(distance.abs().max()) < 4
    for k in range(3):  # within an expert the noise is uniform between the ends
        place = ((post.noise[..., 0] - ends[0][k]) / (ends[1][k] - ends[0][k]))[post.expert == k]
        assert_close(place.mean(), torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=0.02)
        assert_close(place.var(), torch.tensor(1 / 12, dtype=torch.float64), rtol=0.05, atol=0)


def several(runs, **options):
    posts = [
        sample_posterior(generator=torch.Generator().manual_seed(seed), **options) for seed in range(runs)
    ]
    return torch.stack([features(p.speaker, p.noise[:, 0], p.expert).mean(0) for p in posts])


@pytest.mark.slow
@pytest.mark.parametrize("few", [8, 2])
def test_one_noise_for_all_matches_rejection(few, monkeypatch):
    monkeypatch.setattr("tether.causal.speaking.FEW", few)
    loc, scale, weight, log_weights, source = make(2, 3, 2, 2, 3)
    e, u, who, latent = prior(source, loc, scale, log_weights, shared=True)
    winners = (latent.float() @ weight.T).argmax(-1)
    tokens = winners[1]
    kept = (winners == tokens).all(-1)
    reference = features(e[kept], u[kept, 0], who[kept])
    assert len(reference) > 1000
    assert float(reference[:, :3].var(0).min()) > 0.01  # at each position several speak
    got = several(
        8, loc=loc, scale=scale, weight=weight, log_weights=log_weights, tokens=tokens, shared=True, samples=120,
        burn_in=20, candidates=2,
    )  # fmt: skip
    agree(got, reference)


@pytest.mark.parametrize(("token", "size"), [(None, 2), (1, 2), (0, 3)])
def test_values_of_positions_alone_match_a_thin_slab(token, size, generator):
    loc, scale, weight, log_weights, source = make(4, 1, 3, size, 3)
    value_weight = torch.randn(size, generator=source)
    e, u, who, latent = prior(source, loc, scale, log_weights, shared=False, draws=4 * DRAWS)
    values = latent @ value_weight.double() - 0.3
    target = values.quantile(0.6) if values.numel() < 1e6 else values[:1000].quantile(0.6)
    kept = (values - target).abs() < 0.02
    tokens = None
    if token is not None:
        kept = kept & ((latent.float() @ weight.T).argmax(-1) == token)
        tokens = torch.full((COPIES,), token)
    laws = copied(loc, scale, log_weights)
    post = sample_posterior(
        *laws[:2], weight, log_weights=laws[2], tokens=tokens, values=target.float().expand(COPIES),
        value_weight=value_weight, value_bias=-0.3, samples=200, burn_in=30, generator=generator,
    )  # fmt: skip
    check_alone(post, 0, e, u, who, kept)
    row = torch.arange(COPIES)
    spoken = [law[row, post.expert] for law in laws[:2]]
    got = from_noise(post.noise, *spoken) @ value_weight.double() - 0.3
    assert_close(got, target.float().double().expand(got.shape), rtol=1e-9, atol=1e-9)


def along_the_line(loc, scale, weight, log_weights, value_weight, tokens, observed, seen, points=100_000):
    """The individuals (e, u, who) with the observed values, on grids of lines in t, and their probabilities."""
    ends = torch.nn.functional.pad(log_weights.exp().cumsum(-1), (1, 0))
    angle = (torch.arange(points, dtype=torch.float64) + 0.5) / points - 0.5
    line = torch.tan(torch.pi * angle)
    found = []
    row = torch.arange(len(loc))
    for who in itertools.product(range(loc.shape[1]), repeat=len(loc)):
        who = torch.tensor(who)
        low, high = ends[row, who].max(), ends[row, who + 1].min()
        if low >= high:
            continue
        here, width = loc[row, who].double(), scale[row, who].double()
        normals = (width * value_weight.double())[seen]
        targets = (observed.double() - here @ value_weight.double())[seen]
        first = torch.linalg.pinv(normals) @ targets
        direction = torch.linalg.svd(normals, full_matrices=True).Vh[-1]
        t = first + line[:, None] * direction
        # The density of t where the values hold: Cauchy, over the volume that the values' gradients span.
        volume = torch.linalg.det(normals @ normals.T).sqrt()
        density = (high - low) / volume * (1 + line.square()) / (torch.pi * (1 + t.square())).prod(-1)
        latent = here + width * t[:, None]
        acts = ((latent.float() @ weight.T).argmax(-1) == tokens).all(-1)
        e = low + (high - low) * ((torch.arange(points) * 0.6180339887498949) % 1)
        u = torch.atan(t) / torch.pi + 0.5
        found.append((features(e[:, None], u, who.expand(points, -1)), density * acts))
    return [torch.cat(column) for column in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("seen", [[True, False], [True, True]])
def test_values_under_one_noise_match_integration_along_the_line(seen):
    seen = torch.tensor(seen)
    size = 1 + int(seen.sum())
    loc, scale, weight, log_weights, source = make(6, 2, 2, size, 3, 0.7)
    value_weight = torch.randn(size, generator=source)
    latent = prior(source, loc, scale, log_weights, shared=True, draws=1000)[-1]
    values = latent @ value_weight.double()
    common = int((values - values.median(0).values).abs().sum(-1).argmin())
    observed, tokens = values[common].float(), (latent[common].float() @ weight.T).argmax(-1)
    individuals, density = along_the_line(
        loc, scale, weight, log_weights, value_weight, tokens, observed, seen
    )
    expected = (individuals * (density / density.sum())[:, None]).sum(0)
    assert 0.05 < float(expected[:2].min()) < float(expected[:2].max()) < 0.95  # at each position both speak
    got = several(
        8, loc=loc, scale=scale, weight=weight, log_weights=log_weights, tokens=tokens, shared=True,
        values=observed, value_mask=seen, value_weight=value_weight, samples=120, burn_in=20,
    )  # fmt: skip
    agree(got, expected.expand(2, -1))


def test_everyone_who_acts_is_told_apart_by_the_served_rule(generator):
    """The number and the noise of each draw, put through the rule that serves, act as observed."""
    loc, scale, weight, log_weights, source = make(7, 6, 4, 8, 40, 0.3)
    log_weights[2, 1] = -torch.inf
    log_weights = log_weights - log_weights.logsumexp(-1, keepdim=True)
    rows, experts = log_weights.shape
    for shared in (False, True):
        latent = prior(source, loc, scale, log_weights, shared, draws=1)[3][0]
        tokens = (latent.float() @ weight.T).argmax(-1)
        post = sample_posterior(
            loc, scale, weight, log_weights=log_weights, tokens=tokens, shared=shared, samples=50, candidates=16,
            generator=generator,
        )  # fmt: skip
        number = torch.arange(rows * experts)
        entry = number.view(rows, experts).masked_fill(log_weights == -torch.inf, -1)
        flat = loc.flatten(0, 1), scale.flatten(0, 1).log()
        rule = Experts(
            row=number // experts, expert=number % experts, loc=flat[0], log_scale=flat[1], entry=entry
        )
        for e, u, who in zip(post.speaker, post.noise, post.expert, strict=True):
            at = rule.speaker(log_weights, e.expand(rows))
            assert torch.equal(at % experts, who)
            acts = from_noise(u, flat[0][at], scale.flatten(0, 1)[at]).float() @ weight.T
            assert torch.equal(acts.argmax(-1), tokens)
        assert len(post.expert[:, 2].unique()) > 1
        assert not bool((post.expert[:, 2] == 1).any())


@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_only_those_who_act_as_observed_are_asked_to_speak(shared, valued, generator, monkeypatch):
    """Whoever is chosen speaks: nothing has to be undone, and few of those who could be chosen act so."""
    asked, kept, jumps = [], [], SpeakingChain._move

    def move(chain, chosen, points):
        others = chosen != chain.cell
        jumps(chain, chosen, points)
        asked.append(int(others.sum()))
        kept.append(int((others & (chosen == chain.cell)).sum()))

    monkeypatch.setattr(SpeakingChain, "_move", move)
    loc, scale, weight, log_weights, source = make(8, 3, 3, 4, 12)
    latent = prior(source, loc, scale, log_weights, shared, draws=1)[3][0]
    options = {"tokens": (latent.float() @ weight.T).argmax(-1)}
    if valued:
        value_weight = torch.randn(4, generator=source)
        values = (latent @ value_weight.double()).float()
        options |= {"values": values, "value_weight": value_weight, "value_mask": torch.arange(3) == 1}
    sample_posterior(
        loc, scale, weight, log_weights=log_weights, shared=shared, samples=60, generator=generator, **options
    )
    assert sum(asked) > 10
    assert kept == asked


@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_who_would_not_act_as_observed_does_not_speak(shared, valued, generator, monkeypatch):
    """Whatever a jump proposes, what the model itself would not say again is refused, and the chain stays as it was."""
    refused, jumps = [], SpeakingChain._move

    def move(chain, chosen, points):
        jumps(chain, chosen, points)
        refused.append(bool((chosen != chain.cell).any()))
        # The noise goes on under the law of who speaks now, and so do the values.
        assert torch.equal(chain.chain._polytope.loc, chain._law(chain.cell)[0].loc)
        assert torch.equal(chain.chain._targets, chain._targets[chain._chains, chain.cell])

    monkeypatch.setattr(SpeakingChain, "_holds", lambda chain, points, worth, row: worth)
    monkeypatch.setattr(SpeakingChain, "_move", move)
    loc, scale, weight, log_weights, source = make(8, 3, 3, 4, 12)
    latent = prior(source, loc, scale, log_weights, shared, draws=1)[3][0]
    tokens = (latent.float() @ weight.T).argmax(-1)
    options = {"tokens": tokens, "shared": shared, "samples": 60, "generator": generator}
    if valued:
        value_weight = torch.randn(4, generator=source)
        values = (latent @ value_weight.double()).float()
        options |= {"values": values, "value_weight": value_weight, "value_mask": torch.arange(3) == 1}
    found = sample_posterior(loc, scale, weight, log_weights=log_weights, **options)
    assert sum(refused) > 10
    own = [law.double()[torch.arange(3), found.expert] for law in (loc, scale)]
    said = (from_noise(found.noise, *own) @ weight.double().T).argmax(-1)
    assert torch.equal(said, tokens.expand(60, 3))


def test_cells_are_where_the_same_experts_speak():
    log_weights = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.0, 0.75]], dtype=torch.float64).log()
    law = torch.ones(2, 3, 1)
    together = Speakers.of(law, law, log_weights, 1)
    assert_close(together.low, torch.tensor([[0, 0.25, 0.5]], dtype=torch.float64))
    assert_close(together.high, torch.tensor([[0.25, 0.5, 1]], dtype=torch.float64))
    assert together.expert.tolist() == [[0, 0, 1], [0, 2, 2]]
    alone = Speakers.of(law, law, log_weights, 2)
    assert alone.each == 1
    assert_close(alone.log_share.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    cell = torch.tensor([2])
    assert_close(float(together.inside(cell, torch.tensor([1e-12]))), 0.5 + CLEAR)
    assert_close(float(together.inside(cell, torch.tensor([1 - 1e-12]))), 1 - CLEAR)
    tiny = torch.tensor([[1 - 1e-6, 1e-6]], dtype=torch.float64).log()
    ends = Speakers.of(torch.ones(1, 2, 1), torch.ones(1, 2, 1), tiny, 1)
    assert 1 - 1e-6 < float(ends.inside(torch.tensor([1]), torch.tensor([0.5]))) < 1


def test_a_chain_starts_with_who_is_likeliest_to_have_said_it():
    loc = torch.tensor([[[0.0], [2.0], [5.0]]])
    log_weights = torch.tensor([[0.6, 0.35, 0.05]], dtype=torch.float64).log()
    speakers = Speakers.of(loc, torch.ones_like(loc), log_weights, 1)
    weight, bias = torch.tensor([[1.0], [-1.0]]), torch.tensor([0.0, 1.0])
    for token, expected in ((0, [1, 0, 2]), (1, [0, 1, 2])):
        given = Observation(
            loc=loc[:, 0], scale=torch.ones(1, 1), weight=weight, bias=bias, tokens=torch.tensor([token])
        )
        likely = log_weights[0].exp() * (loc[0] * weight.T + bias).double().softmax(-1)[:, token]
        assert likely.argsort(descending=True).tolist() == expected
        assert speakers.order(given, torch.tensor([0])).tolist() == [expected]


def test_a_start_that_takes_long_is_looked_for_with_the_likeliest_again(generator, monkeypatch):
    loc, scale, weight, log_weights, _ = make(5, 1, 2, 3, 5)
    tokens = (loc[:, 0] @ weight.T).argmax(-1)
    given = Observation(loc=loc[:, 0], scale=scale[:, 0], weight=weight, bias=None, tokens=tokens)
    likeliest = int(Speakers.of(loc, scale, log_weights, 1).order(given, torch.tensor([0]))[0, 0])
    tried = []

    def first_point(polytope, *hyperplanes, limit, **options):
        """Nobody at first, then only the likeliest."""
        who = int((polytope.loc[0] - loc[0]).norm(dim=-1).argmin())
        tried.append((who, limit))
        noise, iterations, failed = start.first_point(polytope, *hyperplanes, limit=limit, **options)
        return noise, iterations, failed if limit > speaking.FIRST_TRIES and who == likeliest else 0 * failed

    monkeypatch.setattr(speaking, "first_point", first_point)
    options = {"tokens": tokens, "log_weights": log_weights, "samples": 1, "generator": generator}
    sample_posterior(loc, scale, weight, **options, start_limit=500)
    assert tried == [
        (likeliest, speaking.FIRST_TRIES),
        (1 - likeliest, speaking.FIRST_TRIES),
        (likeliest, 500),
    ]


def test_the_burn_in_ends_for_the_noise_of_those_who_speak(generator, monkeypatch):
    loc, scale, weight, log_weights, _ = make(9, 3, 2, 3, 5)
    frozen, freeze = [], Chain.freeze
    monkeypatch.setattr(Chain, "freeze", lambda chain: frozen.append(chain) or freeze(chain))
    options = {"tokens": (loc[:, 0] @ weight.T).argmax(-1), "samples": 1, "generator": generator}
    sample_posterior(loc, scale, weight, log_weights=log_weights, **options)
    assert len(frozen) == 1


def test_one_expert_with_all_the_weight_is_the_posterior_of_one_law(generator):
    loc, scale, weight, _, _ = make(9, 3, 2, 3, 5)
    log_weights = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64).log()
    tokens = (loc[:, 0] @ weight.T).argmax(-1)
    options = {"tokens": tokens, "samples": 20}
    many = sample_posterior(loc, scale, weight, log_weights=log_weights, generator=generator, **options)
    assert bool((many.expert == 0).all())
    one = sample_posterior(
        loc[:, 0], scale[:, 0], weight, generator=torch.Generator().manual_seed(0), **options
    )
    assert one.speaker is None
    assert torch.equal(many.noise[0] > 0, one.noise[0] > 0)


def test_bad_requests(generator):
    loc, scale, weight, log_weights, _ = make(9, 3, 2, 3, 5)
    options = {"tokens": torch.zeros(3, dtype=torch.long), "samples": 1, "generator": generator}
    with pytest.raises(ShapeError, match="K experts"):
        sample_posterior(loc[:, 0], scale[:, 0], weight, log_weights=log_weights, **options)
    with pytest.raises(ShapeError, match="K experts"):
        sample_posterior(loc, scale, weight, log_weights=log_weights[:, :1], **options)
    with pytest.raises(ConfigError, match="add up to 1"):
        sample_posterior(loc, scale, weight, log_weights=log_weights + 0.1, **options)
    with pytest.raises(ConfigError, match="sleep"):
        sample_posterior(loc, scale * 0, weight, log_weights=log_weights, **options)
    between = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    options |= {"tokens": torch.tensor([0, 2, 1]), "start_limit": 60}
    for shared in (False, True):
        with pytest.raises(ConfigError, match=r"position 1 \(token 2\)"):
            sample_posterior(loc, scale, between, log_weights=log_weights, shared=shared, **options)
