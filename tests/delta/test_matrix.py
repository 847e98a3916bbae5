"""Chart `matrix`: the fused model is W_base + sum a_k delta_k on both heads, whatever the base's scale depends on."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
from tether.cauchy.charts import read_move
from tether.causal.checkpoint import save_checkpoint
from tether.causal.dataset import make_examples
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.pairs import Pair
from tether.causal.readout import fit_values
from tether.causal.routed import make_fusion
from tether.delta.anchor import anchor_text
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.certificate import certify
from tether.delta.delta import Delta
from tether.delta.export import export_plain
from tether.delta.fusion import fuse, unfuse
from tether.delta.learning import fit_delta
from tether.delta.ledger import keep_ledger
from tether.delta.training import Fit
from tether.delta.verification import verify
from tether.delta.windows import reader, window_text
from tether.errors import ConfigError
from tether.store.documents import write_documents

WEIGHTS = (0.8, -0.5, 1.3)


@pytest.fixture(scope="module")
def model():
    made = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.2)
    with torch.no_grad():
        made.abduction.log_scale.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        made.abduction.loc.bias.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    renew_fingerprint(made)
    return made


def made_delta(model, name, seed, *, scale=True):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(32, 32, generator=generator) / 60 for _ in range(2))
    return Delta(
        name=name, chart="matrix", first=first if scale else None, second=second, gate=None,
        base=model.config.base_fingerprint, record={"budget": 0.1, "metric": "softmax"},
    )  # fmt: skip


def by_hand(model, deltas, weights):
    """The document's one matrix for each head."""
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for delta, weight in zip(deltas, weights, strict=True):
            whole.abduction.loc.weight += weight * delta.second / model.abduction.logit_scale
            if delta.first is not None:
                whole.abduction.log_scale.weight += weight * delta.first
    return whole


@torch.no_grad()
def z_of(model, ids):
    return model.backbone(input_ids=ids).last_hidden_state


# The document's formulas on the hidden states of the base, in float64 and by nothing of tether's but its weights.
@torch.no_grad()
def document_law(model, deltas, ids):
    z = z_of(model, ids).double()
    loc, log_scale, action = model.abduction.loc, model.abduction.log_scale, model.action
    w_loc, w_scale = loc.weight.double(), log_scale.weight.double()
    for delta, weight in zip(deltas, WEIGHTS, strict=True):
        w_loc = w_loc + weight * delta.second.double()
        w_scale = w_scale + weight * delta.first.double()
    latent_loc = z @ w_loc.T + loc.bias.double()
    latent_log_scale = z @ w_scale.T + log_scale.bias.double()
    w_value = action.value_weight[0].double()
    return {
        "latent_loc": latent_loc,
        "latent_log_scale": latent_log_scale,
        "logits": latent_loc @ action.weight.double().T,
        "value_loc": latent_loc @ w_value + action.value_bias.double(),
        "value_scale": latent_log_scale.exp() @ w_value.abs(),
    }


def assert_near(found, expected):
    # 1e-6 of the largest: what float32 keeps of a sum of 32 products.
    scale = float(expected.abs().max())
    assert_close(found.double() / scale, expected / scale, rtol=0, atol=1e-6)


def test_after_a_fit_of_values_it_is_the_documents_matrices_fused_exported_and_read_back(tmp_path):
    backbone = tiny.backbone("qwen2")
    # With a reserved row for <NUM> the model can be exported.
    backbone.resize_token_embeddings(264, mean_resizing=False)
    model = CausalQwenForCausalLM.from_backbone(backbone, latent_scale=0.2)
    tokenizer = model.add_numbers(tiny.tokenizer())
    rows = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).tolist()
    told = [Pair(f"a {50 * a:.2f} b {50 * b:.2f} c", f" {a + 2 * b:.4f}") for a, b in rows]
    examples = make_examples(told, tokenizer)
    fit_values(model, examples)
    renew_fingerprint(model)
    ids = examples.collate(range(3))["input_ids"]
    with torch.no_grad():
        assert float(model(input_ids=ids).latent_log_scale.std((0, 1)).min()) > 0.3
    for seed, name in enumerate("abc"):
        made_delta(model, name, seed).save(tmp_path / f"{name}.delta")
    deltas = [Delta.load(tmp_path / f"{name}.delta") for name in "abc"]
    expected = document_law(model, deltas, ids)
    fused = fuse(model, dict(zip(deltas, WEIGHTS, strict=True)), by="sum", chart="matrix")
    assert fused.config.fusion["chart"] == "matrix"
    save_checkpoint(fused, tokenizer, tmp_path / "fused")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    for each in (fused, again):
        with torch.no_grad():
            out = each(input_ids=ids)
        for name, value in expected.items():
            assert_near(getattr(out, name), value)
    base, back = unfuse(again)
    assert tuple(back.values()) == WEIGHTS
    assert all(
        torch.equal(one.first, other.first) and torch.equal(one.second, other.second)
        for one, other in zip(back, deltas, strict=True)
    )
    assert fuse(base, back, by="sum").config.fusion == again.config.fusion
    export_plain(again, tokenizer, tmp_path / "plain")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(input_ids=ids).logits
    assert_near(plain, expected["logits"])
    # Moves in units of the scale are no matrix here, not even of deltas that agree where the scale is its mean.
    scale = model.abduction(z_of(model, ids))[1].mean((0, 1)).exp().detach().unsqueeze(-1)
    in_units = [Delta(**{**d.__dict__, "chart": "linear", "second": d.second / scale}) for d in deltas]
    linear = fuse(model, dict(zip(in_units, WEIGHTS, strict=True)), by="sum", chart="linear")
    with torch.no_grad():
        apart = linear(input_ids=ids).latent_loc - expected["latent_loc"]
    assert float(apart.abs().max()) > 1e-2 * float(expected["latent_loc"].abs().max())


def test_while_the_scale_is_constant_linear_is_the_same(ids):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.2)
    deltas = [made_delta(model, name, seed) for seed, name in enumerate("abc")]
    scale = model.abduction.log_scale.bias.detach().exp().unsqueeze(-1)
    in_units = [Delta(**{**d.__dict__, "chart": "linear", "second": d.second / scale}) for d in deltas]
    fused = fuse(model, dict(zip(in_units, WEIGHTS, strict=True)), by="sum", chart="linear")
    expected = document_law(model, deltas, ids)
    with torch.no_grad():
        out = fused(input_ids=ids)
    for name in ("latent_loc", "latent_log_scale", "logits"):
        assert_near(getattr(out, name), expected[name])


@pytest.fixture(scope="module")
def deltas(model):
    return [made_delta(model, name, seed) for seed, name in enumerate("abc")]


@pytest.fixture
def ids(generator):
    return torch.randint(256, (3, 20), generator=generator)


@pytest.mark.parametrize("chart", [None, "matrix"])
def test_the_sum_is_the_models_own_matrices_added_up(model, deltas, ids, chart, tmp_path):
    fused = fuse(model, dict(zip(deltas, WEIGHTS, strict=True)), by="sum", chart=chart, gated=False)
    whole = by_hand(model, deltas, WEIGHTS)
    for mode in ("softmax", "deterministic"):
        with torch.no_grad():
            found, expected = (each(input_ids=ids, mode=mode) for each in (fused, whole))
        assert_close(found.latent_loc, expected.latent_loc, rtol=1e-6, atol=1e-6)
        assert_close(found.latent_log_scale, expected.latent_log_scale, rtol=1e-6, atol=1e-6)
        assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    # The scale differs from context to context, so no delta of chart `linear` is this.
    with torch.no_grad():
        assert float(model(input_ids=ids).latent_log_scale.std(1).mean()) > 0.05
    save_checkpoint(fused, tiny.tokenizer(), tmp_path / "fused")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, fused(input_ids=ids).logits)
    back = list(unfuse(again)[1])
    assert [delta.chart for delta in back] == ["matrix"] * 3
    for one, other in zip(back, deltas, strict=True):
        assert torch.equal(one.second, other.second)


def test_by_evidence_an_expert_is_the_model_with_its_matrices(model, deltas, ids):
    fused = fuse(model, {deltas[0]: 1.0}, gated=False)
    whole = by_hand(model, deltas[:1], (1.0,))
    with torch.no_grad():
        out = fused(input_ids=ids, output_weights=True)
        laws = [each(input_ids=ids).logits.double().softmax(-1) for each in (model, whole)]
    mixed = sum(out.log_weights[..., at].exp().unsqueeze(-1) * law for at, law in enumerate(laws))
    assert_close(out.logits.double().softmax(-1), mixed.double(), rtol=1e-4, atol=1e-6)


def test_it_is_exported_with_any_scale_and_read_back(model, ids, tmp_path):
    plain = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.2)
    with torch.no_grad():
        plain.abduction.log_scale.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    renew_fingerprint(plain)
    deltas = [made_delta(plain, name, seed) for seed, name in enumerate("abc")]
    fused = fuse(plain, dict(zip(deltas, WEIGHTS, strict=True)), by="sum", gated=False)
    export_plain(fused, tiny.tokenizer(), tmp_path / "plain")
    with torch.no_grad():
        assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(input_ids=ids).logits,
            by_hand(plain, deltas, WEIGHTS)(input_ids=ids).logits,
            rtol=1e-5,
            atol=1e-5,
        )
    deltas[0].save(tmp_path / "a.delta")
    again = Delta.load(tmp_path / "a.delta")
    assert again.chart == "matrix"
    assert torch.equal(again.first, deltas[0].first)


# The document's own formula of the drift of one model from another, of their laws of U.
@torch.no_grad()
def document_drift(before, after, ids):
    first, second = (each(input_ids=ids) for each in (before, after))
    (loc_a, gamma_a), (loc_b, gamma_b) = (
        (out.latent_loc[0].double(), out.latent_log_scale[0].double().exp()) for out in (first, second)
    )
    ratio = ((gamma_a + gamma_b) ** 2 + (loc_a - loc_b) ** 2) / (4 * gamma_a * gamma_b)
    return ratio.log().sum(-1)


def test_a_matrix_is_learnt_certified_and_in_the_ledger(model, tmp_path):
    texts = {"digits": tiny.documents("digits", 40, 1), "words": tiny.documents("words", 40, 2)}
    texts["held out"] = tiny.documents("words", 40, 3)
    caches = {
        name: cache_states(model, window_text(text, tiny.tokenizer(), length=64), tmp_path / name)
        for name, text in texts.items()
    }
    anchor = anchor_text(model, caches["words"], caches["held out"], tokens=2000, background=tiny.BACKGROUND)
    fit = Fit(
        chart="matrix", budget=Budget(value=0.05), epochs=4, batch=128, lr=3e-3, candidates=200, sampled=32
    )
    delta = fit_delta(model, caches["digits"], anchor, "digits", fit)
    assert delta.record["held_out"]["change"] < -0.05
    assert 0.9 * 0.05 <= delta.record["drift_base"] <= 0.05 or delta.record["budget_used"] < 1
    fused = fuse(model, {delta: 1.0}, by="sum", gated=False)
    whole = by_hand(model, [delta], [1.0])
    windows = window_text(texts["held out"], tiny.tokenizer(), length=64)
    pieces = windows.input_ids.tensor_split(windows.starts[1:-1].tolist())
    with torch.no_grad():
        laws = [
            torch.cat([each(input_ids=piece[None]).logits[0].double().log_softmax(-1) for piece in pieces])
            for each in (model, whole)
        ]
    drift = float((laws[0].exp() * (laws[0] - laws[1])).sum(-1).mean())
    latent = float(torch.cat([document_drift(model, whole, piece[None]) for piece in pieces]).mean())
    save_checkpoint(fused, tiny.tokenizer(), tmp_path / "fused")
    write_documents(tmp_path / "words.jsonl", texts["held out"])
    certificate = certify(model, fused, tiny.tokenizer(), {"words": tmp_path / "words.jsonl"}, window=64)
    certificate.save(tmp_path / "cert.json")
    assert verify(tmp_path / "cert.json") == []
    figures = certificate.figures["words"]
    assert figures["softmax_kl"]["mean"] == pytest.approx(drift, rel=1e-3)
    assert figures["latent_drift"]["mean"] == pytest.approx(latent, rel=1e-4)
    assert figures["bound"]["violations"] == 0
    assert certificate.fusion["chart"] == "matrix"
    kept = keep_ledger(fused, tiny.tokenizer(), texts["held out"], window=64, tokens=None)
    assert kept["chart"] == "matrix"
    assert kept["total"]["measured"] == pytest.approx(latent, rel=1e-4)
    # One delta of weight 1: its own drift is the plan, and no constant of the chart is needed.
    assert kept["budgets"]["allowed"] == pytest.approx(delta.record["latent_base"], rel=1e-6)


def test_what_keeps_values_moves_nothing_that_numbers_see(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.2)
    model.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        model.abduction.log_scale.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    renew_fingerprint(model)
    read = reader(model, tiny.tokenizer())
    caches = {
        name: cache_states(
            model, window_text(tiny.documents(kind, 30, seed), read, length=64), tmp_path / name
        )
        for seed, (name, kind) in enumerate((("digits", "digits"), ("words", "words"), ("held out", "words")))
    }
    anchor = anchor_text(model, caches["words"], caches["held out"], tokens=2000, background=tiny.BACKGROUND)
    given = {
        "budget": Budget(value=0.1),
        "epochs": 3,
        "batch": 128,
        "lr": 3e-3,
        "candidates": 200,
        "sampled": 32,
    }
    fit = Fit(chart="matrix", location_only=True, keep_values=True, **given)
    delta = fit_delta(model, caches["digits"], anchor, "digits", fit)
    assert delta.record["held_out"]["change"] < -0.05
    assert delta.record["values"]["drift"] < 1e-6
    windows = caches["digits"].windows
    ids, values = windows.input_ids[None, :64], windows.numeric_values[None, :64]
    with torch.no_grad():
        before, after = (
            each(input_ids=ids, numeric_values=values)
            for each in (model, fuse(model, {delta: 1.0}, by="sum", gated=False))
        )
    assert_close(after.value_loc, before.value_loc, rtol=1e-5, atol=1e-5)
    assert_close(after.value_scale, before.value_scale)
    assert float((after.latent_loc - before.latent_loc).abs().max()) > 1e-2
    with pytest.raises(ConfigError, match="keep_values in chart symmetric"):
        Fit(keep_values=True, location_only=True)


def test_what_is_no_matrix_is_refused(model, deltas):
    other = Delta(
        name="d", chart="symmetric", first=None, second=torch.zeros(32, 32), gate=None,
        base=model.config.base_fingerprint,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"chart 'matrix' with 'd' \(symmetric\)"):
        fuse(model, {deltas[0]: 1.0, other: 1.0}, by="sum", chart="matrix", gated=False)
    with pytest.raises(ConfigError, match="chart='round'"):
        fuse(model, {deltas[0]: 1.0}, by="sum", chart="round", gated=False)
    described = fuse(model, {deltas[0]: 1.0, other: 1.0}, by="sum", chart="linear").config.fusion
    with pytest.raises(ConfigError, match="chart matrix of deltas in matrix, symmetric"):
        make_fusion(32, 32, described | {"chart": "matrix"})
    with pytest.raises(ConfigError, match="without the base's scale"):
        read_move(torch.zeros(2), torch.zeros(2), "matrix", None)
