import math

import pytest
import torch
from torch.testing import assert_close

from tether.cauchy.functional import from_noise, icdf
from tether.causal import gibbs
from tether.causal.losses import IGNORE
from tether.causal.posterior import effective_sample_size, sample_posterior
from tether.errors import ConfigError, ShapeError

DRAWS = 400_000
COPIES = 64


def make(seed, rows, size, vocab, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    loc = torch.randn(rows, size, generator=source).to(dtype)
    scale = (torch.rand(rows, size, generator=source) + 0.3).to(dtype)
    weight = torch.randn(vocab, size, generator=source).to(dtype)
    return loc, scale, weight, source


def prior(source, *shape):
    return torch.rand(*shape, dtype=torch.float64, generator=source).clamp(min=2.0**-54)


def act(noise, loc, scale, weight, offset=0.0):
    """Scores of each row, (S, R, V), as the model computes them: noise is (S, R or 1, C)."""
    return from_noise(noise, loc, scale).to(weight.dtype) @ weight.T + offset


def bounded(noise):
    """Bounded functions of the noise: (S, ..., C) -> (S, F)."""
    t = icdf(noise, torch.zeros_like(noise), torch.ones_like(noise)).flatten(1)
    flat = noise.flatten(1)
    pair = (flat[:, :1] * flat[:, 1:2],) if flat.shape[1] > 1 else ()
    far = (t.abs() > 3).double()
    return torch.cat([flat, flat.square(), torch.sin(t), (t > 1).double(), far, *pair], 1)


def agree(draws, reference, law=None):
    """Means over chains (S, K, C) match a reference (D, F), or its exact law, within 4 standard errors."""
    chains = torch.stack([bounded(draws[:, k]) for k in range(draws.shape[1])], 1)
    if chains.shape[1] > 1:  # independent chains: their spread is the error, whatever the autocorrelation
        error = chains.mean(0).var(0) / chains.shape[1]
    else:
        moving = chains[:, 0].var(0) > 0  # an event may never have happened, if it is rare enough
        worth = effective_sample_size(chains[:, 0])[moving].min()
        assert float(worth) > 100
        error = torch.maximum(chains[:, 0].var(0), reference.var(0)) / worth
    if law is None:
        error = error + reference.var(0) / len(reference)
        expected = reference.mean(0)
    else:
        expected = (reference * law[:, None]).sum(0)
    distance = (chains.mean((0, 1)) - expected).abs() / error.sqrt().clamp(min=1e-5)
    assert float(distance.max()) < 4, distance


def check_rejection(post, noise, kept):
    """Compare chains with the prior draws (D, C) that act as observed; kept is (D, distinct positions)."""
    copies = post.noise.shape[1] // kept.shape[1]
    for place in range(kept.shape[1]):
        reference = noise[kept[:, place]]
        assert len(reference) > 1000
        agree(post.noise[:, place * copies : (place + 1) * copies], bounded(reference))


def copied(*tensors):
    """Repeat each position, to run independent chains of the same posterior side by side."""
    return [tensor.repeat_interleave(COPIES, 0) for tensor in tensors]


@pytest.mark.parametrize("candidates", [6, 2])
def test_argmax_posterior_matches_rejection(candidates, generator):
    loc, scale, weight, source = make(1, 4, 3, 6)
    noise = prior(source, DRAWS, 1, 3)
    winners = act(noise, loc, scale, weight).argmax(-1)
    # At each position a class that wins in a few percent of the draws: not where loc already is.
    shares = torch.stack([(winners == k).double().mean(0) for k in range(6)], 1)
    tokens = torch.where(shares > 0.02, shares, torch.inf).argmin(1)
    laws, said = copied(loc, scale), *copied(tokens)
    post = sample_posterior(
        *laws, weight, tokens=said, samples=300, burn_in=200, candidates=candidates, generator=generator
    )
    assert torch.equal(act(post.noise, *laws, weight).argmax(-1), said.expand(300, -1))
    check_rejection(post, noise[:, 0], winners == tokens)
    if candidates == 6:
        assert float(post.acceptance.min()) > 0.999
    else:
        assert float(post.acceptance.mean()) < 0.99  # the look at all constraints had work to do
    assert bool(post.value_acceptance.isnan().all())


def test_bias_and_threshold_move_the_argmax(generator):
    loc, scale, weight, source = make(2, 2, 2, 4)
    bias, threshold = torch.randn(4, generator=source), torch.randn(2, 4, generator=source)
    noise = prior(source, DRAWS, 1, 2)
    winners = act(noise, loc, scale, weight, bias - threshold).argmax(-1)
    tokens = winners[7]
    assert not torch.equal(tokens, (loc @ weight.T).argmax(-1))
    *laws, said, level = copied(loc, scale, tokens, threshold)
    post = sample_posterior(
        *laws, weight, tokens=said, bias=bias, threshold=level, samples=300, burn_in=100, generator=generator
    )
    assert torch.equal(act(post.noise, *laws, weight, bias - level).argmax(-1), said.expand(300, -1))
    check_rejection(post, noise[:, 0], winners == tokens)


@pytest.mark.parametrize("candidates", [5, 2])
def test_shared_posterior_matches_rejection(candidates, generator):
    loc, scale, weight, source = make(3, 3, 3, 5)
    noise = prior(source, DRAWS, 1, 3)
    winners = act(noise, loc, scale, weight).argmax(-1)
    tokens = winners[3]
    together = (winners == tokens).all(-1, keepdim=True)
    alone = (winners == tokens).double().mean(0)
    assert float(together.double().mean()) < 0.8 * float(alone.min())  # the positions constrain each other
    post = sample_posterior(
        loc,
        scale,
        weight,
        tokens=tokens,
        shared=True,
        samples=2000,
        candidates=candidates,
        generator=generator,
    )
    assert post.noise.shape == (2000, 1, 3)
    assert torch.equal(act(post.noise, loc, scale, weight).argmax(-1), tokens.expand(2000, 3))
    check_rejection(post, noise[:, 0], together)


@pytest.mark.parametrize("candidates", [4, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_ovr_posterior_matches_rejection(candidates, shared, generator):
    loc, scale, weight, source = make(4, 2, 3, 4)
    noise = prior(source, DRAWS, 1, 3)
    decided = act(noise, loc, scale, weight, -0.3) > 0
    fired = decided[11]
    kept = (decided == fired).all(-1)
    if shared:
        kept = kept.all(-1, keepdim=True)
    *laws, said = (loc, scale, fired) if shared else copied(loc, scale, fired)
    samples = 3000 if shared else 300
    post = sample_posterior(
        *laws,
        weight,
        fired=said,
        threshold=0.3,
        shared=shared,
        samples=samples,
        burn_in=100,
        candidates=candidates,
        generator=generator,
    )
    assert torch.equal(act(post.noise, *laws, weight, -0.3) > 0, said.expand(samples, -1, 4))
    check_rejection(post, noise[:, 0], kept)


def line_reference(loc, scale, weight, value_weight, target, token, points=200_000):
    """Noise on a grid of the line w . u = target in two dimensions, and its weights under the posterior."""
    # The first coordinate's noise is uniform a priori; the second follows from the value.
    first = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    t = icdf(first, torch.zeros_like(first), torch.ones_like(first))
    u = loc[0] + scale[0] * t
    other = ((target - value_weight[0] * u) / value_weight[1] - loc[1]) / scale[1]
    both = torch.stack([u, loc[1] + scale[1] * other], 1)
    density = 1 / (1 + other.square())
    if token is not None:
        density = density * ((both @ weight.T).argmax(1) == token)
    return torch.stack([first, torch.atan(other) / math.pi + 0.5], 1), density / density.sum()


@pytest.mark.parametrize("token", [None, 0, 1])
def test_value_posterior_matches_integration_along_the_line(token, generator):
    loc, scale, weight, _ = make(5, 1, 2, 3, torch.float64)
    value_weight = torch.tensor([1.3, -0.7], dtype=torch.float64)
    target = loc[0] @ value_weight + 6.0
    noise, law = line_reference(loc[0], scale[0], weight, value_weight, target, token)
    assert bool(law.isfinite().all())
    *laws, values = copied(loc, scale, target[None])
    post = sample_posterior(
        *laws,
        weight,
        tokens=None if token is None else torch.full((COPIES,), token),
        values=values,
        value_weight=value_weight,
        samples=300,
        generator=generator,
    )
    agree(post.noise, bounded(noise), law)
    got = from_noise(post.noise, *laws) @ value_weight
    assert_close(got, values.expand(300, -1), rtol=1e-12, atol=1e-12)
    assert 0.2 < float(post.value_acceptance.mean()) < 1


@pytest.mark.parametrize("shared", [False, True])
def test_value_posterior_matches_a_thin_slab(shared, generator):
    loc, scale, weight, source = make(6, 2, 3, 4)
    value_weight = torch.randn(3, generator=source)
    bias = 0.4
    noise = prior(source, 2_000_000, 1, 3)
    values = from_noise(noise, loc, scale) @ value_weight.double() + bias
    winners = act(noise, loc, scale, weight).argmax(-1)
    tokens, observed = winners[2], values[2]
    mask = torch.tensor([True, False])
    kept = (winners == tokens) & (((values - observed).abs() < 0.02) | ~mask)
    if shared:
        kept = kept.all(-1, keepdim=True)
    numbers = torch.where(mask, observed, torch.nan).float()
    parts = (loc, scale, tokens, numbers, mask)
    *laws, said, numbers, seen = parts if shared else copied(*parts)
    samples = 3000 if shared else 300
    post = sample_posterior(
        *laws,
        weight,
        tokens=said,
        values=numbers,
        value_mask=seen,
        value_weight=value_weight,
        value_bias=bias,
        shared=shared,
        samples=samples,
        burn_in=100,
        candidates=3,
        generator=generator,
    )
    check_rejection(post, noise[:, 0], kept)
    assert torch.equal(act(post.noise, *laws, weight).argmax(-1), said.expand(samples, -1))
    got = (from_noise(post.noise, *laws) @ value_weight.double() + bias)[:, seen]
    assert_close(got, numbers[seen].double().expand(samples, -1), rtol=1e-9, atol=1e-9)
    assert bool((post.value_acceptance.isnan() == (~seen if not shared else torch.tensor([False]))).all())


def test_several_values_share_one_noise(generator):
    loc, scale, weight, source = make(7, 2, 3, 4)
    value_weight = torch.randn(3, generator=source)
    noise = prior(source, 4_000_000, 1, 3)
    values = from_noise(noise, loc, scale) @ value_weight.double()
    winners = act(noise, loc, scale, weight).argmax(-1)
    tokens, observed = winners[5], values[5].float()
    kept = (winners == tokens).all(-1) & ((values - observed).abs() < 0.1).all(-1)
    post = sample_posterior(
        loc,
        scale,
        weight,
        tokens=tokens,
        values=observed,
        value_weight=value_weight[None],
        shared=True,
        samples=3000,
        generator=generator,
    )
    check_rejection(post, noise[:, 0], kept.unsqueeze(-1))
    got = from_noise(post.noise, loc, scale) @ value_weight.double()
    assert_close(got, observed.double().expand(3000, 2), rtol=1e-9, atol=1e-9)


def test_effective_sample_size_predicts_the_spread_of_chain_means(generator):
    loc, scale, weight, _ = make(1, 1, 3, 6)
    laws, said = copied(loc, scale), torch.full((COPIES,), int((loc @ weight.T).argmax()))
    post = sample_posterior(*laws, weight, tokens=said, samples=500, generator=generator)
    predicted = (post.noise.var(0) / post.effective_sample_size).mean(0)
    assert_close(post.noise.mean(0).var(0) / predicted, torch.ones(3, dtype=torch.float64), rtol=0.6, atol=0)


def test_unobserved_positions_keep_the_prior(generator):
    loc, scale, weight, _ = make(8, 2, 2, 4)
    *laws, said = copied(loc, scale, torch.tensor([IGNORE, 1]))
    post = sample_posterior(
        *laws, weight, tokens=said, samples=300, burn_in=1, candidates=2, generator=generator
    )
    agree(post.noise[:, :COPIES], bounded(prior(generator, DRAWS, 2)))
    assert bool((post.start_iterations[:COPIES] == 0).all())


@pytest.mark.parametrize("shared", [False, True])
def test_midsize_model_replays_all_it_said(shared, generator):
    loc, scale, weight, source = make(9, 10, 32, 500)
    noise = prior(source, 1 if shared else 10, 32)
    tokens = act(noise, loc, scale, weight).argmax(-1)
    assert int((tokens != (loc @ weight.T).argmax(-1)).sum()) >= 5
    post = sample_posterior(
        loc, scale, weight, tokens=tokens, shared=shared, samples=100, candidates=64, generator=generator
    )
    assert post.noise.shape == (100, 1 if shared else 10, 32)
    assert bool(((post.noise > 0) & (post.noise < 1)).all())
    scores = act(post.noise, loc, scale, weight)
    assert torch.equal(scores.argmax(-1), tokens.expand(100, 10))
    one_by_one = torch.stack([act(post.noise[s], loc, scale, weight).argmax(-1) for s in range(100)])
    assert torch.equal(one_by_one, tokens.expand(100, 10))
    assert float(post.acceptance.min()) > 0.3
    assert float(post.effective_sample_size.median()) > (3 if shared else 10)


def test_far_tails_are_reached_and_replayed(generator):
    """A token that needs t beyond 1e6 on either side, and scales from 1e-6 to 1e6."""
    loc = torch.tensor([[-30.0, 0.0], [30.0, 0.0], [0.0, 0.0]])
    scale = torch.tensor([[1e-6, 1e-6], [1e-6, 1e-6], [1e6, 1e-6]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.1]])
    tokens = torch.tensor([0, 1, 1])
    post = sample_posterior(loc, scale, weight, tokens=tokens, samples=500, generator=generator)
    assert torch.equal(act(post.noise, loc, scale, weight).argmax(-1), tokens.expand(500, 3))
    assert float(post.noise[:, 0, 0].min()) > 1 - 1e-7
    assert float(post.noise[:, 1, 0].max()) < 1e-7


def test_candidates_learn_during_the_burn_in_only(monkeypatch):
    """A chain whose proposals depend on its own past would follow another law."""
    learnt = []
    learn = gibbs.Chain._learn
    monkeypatch.setattr(gibbs.Chain, "_learn", lambda chain, *broken: learnt.append(learn(chain, *broken)))
    loc, scale, weight, _ = make(1, 4, 3, 6)
    tokens = (loc @ weight.T).argmax(-1)
    for burn_in in (0, 50):
        source = torch.Generator().manual_seed(0)
        post = sample_posterior(
            loc, scale, weight, tokens=tokens, samples=50, burn_in=burn_in, candidates=2, generator=source
        )
        assert float(post.acceptance.min()) < 1
        assert bool(learnt) == (burn_in > 0)
        assert len(learnt) <= burn_in


def test_same_generator_same_draws():
    loc, scale, weight, _ = make(10, 3, 4, 9)
    tokens = (loc @ weight.T).argmax(-1)

    def run(seed):
        source = torch.Generator().manual_seed(seed)
        return sample_posterior(loc, scale, weight, tokens=tokens, samples=3, thin=2, generator=source).noise

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_half_precision_weights_are_scored_in_float32(generator):
    loc, scale, weight, _ = make(11, 3, 4, 9)
    half = weight.bfloat16()
    tokens = (loc @ half.float().T).argmax(-1)
    post = sample_posterior(loc, scale, half, tokens=tokens, samples=50, generator=generator)
    assert torch.equal(act(post.noise, loc, scale, half.float()).argmax(-1), tokens.expand(50, 3))


def test_a_token_that_never_wins_is_refused(generator):
    loc, scale, _, _ = make(12, 3, 2, 3)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])  # the last lies between the others
    with pytest.raises(ConfigError, match=r"position 1 \(token 2\): 50 projections"):
        sample_posterior(
            loc,
            scale,
            weight,
            tokens=torch.tensor([0, 2, 1]),
            samples=1,
            start_limit=50,
            generator=generator,
        )


def test_text_no_one_individual_writes_is_refused(generator):
    loc, scale = torch.zeros(2, 1), torch.ones(2, 1)
    weight = torch.tensor([[1.0], [-1.0]])
    options = {"tokens": torch.tensor([0, 1]), "samples": 2, "start_limit": 40, "generator": generator}
    sample_posterior(loc, scale, weight, **options)
    with pytest.raises(ConfigError, match=r"position [01] \(token [01]\).*shared=False"):
        sample_posterior(loc, scale, weight, shared=True, **options)


def test_values_against_the_decision_are_refused(generator):
    loc, scale = torch.zeros(1, 2), torch.ones(1, 2)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    options = {"tokens": torch.tensor([0]), "samples": 2, "start_limit": 40, "generator": generator}
    value = {"values": torch.tensor([-1.0]), "value_weight": torch.tensor([1.0, 0.0])}
    with pytest.raises(ConfigError, match="position 0"):
        sample_posterior(loc, scale, weight, **options, **value)
    with pytest.raises(ConfigError, match="norm 0"):
        sample_posterior(loc, scale, weight, **options, **(value | {"value_weight": torch.zeros(2)}))
    with pytest.raises(ConfigError, match="fewer values than"):
        sample_posterior(
            loc[:, :1],
            scale[:, :1],
            weight[:, :1],
            **options,
            values=torch.tensor([1.0]),
            value_weight=torch.ones(1),
        )


GOOD = {
    "loc": torch.zeros(2, 3),
    "scale": torch.ones(2, 3),
    "weight": torch.eye(3),
    "tokens": torch.tensor([0, 1]),
    "samples": 1,
    "burn_in": 0,
}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"loc": torch.zeros(3)}, ShapeError, "flatten"),
        ({"loc": torch.zeros(0, 3)}, ShapeError, "flatten"),
        ({"scale": torch.ones(3)}, ShapeError, r"scale .* \(2, 3\)"),
        ({"weight": torch.eye(4)}, ShapeError, r"\(2, 4\)"),
        ({"tokens": torch.tensor([0])}, ShapeError, "tokens"),
        ({"tokens": torch.tensor([0.0, 1.0])}, ShapeError, "int64"),
        ({"tokens": torch.tensor([0, 3])}, ConfigError, "0 to 2"),
        ({"tokens": None}, ConfigError, "nothing was observed"),
        ({"fired": torch.ones(2, 3, dtype=torch.bool)}, ConfigError, "both"),
        ({"tokens": None, "fired": torch.ones(2, dtype=torch.bool)}, ShapeError, "fired"),
        ({"bias": torch.zeros(2)}, ShapeError, "bias"),
        ({"threshold": torch.zeros(3, 3)}, ShapeError, "threshold"),
        ({"threshold": math.nan}, ConfigError, "bias, threshold"),
        ({"loc": torch.full((2, 3), math.inf)}, ConfigError, "loc"),
        ({"scale": torch.zeros(2, 3)}, ConfigError, "scales above 0"),
        ({"values": torch.zeros(2)}, ConfigError, "value_weight is missing"),
        ({"value_mask": torch.ones(2, dtype=torch.bool)}, ConfigError, "without values"),
        ({"values": torch.zeros(2), "value_weight": torch.ones(2)}, ShapeError, "value_weight"),
        ({"values": torch.tensor([0.0, math.nan]), "value_weight": torch.ones(3)}, ConfigError, "values"),
        ({"samples": 0}, ConfigError, "samples=0"),
        ({"burn_in": -1}, ConfigError, "burn_in=-1"),
        ({"thin": 0}, ConfigError, "thin=0"),
        ({"candidates": 1}, ConfigError, "candidates=1"),
        ({"start_limit": -1}, ConfigError, "start_limit=-1"),
    ],
)
def test_bad_requests(change, error, match, generator):
    sample_posterior(**GOOD, generator=generator)
    with pytest.raises(error, match=match):
        sample_posterior(**(GOOD | change), generator=generator)


@pytest.mark.parametrize("persistence", [0.0, 0.8])
def test_effective_sample_size_of_an_autoregression(persistence):
    source = torch.Generator().manual_seed(0)
    shocks = torch.randn(20_000, 8, dtype=torch.float64, generator=source)
    draws = [shocks[0]]
    for shock in shocks[1:]:
        draws.append(persistence * draws[-1] + math.sqrt(1 - persistence**2) * shock)
    expected = 20_000 * (1 - persistence) / (1 + persistence)
    got = effective_sample_size(torch.stack(draws))
    assert_close(got.mean(), torch.tensor(expected, dtype=torch.float64), rtol=0.1, atol=0)


def test_effective_sample_size_at_its_ends():
    assert effective_sample_size(torch.full((50, 2), 0.1)).tolist() == [1, 1]
    assert effective_sample_size(torch.tensor([[0.3]])).tolist() == [1]
    alternating = torch.tensor([1.0, -1.0]).repeat(50)[:, None]
    assert effective_sample_size(alternating).tolist() == [100]
    with pytest.raises(ShapeError, match="at least one draw"):
        effective_sample_size(torch.zeros(0, 2))


def test_settled_points_keep_their_values_in_the_far_tail():
    """Noise near 1 names few large t; the value holds all the same."""
    t = torch.tensor([[3e9, 0.2, -0.1], [-3e9, 0.2, 40.0]], dtype=torch.float64)
    normals = torch.tensor([[[1.0, 2.0, 0.5]], [[1.0, 2.0, 0.5]]], dtype=torch.float64)
    targets = (normals @ t.unsqueeze(-1)).squeeze(-1)
    noise, settled = gibbs.settle(t, normals, targets)
    assert torch.equal(settled, icdf(noise, torch.zeros_like(noise), torch.ones_like(noise)))
    assert_close((normals @ settled.unsqueeze(-1)).squeeze(-1), targets, rtol=1e-15, atol=0)
    assert_close(settled[0, 0], t[0, 0], rtol=1e-5, atol=0)
