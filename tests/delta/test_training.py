"""What a fit is held to and watched by: quantiles, hard budgets, early stop, full loss, features, class bias."""

import copy

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.cauchy.divergence import drift
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.anchor import Anchor
from tether.delta.budget import Budget, cvar
from tether.delta.cache import cache_states
from tether.delta.fusion import fuse
from tether.delta.head import Head, Reference, ray_share, token_drift
from tether.delta.learning import anchor_text, feature_layers, fit_delta, reference
from tether.delta.objective import CandidateSoftmax, full_cross_entropy, output_fisher
from tether.delta.output_head import OutputHead, output_head
from tether.delta.source import Source, set_aside
from tether.delta.training import Aside, Fit, Training
from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError


def fit(model, caches, budget=None, **options):
    chosen = Fit(
        budget=budget or Budget(value=0.02),
        **{"epochs": 4, "batch": 128, "lr": 3e-3, "candidates": 200, "sampled": 32, "probe": 100_000}
        | options,
    )
    anchor = anchor_text(
        model, caches["words"], caches["words-held-out"], tokens=100_000, background=tiny.BACKGROUND
    )
    return fit_delta(model, caches["digits"], anchor, "digits", chosen)


def drifts(model, delta, cache, metric):
    at = reference(model, cache.states.float())
    return token_drift(metric, Head(delta.first, delta.second, delta.chart), at, output=output_head(model))


def test_the_statistic_of_a_budget():
    values = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 6.0, 8.0, 7.0, 10.0])
    assert float(Budget(value=1.0).statistic(values)) == 5.5
    assert float(Budget(value=1.0, quantile=0.9).statistic(values)) == 9.0
    assert float(Budget(value=1.0, quantile=0.91).statistic(values)) == 10.0
    assert float(Budget(value=1.0, hard=True).statistic(values)) == 10.0
    assert float(Budget(value=1.0, quantile=0.8).pressed(values)) == 9.5
    assert float(cvar(values, 0.8)) >= float(Budget(value=1.0, quantile=0.8).statistic(values))
    assert float(Budget(value=8.0, hard=True).pressed(values)) == pytest.approx((1 + 2) / 10)


@pytest.mark.parametrize("metric", ["softmax", "latent"])
def test_a_budget_on_a_quantile_is_met_on_held_out_base_text(model, caches, metric):
    value = {"softmax": 0.05, "latent": 60.0}[metric]
    delta = fit(model, caches, Budget(value=value, metric=metric, quantile=0.95))
    found = drifts(model, delta, caches["words-held-out"], metric)
    share = float((found > value).double().mean())
    assert share <= 0.05
    assert float((found > 0.95 * value).double().mean()) > 0.02
    assert float(found.max()) > value


@pytest.mark.parametrize("metric", ["latent", "softmax"])
def test_a_hard_budget_holds_at_every_training_context(model, caches, metric):
    value = {"softmax": 0.2, "latent": 100.0}[metric]
    delta = fit(model, caches, Budget(value=value, metric=metric, hard=True))
    scored = caches["digits"].scored()[0]
    found = [
        float(drifts(model, delta, cache, metric).max())
        for cache in (caches["digits"]._replace(states=scored), caches["words"])
    ]
    assert 0.9 * value <= max(found) <= value * (1 + 1e-4)
    assert delta.record["drift_base"] == pytest.approx(max(found), rel=1e-3)


@pytest.mark.parametrize("chart", ["linear", "symmetric", "geodesic", "rootkl"])
def test_shares_bring_every_context_to_its_limit(generator, chart):
    states = torch.randn(200, 6, generator=generator)
    head = Head(torch.randn(6, 6, generator=generator), 3 * torch.randn(6, 6, generator=generator), chart)
    at = Reference(states, states, torch.ones_like(states))
    alone = token_drift("latent", head, at)
    limit = float(alone.median())
    share = ray_share(head, at, "latent", limit, rounds=40)
    x, y = head.displacement(states, share)
    moved = drift(x, y).sum(-1)
    assert bool((moved <= limit * (1 + 1e-5)).all())
    over = alone > limit
    assert bool((share[~over] == 1).all())
    assert float(moved[over].min()) > 0.9 * limit


def test_a_fit_stops_where_documents_set_aside_no_longer_improve(model, caches):
    # Sixteen documents and as many passes as it takes to learn them by heart.
    few = caches["digits"].only(torch.arange(8))
    anchor = anchor_text(
        model, caches["words"], caches["words-held-out"], tokens=1000, background=tiny.BACKGROUND
    )
    options = {"batch": 64, "lr": 2e-2, "candidates": 200, "sampled": 32, "probe": 1000, "gate": False}
    loose = Budget(value=5.0)
    watched = fit_delta(
        model, few, anchor, "few", Fit(budget=loose, epochs=60, aside=0.25, patience=6, **options)
    )
    steps = watched.record["curve"][-1]
    assert watched.record["stopped"] < steps["step"] < steps["steps"]
    looks = {entry["step"]: entry["held_out"] for entry in watched.record["curve"] if "held_out" in entry}
    assert watched.record["stopped"] == min(looks, key=looks.get)


def test_a_small_text_is_learnt_in_at_least_so_many_steps(model, caches):
    few = caches["digits"].only(torch.arange(16))
    tokens = len(few.scored()[1])
    steps = []
    anchor = anchor_text(model, caches["words"], caches["words-held-out"], background=tiny.BACKGROUND)
    fit_delta(model, few, anchor, "few", Fit(epochs=1, gate=False, candidates=200), steps.append)
    assert 32 * 32 < tokens < 32 * 256
    assert 32 <= steps[-1]["steps"] <= 34


def test_what_comes_back_are_the_heads_of_the_best_look(model, caches):
    few = caches["digits"].only(torch.arange(8))
    stay, away = set_aside(few.windows.documents, 0.25)
    source, other = Source(model, few, stay), Source(model, few, away)
    assert len(source) + len(other) == len(few.scored()[1])
    weight = model.action.weight.detach()
    base = reference(model, caches["words"].states.float())
    training = Training(
        Fit(budget=Budget(value=5.0), epochs=60, batch=64, lr=2e-2, patience=6, probe=1000),
        source,
        Anchor(base, base, output_fisher(OutputHead(weight), base.loc), ""),
        CandidateSoftmax(
            OutputHead(weight),
            torch.rand(258, generator=torch.Generator().manual_seed(0)),
            size=200,
            sampled=32,
        ),
        torch.Generator().manual_seed(0),
        Aside(other.some(10_000), other.targets),
    )
    training.run(lambda head: 1.0, None)
    looks = [entry["held_out"] for entry in training.curve if "held_out" in entry]
    assert looks[-1] > min(looks)
    training.ratio = 1.0
    # The same draws again, so the same loss to rounding: of the best look, not of the last.
    assert training._look(0) == pytest.approx(min(looks), abs=1e-3)


def test_the_multiplier_answers_to_base_text_that_the_heads_do_not_see(model, caches):
    fitted, probe = (reference(model, caches[name].states.float()) for name in ("words", "words-held-out"))
    weight = model.action.weight.detach()
    anchor = Anchor(fitted, probe, output_fisher(OutputHead(weight), fitted.loc), "")
    loss = CandidateSoftmax(OutputHead(weight), torch.ones(258), size=200, sampled=32)
    source = Source(model, caches["digits"])

    def watched(budget):
        fit = Fit(budget=budget, probe=40)
        return Training(fit, source, anchor, loss, torch.Generator()).watched.states

    assert torch.equal(watched(Budget(value=0.1)), probe.some(20).states)
    # A hard budget is on the contexts of the fit itself.
    both = torch.cat([fitted.some(20).states, source.some(20).states])
    assert torch.equal(watched(Budget(value=0.1, hard=True)), both)


def test_documents_set_aside_are_whole_and_spread():
    stay, away = set_aside(torch.arange(40).repeat_interleave(5), 0.1)
    assert away.tolist() == [5, 15, 25, 35]
    assert len(stay) == 36
    assert len(set_aside(torch.arange(3), 0.5)[1]) == 0
    assert len(set_aside(torch.arange(9), 0.01)[1]) == 1
    assert len(set_aside(torch.arange(9), 0.0)[1]) == 0


def test_the_full_loss_is_the_cross_entropy_with_its_gradient(generator, monkeypatch):
    monkeypatch.setattr("tether.delta.output_head.CHUNK_BYTES", 4 * 60 * 7)  # seven tokens a chunk
    weight, bias = torch.randn(60, 6, generator=generator), torch.randn(60, generator=generator)
    targets = torch.randint(60, (40,), generator=generator)
    for given in (bias, None):
        loc = torch.randn(40, 6, generator=generator, requires_grad=True)
        plain = torch.nn.functional.cross_entropy(loc @ weight.T + (0 if given is None else given), targets)
        (expected,) = torch.autograd.grad(plain, loc)
        ours = full_cross_entropy(loc, targets, OutputHead(weight, given))
        (found,) = torch.autograd.grad(2 * ours, loc)
        assert_close(ours, plain)
        assert_close(found, 2 * expected)


def test_the_last_epochs_can_take_the_full_loss(model, caches):
    full, sampled = fit(model, caches, full_epochs=4), fit(model, caches, candidates=258)
    # With every class a candidate both losses are the same.
    assert_close(full.second, sampled.second, rtol=1e-3, atol=1e-3)


def test_candidates_with_a_class_bias(generator):
    weight, bias = torch.randn(60, 6, generator=generator), torch.randn(60, generator=generator)
    loc, targets = torch.randn(40, 6, generator=generator), torch.randint(60, (40,), generator=generator)
    loss = CandidateSoftmax(OutputHead(weight, bias), torch.rand(60, generator=generator), size=60, sampled=0)
    assert_close(
        loss(loc, targets, generator), torch.nn.functional.cross_entropy(loc @ weight.T + bias, targets)
    )
    half = CandidateSoftmax(
        OutputHead(weight, bias), torch.rand(60, generator=generator), size=20, sampled=10
    )
    row, target = loc[:1], targets[:1]
    draws = torch.stack([half(row, target, generator) for _ in range(4000)]).exp()
    error = float(draws.std()) / len(draws) ** 0.5
    assert abs(float(draws.mean() - loss(row, target, generator).exp())) < 4 * error


@pytest.fixture(scope="module")
def numeric(tmp_path_factory):
    """A model with an added <NUM>, whose classes have a bias, and states of texts."""
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"))
    model.add_numbers(tiny.tokenizer())
    assert model.action.bias is not None
    with torch.no_grad():
        model.action.bias[:-1] = 0.5 * torch.randn(258, generator=torch.Generator().manual_seed(1))
    renew_fingerprint(model)
    folder = tmp_path_factory.mktemp("states")
    texts = {"digits": ("digits", 1), "words": ("words", 2), "words-held-out": ("words", 3)}
    caches = {
        name: cache_states(
            model,
            window_text(tiny.documents(kind, 30, seed), tiny.tokenizer(), length=64),
            folder / f"{name}.safetensors",
        )
        for name, (kind, seed) in texts.items()
    }
    return model, caches


def test_a_model_with_a_class_bias_learns_and_meets_its_budget(numeric):
    model, caches = numeric
    delta = fit(model, caches)
    found = drifts(model, delta, caches["words-held-out"], "softmax")
    assert 0.95 * 0.02 <= float(found.mean()) <= 0.02
    # The same from the model's own logits.
    ids = caches["words-held-out"].windows.input_ids[:64][None]
    with torch.no_grad():
        before, after = (
            m(input_ids=ids).logits.log_softmax(-1)[0]
            for m in (model, fuse(model, {delta: 1.0}, gated=False, by="sum"))
        )
    kl = (before.exp() * (before - after)).sum(-1)
    assert_close(found[:64], kl, rtol=2e-2, atol=1e-4)
    targets = ids[0, 1:]
    own = caches["digits"].windows.input_ids[:64][None]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(m(input_ids=own).logits[0, :-1], own[0, 1:])
            for m in (model, fuse(model, {delta: 1.0}, gated=False, by="sum"))
        ]
    assert float(losses[1]) < float(losses[0]) - 0.1
    assert len(targets) == 63


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of four layers with states of the middle ones."""
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(layers=4))
    layers = feature_layers(model, "multi")
    folder = tmp_path_factory.mktemp("states")
    texts = {"digits": ("digits", 1), "words": ("words", 2), "words-held-out": ("words", 3)}
    caches = {
        name: cache_states(
            model,
            window_text(tiny.documents(kind, 30, seed), tiny.tokenizer(), length=64),
            folder / f"{name}.safetensors",
            layers=layers,
        )
        for name, (kind, seed) in texts.items()
    }
    return model, caches, layers


def test_deltas_on_middle_layers_learn_fuse_and_generate_what_was_measured(deep, tmp_path):
    model, caches, layers = deep
    assert layers == (1, 3)
    multi = fit(model, caches)
    assert multi.layers == layers
    assert multi.second.shape == (32, 96)
    found = drifts(model, multi, caches["words-held-out"], "softmax")
    assert 0.95 * 0.02 <= float(found.mean()) <= 0.02
    assert type(multi).load(multi.save(tmp_path / "a.delta").path).layers == layers
    # In the model's own forward pass, whole and token by token.
    fused = fuse(model, {multi: 1.0}, gated=False, by="sum")
    ids = caches["words-held-out"].windows.input_ids[:40][None]
    with torch.no_grad():
        base = model(input_ids=ids).logits.log_softmax(-1)
        whole = fused(input_ids=ids)
        kl = (base.exp() * (base - whole.logits.log_softmax(-1))).sum(-1)[0]
        state, steps = {}, []
        for token in ids[0]:
            output = fused(input_ids=token[None, None], use_cache=True, **state)
            state = {"past_key_values": output.past_key_values, "gate_state": output.gate_state}
            steps.append(output.logits[0, 0])
    assert_close(found[:40], kl, rtol=3e-2, atol=1e-4)
    assert_close(torch.stack(steps), whole.logits[0], rtol=1e-4, atol=1e-4)
    assert whole.hidden_states is None
    with torch.no_grad():
        assert len(fused(input_ids=ids, output_hidden_states=True).hidden_states) == 5
    fused.save_pretrained(tmp_path / "fused")
    again = CausalQwenForCausalLM.from_pretrained(tmp_path / "fused")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, whole.logits)


def test_deltas_of_different_features_fuse(deep):
    model, caches, _ = deep
    multi = fit(model, caches, gate=False)
    plain = copy.copy(multi)
    object.__setattr__(plain, "name", "plain")
    object.__setattr__(plain, "layers", ())
    object.__setattr__(plain, "first", multi.first[:, :32])
    object.__setattr__(plain, "second", multi.second[:, :32])
    both = fuse(model, {multi: 0.5, plain: 1.0}, by="sum").fusion
    features = caches["digits"].states[:9].float()
    x, y = both.deltas(features)
    alone = fuse(model, {plain: 1.0}, by="sum").fusion.deltas(features[:, :32])
    assert_close(x[1], alone[0][0])
    assert_close(y[1], alone[1][0])
    cut = {name: cache._replace(layers=()) for name, cache in caches.items()}
    with pytest.raises(CheckpointError, match="layers"):
        fit(model, cut | {"digits": caches["digits"]})


def test_bad_fits():
    for options, message in (
        ({"features": "first"}, "last, multi"),
        ({"aside": 1.0}, r"\[0, 1\)"),
        ({"patience": 0}, "positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            Fit(**options)
    for options, message in (
        ({"quantile": 1.0}, r"\(0, 1\)"),
        ({"hard": True, "quantile": 0.9}, "every context"),
        ({"stretch": 0.5}, ">= 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Budget(**options)
