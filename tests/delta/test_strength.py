"""The strength of a delta: the factor along its ray that its own held-out documents are best with."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta import learning
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.head import Head, Reference
from tether.delta.held_out import hold_out
from tether.delta.learning import anchor_text, feature_layers, fit_delta, learn_delta, reference
from tether.delta.outcome import NO_HELP
from tether.delta.output_head import OutputHead
from tether.delta.ray import Ray
from tether.delta.strength import STEP, change_figures, find_strength, served_change, token_nll
from tether.delta.training import Fit
from tether.delta.windows import window_text

SHARES = [number * STEP for number in range(1, 9)]


def flat(loss):
    """Give a loss of a share as that of three tokens, without numbers."""
    return lambda share: (torch.full((3,), loss(share), dtype=torch.float64), 0.0)


@given(best=st.floats(0.07, 3.0), steep=st.floats(0.01, 100.0))
def test_of_a_convex_loss_the_best_share_of_the_grid_is_found(best, steep):
    def loss(share):
        return steep * (share - best) ** 2

    found = find_strength(flat(loss))
    assert found.share in SHARES
    assert loss(found.share) == pytest.approx(min(map(loss, SHARES)))
    assert found.helps
    assert max(found.nll) == 1.0
    assert len(found.nll) <= 7


def test_of_equal_losses_the_larger_share_is_taken():
    assert find_strength(flat(lambda share: 0.0 if share else 1.0)).share == 1.0
    assert find_strength(flat(lambda share: abs(share - 0.5625))).share == 0.625


def test_numbers_have_their_part_in_the_choice():
    # Tokens like 1 best, numbers suffer by as much again from .5 on.
    found = find_strength(lambda share: (torch.tensor([1 - share]), max(0.0, 3 * (share - 0.5))))
    assert found.share == 0.5
    assert found.looked[0.5] == pytest.approx(0.5)  # of tokens alone
    worse = find_strength(lambda share: (torch.tensor([1 - share]), 2 * share))
    assert (worse.share, worse.helps) == (STEP, False)


@pytest.mark.parametrize("loss", [lambda share: share, lambda share: 0.0, lambda share: np.exp(90 * share)])
def test_where_nothing_helps_the_least_share_is_taken(loss):
    found = find_strength(flat(loss))
    assert found.share == STEP
    assert not found.helps


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_never_chosen(broken):
    found = find_strength(flat(lambda share: broken if share > 0.8 else 1 - share))
    assert found.share == 0.75
    assert found.helps
    assert find_strength(flat(lambda share: broken if share else 1.0)).share == STEP


@pytest.fixture
def case(generator):
    loc, move = torch.randn(40, 6, generator=generator), 0.3 * torch.randn(40, 6, generator=generator)
    weight, bias = torch.randn(60, 6, generator=generator), torch.randn(60, generator=generator)
    return loc, move, weight, bias, torch.randint(60, (40,), generator=generator)


@pytest.mark.parametrize("biased", [True, False])
def test_losses_and_drift_are_those_of_dense_laws(case, biased, monkeypatch):
    monkeypatch.setattr("tether.delta.output_head.CHUNK_BYTES", 4 * 60 * 7)  # seven tokens a chunk
    loc, move, weight, bias, targets = case
    bias = bias if biased else None
    add = 0 if bias is None else bias
    before, after = (
        torch.distributions.Categorical(logits=(at @ weight.T + add).double()) for at in (loc, loc + move)
    )
    output = OutputHead(weight, bias)
    head = Head(None, torch.randn(6, 6), "symmetric")
    at = Reference(loc, loc, torch.full_like(loc, 0.5))
    moved = loc + 0.5 * loc @ head.second.T
    dense = torch.nn.functional.cross_entropy(moved @ weight.T + add, targets, reduction="none")
    assert_close(token_nll(head, at, targets, output), dense, rtol=1e-5, atol=1e-5)
    plain = token_nll(None, at, targets, output)
    assert_close(plain.double(), -before.log_prob(targets), rtol=1e-5, atol=1e-5)

    known = targets.clone()
    known[::9] = -1
    law = list(output.log_prob(loc))
    change = served_change(law, loc + move, known, output)
    assert_close(change.kl.double(), torch.distributions.kl_divergence(before, after), rtol=1e-4, atol=1e-6)
    scored = known >= 0
    assert torch.equal(change.before.isnan(), ~scored)
    assert_close(change.before[scored].double(), -before.log_prob(targets)[scored], rtol=1e-5, atol=1e-5)
    assert_close(change.after[scored].double(), -after.log_prob(targets)[scored], rtol=1e-5, atol=1e-5)
    figures = change.figures()
    assert figures["tokens"] == 40
    assert figures["nll_after"] == pytest.approx(float(-after.log_prob(targets)[scored].mean()), rel=1e-5)
    assert figures["softmax_kl"] == pytest.approx(float(change.kl.mean()))
    unknown = served_change(law, loc + move, None, output)
    assert torch.equal(unknown.kl, change.kl)
    assert unknown.figures()["nll_before"] is None


def test_the_error_is_that_of_a_ratio_over_documents():
    before, documents = torch.zeros(5), torch.tensor([3, 3, 3, 8, 8])
    after = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0])
    found = change_figures(before, after, documents)
    assert (found["documents"], found["tokens"], found["change"]) == (2, 5, 1.0)
    # Totals 6 of three tokens and -1 of two: residuals 3 and -3, so sqrt(2 (9 + 9)) / 5.
    assert found["standard_error"] == pytest.approx(6 / 5)
    assert change_figures(before, after, torch.zeros(5))["standard_error"] is None


def fit(model, caches, domain, budget=None, **options):
    chosen = {"epochs": 4, "batch": 128, "lr": 3e-3, "candidates": 200, "sampled": 32, "probe": 100_000}
    anchor = anchor_text(
        model, caches["words"], caches["words-held-out"], tokens=100_000, background=tiny.BACKGROUND
    )
    return fit_delta(
        model, domain, anchor, "digits", Fit(budget=budget or Budget(value=0.02), **chosen | options)
    )


def dense_nll(model, delta, cache, documents, factor=1.0):
    """Losses of some documents' tokens: base, and the delta times a factor; plain formulas, whole vocabulary."""
    kept = torch.isin(cache.windows.documents, documents) & (cache.windows.targets >= 0)
    at, targets = reference(model, cache.states[kept].float()), cache.windows.targets[kept]
    head, weight = Head(delta.first, delta.second, delta.chart).scaled(factor), model.action.weight.detach()
    moved = at.loc + at.scale * head.displacement(at.states)[1]
    return [
        torch.nn.functional.cross_entropy((loc @ weight.T).double(), targets, reduction="none")
        for loc in (at.loc, moved)
    ]


@pytest.mark.parametrize("chart", ["symmetric", "linear"])
def test_the_figures_are_those_of_the_delta_as_it_is_saved(model, caches, chart):
    cache = caches["digits"]
    delta = fit(model, caches, cache, chart=chart)
    record, kept = delta.record, hold_out(cache.windows, 0.15)
    found = record["held_out"]
    before, after = dense_nll(model, delta, cache, kept.away)
    assert found["tokens"] == len(before) <= 1024
    assert found["documents"] == len(kept.away)
    assert found["nll_before"] == pytest.approx(float(before.mean()), rel=1e-5)
    assert found["nll_after"] == pytest.approx(float(after.mean()), rel=1e-5)
    assert found["change"] == pytest.approx(float((after - before).mean()), rel=1e-4)
    assert record["tokens"] == int((cache.windows.targets >= 0).sum()) - found["tokens"]
    # At every factor that was looked at, along the same ray, by brute force.
    assert found["looked"][0]["factor"] == 0
    for look in found["looked"]:
        by_force = dense_nll(model, delta, cache, kept.away, look["factor"] / record["factor"])[1]
        assert look["nll"] == pytest.approx(float(by_force.mean()), rel=1e-5)
        assert look["factor"] <= record["factor_budget"]
    every = [
        float(
            dense_nll(model, delta, cache, kept.away, s * record["factor_budget"] / record["factor"])[
                1
            ].mean()
        )
        for s in SHARES
    ]
    assert SHARES[int(np.argmin(every))] * record["factor_budget"] == pytest.approx(record["factor"])
    assert (record["strengths"], delta.strengths) == ([1.0], (1.0,))


def test_base_text_is_measured_with_the_delta_as_it_is_saved(model, caches):
    delta = fit(model, caches, caches["digits"])
    cache = caches["words-held-out"]
    head, weight = Head(delta.first, delta.second, delta.chart), model.action.weight.detach()
    laws = []
    with torch.no_grad():
        for batch in cache.windows.batches(8):
            at = reference(model, model.backbone(batch.input_ids).last_hidden_state[batch.mask])
            both = [at.loc, at.loc + at.scale * head.displacement(at.states)[1]]
            targets = cache.windows.targets[cache.windows.positions(batch)]
            laws.append([*((loc @ weight.T).double() for loc in both), targets])
    before, after, targets = (torch.cat(values) for values in zip(*laws, strict=True))
    kl = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=logits) for logits in (before, after))
    )
    figures, scored = delta.record["base_text"], targets >= 0
    assert figures["tokens"] == len(kl)
    # Cached states are rounded to half precision, the model's own are not.
    assert figures["softmax_kl"] == pytest.approx(float(kl.mean()), rel=2e-2)
    for name, logits in (("nll_before", before), ("nll_after", after)):
        loss = torch.nn.functional.cross_entropy(logits[scored], targets[scored])
        assert figures[name] == pytest.approx(float(loss), rel=1e-3)
    assert delta.record["drift_base"] == pytest.approx(figures["softmax_kl"])
    assert delta.record["budget_used"] == pytest.approx(delta.record["drift_base"] / 0.02)


@pytest.fixture(scope="module")
def overfitted(model, caches, tmp_path_factory):
    """A few documents learnt by heart under a budget that allows far too much of it."""
    domain = caches["digits"].only(torch.arange(12))
    options = {"epochs": 30, "batch": 64, "lr": 1e-2, "gate": False}
    return domain, fit(model, caches, domain, Budget(value=20.0, stretch=8.0), **options)


def test_where_half_is_better_than_all_of_it_less_is_taken(model, overfitted):
    domain, delta = overfitted
    record, away = delta.record, hold_out(domain.windows, 0.15).away
    assert record["factor"] < record["factor_budget"]
    whole = dense_nll(model, delta, domain, away, record["factor_budget"] / record["factor"])[1]
    before, taken = dense_nll(model, delta, domain, away)
    assert float(taken.mean()) < float(whole.mean()) - 0.1
    assert float(taken.mean()) < float(before.mean())
    assert record["drift_base"] < 0.9 * 20.0
    assert "because more of it raised the loss" in record["budget_why"]
    assert record["warnings"] == []


def test_the_drift_on_record_is_measured_at_the_factor_taken(model, caches, overfitted):
    _, delta = overfitted
    at, weight = reference(model, caches["words-held-out"].states.float()), model.action.weight.detach()
    y = Head(delta.first, delta.second, delta.chart).displacement(at.states)[1]
    before, after = ((loc @ weight.T).double().log_softmax(-1) for loc in (at.loc, at.loc + at.scale * y))
    kl = (before.exp() * (before - after)).sum(-1)
    assert delta.record["drift_base"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert delta.record["base_text"]["softmax_kl"] == pytest.approx(float(kl.mean()), rel=1e-3)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(value=20.0, metric="latent"),
        Budget(value=0.05, quantile=0.9),
        Budget(value=100.0, metric="latent", hard=True),
        Budget(value=None, penalty=1e-5),
    ],
)
def test_no_budget_of_any_kind_is_exceeded(model, caches, budget):
    record = fit(model, caches, caches["digits"], budget, gate=False).record
    assert 0 < record["factor"] <= record["factor_budget"]
    if budget.value is None:
        assert record["factor_budget"] == 1.0
        assert record["budget_used"] is None
        assert record["budget_why"].startswith("No budget was set")
        assert "drift_base" not in record
    else:
        assert record["drift_base"] <= budget.value
        assert record["budget_used"] == record["drift_base"] / budget.value
    assert record["base_text"]["softmax_kl"] > 0


@pytest.mark.parametrize("features", ["last", "multi"])
def test_what_is_kept_aside_has_no_influence_on_heads_and_gate(tokenizer, tmp_path, monkeypatch, features):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(layers=4))
    layers = feature_layers(model, features)
    heads = []

    class Spied(Ray):
        def __init__(self, head, *rest):
            heads.append(copy.copy(head))
            super().__init__(head, *rest)

    monkeypatch.setattr(learning, "Ray", Spied)
    base = {
        name: cache_states(
            model,
            window_text(tiny.documents("words", 30, seed), tokenizer, length=64),
            tmp_path / name,
            layers=layers,
        )
        for name, seed in (("words", 2), ("words-held-out", 3))
    }
    away = hold_out(window_text(tiny.documents("digits", 40, 1), tokenizer, length=64), 0.15).away.tolist()
    inside = next(number for number in range(40) if number not in away)
    deltas = []
    for number in (None, away[0], inside):
        documents = tiny.documents("digits", 40, 1)
        if number is not None:
            documents[number] = tiny.documents("digits", 1, 77)[0]
        cache = cache_states(
            model, window_text(documents, tokenizer, length=64), tmp_path / f"d{number}", layers=layers
        )
        assert hold_out(cache.windows, 0.15).away.tolist() == away
        deltas.append(fit(model, base, cache, epochs=1))
    (plain, outside, other), (first, second, third) = heads, deltas
    assert torch.equal(plain.second, outside.second)
    assert torch.equal(plain.first, outside.first)
    assert all(torch.equal(a, b) for a, b in zip(first.gate, second.gate, strict=True))
    assert first.record["held_out"]["nll_before"] != second.record["held_out"]["nll_before"]
    assert not torch.equal(plain.second, other.second)
    assert not torch.equal(first.gate.center, third.gate.center)


def test_a_delta_that_does_not_help_its_own_documents_says_so(model, caches, tokenizer, tmp_path):
    documents = tiny.documents("digits", 40, 1)
    away = hold_out(window_text(documents, tokenizer, length=64), 0.15).away
    # What is kept aside is as many tokens of another kind, which a delta on digits makes less likely.
    for number in away.tolist():
        documents[number] = "#~" * (len(documents[number]) // 2)
    cache = cache_states(model, window_text(documents, tokenizer, length=64), tmp_path / "states")
    delta = fit(model, caches, cache, Budget(value=2.0), gate=False)
    record = delta.record
    before, after = dense_nll(model, delta, cache, away)
    assert float(after.mean()) > float(before.mean())
    assert record["warnings"] == [NO_HELP]
    assert record["factor"] == STEP * record["factor_budget"] > 0
    assert record["held_out"]["change"] > 0
    assert "no strength lowered the loss" in record["budget_why"]


def test_without_text_kept_aside_the_budget_alone_decides(model, caches):
    cache = caches["digits"]
    for domain, options in ((cache, {"held_out": 0.0}), (cache.only(torch.arange(6)), {})):
        record = fit(model, caches, domain, gate=False, **options).record
        assert record["factor"] == record["factor_budget"]
        assert record["held_out"] == {
            "kind": "none", "note": record["held_out"]["note"], "documents": 0, "tokens": 0,
        }  # fmt: skip
        assert record["tokens"] == int((domain.windows.targets >= 0).sum())
        assert 0.95 * 0.02 <= record["drift_base"] <= 0.02
        assert record["budget_why"] == "The budget is used up."


def test_where_no_factor_holds_the_domain_is_switched_off(model, caches, monkeypatch):
    monkeypatch.setattr(Ray, "limited", lambda self, factor: 9.0 if factor else 0.0)
    delta = fit(model, caches, caches["digits"], gate=False)
    assert delta.record["factor"] == delta.record["factor_budget"] == 0.0
    assert not delta.second.any()
    assert "switched off" in delta.record["budget_why"]
    assert delta.record["warnings"] == [NO_HELP]


def test_from_one_document_to_a_delta_with_a_sample(model, tokenizer):
    document = " ".join(tiny.documents("digits", 24, 1))
    options = {"base_texts": tiny.documents("words", 12), "window": 64, "candidates": 200, "epochs": 1}
    delta = learn_delta(model, tokenizer, [document], **options)
    found = delta.record["held_out"]
    assert (found["kind"], found["documents"]) == ("windows", len(delta.sample))
    assert all(piece in document for piece in delta.sample)
    assert delta.record["factor"] <= delta.record["factor_budget"]
    assert learn_delta(model, tokenizer, [document], sample=False, **options).sample == ()
    short = learn_delta(model, tokenizer, [document[:600]], **options)
    assert short.sample == ()
    assert "too short" in short.record["held_out"]["note"]
