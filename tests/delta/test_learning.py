import math

import pytest
import torch

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.budget import Budget
from tether.delta.fusion import fuse
from tether.delta.head import Head, Reference, token_drift
from tether.delta.learning import anchor_text, fit_delta, learn_delta, reference
from tether.delta.material import gather
from tether.delta.objective import output_fisher
from tether.delta.output_head import OutputHead
from tether.delta.source import spread
from tether.delta.training import Fit
from tether.errors import CheckpointError, ConfigError
from tether.processes import Group
from tether.store.documents import text_hash


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
    fisher = output_fisher(OutputHead(weight), reference(model, caches["words"].states.float()).loc)
    head = Head(delta.first, delta.second, delta.chart)
    return float(token_drift(metric, head, at, output=OutputHead(weight), fisher=fisher).mean())


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
    assert delta.record["texts"]["domain"] == text_hash(tiny.documents("digits", 12))
    assert delta.record["fit"]["lr"] == 1e-3
    assert delta.record["window"] == 64


def test_plain_base_text_is_cut_in_two_at_a_word(model, tokenizer, tmp_path):
    (tmp_path / "base.txt").write_text(" ".join(tiny.documents("words", 12)))
    material = gather(model, tokenizer, tiny.documents("digits", 12), tmp_path / "base.txt", window=64)
    fitted, held_out = (tokenizer.decode(windows.input_ids) for windows in material.windows[1:])
    whole = (tmp_path / "base.txt").read_text()
    assert fitted == whole[: len(fitted)]
    assert len(fitted) / len(whole) == pytest.approx(0.6, abs=0.02)
    # The rest begins where the first part ended, up to what is too short for a window there.
    at = whole.index(held_out[:64])
    assert 0 <= at - len(fitted) < 32
    assert whole[at - 1] == " "


@pytest.mark.parametrize("count", [3, 4])
def test_too_few_windows_for_a_gate_are_found_before_the_model_runs(model, tokenizer, monkeypatch, count):
    monkeypatch.setattr(model.backbone, "forward", lambda *_, **__: pytest.fail("the backbone ran"))
    words = tiny.documents("words", 12)
    fails = (
        pytest.raises(ConfigError, match="at least 4 windows")
        if count < 4
        else pytest.raises(pytest.fail.Exception)
    )
    with fails:
        learn_delta(model, tokenizer, ["a" * 64] * count, base_texts=words, window=64)


def test_a_fusion_is_no_base_to_learn_on(model, caches, tokenizer):
    fused = fuse(model, {fit(model, caches, "digits", gate=False): 1.0}, gated=False)
    words = tiny.documents("words", 12)
    with pytest.raises(ConfigError, match=r"the model is fused \(digits\)"):
        learn_delta(fused, tokenizer, words, base_texts=words)


def test_a_fit_that_diverges_is_an_error(model, caches):
    anchor = anchor_text(model, caches["words"], caches["words-held-out"], background=tiny.BACKGROUND)
    with pytest.raises(ConfigError, match="diverged"):
        fit_delta(
            model, caches["digits"], anchor, "digits", Fit(lr=300.0, epochs=2, gate=False, candidates=200)
        )


def test_several_processes_need_a_folder_that_they_share(model, tokenizer, monkeypatch):
    words = tiny.documents("words", 12)
    with monkeypatch.context() as patch:
        patch.setattr("tether.delta.material.current", lambda: Group(2, 0))
        with pytest.raises(ConfigError, match="cache_folder"):
            learn_delta(model, tokenizer, words, base_texts=words, window=64)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="start them with torchrun"):
        learn_delta(model, tokenizer, words, base_texts=words, window=64)


def test_base_text_is_held_up_to_a_limit_and_spread(model, caches, monkeypatch):
    monkeypatch.setattr("tether.delta.anchor.MOST", 50)
    anchor = anchor_text(model, caches["words"], caches["words-held-out"], background=tiny.BACKGROUND)
    states = caches["words"].states.float()
    assert torch.equal(anchor.fitted.states[[0, -1]], states[[0, -1]])
    assert (len(anchor.fitted.states), len(anchor.probe.states)) == (50, 50)


def test_positions_of_a_long_text_stay_inside_it():
    assert int(spread(20_000_004, 1024).max()) == 20_000_003


def test_bad_options(model, tokenizer):
    words = tiny.documents("words", 4)
    with pytest.raises(ConfigError, match="> 0"):
        learn_delta(model, tokenizer, words, base_texts=words, budget=0.0)
    with pytest.raises(ConfigError, match="linear, symmetric"):
        learn_delta(model, tokenizer, words, base_texts=words, chart="flat")
    with pytest.raises(ConfigError, match="location_only in chart geodesic"):
        learn_delta(model, tokenizer, words, base_texts=words, chart="geodesic", location_only=True)
    with pytest.raises(ConfigError, match="leave out quantile"):
        learn_delta(model, tokenizer, words, base_texts=words, budget=None, penalty=1.0, quantile=0.9)
    with pytest.raises(ConfigError, match=r"the domain text gives .* at least one context"):
        learn_delta(model, tokenizer, ["short"], base_texts=words)
    with pytest.raises(ConfigError, match=r"meet the budget on \(40% of it\) gives"):
        learn_delta(model, tokenizer, words, base_texts=["word " * 300] * 3 + ["short"] * 2)
    with pytest.raises(ConfigError, match="positive"):
        Fit(epochs=0)
    with pytest.raises(ConfigError, match="no such text file"):
        learn_delta(model, tokenizer, "missing.jsonl", base_texts=words)


def test_reference_some_spreads_over_the_text():
    values = torch.arange(100.0)[:, None]
    picked = Reference(values, values, values).some(4).states[:, 0].tolist()
    assert picked == [0.0, 33.0, 66.0, 99.0]
