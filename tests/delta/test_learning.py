import math

import pytest
import torch

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.budget import Budget
from tether.delta.head import Head, Reference, token_drift
from tether.delta.learning import anchor_text, fit_delta, learn_delta, reference
from tether.delta.objective import output_fisher
from tether.delta.training import Fit
from tether.errors import CheckpointError, ConfigError


def fit(model, caches, name="digits", **options):
    budget = options.pop("budget", Budget(value=0.02))
    chosen = Fit(
        budget=budget, epochs=4, batch=128, lr=3e-3, candidates=200, sampled=32, probe=100_000, **options
    )
    anchor = anchor_text(
        model, caches["words"], caches["words-held-out"], tokens=100_000, background=tiny.BACKGROUND
    )
    return fit_delta(model, caches["digits"], anchor, name, chosen)


def nll(model, delta, cache):
    states, targets = cache.scored()
    at = reference(model, states)
    y = Head(delta.first, delta.second, delta.chart).displacement(states)[1]
    logits = (at.loc + at.scale * y) @ model.action.weight.detach().T
    base = torch.nn.functional.cross_entropy(at.loc @ model.action.weight.detach().T, targets)
    return float(base), float(torch.nn.functional.cross_entropy(logits, targets))


def held_out_drift(model, delta, caches, metric):
    at = reference(model, caches["words-held-out"].states.float())
    weight = model.action.weight.detach()
    fisher = output_fisher(weight, reference(model, caches["words"].states.float()).loc)
    head = Head(delta.first, delta.second, delta.chart)
    return float(token_drift(metric, head, at, weight=weight, fisher=fisher).mean())


@pytest.mark.parametrize("value", [0.005, 0.05])
def test_the_domain_gets_better_and_the_budget_is_met_on_held_out_base_text(model, caches, value):
    delta = fit(model, caches, budget=Budget(value=value))
    base, tuned = nll(model, delta, caches["digits"])
    assert tuned < base - 0.1
    drift = held_out_drift(model, delta, caches, "softmax")
    assert 0.95 * value <= drift <= value
    assert delta.record["drift_base"] == pytest.approx(drift, rel=1e-4)


def test_a_larger_budget_buys_a_better_domain(model, caches):
    tuned = [
        nll(model, fit(model, caches, budget=Budget(value=value)), caches["digits"])[1]
        for value in (0.002, 0.1)
    ]
    assert tuned[1] < tuned[0] - 0.1


@pytest.mark.parametrize("metric", ["latent", "fisher"])
def test_budgets_in_other_metrics(model, caches, metric):
    value = {"latent": 20.0, "fisher": 0.02}[metric]
    delta = fit(model, caches, budget=Budget(value=value, metric=metric))
    assert 0.94 * value <= held_out_drift(model, delta, caches, metric) <= 1.01 * value


@pytest.mark.parametrize("chart", ["geodesic", "rootkl"])
def test_curved_charts_learn_where_the_scale_is_of_the_size_of_the_moves(caches, chart):
    # Their coordinates are logarithms of a displacement in units of the scale: at the calibrated 0.02 every
    # useful move is dozens of scales, and a head linear in logarithms cannot express it (docs/log.md).
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(), latent_scale=1.0)
    base, tuned = nll(model, fit(model, caches, chart=chart), caches["digits"])
    assert tuned < base - 1.0


def test_the_linear_chart_learns(model, caches):
    base, tuned = nll(model, fit(model, caches, chart="linear"), caches["digits"])
    assert tuned < base - 1.0


def test_location_only_has_no_scale_head(model, caches):
    delta = fit(model, caches, location_only=True)
    assert delta.first is None
    assert nll(model, delta, caches["digits"])[1] < nll(model, delta, caches["digits"])[0]


def test_the_plain_penalty_of_the_paper(model, caches):
    weak, strong = (
        fit(model, caches, budget=Budget(value=None, penalty=penalty)) for penalty in (1e-5, 1e-1)
    )
    assert "drift_base" not in weak.record
    drifts = [held_out_drift(model, delta, caches, "latent") for delta in (weak, strong)]
    assert drifts[1] < 0.2 * drifts[0]


def test_the_model_is_not_touched_and_a_fit_repeats_exactly(model, caches):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, second = fit(model, caches), fit(model, caches)
    assert torch.equal(first.second, second.second)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_states_of_another_base_are_refused(model, caches):
    foreign = caches | {"words": caches["words"]._replace(base="sha256:" + "0" * 64)}
    with pytest.raises(CheckpointError, match="backbone"):
        fit(model, foreign)
    with pytest.raises(CheckpointError, match="backbone"):
        fit(model, caches | {"digits": foreign["words"]})


def test_from_text_to_delta(model, tokenizer, tmp_path):
    steps = []
    delta = learn_delta(
        model, tokenizer, tiny.documents("digits", 12), base_texts=tiny.documents("words", 12), budget=0.05,
        name="numbers", window=64, candidates=200, cache_folder=tmp_path, on_step=steps.append,
    )  # fmt: skip
    assert delta.name == "numbers"
    assert delta.gate is not None
    assert len(list(tmp_path.iterdir())) == 3
    assert {"step", "steps", "nll", "drift", "multiplier"} <= steps[-1].keys()
    assert math.isfinite(delta.record["drift_base"])


def test_bad_options(model, tokenizer):
    words = tiny.documents("words", 4)
    with pytest.raises(ConfigError, match="> 0"):
        learn_delta(model, tokenizer, words, base_texts=words, budget=0.0)
    with pytest.raises(ConfigError, match="linear, symmetric"):
        learn_delta(model, tokenizer, words, base_texts=words, chart="flat")
    with pytest.raises(ConfigError, match="at least 2"):
        learn_delta(model, tokenizer, words, base_texts=words[:1])
    with pytest.raises(ConfigError, match=r"the domain text gives .* at least one context"):
        learn_delta(model, tokenizer, ["short"], base_texts=words)
    with pytest.raises(ConfigError, match=r"meet the budget on \(40% of its documents\) gives"):
        learn_delta(model, tokenizer, words, base_texts=["word " * 300] * 3 + ["short"] * 2)
    with pytest.raises(ConfigError, match="positive"):
        Fit(epochs=0)
    with pytest.raises(ConfigError, match="no such text file"):
        learn_delta(model, tokenizer, "missing.jsonl", base_texts=words)


def test_reference_some_spreads_over_the_text():
    values = torch.arange(100.0)[:, None]
    picked = Reference(values, values, values).some(4).states[:, 0].tolist()
    assert picked == [0.0, 33.0, 66.0, 99.0]
