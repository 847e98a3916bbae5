import json
import math
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
from tether.cauchy.charts import fuse
from tether.cauchy.divergence import drift
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.adapter import Adapter, is_adapter, lora_config
from tether.delta.adapter_drift import adapter_drift
from tether.delta.adapter_learning import fit_adapter, learn_adapter
from tether.delta.adapter_serving import AdaptedForCausalLM, save_adapted, serve
from tether.delta.adapter_training import AdapterFit, AdapterTraining
from tether.delta.attached import Attached
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.certificate import certify
from tether.delta.held_out import hold_out
from tether.delta.measure import Variant, measure
from tether.delta.objective import output_fisher
from tether.delta.outcome import NO_HELP
from tether.delta.output_head import OutputHead
from tether.delta.source import reference
from tether.delta.verification import verify
from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError
from tether.store.documents import write_documents
from tether.store.manifest import read_manifest


def options(**given):
    budget = given.pop("budget", Budget(value=0.05))
    return AdapterFit(**{"budget": budget, "epochs": 2, "batch": 4, "lr": 5e-3, "probe": 100_000, **given})


def fit(model, caches, name="digits", domain="digits", **given):
    return fit_adapter(
        model, caches[domain], caches["words"], caches["words-held-out"], name, options(**given)
    )


@pytest.fixture(scope="module")
def adapter(model, caches):
    return fit(model, caches)


@pytest.fixture(scope="module")
def other(model, caches):
    return fit(model, caches, "words", "words-held-out", seed=1, epochs=1)


def random_ids(generator, rows=2, length=30):
    return torch.randint(256, (rows, length), generator=generator)


def plain_logits(model, adapter, ids):
    """Logits of PEFT's own model around the plain base."""
    attached = Attached.of(model, {"a": adapter})
    with torch.no_grad():
        return model.action.score_loc(model.abduction(attached.states("a", ids).last_hidden_state)[0])


def all_drifts(model, adapter, cache, metric="softmax", fisher=None):
    attached = Attached.of(model, {"a": adapter})
    drifts = []
    with torch.no_grad():
        for batch in cache.windows.batches(8):
            before, after = (
                output.last_hidden_state[batch.mask]
                for output in (model.backbone(batch.input_ids), attached.states("a", batch.input_ids))
            )
            drifts.append(adapter_drift(metric, model, before, after, fisher))
    return torch.cat(drifts)


def nll(model, adapter, cache):
    attached = Attached.of(model, {"a": adapter})
    losses = []
    with torch.no_grad():
        for batch in cache.windows.batches(8):
            targets = cache.windows.targets[cache.windows.positions(batch)]
            for run in (model.backbone, lambda ids: attached.states("a", ids)):
                states = run(batch.input_ids).last_hidden_state[batch.mask][targets >= 0]
                scores = model.action.score_loc(model.abduction(states)[0])
                losses.append(
                    torch.nn.functional.cross_entropy(scores, targets[targets >= 0], reduction="none")
                )
    return float(torch.cat(losses[::2]).mean()), float(torch.cat(losses[1::2]).mean())


@pytest.mark.parametrize("value", [0.05, pytest.param(0.01, marks=pytest.mark.slow)])
def test_the_budget_is_met_on_held_out_base_text_and_the_domain_gains(model, caches, value):
    learnt = fit(model, caches, budget=Budget(value=value))
    measured = float(all_drifts(model, learnt, caches["words-held-out"]).mean())
    assert 0.95 * value <= measured <= value
    assert learnt.record["drift_base"] == pytest.approx(measured, rel=1e-3)
    base, tuned = nll(model, learnt, caches["digits"])
    assert tuned < base - 0.3


def test_a_quantile_budget_limits_the_quantile(model, caches):
    budget = Budget(value=0.1, quantile=0.9)
    learnt = fit(model, caches, budget=budget)
    drifts = all_drifts(model, learnt, caches["words-held-out"])
    assert 0.09 <= float(drifts.quantile(0.9)) <= 0.1001
    assert float((drifts > 0.1).float().mean()) <= 0.1


@pytest.mark.parametrize(
    ("metric", "value"), [("latent", 60.0), pytest.param("fisher", 0.05, marks=pytest.mark.slow)]
)
def test_budgets_in_the_other_metrics(model, caches, metric, value):
    learnt = fit(model, caches, budget=Budget(value=value, metric=metric))
    some = reference(model, caches["words"].states[:1024].float()).loc
    fisher = output_fisher(OutputHead(model.action.weight.detach()), some)
    measured = float(all_drifts(model, learnt, caches["words-held-out"], metric, fisher).mean())
    assert 0.94 * value <= measured <= 1.001 * value


def test_it_fails_closed_where_no_factor_is_found(model, caches, monkeypatch):
    from tether.delta import adapter_probe

    def jumpy(metric, model, before, after, fisher=None):
        # Any move at all is too much.
        moved = (before != after).any()
        return torch.full((len(before),), 9.0 if moved else 0.0)

    monkeypatch.setattr(adapter_probe, "adapter_drift", jumpy)
    learnt = fit(model, caches, epochs=1)
    assert learnt.record["factor"] == 0.0
    assert all(not values.any() for name, values in learnt.tensors.items() if "lora_B" in name)


def test_the_drifts_are_those_of_the_served_laws(model, generator):
    before, after = (torch.randn(20, 32, generator=generator) for _ in range(2))
    base = torch.distributions.Categorical(logits=model.action.score_loc(before).detach())
    tuned = torch.distributions.Categorical(logits=model.action.score_loc(after).detach())
    expected = torch.distributions.kl_divergence(base, tuned)
    assert_close(adapter_drift("softmax", model, before, after).detach(), expected, rtol=1e-4, atol=1e-5)
    laws = [torch.distributions.Cauchy(z.double(), torch.tensor(0.0245).double()) for z in (before, after)]
    latent = torch.distributions.kl_divergence(*laws).sum(-1)
    assert_close(
        adapter_drift("latent", model, before, after).detach().double(), latent, rtol=1e-4, atol=1e-4
    )
    weight = model.action.weight.detach()
    fisher = weight.T @ weight
    quadratic = torch.stack([0.5 * d @ fisher @ d for d in after - before])
    assert_close(
        adapter_drift("fisher", model, before, after, fisher).detach(), quadratic, rtol=1e-4, atol=1e-4
    )


def test_gradients_of_the_softmax_drift_are_the_closed_form(model, generator):
    before, after = (torch.randn(6, 32, generator=generator) for _ in range(2))
    after.requires_grad_()
    (found,) = torch.autograd.grad(adapter_drift("softmax", model, before, after).sum(), after)
    weight = model.action.weight.detach()
    expected = ((after.detach() @ weight.T).softmax(-1) - (before @ weight.T).softmax(-1)) @ weight
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_model_is_not_touched_and_a_fit_repeats_exactly(model, caches):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.random.get_rng_state()
    first, second = (fit(model, caches, epochs=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(values, second.tensors[name]) for name, values in first.tensors.items())
    third = fit(model, caches, epochs=1, seed=5)
    assert not all(torch.equal(values, third.tensors[name]) for name, values in first.tensors.items())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("value", "pace"), [(1e9, -2 * 0.01), (1e-9, 2 * 0.1)])
def test_the_multiplier_falls_a_tenth_as_fast_as_it_rises(model, caches, value, pace):
    """Far below its budget, as every fit begins, or far above it: the ascent is at its full pace at every step."""
    few = caches["digits"].only(torch.arange(12))
    chosen = options(budget=Budget(value=value), epochs=1, batch=1, gate=False)
    generator = torch.Generator().manual_seed(0)
    attached = Attached(model, "a", lora_config(chosen.rank, chosen.alpha), generator)
    loop = AdapterTraining(model, attached, "a", few, caches["words"], chosen, generator)
    steps = []
    loop.run(steps.append)
    count = len(few.windows.starts) - 1
    assert len(steps) == count >= 12
    # No step of the ascent while Adam warms up.
    rises = count - count // 8
    assert loop.multiplier == pytest.approx((0.05 / value) ** 0.5 * math.exp(pace * rises))


def test_plain_lora_and_replay_are_the_same_loop_without_the_budget(model, caches):
    free = fit(model, caches, budget=None)
    weak, strong = (fit(model, caches, budget=None, replay=beta) for beta in (0.3, 30.0))
    assert free.record["factor"] == 1.0
    assert "drift_base" not in free.record
    drifts = [float(all_drifts(model, a, caches["words-held-out"]).mean()) for a in (free, weak, strong)]
    assert drifts[0] > drifts[1] > drifts[2]
    assert strong.record["multiplier"] == 30.0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT itself
def test_the_folder_is_an_adapter_for_peft_and_within_its_budget(model, caches, adapter, tmp_path, generator):
    from peft import PeftModel

    adapter.save(tmp_path / "digits.lora", inputs={"domain": "0" * 64})
    again = Adapter.load(tmp_path / "digits.lora")
    assert (again.name, again.base, again.record) == (adapter.name, adapter.base, adapter.record)
    assert all(torch.equal(values, again.tensors[name]) for name, values in adapter.tensors.items())
    assert torch.equal(again.gate.whitening, adapter.gate.whitening)
    manifest = read_manifest(tmp_path / "digits.lora")
    assert manifest.kind == "adapter"
    assert manifest.recipe["record"]["budget"] == 0.05
    ids = random_ids(generator)
    plain = PeftModel.from_pretrained(tiny.backbone(), tmp_path / "digits.lora").eval()
    with torch.no_grad():
        assert_close(plain(input_ids=ids).logits, plain_logits(model, adapter, ids), rtol=0, atol=1e-4)


def test_what_is_no_adapter_is_refused(model, adapter, tmp_path):
    assert not is_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="learn --adapter"):
        Adapter.load(tmp_path)
    wide = {name: torch.cat([values, values]) for name, values in adapter.tensors.items()}
    with pytest.raises(CheckpointError, match="do not fit"):
        Attached.of(model, {"a": Adapter(**{**adapter.__dict__, "tensors": wide})})


def test_one_adapter_of_weight_one_is_served_as_peft_serves_it(model, adapter, generator):
    served = serve(model, {adapter: 1.0}, by="sum", gated=False)
    ids = random_ids(generator)
    with torch.no_grad():
        got = served(input_ids=ids).logits
        assert_close(got, plain_logits(model, adapter, ids), rtol=0, atol=1e-4)
        assert float((got - model(input_ids=ids).logits).abs().max()) > 0.1


@pytest.mark.parametrize("chart", ["linear", "symmetric", "geodesic", "rootkl"])
def test_moves_of_several_adapters_are_added_in_the_chart(model, adapter, other, generator, chart):
    served = serve(model, {adapter: 0.7, other: -0.4}, chart=chart, gated=False)
    ids = random_ids(generator, 1, 12)
    with torch.no_grad():
        attached = Attached.of(model, {"a": adapter, "b": other})
        z, a, b = (
            run(ids).last_hidden_state
            for run in (model.backbone, lambda i: attached.states("a", i), lambda i: attached.states("b", i))
        )
        y = torch.stack([a - z, b - z]) / model.config.latent_scale
        x = torch.zeros_like(y)
        fused_x, fused_y = fuse(x.double(), y.double(), torch.tensor([0.7, -0.4]).double(), chart=chart)
        expected = z + model.config.latent_scale * fused_y
        output = served(input_ids=ids)
    assert_close(output.latent_loc.double(), expected, rtol=1e-3, atol=1e-4)
    assert_close(
        output.latent_log_scale.double(), fused_x + torch.tensor(0.0245).log().double(), rtol=1e-3, atol=2e-3
    )


def test_closed_gates_are_the_base_bit_for_bit_and_open_ones_the_adapter(model, adapter, tokenizer):
    served = serve(model, {adapter: 1.0}, by="sum")
    for kind, seed in (("words", 9), ("digits", 9)):
        ids = tokenizer(tiny.documents(kind, 1, seed), return_tensors="pt")["input_ids"][:, :60]
        with torch.no_grad():
            output, base = served(input_ids=ids), model(input_ids=ids).logits
            own = plain_logits(model, adapter, ids)
        gates = output.gates[0, 0].bool()
        assert torch.equal(output.logits[0, ~gates], base[0, ~gates])
        assert_close(output.logits[0, gates], own[0, gates], rtol=0, atol=1e-4)
        assert (float(gates.float().mean()) > 0.5) == (kind == "digits")


def test_passes_left_out_behind_closed_gates_change_nothing(model, adapter, other, tokenizer):
    served = serve(model, {adapter: 1.0, other: 1.0}, by="sum")
    texts = tiny.documents("words", 2, 7) + tiny.documents("digits", 2, 7)
    ids = torch.stack([tokenizer(text, return_tensors="pt")["input_ids"][0, :50] for text in texts])
    with torch.no_grad():
        # With a cache every pass is made.
        left_out, complete = (served(input_ids=ids, use_cache=cache).logits for cache in (False, True))
    assert_close(left_out, complete, rtol=0, atol=1e-5)


def test_generation_with_caches_writes_what_full_passes_write(model, adapter, tokenizer):
    served = serve(model, {adapter: 1.0}, by="sum")
    prompt = tokenizer(tiny.documents("digits", 2, 8), return_tensors="pt")["input_ids"][:, :30]
    written = served.generate(prompt, do_sample=False, max_new_tokens=15, min_new_tokens=15, pad_token_id=257)
    text = prompt
    with torch.no_grad():
        for _ in range(15):
            scores = served(input_ids=text, use_cache=False).logits[:, -1:].clone()
            scores[..., 256] = -torch.inf  # the end of a text, as for min_new_tokens
            text = torch.cat([text, scores.argmax(-1)], dim=1)
    assert torch.equal(written, text)
    plain = model.generate(prompt, do_sample=False, max_new_tokens=15, min_new_tokens=15, pad_token_id=257)
    assert not torch.equal(written, plain)


@pytest.mark.parametrize("metric", ["softmax", "latent"])
def test_the_leash_holds_in_every_context(model, caches, tokenizer, metric):
    wild = fit(model, caches, budget=None)
    nats = {"softmax": 0.05, "latent": 3.0}[metric]
    windows = window_text(
        tiny.documents("words", 8, 4) + tiny.documents("digits", 8, 4), tokenizer, length=48
    )
    figures = {}
    for leash in (None, nats):
        served = serve(model, {wild: 1.0}, by="sum", gated=False, leash=leash, leash_metric=metric)
        drifts = []
        with torch.no_grad():
            for batch in windows.batches(8):
                moved = served(input_ids=batch.input_ids, use_cache=False)
                base = model(input_ids=batch.input_ids, use_cache=False)
                if metric == "softmax":
                    laws = [torch.distributions.Categorical(logits=o.logits.double()) for o in (base, moved)]
                    drifts.append(torch.distributions.kl_divergence(*laws)[batch.mask])
                else:
                    x = (moved.latent_log_scale - base.latent_log_scale).double()
                    y = (moved.latent_loc - base.latent_loc).double() / base.latent_log_scale.double().exp()
                    drifts.append(drift(x, y).sum(-1)[batch.mask])
        figures[leash] = torch.cat(drifts)
    assert float(figures[None].max()) > 5 * nats
    assert float(figures[nats].max()) <= nats * (1 + 1e-4)
    # It is used up where it binds, not avoided.
    assert float(figures[nats].max()) >= 0.99 * nats


def test_measured_and_certified_like_a_fusion_of_deltas(model, adapter, tokenizer, tmp_path):
    served = serve(model, {adapter: 1.0}, by="sum", gated=False)
    text = tiny.documents("words", 6, 4)
    windows = window_text(text, tokenizer, length=48)
    result = measure(served, served.fusion, windows, [Variant((1.0,), "symmetric", False)])
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    attached = Attached.of(base, {"a": adapter})
    with torch.no_grad():
        for batch in windows.batches(4):
            where = windows.positions(batch)
            z, moved = (
                run(batch.input_ids).last_hidden_state[batch.mask]
                for run in (base.backbone, lambda ids: attached.states("a", ids))
            )
            assert_close(
                result.softmax_kl[0, where], adapter_drift("softmax", base, z, moved), rtol=1e-3, atol=1e-5
            )
            assert_close(
                result.latent_drift[0, where], adapter_drift("latent", base, z, moved), rtol=1e-3, atol=1e-3
            )
    assert bool((result.latent_drift <= result.bound * (1 + 1e-5)).all())
    certificate = certify(model, served, tokenizer, text, window=48)
    assert certificate.figures["text"]["softmax_kl"]["mean"] == pytest.approx(
        float(result.softmax_kl.mean()), rel=1e-4
    )
    assert certificate.fusion["kind"] == "adapters"


def test_a_served_folder_loads_with_stock_classes_and_its_certificate_holds(
    model, adapter, other, tokenizer, tmp_path, generator, monkeypatch
):
    for part in (tiny.backbone(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 6, 4))
    weights = {adapter: 1.0, other: 0.5}
    served = serve(model, weights, chart="linear", leash=0.4)
    save_adapted(served, weights, tokenizer, tmp_path / "adapted", base=str(tmp_path / "base"))
    certify(model, served, tokenizer, {"words": tmp_path / "words.jsonl"}, window=48).save(
        tmp_path / "cert.json"
    )
    # Everything is found again where the folders are now.
    (tmp_path / "moved").mkdir()
    for name in ("base", "adapted", "words.jsonl", "cert.json"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    folder = tmp_path / "moved"
    again = AutoModelForCausalLM.from_pretrained(folder / "adapted")
    assert isinstance(again, AdaptedForCausalLM)
    assert again.fusion.leash == (0.4, "softmax")
    ids = random_ids(generator)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, served(input_ids=ids).logits)
    assert verify(folder / "cert.json") == []
    weights_file = folder / "adapted" / "digits" / "adapter_model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert any("adapter_model.safetensors has changed" in line for line in verify(folder / "cert.json"))
    weights_file.write_bytes(content)
    tiny.backbone(seed=3).save_pretrained(folder / "base")
    with pytest.raises(CheckpointError, match="was learnt on base"):
        AutoModelForCausalLM.from_pretrained(folder / "adapted")


def test_what_cannot_be_served(model, adapter):
    with pytest.raises(ConfigError, match="at least one"):
        serve(model, {})
    with pytest.raises(ConfigError, match="distinct"):
        serve(model, {adapter: 1.0, Adapter(**adapter.__dict__): 1.0})
    with pytest.raises(ConfigError, match="no gate"):
        serve(model, {Adapter(**{**adapter.__dict__, "gate": None}): 1.0}, gated=True)
    with pytest.raises(CheckpointError, match="was learnt on base"):
        serve(model, {Adapter(**{**adapter.__dict__, "base": "sha256:" + "0" * 64}): 1.0})
    with pytest.raises(ConfigError, match="fused already"):
        serve(serve(model, {adapter: 1.0}, by="sum"), {adapter: 1.0})
    with pytest.raises(ConfigError, match="one beam"):
        serve(model, {adapter: 1.0}, by="sum", gated=False).generate(
            torch.ones(1, 4, dtype=torch.int64), num_beams=2
        )
    with pytest.raises(ConfigError, match="growing cache of its own"):
        serve(model, {adapter: 1.0}, by="sum", gated=False).generate(
            torch.ones(1, 4, dtype=torch.int64), cache_implementation="static"
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "positive"),
        ({"replay": -1.0}, ">= 0"),
        ({"budget": Budget(value=None, penalty=1.0)}, "penalty"),
        ({"budget": Budget(value=1.0, hard=True)}, "leash"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ConfigError, match=message):
        AdapterFit(**given)


def test_from_text_to_adapter(model, tokenizer, tmp_path):
    steps = []
    learnt = learn_adapter(
        model, tokenizer, tiny.documents("digits", 12), base_texts=tiny.documents("words", 12), name="numbers",
        window=64, cache_folder=tmp_path, on_step=steps.append, fit=AdapterFit(budget=Budget(value=0.05)),
    )  # fmt: skip
    assert learnt.name == "numbers"
    assert set(learnt.record["texts"]) == {"domain", "base"}
    assert len(list(tmp_path.iterdir())) == 3
    assert {"step", "steps", "nll", "drift", "multiplier"} <= steps[-1].keys()
    with pytest.raises(ConfigError, match="the domain text gives 90 tokens"):
        learn_adapter(model, tokenizer, ["a" * 90], base_texts=["b" * 90])


def test_an_adapters_figures_are_those_of_the_adapter_as_it_is_saved(model, caches, adapter):
    cache, found = caches["digits"], adapter.record["held_out"]
    kept = hold_out(cache.windows, 0.15)
    before, after = nll(model, adapter, cache.only(kept.away))
    assert (found["documents"], found["kind"]) == (len(kept.away), "documents")
    assert found["tokens"] == len(cache.only(kept.away).scored()[1])
    assert found["nll_before"] == pytest.approx(before, rel=1e-5)
    assert found["nll_after"] == pytest.approx(after, rel=1e-4)
    assert found["standard_error"] > 0
    base = adapter.record["base_text"]
    kl = float(all_drifts(model, adapter, caches["words-held-out"]).mean())
    assert base["softmax_kl"] == pytest.approx(kl, rel=1e-3)
    assert base["softmax_kl"] == pytest.approx(adapter.record["drift_base"], rel=1e-3)
    losses = nll(model, adapter, caches["words-held-out"])
    assert (base["nll_before"], base["nll_after"]) == pytest.approx(losses, rel=1e-4)
    assert adapter.record["budget_why"] == "The budget is used up."
    assert (adapter.strengths, adapter.record["warnings"]) == ((1.0,), [])


def test_what_is_kept_aside_has_no_influence_on_an_adapter(model, caches, tokenizer, tmp_path):
    documents = tiny.documents("digits", 40, 1)
    away = hold_out(caches["digits"].windows, 0.15).away.tolist()
    learnt = []
    for name, number in (("outside", away[0]), ("inside", next(n for n in range(40) if n not in away))):
        text = list(documents)
        text[number] = tiny.documents("digits", 1, 77)[0]
        cache = cache_states(model, window_text(text, tokenizer, length=64), tmp_path / name)
        learnt.append(fit(model, caches | {"digits": cache}, epochs=1))
    plain = fit(model, caches, epochs=1)
    same = [
        all(torch.equal(values, other.tensors[name]) for name, values in plain.tensors.items())
        for other in learnt
    ]
    assert same == [True, False]
    assert torch.equal(plain.gate.center, learnt[0].gate.center)
    assert not torch.equal(plain.gate.center, learnt[1].gate.center)


def test_an_adapter_carries_a_sample_unless_it_shall_not(model, tokenizer, tmp_path):
    documents = tiny.documents("digits", 12)
    options = {"base_texts": tiny.documents("words", 12), "window": 64, "cache_folder": tmp_path / "cache"}
    learnt = learn_adapter(model, tokenizer, documents, **options, fit=AdapterFit(gate=False))
    assert len(learnt.sample) == learnt.record["held_out"]["documents"] >= 2
    assert set(learnt.sample) <= set(documents)
    learnt.save(tmp_path / "a.lora")
    again = Adapter.load(tmp_path / "a.lora")
    assert (again.sample, again.strengths) == (learnt.sample, (1.0,))
    manifest = json.loads((tmp_path / "a.lora" / "tether.json").read_text())
    manifest["recipe"]["sample"] = ["a"] * 17
    (tmp_path / "a.lora" / "tether.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"a\.lora: damaged, its sample is above 16 texts"):
        Adapter.load(tmp_path / "a.lora")
    private = learn_adapter(model, tokenizer, documents, **options, sample=False, fit=AdapterFit(gate=False))
    assert private.sample == ()


def test_an_adapter_that_does_not_help_says_so(model, caches, tokenizer, tmp_path):
    documents = tiny.documents("digits", 40, 1)
    for number in hold_out(caches["digits"].windows, 0.15).away.tolist():
        documents[number] = "#~" * (len(documents[number]) // 2)
    cache = cache_states(model, window_text(documents, tokenizer, length=64), tmp_path / "states")
    learnt = fit(model, caches | {"digits": cache}, budget=None, gate=False, epochs=6, lr=2e-2)
    assert learnt.record["held_out"]["change"] > 0
    assert learnt.record["warnings"] == [NO_HELP]


def test_other_architectures(caches, tokenizer, tmp_path):
    untied = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"))
    attached = Attached(untied, "a", lora_config(2, 4), torch.Generator().manual_seed(0))
    assert len(attached.weights("a")) == 2 * 2 * 7
    ids = torch.arange(20).reshape(1, -1)
    assert torch.equal(attached.states("a", ids).last_hidden_state, untied.backbone(ids).last_hidden_state)


def test_without_peft_there_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"tether\[adapters\]"):
        lora_config(8, 16)
