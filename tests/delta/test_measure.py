import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.cauchy.charts import CHARTS
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import Gate
from tether.delta.measure import Variant, measure
from tether.delta.summary import summarise
from tether.delta.windows import window_text


def delta(model, name, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    first, second = (size * torch.randn(32, 32, generator=generator) / 32 for _ in range(2))
    gate = Gate(torch.zeros(32), torch.randn(4, 32, generator=generator), torch.full((6,), 120.0))
    return Delta(
        name=name,
        chart="symmetric",
        first=first,
        second=second,
        gate=gate,
        base=model.config.base_fingerprint,
    )


def kl_of(base, moved):
    """KL(base || moved) of the softmax of scores, by torch in float64."""
    p, q = (torch.distributions.Categorical(logits=scores.double()) for scores in (base, moved))
    return torch.distributions.kl_divergence(p, q)


@pytest.fixture(scope="module")
def case(model, tokenizer):
    windows = window_text(tiny.documents("words", 5) + tiny.documents("digits", 3), tokenizer, length=40)
    deltas = {delta(model, "a", 1): 1.0, delta(model, "b", 2): 0.5}
    return windows, deltas


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("gated", [True, False])
def test_measured_is_what_the_fused_model_does(model, case, chart, gated):
    windows, deltas = case
    fused = fuse(model, deltas, chart=chart, gated=gated)
    result = measure(
        model,
        fuse(model, deltas, by="sum").fusion,
        windows,
        [Variant((1.0, 0.5), chart, gated)],
        batch_size=3,
    )
    kl, nll, base_nll, drift = [], [], [], []
    for start, end in zip(windows.starts[:-1], windows.starts[1:], strict=True):
        ids = windows.input_ids[start:end][None]
        with torch.no_grad():
            before, after = model(input_ids=ids), fused(input_ids=ids)
        p, q = before.logits[0].double().log_softmax(-1), after.logits[0].double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        targets = ids[0, 1:, None]
        base_nll.append(-p[:-1].gather(-1, targets)[:, 0])
        nll.append(-q[:-1].gather(-1, targets)[:, 0])
        laws = [
            torch.distributions.Cauchy(out.latent_loc[0].double(), out.latent_log_scale[0].double().exp())
            for out in (before, after)
        ]
        drift.append(torch.distributions.kl_divergence(*laws).sum(-1))
    assert_close(result.softmax_kl[0].double(), torch.cat(kl), rtol=1e-3, atol=1e-5)
    assert_close(result.nll[0].double(), torch.cat(nll), rtol=1e-4, atol=1e-4)
    assert_close(result.base_nll.double(), torch.cat(base_nll), rtol=1e-4, atol=1e-5)
    assert_close(result.latent_drift[0].double(), torch.cat(drift), rtol=1e-3, atol=1e-4)
    assert bool((result.latent_drift <= result.bound * (1 + 1e-5) + 1e-9).all())


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize(("nats", "metric"), [(3e-5, "softmax"), (0.4, "latent")])
def test_measured_with_a_leash_is_what_the_leashed_model_does(model, case, chart, nats, metric):
    windows, deltas = case
    fused = fuse(model, deltas, chart=chart, leash=nats, leash_metric=metric)
    variant = Variant((1.0, 0.5), chart, True, nats, metric)
    result = measure(model, fuse(model, deltas, by="sum").fusion, windows, [variant])
    kl, drift, nll = [], [], []
    for start, end in zip(windows.starts[:-1], windows.starts[1:], strict=True):
        ids = windows.input_ids[start:end][None]
        with torch.no_grad():
            before, after = model(input_ids=ids), fused(input_ids=ids)
        kl.append(kl_of(before.logits[0], after.logits[0]))
        nll.append(-after.logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0])
        laws = [
            torch.distributions.Cauchy(out.latent_loc[0].double(), out.latent_log_scale[0].double().exp())
            for out in (before, after)
        ]
        drift.append(torch.distributions.kl_divergence(*laws).sum(-1).float())
    assert_close(result.softmax_kl[0].double(), torch.cat(kl), rtol=2e-3, atol=1e-9)
    assert_close(result.latent_drift[0], torch.cat(drift), rtol=2e-2, atol=1e-4)
    assert_close(result.nll[0], torch.cat(nll), rtol=1e-4, atol=1e-4)
    held = result.softmax_kl if metric == "softmax" else result.latent_drift
    assert float(held.max()) <= nats * (1 + 1e-2 * (metric == "softmax"))
    assert 0.1 < float((result.leash < 1).float().mean()) < 1
    assert bool((result.latent_drift <= result.bound * (1 + 1e-5) + 1e-9).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("nats", "metric"), [(3e-5, "softmax"), (0.4, "latent"), (None, "softmax")])
def test_in_half_precision_too_what_is_measured_is_what_is_served(tokenizer, dtype, nats, metric):
    """Scores as they are rounded: a leash that is checked on them lets less through than one on exact scores."""
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone().to(dtype))
    windows = window_text(tiny.documents("words", 3) + tiny.documents("digits", 2), tokenizer, length=40)
    deltas = {delta(model, "a", 1): 1.0, delta(model, "b", 2): 0.5}
    fused = fuse(model, deltas, by="sum", leash=nats, leash_metric=metric)
    variant = Variant((1.0, 0.5), fused.fusion.chart, True, nats, metric)
    result = measure(model, fuse(model, deltas, by="sum").fusion, windows, [variant], batch_size=2)
    kl, nll = torch.zeros_like(result.softmax_kl[0]).double(), torch.zeros(len(windows.input_ids)).double()
    for batch in windows.batches(2):
        at = windows.positions(batch)
        with torch.no_grad():
            base, served = (m(input_ids=batch.input_ids).logits[batch.mask] for m in (model, fused))
        kl[at] = kl_of(base, served)
        target = windows.targets[at].clamp(min=0).unsqueeze(-1)
        nll[at] = -served.double().log_softmax(-1).gather(-1, target).squeeze(-1)
    assert_close(result.softmax_kl[0].double(), kl, rtol=1e-3, atol=1e-8)
    assert_close(result.nll[0].double(), nll[result.scored], rtol=1e-5, atol=1e-5)
    if nats is not None:
        assert 0.1 < float((result.leash < 1).float().mean()) < 1
    if metric == "softmax" and nats is not None:
        assert 0.5 * nats < float(result.softmax_kl.max()) <= nats * (1 + 1e-5)


def plain(model, name, size, second):
    """A delta that leaves the scale of U alone."""
    base = model.config.base_fingerprint
    return Delta(name=name, chart="symmetric", first=None, second=size * second, gate=None, base=base)


def test_without_a_change_of_scale_the_bound_of_linear_is_that_of_symmetric_and_small_moves_attain_it(
    model, case
):
    windows, head = case[0], torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) / 32
    alike = {plain(model, name, 1e-3, head): 1.0 for name in "ab"}
    fused = fuse(model, alike, chart="linear", gated=False, by="sum")
    result = measure(
        model, fused.fusion, windows, [Variant((1.0, 1.0), c, False) for c in ("linear", "symmetric")]
    )
    assert torch.equal(result.bound[0], result.bound[1])
    assert_close(result.latent_drift, result.bound, rtol=1e-3, atol=0)
    # With a change of scale the constant of the linear chart is needed.
    free = {delta(model, name, 1, size=1e-3): 1.0 for name in "ab"}
    with_scale = measure(
        model, fuse(model, free, by="sum").fusion, windows, [Variant((1.0, 1.0), "linear", False)]
    )
    assert float((with_scale.latent_drift / with_scale.bound).max()) == pytest.approx(1 / 1.338534, rel=1e-2)


def test_a_latent_leash_is_a_bound_that_pulled_contexts_attain(model, case):
    windows, deltas = case
    fusion = fuse(model, deltas, by="sum").fusion
    loose = Variant((1.0, 0.5), "symmetric", False)
    nats = float(measure(model, fusion, windows, [loose]).latent_drift.median())
    held = loose._replace(leash=nats, leash_metric="latent")
    result = measure(model, fusion, windows, [loose, held])
    assert torch.equal(result.bound[1], result.bound[0].clamp(max=nats))
    pulled = result.leash[1] < 1
    assert 0.4 < float(pulled.float().mean()) < 0.6
    assert float(result.bound[0][pulled].min()) > nats
    assert_close(result.latent_drift[1][pulled], result.bound[1][pulled], rtol=1e-3, atol=0)
    # A leash in the other metric bounds no latent drift.
    softmax = measure(model, fusion, windows, [held._replace(leash=1e-5, leash_metric="softmax")])
    assert torch.equal(softmax.bound[0], result.bound[0])


def test_the_bound_of_one_delta_alone_is_its_own_drift(model, case):
    windows, deltas = case
    result = measure(
        model, fuse(model, deltas, by="sum").fusion, windows, [Variant((1.0, 0.0), "symmetric", False)]
    )
    assert_close(result.bound, result.latent_drift, rtol=1e-5, atol=1e-9)


def test_where_gates_are_closed_nothing_is_measured_as_moved(model, case):
    windows, deltas = case
    result = measure(
        model, fuse(model, deltas, by="sum").fusion, windows, [Variant((1.0, 0.5), "symmetric", True)]
    )
    closed = result.gates.sum(0) == 0
    assert 0 < int(closed.sum()) < len(closed)
    assert bool((result.softmax_kl[0][closed] == 0).all())
    assert bool((result.latent_drift[0][closed] == 0).all())
    kept = closed[result.scored]
    assert torch.equal(result.nll[0][kept], result.base_nll[kept])


def test_summary_counts_means_and_violations(model, case):
    windows, deltas = case
    result = measure(
        model, fuse(model, deltas, by="sum").fusion, windows, [Variant((1.0, 0.5), "linear", False)]
    )
    figures = summarise(result, 0)
    assert figures["tokens"] == len(windows.input_ids)
    assert figures["documents"] == 8
    assert figures["softmax_kl"]["mean"] == pytest.approx(float(result.softmax_kl[0].double().mean()))
    assert figures["softmax_kl"]["low"] <= figures["softmax_kl"]["mean"] <= figures["softmax_kl"]["high"]
    assert figures["nll_change"]["mean"] == pytest.approx(figures["nll"] - figures["nll_base"], abs=1e-6)
    assert figures["bound"] | {"mean_allowed": 0, "largest_ratio": 0} == {
        "contexts": len(windows.input_ids), "violations": 0, "mean_allowed": 0, "largest_ratio": 0
    }  # fmt: skip
    assert figures["softmax_kl"]["documents"]["at_most"] is None
    assert "59" in figures["softmax_kl"]["documents"]["reason"]
    broken = result._replace(bound=result.latent_drift * 0.5)
    assert summarise(broken, 0)["bound"]["violations"] == len(windows.input_ids)
    many = result._replace(documents=torch.arange(len(result.documents)) % 70)
    per_document = torch.stack([result.softmax_kl[0][many.documents == d].double().mean() for d in range(70)])
    at_most = summarise(many, 0)["softmax_kl"]["documents"]["at_most"]
    # 70 documents: the largest but none may be left out at 95 %/95 %.
    assert at_most == pytest.approx(float(per_document.max()))


def test_where_a_leash_serves_the_base_nothing_is_measured(model, tokenizer):
    """A move that float32 does not hold cannot be shrunk: the base is served, and that is on record."""
    windows = window_text(tiny.documents("words", 3), tokenizer, length=40)
    large = {delta(model, "a", 1, size=1200.0): 1.0}
    fused = fuse(model, large, gated=False, leash=0.1)
    result = measure(model, fused.fusion, windows, [Variant((1.0,), "symmetric", False, 0.1, "softmax")])
    assert float(result.softmax_kl.abs().max()) <= 0.1
    assert torch.isfinite(result.nll).all()
    assert float(result.leash.min()) == 0
    batch = next(windows.batches(3))
    with torch.no_grad():
        served, base = fused(input_ids=batch.input_ids).logits, model(input_ids=batch.input_ids).logits
    kl = base.double().softmax(-1) * (base.double().log_softmax(-1) - served.double().log_softmax(-1))
    assert_close(
        result.softmax_kl[0, windows.positions(batch)], kl.sum(-1)[batch.mask].float(), rtol=1e-3, atol=1e-6
    )


def test_in_half_precision_rounding_of_what_is_served_counts(tokenizer):
    backbone = tiny.backbone()
    with torch.no_grad():
        backbone.get_output_embeddings().weight.mul_(4)
    model = CausalQwenForCausalLM.from_backbone(backbone.bfloat16())
    windows = window_text(tiny.documents("words", 3), tokenizer, length=40)
    fused = fuse(model, {delta(model, "a", 1, size=0.3): 1.0}, gated=False, by="sum")
    result = measure(model, fused.fusion, windows, [Variant((1.0,), "symmetric", False)])
    kl = torch.zeros(len(windows.input_ids), dtype=torch.float64)
    for batch in windows.batches(3):
        with torch.no_grad():
            base, served = (
                m(input_ids=batch.input_ids).logits.double().log_softmax(-1) for m in (model, fused)
            )
        kl[windows.positions(batch)] = (base.exp() * (base - served)).sum(-1)[batch.mask]
    assert 1e-6 < float(kl.mean()) < 0.1
    assert_close(result.softmax_kl[0].double().mean(), kl.mean(), rtol=0.02, atol=0)
