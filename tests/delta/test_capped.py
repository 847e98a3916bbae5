"""Domains of a base that caps its logits: what is learnt, served and certified is measured after the cap."""

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.adapter_learning import fit_adapter
from tether.delta.adapter_serving import serve
from tether.delta.adapter_training import AdapterFit
from tether.delta.anchor import anchor_text
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.certificate import certify, read
from tether.delta.fisher import fisher_axes
from tether.delta.fusion import fuse
from tether.delta.learning import fit_delta
from tether.delta.output_head import output_head
from tether.delta.training import Fit
from tether.delta.verification import verify
from tether.delta.windows import window_text
from tether.store.documents import write_documents

CAP, BUDGET = 2.0, 0.03


@pytest.fixture(scope="module")
def base():
    return tiny.backbone("gemma2")


@pytest.fixture(scope="module")
def model(base):
    return CausalQwenForCausalLM.from_backbone(base)


@pytest.fixture(scope="module")
def held_out():
    return window_text(tiny.documents("words", 40, 3), tiny.tokenizer(), length=64)


@pytest.fixture(scope="module")
def caches(model, held_out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("capped")
    texts = {
        name: window_text(tiny.documents(name, 40, seed), tiny.tokenizer(), length=64)
        for seed, name in enumerate(("digits", "words"), start=1)
    }
    return {
        name: cache_states(model, windows, folder / f"{name}.safetensors")
        for name, windows in (texts | {"held out": held_out}).items()
    }


@pytest.fixture(scope="module")
def delta(model, caches):
    options = Fit(
        budget=Budget(value=BUDGET), epochs=4, batch=128, lr=3e-3, candidates=200, sampled=32, probe=100_000
    )
    anchor = anchor_text(
        model, caches["words"], caches["held out"], tokens=100_000, background=tiny.BACKGROUND
    )
    return fit_delta(model, caches["digits"], anchor, "digits", options)


def laws(model, windows):
    """Log probabilities of every context by the whole model, window by window."""
    pieces = windows.input_ids.tensor_split(windows.starts[1:-1].tolist())
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=piece[None]).logits[0].double().log_softmax(-1) for piece in pieces]
        )


def drift(base, moved, windows):
    before, after = laws(base, windows), laws(moved, windows)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_a_delta_meets_its_budget_after_the_cap(base, model, delta, caches, held_out):
    moved = fuse(model, {delta: 1.0}, by="sum", gated=False)
    served = drift(base, moved, held_out)
    assert served == pytest.approx(delta.record["drift_base"], rel=1e-3)
    assert 0.95 * BUDGET <= served <= BUDGET
    windows = caches["digits"].windows
    scored = windows.targets >= 0
    losses = [
        -laws(each, windows)[scored].gather(-1, windows.targets[scored, None]).mean()
        for each in (base, moved)
    ]
    assert losses[1] < losses[0] - 0.05
    with torch.no_grad():
        assert float(moved(input_ids=held_out.input_ids[None, :64]).logits.abs().max()) <= CAP


def test_an_adapter_meets_its_budget_after_the_cap(base, model, caches, held_out):
    options = AdapterFit(budget=Budget(value=BUDGET), epochs=2, batch=4, lr=5e-3, probe=100_000)
    adapter = fit_adapter(model, caches["digits"], caches["words"], caches["held out"], "digits", options)
    served = drift(base, serve(model, {adapter: 1.0}, by="sum", gated=False), held_out)
    assert served == pytest.approx(adapter.record["drift_base"], rel=1e-3)
    assert served <= BUDGET


def test_its_certificate_says_what_the_whole_models_say(model, delta, held_out, tmp_path):
    fused = fuse(model, {delta: 1.0}, by="sum", gated=False)
    save_checkpoint(fused, tiny.tokenizer(), tmp_path / "fused")
    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 40, 3))
    texts = {"words": tmp_path / "words.jsonl"}
    certify(model, fused, tiny.tokenizer(), texts, window=64).save(tmp_path / "cert.json")
    assert verify(tmp_path / "cert.json") == []
    figures = read(tmp_path / "cert.json").figures["words"]
    assert figures["softmax_kl"]["mean"] == pytest.approx(drift(model, fused, held_out), rel=1e-3)


def test_axes_are_those_of_the_capped_fisher(base, model, caches):
    states = caches["words"].states.float()[:200]
    axes = fisher_axes(output_head(model), states)
    weight = base.get_output_embeddings().weight.detach().double()

    def kl(move):
        before, after = (
            torch.log_softmax(CAP * torch.tanh(at @ weight.T / CAP), -1)
            for at in (states.double(), states.double() + move)
        )
        return (before.exp() * (before - after)).sum(-1).mean()

    hessian = torch.autograd.functional.hessian(kl, torch.zeros(32, dtype=torch.float64))
    along = torch.einsum("ia,ij,ja->a", axes.basis.double(), hessian, axes.basis.double())
    assert_close((1 / (2 * axes.scale.double().square()))[-8:], along[-8:], rtol=1e-3, atol=1e-9)


def test_by_evidence_the_capped_laws_are_mixed(base, model, delta, held_out):
    ids = held_out.input_ids[None, :64]
    with torch.no_grad():
        out = fuse(model, {delta: 1.0}, gated=False)(input_ids=ids, output_weights=True)
        alone = fuse(model, {delta: 1.0}, by="sum", gated=False)
        laws = [each(input_ids=ids).logits.double().softmax(-1) for each in (base, alone)]
    mixed = sum(out.log_weights[..., at].exp().unsqueeze(-1) * law for at, law in enumerate(laws))
    assert_close(out.logits.double().softmax(-1), mixed.double(), rtol=1e-4, atol=1e-7)
    assert float(out.log_weights[..., 1].exp().max()) > 0.1
