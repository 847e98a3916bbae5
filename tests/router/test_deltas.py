import math

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.routed import RoutedFusion, route_shares
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.certificate import certify
from tether.delta.learning import anchor_text, fit_delta
from tether.delta.ledger import keep_ledger
from tether.delta.measure import Variant, measure
from tether.delta.training import Fit
from tether.delta.verification import verify
from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError
from tether.router.deltas import DeltaRouterFit, route_deltas
from tether.store.documents import write_documents

BUDGET = 0.05
SMALL = {
    "tokens": 1500,
    "epochs": 4,
    "batch": 128,
    "candidates": 200,
    "sampled": 50,
    "probe": 300,
    "window": 8,
}


DOMAINS = ("digits", "capitals", "mirrored")


def capitals(count, seed):
    return [text.upper() for text in tiny.documents("words", count, seed)]


def mirrored(count, seed):
    return [text[::-1] for text in tiny.documents("words", count, seed)]


@pytest.fixture(scope="module")
def text():
    """Three domains of one model, base text between them, and other documents of each."""
    held = {}
    for name, make in {
        "digits": lambda n, s: tiny.documents("digits", n, s),
        "capitals": capitals,
        "mirrored": mirrored,
        "base": lambda n, s: tiny.documents("words", n, s),
    }.items():
        held[name], held[f"{name}-test"] = make(40, 1), make(12, 2)
    held["held-out"] = tiny.documents("words", 20, 3)
    return held


@pytest.fixture(scope="module")
def case(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    caches = {
        name: cache_states(model, window_text(content, tiny.tokenizer(), length=64), folder / f"{name}.st")
        for name, content in text.items()
        if not name.endswith("-test")
    }
    anchor = anchor_text(model, caches["base"], caches["held-out"])
    # Nearly no limit: what interferes when it is summed.
    fit = Fit(budget=Budget(value=4.0), epochs=4, batch=128, lr=1e-2, candidates=200, sampled=50, probe=300)
    deltas = [fit_delta(model, caches[name], anchor, name, fit) for name in DOMAINS]
    routed = route_deltas(
        model, deltas, caches, caches["base"], caches["held-out"], DeltaRouterFit(budget=BUDGET, **SMALL)
    )
    return model, deltas, caches, routed


def test_a_ledger_accounts_for_a_routed_model(case, text):
    routed = case[3]
    figures = keep_ledger(routed, tiny.tokenizer(), text["base-test"], window=64)
    shares = sum(row["share"] for row in figures["domains"].values())
    assert shares == pytest.approx(figures["total"]["measured"], rel=1e-4)
    # The router is not taught again: what is left of three are the two others at their shares.
    rows, total = figures["domains"], figures["total"]["measured"]
    pair = (
        figures["interactions"]["capitals + mirrored"] + rows["capitals"]["alone"] + rows["mirrored"]["alone"]
    )
    assert total - rows["digits"]["removal"] == pytest.approx(pair, rel=1e-4)


@pytest.fixture
def figures(case, text):
    """NLL of the base, the router, the sum, the average and each delta alone, by text."""
    model, _, _, routed = case
    variants = {
        "routed": Variant(tuple(routed.fusion.weights), routed.fusion.chart, True),
        "sum": Variant((1.0,) * 3, "symmetric", False),
        "average": Variant((1 / 3,) * 3, "symmetric", False),
    } | {
        name: Variant(tuple(float(name == other) for other in DOMAINS), "symmetric", False)
        for name in DOMAINS
    }
    found = {}
    for name in (*DOMAINS, "base"):
        windows = window_text(text[f"{name}-test"], tiny.tokenizer(), length=64)
        result = measure(model, routed.fusion, windows, list(variants.values()))
        found[name] = dict(zip(variants, result.nll.mean(1).tolist(), strict=True))
        found[name]["base"] = float(result.base_nll.mean())
        found[name]["drift"] = float(result.softmax_kl[0].mean())
        assert not bool((result.latent_drift > result.bound * (1 + 1e-4) + 1e-6).any())
    return found


def test_a_router_keeps_each_domains_gain_where_the_sum_loses_it(figures):
    oracle = sum(figures[name]["base"] - figures[name][name] for name in DOMAINS)
    gained = {
        kind: sum(figures[name]["base"] - figures[name][kind] for name in DOMAINS)
        for kind in ("routed", "sum", "average")
    }
    assert oracle > 0.5
    assert gained["routed"] > 0.5 * oracle
    assert gained["routed"] > gained["average"]
    assert gained["routed"] > gained["sum"]


def test_base_text_stays_within_the_budget(case, figures):
    record = case[3].config.fusion["router"]["record"]
    assert 0 < record["drift_base"] <= BUDGET
    assert figures["base"]["routed"] < figures["base"]["base"] + 0.1
    assert figures["base"]["drift"] < 2 * BUDGET
    # Each delta acts on its own domain, and on base text the base.
    shares = record["shares"]
    assert shares["digits"][0] > shares["digits"][1]
    assert shares["capitals"][1] > shares["capitals"][0]
    assert sum(shares["base text"]) < min(sum(shares["digits"]), sum(shares["capitals"]))
    assert all(cost > 0 for cost in record["static_costs"])


def test_measured_is_what_the_routed_model_serves(case, text):
    model, _, _, routed = case
    windows = window_text(text["digits-test"][:3], tiny.tokenizer(), length=64)
    variant = Variant(tuple(routed.fusion.weights), routed.fusion.chart, True)
    result = measure(model, routed.fusion, windows, [variant])
    kl = []
    for start, end in zip(windows.starts[:-1], windows.starts[1:], strict=True):
        ids = windows.input_ids[start:end][None]
        with torch.no_grad():
            p, q = (net(input_ids=ids).logits[0].double().log_softmax(-1) for net in (model, routed))
        kl.append((p.exp() * (p - q)).sum(-1))
    assert_close(result.softmax_kl[0].double(), torch.cat(kl), rtol=1e-3, atol=1e-5)


def test_writing_step_by_step_routes_as_reading_at_once_does(case):
    routed = case[3]
    ids = tiny.tokenizer()("12.0 11.3 of THE model 0", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = routed(input_ids=ids)
        first = routed(input_ids=ids[:, :9], use_cache=True)
        rest = routed(
            input_ids=ids[:, 9:], past_key_values=first.past_key_values, gate_state=first.gate_state
        )
    assert_close(torch.cat([first.gates, rest.gates], -1), whole.gates, rtol=1e-4, atol=1e-5)
    written = routed.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=257)
    for position in range(ids.shape[1], written.shape[1]):
        with torch.no_grad():
            again = routed(input_ids=written[:, :position]).logits[0, -1].argmax()
        assert again == written[0, position]


def test_a_routed_model_is_saved_loaded_and_certified(case, text, tmp_path):
    model, _, _, routed = case
    save_checkpoint(routed, tiny.tokenizer(), tmp_path / "routed")
    again, tokenizer = load(str(tmp_path / "routed"))
    assert isinstance(again.fusion, RoutedFusion)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, routed(input_ids=ids).logits)
    write_documents(tmp_path / "base.jsonl", text["base-test"])
    certificate = certify(model, again, tokenizer, {"base": tmp_path / "base.jsonl"}, window=64)
    assert certificate.figures["base"]["bound"]["violations"] == 0
    certificate.save(tmp_path / "certificate.json")
    assert verify(tmp_path / "certificate.json") == []


def test_gates_of_the_deltas_act_too_where_asked(case):
    model, deltas, caches, _ = case
    short = SMALL | {"epochs": 1, "window": len(deltas[0].gate.threshold)}
    fit = DeltaRouterFit(budget=BUDGET, gated=True, **short)
    routed = route_deltas(model, deltas, caches, caches["base"], caches["held-out"], fit)
    states = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0)) * 50
    mask = torch.ones(1, 12, dtype=torch.bool)
    # Nothing like any domain: the gates are closed whatever the router says.
    assert float(routed.fusion.gates(states, mask)[0].abs().max()) == 0
    with pytest.raises(ConfigError, match="router window 5"):
        route_deltas(
            model, deltas, caches, caches["base"], caches["held-out"],
            DeltaRouterFit(budget=BUDGET, gated=True, **(short | {"window": 5})),
        )  # fmt: skip


def test_shares_are_a_softmax_with_the_base_first():
    generator = torch.Generator().manual_seed(0)
    features, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 6), (4, 6), (4,)))
    expected = (features @ weight.T + bias).softmax(-1).T
    assert_close(route_shares(features, weight, bias, null=True), expected[1:])
    assert_close(route_shares(features, weight, bias, null=False), expected)
    top = route_shares(features, weight, bias, null=False, top_k=2)
    assert bool(((top > 0).sum(0) == 2).all())
    assert_close(top.sum(0), torch.ones(7))


def test_what_cannot_be_routed_is_refused(case):
    model, deltas, caches, _ = case
    parts = caches["base"], caches["held-out"]
    with pytest.raises(ConfigError, match="no text of capitals"):
        route_deltas(model, deltas, {"digits": caches["digits"]}, *parts, DeltaRouterFit(**SMALL))
    foreign = caches["digits"]._replace(base="sha256:" + "0" * 64)
    with pytest.raises(CheckpointError, match="cached states are of backbone"):
        route_deltas(model, deltas, {**caches, "digits": foreign}, *parts, DeltaRouterFit(**SMALL))
    with pytest.raises(ConfigError, match="top_k=9"):
        route_deltas(model, deltas, caches, *parts, DeltaRouterFit(top_k=9, **SMALL))
    for bad in ({"budget": 0.0}, {"budget": math.nan}, {"batch": 1}, {"window": 0}):
        with pytest.raises(ConfigError, match="expected"):
            DeltaRouterFit(**bad)
