"""Numbers in what is learnt: their loss is that of the model, they take part in fit and strength, and drift is told."""

import math

import pytest
import torch
from torch.distributions import Cauchy
from torch.testing import assert_close

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.adapter_learning import fit_adapter
from tether.delta.adapter_training import AdapterFit
from tether.delta.anchor import anchor_text
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.certificate import certify
from tether.delta.fusion import fuse
from tether.delta.head import Head
from tether.delta.learning import fit_delta
from tether.delta.source import Source
from tether.delta.training import Fit
from tether.delta.values import next_values, value_figures, value_head
from tether.delta.verification import verify
from tether.delta.windows import reader, window_text
from tether.store.documents import write_documents


def sums(count, seed):
    """Documents in which a number is nearly three times the number before."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [
            f"a {(first := int(torch.randint(2, 40, (), generator=generator)))} b {3 * first}"
            for _ in range(12)
        ]
        for _ in range(count)
    ]
    return [" ".join(row) for row in rows]


@pytest.fixture(scope="module")
def model():
    made = CausalQwenForCausalLM.from_backbone(
        tiny.backbone("qwen2"), latent_scale=0.2, gate_alpha=0.25, value_loss_weight=2.0
    )
    made.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        made.action.value_bias.fill_(3.0)
        # The scale of U depends on the context.
        made.abduction.log_scale.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    renew_fingerprint(made)
    return made


@pytest.fixture(scope="module")
def caches(model, tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp("numbers"), reader(model, tiny.tokenizer())
    made = {
        "sums": sums(24, 1),
        "words": tiny.documents("words", 30, 2),
        "held out": tiny.documents("words", 30, 3),
    }
    return {
        name: cache_states(model, window_text(text, texts, length=48), folder / f"{name}.safetensors")
        for name, text in made.items()
    }


def fit(model, caches, **options):
    anchor = anchor_text(model, caches["words"], caches["held out"], tokens=2000, background=tiny.BACKGROUND)
    given = {
        "epochs": 4,
        "batch": 64,
        "lr": 3e-3,
        "candidates": 200,
        "sampled": 32,
        "probe": 2000,
        "gate": False,
    }
    return fit_delta(model, caches["sums"], anchor, "sums", Fit(budget=Budget(value=0.1), **given | options))


def test_what_should_follow_is_the_number_of_the_next_token(model):
    windows = window_text(["a 3 b 4.5 c " * 8], reader(model, tiny.tokenizer()), length=64)
    values = next_values(model, windows)
    at = (windows.input_ids == model.config.num_token_id).nonzero().squeeze(-1)
    at = at[at > 0]
    expected = model.action.transform(torch.tensor([3.0, 4.5], dtype=torch.float64))
    assert_close(values[at - 1], expected.repeat(8)[: len(at)])
    assert int((~values.isnan()).sum()) == len(at)
    assert bool(next_values(CausalQwenForCausalLM.from_backbone(tiny.backbone()), windows).isnan().all())


def test_the_loss_of_numbers_is_the_models_own(model, caches):
    delta = fit(model, caches, epochs=1)
    moved, own = fuse(model, {delta: 1.0}, by="sum", gated=False), value_head(model)
    windows = caches["sums"].windows
    source = Source(model, caches["sums"])
    here = (~source.values.isnan()).nonzero().squeeze(-1)
    at, rows = source.take(here), source.rows[here]
    part = rows < int(windows.starts[1])
    ids, values = (
        windows.input_ids[: windows.starts[1]][None],
        windows.numeric_values[: windows.starts[1]][None],
    )
    for served, head in ((model, None), (moved, Head(delta.first, delta.second, delta.chart))):
        with torch.no_grad():
            expected = served(input_ids=ids, labels=ids, numeric_values=values).value_loss
            found = own.nll(*at.moved(head), source.values[here])[part]
        assert len(found) == 12
        assert_close(found.mean(), expected, rtol=1e-3, atol=1e-3)


def test_a_fit_learns_the_numbers_of_its_text(model, caches):
    learnt = fit(model, caches)
    model.config.value_loss_weight = 0.0
    try:
        blind = fit(model, caches)
    finally:
        model.config.value_loss_weight = 2.0
    with_numbers, without = learnt.record["values"], blind.record["values"]
    assert with_numbers["numbers"] == without["numbers"] > 20
    assert with_numbers["median_error_before"] == without["median_error_before"]
    assert with_numbers["median_error_after"] < 0.7 * without["median_error_after"]
    assert with_numbers["median_error_after"] < 0.7 * with_numbers["median_error_before"]
    assert learnt.record["held_out"]["change"] < 0
    assert learnt.record["drift_base"] <= 0.1
    assert min(without["drift"], with_numbers["drift"]) > 0


def test_figures_are_those_of_the_laws(model, generator):
    loc, scale = torch.randn(2, 9, generator=generator), torch.rand(2, 9, generator=generator) + 0.1
    values = torch.randn(9, generator=generator)
    found = value_figures((loc[0], scale[0]), (loc[1], scale[1]), values, lambda y: y.double().sinh())
    error = (loc[1].double().sinh() - values.double().sinh()).abs().median()
    assert found["median_error_after"] == pytest.approx(float(error))
    assert found["covered_before"] == pytest.approx(
        float(((values - loc[0]).abs() <= scale[0]).double().mean())
    )
    law = [Cauchy(loc[at].double(), scale[at].double()) for at in (0, 1)]
    assert found["drift"] == pytest.approx(float(torch.distributions.kl_divergence(*law).mean()), rel=1e-9)
    # Attained: a location two scales away is log 2 nats.
    one, two = (torch.tensor([at]) for at in (1.0, 3.0))
    assert value_figures((one, one), (two, one), one, lambda y: y)["drift"] == pytest.approx(math.log(2))
    none = torch.zeros(0)
    assert value_figures((none, none), (none, none), none, lambda y: y) == {"numbers": 0}


def test_models_without_numbers_have_no_figures_of_them(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    made = {
        name: cache_states(
            model,
            window_text(tiny.documents("words", 30, seed), tiny.tokenizer(), length=48),
            tmp_path / name,
        )
        for seed, name in enumerate(("sums", "words", "held out"))
    }
    assert "values" not in fit(model, made, epochs=1).record


def test_an_adapter_learns_the_numbers_of_its_text(model, caches):
    options = {"budget": Budget(value=0.1), "epochs": 3, "batch": 4, "lr": 5e-3, "probe": 1000, "gate": False}

    def learnt(**more):
        parts = caches["sums"], caches["words"], caches["held out"]
        return fit_adapter(model, *parts, "sums", AdapterFit(**options | more)).record

    with_numbers = learnt()
    model.config.value_loss_weight = 0.0
    try:
        blind = learnt()
    finally:
        model.config.value_loss_weight = 2.0
    assert with_numbers["values"]["numbers"] == blind["values"]["numbers"] > 20
    assert with_numbers["values"]["median_error_after"] < 0.8 * blind["values"]["median_error_after"]
    assert with_numbers["values"]["median_error_after"] < 0.8 * with_numbers["values"]["median_error_before"]
    assert with_numbers["drift_base"] <= 0.1


@pytest.mark.parametrize("by", ["sum", "evidence"])
def test_a_certificate_tells_what_happened_to_numbers(model, caches, tmp_path, by):
    delta = fit(model, caches, epochs=1)
    fused = fuse(model, {delta: 1.0}, **({"by": "sum", "gated": False} if by == "sum" else {}))
    save_checkpoint(fused, tiny.tokenizer(), tmp_path / "fused")
    texts = {"sums": tmp_path / "sums.jsonl", "words": tmp_path / "words.jsonl"}
    documents = {"sums": sums(6, 7), "words": tiny.documents("words", 4)}
    for name, path in texts.items():
        write_documents(path, documents[name])
    certificate = certify(model, fused, tiny.tokenizer(), texts, window=48)
    certificate.save(tmp_path / "cert.json")
    assert verify(tmp_path / "cert.json") == []
    found, own = certificate.figures["sums"]["values"], value_head(model)
    windows = window_text(documents["sums"], reader(model, tiny.tokenizer()), length=48)
    errors = {"before": [], "after": []}
    for start, end in zip(windows.starts[:-1].tolist(), windows.starts[1:].tolist(), strict=True):
        ids, values = windows.input_ids[None, start:end], windows.numeric_values[None, start:end]
        follows = (ids[0, 1:] == own.number).nonzero().squeeze(-1)
        for name, one in (("before", model), ("after", fused)):
            with torch.no_grad():
                guess = one.action.number(one(input_ids=ids, numeric_values=values).value_loc)[0, follows]
            errors[name] += (guess - values[0, follows + 1]).abs().tolist()
    assert found["numbers"] == len(errors["after"]) > 50
    for name, each in errors.items():
        assert found[f"median_error_{name}"] == pytest.approx(sorted(each)[(len(each) - 1) // 2], rel=1e-4)
    assert found["drift"] > 0
    if by == "sum":
        source = Source(model, cache_states(model, windows, tmp_path / "states"))
        here = (~source.values.isnan()).nonzero().squeeze(-1)
        at, head = source.take(here), Head(delta.first, delta.second, delta.chart)
        laws = [Cauchy(*(part.double() for part in own.law(*at.moved(moved)))) for moved in (None, head)]
        assert found["drift"] == pytest.approx(
            float(torch.distributions.kl_divergence(*laws).mean()), rel=1e-3
        )
