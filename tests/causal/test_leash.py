"""Nothing that is served drifts further than the leash, and what need not be pulled is left alone."""

import itertools
import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import oracles
import tiny
from tether.cauchy.charts import CHARTS, fuse
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.fused import Fusion
from tether.causal.leash import check_leash, leash_law, no_step, shrink
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.score_leash import leash_scores, location_path, pull_scores
from tether.delta.delta import Delta
from tether.errors import ConfigError

H = 32
LIMITS = (1e-3, 0.5, 8.0)


def moves(count, latent, seed=0, low=-6, high=4):
    """Moves of all sizes, a size a context, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (low + (high - low) * torch.rand(2, count, 1, generator=generator, dtype=torch.float64))
    x, y = torch.randn(2, count, latent, generator=generator, dtype=torch.float64) * size
    return x.clamp(-300, 300), y


def exact_drift(x, y):
    """Drift summed over dimensions, by the oracle's definition."""
    rows = zip(x.tolist(), y.tolist(), strict=True)
    return [float(mp.fsum(oracles.drift(a, b) for a, b in zip(*row, strict=True))) for row in rows]


def served_drift(loc, log_scale, moved_loc, moved_log_scale):
    """Drift between laws as they are stored, by torch's own KL in float64."""
    base = torch.distributions.Cauchy(loc.double(), log_scale.double().exp())
    moved = torch.distributions.Cauchy(moved_loc.double(), moved_log_scale.double().exp())
    return torch.distributions.kl_divergence(base, moved).sum(-1)


def softmax_kl(base, moved):
    p, q = base.double().log_softmax(-1), moved.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("nats", LIMITS)
def test_a_pulled_move_ends_just_below_the_limit(chart, nats):
    x, y = moves(60, 3)
    near_x, near_y, factor = shrink(x, y, nats, chart)
    before, after = exact_drift(x, y), exact_drift(near_x, near_y)
    pulled = [drift > nats for drift in before]
    assert 10 < sum(pulled) < 50
    for over, drift, t, row in zip(pulled, after, factor.tolist(), range(60), strict=True):
        if over:
            assert 0 < t < 1
            assert 0.999 * nats <= drift <= nats
        else:
            assert t == 1
            assert torch.equal(near_x[row], x[row])
            assert torch.equal(near_y[row], y[row])


@pytest.mark.parametrize("chart", ["symmetric", "geodesic", "rootkl"])
def test_pulling_back_is_all_weights_times_one_factor(chart):
    x, y = (part.unflatten(0, (4, 9)) for part in moves(36, 5, seed=1, low=-2, high=1))
    weights = torch.tensor([1.0, 0.5, -0.7, 2.0], dtype=torch.float64)
    fused = fuse(x, y, weights, chart)
    near_x, near_y, factor = shrink(*fused, 0.3, chart)
    assert float(factor.min()) < 0.2
    again = fuse(x, y, weights.unsqueeze(-1) * factor, chart)
    assert_close((near_x, near_y), again, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.floats(-40, 40), st.floats(-8, 8), st.lists(st.floats(1e-9, 1), min_size=2, max_size=6))
def test_on_the_path_of_the_scores_the_latent_drift_falls_with_t(x, power, factors):
    steps = torch.tensor(sorted([*factors, 0.0, 1.0]), dtype=torch.float64)
    wide = torch.full((len(steps), 1), x, dtype=torch.float64)
    near_x, near_y = location_path(wide, torch.full_like(wide, 10.0**power), steps)
    assert_close(near_y[:, 0], steps * 10.0**power)
    drifts = exact_drift(near_x, near_y)
    assert drifts[0] == 0
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(drifts))


def test_the_plain_ray_would_let_the_drift_grow():
    # What the path above is for: (6, 1000), shrunk to a third, drifts further (theory notes, "Weights").
    assert exact_drift(torch.tensor([[2.0]]), torch.tensor([[1000 / 3]])) > exact_drift(
        torch.tensor([[6.0]]), torch.tensor([[1000.0]])
    )


@pytest.mark.parametrize("chart", CHARTS)
def test_no_law_drifts_beyond_the_leash_as_it_is_stored(chart, generator):
    count, latent, nats = 3000, 6, 0.5
    x, y = moves(count, latent, seed=2, low=-8, high=8)
    loc = torch.randn(count, latent, generator=generator) * 10 ** (
        16 * torch.rand(count, 1, generator=generator) - 8
    )
    log_scale = 6 * torch.randn(count, latent, generator=generator)
    law = leash_law(loc, log_scale, x.float(), y.float(), nats, chart)
    drift = served_drift(loc, log_scale, law.loc, law.log_scale)
    assert float(drift.max()) <= nats * (1 + 1e-9)
    pulled = law.factor < 1
    assert 500 < int(pulled.sum()) < 2900
    untouched = loc[~pulled] + log_scale[~pulled].exp() * y.float()[~pulled]
    assert torch.equal(law.loc[~pulled], untouched)
    assert torch.equal(law.log_scale[~pulled], (log_scale + x.float())[~pulled])


def test_what_is_no_number_is_served_as_the_base():
    loc, log_scale = torch.tensor([1.0, -2.0]).expand(6, 2), torch.zeros(6, 2)
    x, y = torch.zeros(6, 2), torch.zeros(6, 2)
    x[0, 0], x[1, 0], y[2, 1], y[3, 1] = math.nan, math.inf, -math.inf, math.nan
    x[4], y[4] = 3e38, -3e38
    y[5] = 0.1
    for chart in CHARTS:
        law = leash_law(loc, log_scale, x, y, 0.5, chart)
        assert torch.equal(law.loc[:4], loc[:4])
        assert torch.equal(law.log_scale[:4], log_scale[:4])
        assert bool((law.factor[:4] == 0).all())
        assert float(served_drift(loc, log_scale, law.loc, law.log_scale).max()) <= 0.5
        assert float(law.factor[5]) == 1


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("part", ["loc", "log_scale"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_where_the_base_is_not_finite_it_is_served_bit_for_bit(chart, part, broken):
    loc, log_scale = torch.tensor([1.0, -2.0]).repeat(3, 1), torch.zeros(3, 2)
    {"loc": loc, "log_scale": log_scale}[part][1, 0] = broken
    x, y = torch.full((3, 2), 0.1), torch.full((3, 2), 0.2)
    y[2] = 50.0
    law = leash_law(loc, log_scale, x, y, 0.5, chart)
    assert law.factor[:2].tolist() == [1, 0]
    assert_close(law.loc[1], loc[1], rtol=0, atol=0, equal_nan=True)
    assert_close(law.log_scale[1], log_scale[1], rtol=0, atol=0, equal_nan=True)
    # The contexts beside it are served as they are without it.
    others = torch.tensor([0, 2])
    alone = leash_law(loc[others], log_scale[others], x[others], y[others], 0.5, chart)
    for one, other in zip(alone, law, strict=True):
        assert torch.equal(one, other[others])
    assert 0 < float(law.factor[2]) < 1


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_where_scores_of_the_base_are_not_finite_they_are_served_bit_for_bit(broken, generator):
    base = torch.randn(3, 5, generator=generator)
    moved = base + torch.tensor([[0.01], [0.01], [1.0]]) * torch.randn(3, 5, generator=generator)
    base[1, 2] = broken
    factor, served = pull_scores(base, moved, 0.05)
    assert factor[:2].tolist() == [1, 0]
    assert_close(served[1], base[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(served[0], moved[0])
    assert 0 < float(factor[2]) < 1
    assert float(softmax_kl(base[2:], served[2:])) <= 0.05


@pytest.mark.parametrize("metric", ["latent", "softmax"])
def test_a_model_whose_base_overflows_at_a_token_is_its_base_there(metric):
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"))
    with torch.no_grad():
        base.get_input_embeddings().weight[9] = math.inf
    renew_fingerprint(base)
    fused = leashed(base, leash=(0.2, metric))
    ids = torch.tensor([[5, 9, 6], [5, 7, 6]])
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            before, after = base(input_ids=ids), fused(input_ids=ids)
        lost = ~before.logits.isfinite().all(-1)
        assert lost.tolist() == [[True] * 3, [False] * 3]
        assert_close(after.logits[lost], before.logits[lost], rtol=0, atol=0, equal_nan=True)
        assert_close(after.latent_loc[lost], before.latent_loc[lost], rtol=0, atol=0, equal_nan=True)
    drift = divergences(base, fused, input_ids=ids[1:])[metric]
    assert 0 < float(drift.max()) <= 0.2 * (1 + 1e-5)


def test_gradients_of_zeros_that_are_added():
    values = torch.tensor([1.0, math.inf, math.nan], requires_grad=True)
    added = no_step(2 * values)
    assert added.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(added.sum(), values)
    assert gradient[0] == 2


def test_contexts_at_the_very_limit():
    """Moves whose drift is the limit to a few units of the last place, where a careless test decides wrongly."""
    nats = 0.5
    y = torch.randn(4000, H, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = 0.3 * torch.randn(4000, H, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x, y, _ = shrink(x, y, nats, "symmetric")
    stretch = 1 + 3e-5 * torch.linspace(-1, 1, 4000, dtype=torch.float64).unsqueeze(-1)
    x, y = (x * stretch).float(), (y * stretch).float()
    loc, log_scale = torch.zeros_like(x), torch.full_like(x, -3.7)
    loose = served_drift(loc, log_scale, loc + log_scale.exp() * y, log_scale + x)
    assert 0.2 < float((loose > nats).double().mean()) < 0.8
    law = leash_law(loc, log_scale, x, y, nats, "symmetric")
    assert float(served_drift(loc, log_scale, law.loc, law.log_scale).max()) <= nats * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nats", [0.01, 0.5, 8.0])
def test_no_scores_diverge_beyond_the_leash_as_they_are_served(dtype, nats, generator):
    count, classes = 400, 300
    base = (5 * torch.randn(count, classes, generator=generator)).to(dtype)
    size = 10 ** (7 * torch.rand(count, 1, generator=generator) - 3)
    moved = (base.float() + size * torch.randn(count, classes, generator=generator)).to(dtype)
    factor, served = pull_scores(base, moved, nats)
    assert served.dtype == dtype
    after = softmax_kl(base, served)
    assert float(after.max()) <= nats * (1 + 1e-9)
    whole = factor == 1
    assert 20 < int(whole.sum()) < count - 20
    assert torch.equal(served[whole], moved[whole])
    assert bool((softmax_kl(base, moved)[~whole].nan_to_num(math.inf) > nats * (1 - 1e-6)).all())
    if dtype == torch.float32:
        # Not tighter than it need be, except where rounding leaves no choice.
        assert float((after[~whole] / nats).min()) > 0.995


def test_scores_that_are_no_numbers_are_served_as_the_base():
    base = torch.zeros(3, 4)
    moved = torch.tensor([[0.0, math.inf, 0, 0], [math.nan, 0, 0, 0], [0, 0, 3e38, -3e38]])
    factor, served = pull_scores(base, moved, 0.5)
    assert torch.equal(served[:2], base[:2])
    assert factor.tolist()[:2] == [0, 0]
    assert float(softmax_kl(base, served).max()) <= 0.5


def test_scores_of_contexts_side_by_side_and_alone(generator):
    weight = torch.randn(50, 8, generator=generator)
    loc = torch.randn(2, 5, 8, generator=generator)
    moved = loc.clone()
    moved[0, 3] += 2.0
    # A bias of the classes counts on both sides.
    head = weight, torch.randn(50, generator=generator)
    plain = torch.nn.functional.linear(loc, *head)
    factor, scores = leash_scores(head, loc, loc.clone(), 0.5, keep=True)
    assert torch.equal(scores, plain)
    factor, scores = leash_scores(head, loc, moved, 0.5, keep=True)
    assert float(factor[0, 3]) < 1
    assert int((factor < 1).sum()) == 1
    assert float(softmax_kl(plain, scores).max()) <= 0.5 * (1 + 1e-5)
    assert float(softmax_kl(plain, scores)[0, 3]) > 0.499
    # One context at a time, as in generation, and without scores.
    alone = leash_scores(head, loc[:1, 3:4], moved[:1, 3:4], 0.5, keep=True)
    assert_close(alone, (factor[:1, 3:4], scores[:1, 3:4]), rtol=1e-5, atol=1e-5)
    without, none = leash_scores(head, loc, moved, 0.5, keep=False)
    assert none is None
    assert_close(without, factor, rtol=1e-5, atol=0)


def delta(model, name, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(H, H, generator=generator) / H for _ in range(2))
    second = size * second
    return Delta(
        name=name,
        chart="symmetric",
        first=first,
        second=second,
        gate=None,
        base=model.config.base_fingerprint,
    )


def leashed(model, chart="symmetric", leash=None, size=1.0):
    """A model with two deltas on a leash, its base's modules shared."""
    from tether.delta.fusion import fuse as fuse_deltas

    nats, metric = leash or (None, "softmax")
    deltas = {delta(model, "a", 1, size): 1.0, delta(model, "b", 2, size): 0.5}
    return fuse_deltas(model, deltas, chart=chart, leash=nats, leash_metric=metric)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request):
    return CausalQwenForCausalLM.from_backbone(tiny.backbone().to(request.param))


def divergences(base, fused, **inputs):
    with torch.no_grad():
        before, after = base(**inputs), fused(**inputs)
    latent = served_drift(
        before.latent_loc, before.latent_log_scale, after.latent_loc, after.latent_log_scale
    )
    return {"latent": latent, "softmax": softmax_kl(before.logits, after.logits)}


@pytest.mark.parametrize("metric", ["latent", "softmax"])
@pytest.mark.parametrize("chart", CHARTS)
def test_a_model_keeps_to_its_leash_on_random_and_on_searched_input(model, metric, chart):
    nats = 0.3
    size = 1.0 if metric == "latent" else 200.0
    loose, fused = leashed(model, chart, size=size), leashed(model, chart, (nats, metric), size)
    ids = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(5))
    embeds = model.get_input_embeddings()(ids).detach()
    # Embeddings that drift as far as they can, found by the gradient through the model without a leash.
    search = embeds.float().clone().requires_grad_()
    optimiser = torch.optim.Adam([search], lr=0.2)
    for _ in range(8):
        optimiser.zero_grad()
        out = loose(inputs_embeds=search.to(embeds.dtype))
        (-(out.latent_loc / model.config.latent_scale).square().log1p().sum()).backward()
        optimiser.step()
    found = search.detach().to(embeds.dtype)
    limit = nats * (1 + 1e-5)
    over = 0
    for case in (embeds, found, found * 1e4, found * 1e30, found * 1e-30, torch.zeros_like(found)):
        got = divergences(model, fused, inputs_embeds=case)[metric]
        assert float(got.max()) <= limit
        over += int((divergences(model, loose, inputs_embeds=case)[metric] > nats).sum())
    assert over > 50


@pytest.mark.parametrize("metric", ["latent", "softmax"])
def test_a_leash_survives_saving_and_serves_generation_as_it_serves_text(metric, tmp_path, generator):
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    fused = leashed(base, "geodesic", (0.2, metric), size=200.0)
    fused.save_pretrained(tmp_path / "fused")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    assert again.fusion.leash == (0.2, metric)
    ids = torch.randint(256, (2, 9), generator=generator)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
    text = fused.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(again.generate(ids, attention_mask=torch.ones_like(ids), **options), text)
    assert float(divergences(base, again, input_ids=text)[metric].max()) <= 0.2 * (1 + 1e-5)
    with torch.no_grad():
        logits = again(input_ids=text).logits[:, 8:-1]
    chosen = logits.gather(-1, text[:, 9:, None])[..., 0]
    # eos is kept out by min_new_tokens; otherwise the choice at each step is the best of the whole text's scores.
    logits[..., 256] = -math.inf
    assert_close(chosen, logits.amax(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["deterministic", "causal"])
def test_all_modes_act_from_the_pulled_law(mode, generator):
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    ids = torch.randint(256, (2, 9), generator=generator)
    for metric in ("latent", "softmax"):
        fused = leashed(base, "symmetric", (0.2, metric), size=200.0)
        noise = {} if mode == "deterministic" else {"noise": torch.full((H,), 0.4)}
        with torch.no_grad():
            softmax, other = fused(input_ids=ids), fused(input_ids=ids, mode=mode, **noise)
        assert torch.equal(softmax.latent_loc, other.latent_loc)
        assert torch.equal(softmax.latent_log_scale, other.latent_log_scale)
        assert_close(softmax.logits, fused.action.score_loc(softmax.latent_loc), rtol=1e-4, atol=1e-4)


def test_a_leash_that_does_not_bind_changes_nothing(generator):
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    ids = torch.randint(256, (3, 11), generator=generator)
    loose = leashed(base)
    with torch.no_grad():
        expected = loose(input_ids=ids)
        for metric in ("latent", "softmax"):
            got = leashed(base, leash=(1e6, metric))(input_ids=ids)
            assert torch.equal(got.latent_loc, expected.latent_loc)
            assert torch.equal(got.latent_log_scale, expected.latent_log_scale)
            assert_close(got.logits, expected.logits, rtol=1e-6, atol=1e-5)


def test_gradients_pass_a_leash(generator):
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    ids = torch.randint(256, (2, 9), generator=generator)
    for metric in ("latent", "softmax"):
        fused = leashed(base, leash=(0.1, metric), size=200.0)
        base.zero_grad()
        fused(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad for p in base.backbone.parameters() if p.grad is not None]
        assert gradients
        assert all(bool(g.isfinite().all()) for g in gradients)
        assert max(float(g.abs().max()) for g in gradients) > 0


def test_a_leash_that_means_nothing_is_refused():
    for nats in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="positive finite"):
            check_leash(nats, "latent")
    with pytest.raises(ConfigError, match="latent, softmax"):
        check_leash(1.0, "kl")
    described = {
        "chart": "symmetric",
        "native": ["symmetric"],
        "domains": ["a"],
        "weights": [1.0],
        "gated": False,
        "location_only": True,
        "leash": {"nats": 0.5, "metric": "softmax"},
    }
    fusion = Fusion(H, H, described)
    loc, log_scale, x, y = torch.zeros(4, 2, H)
    with pytest.raises(ConfigError, match="output head"):
        fusion.sum.law(loc, log_scale, x[None], y[None], torch.ones(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nats", [0.001, 0.05, 0.5])
def test_a_leash_holds_with_gradients_as_without(dtype, nats):
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone().to(dtype))
    fused = leashed(base, "symmetric", (nats, "softmax"), 200.0)
    ids = torch.randint(256, (8, 24), generator=torch.Generator().manual_seed(5))
    served = fused(input_ids=ids).logits
    assert served.requires_grad
    with torch.no_grad():
        assert torch.equal(served, fused(input_ids=ids).logits)
        found = softmax_kl(base(input_ids=ids).logits, served)
    assert float(found.max()) <= nats * (1 + 1e-5)
    assert float(found.max()) > 0.9 * nats
