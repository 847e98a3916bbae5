import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.cauchy.divergence import drift
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.budget import Budget
from tether.delta.fisher import align_latent, fisher_axes
from tether.delta.fusion import fuse
from tether.delta.learning import anchor_text, fit_delta
from tether.delta.objective import output_fisher
from tether.delta.output_head import OutputHead
from tether.delta.training import Fit
from tether.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def aligned(model, caches):
    states = caches["words"].states.float()
    return {
        context: align_latent(
            model, fisher_axes(OutputHead(model.action.weight.detach()), states, context=context, ridge=0.01)
        )
        for context in (False, True)
    }


@pytest.mark.parametrize("context", [False, True])
def test_the_logits_stay_equal(model, aligned, context):
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert_close(
            aligned[context](input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    assert aligned[context].action.weight is not aligned[context].get_input_embeddings().weight


def test_drift_is_the_fisher_form_to_second_order(model, aligned, caches, generator):
    states = caches["words"].states.float()
    fisher = output_fisher(OutputHead(model.action.weight.detach()), states)
    move = 1e-3 * torch.randn(200, 32, generator=generator)
    loc, log_scale = aligned[False].abduction(states[:200])
    moved = aligned[False].abduction(states[:200] + move)[0]
    found = drift(torch.zeros_like(loc), (moved - loc) / log_scale.exp()).sum(-1)
    expected = 0.5 * ((move @ fisher) * move).sum(-1)
    assert_close(found, expected, rtol=1e-2, atol=1e-9)


def test_scales_that_follow_the_context_rank_contexts_better(model, aligned, caches, generator):
    # The same move, at each context: its KL to second order is its own Fisher form, not the mean's.
    states = caches["words-held-out"].states.float()
    weight = model.action.weight.detach()
    move = 1e-2 * torch.randn(32, generator=generator)
    base = torch.log_softmax(states @ weight.T, -1)
    kl = (base.exp() * (base - torch.log_softmax((states + move) @ weight.T, -1))).sum(-1)

    def correlation(context):
        loc, log_scale = aligned[context].abduction(states)
        y = (aligned[context].abduction(states + move)[0] - loc) / log_scale.exp()
        found = drift(torch.zeros_like(y), y).sum(-1)
        ranks = torch.stack([values.argsort().argsort().double() for values in (found, kl)])
        return float(torch.corrcoef(ranks)[0, 1])

    # A constant scale gives every context the same drift for the same move.
    assert correlation(True) > 0.15
    assert correlation(True) > correlation(False) + 0.1


def test_deltas_are_learnt_in_the_aligned_latent_and_fit_no_other(model, aligned, caches):
    target = aligned[False]
    # States are the backbone's, so the same caches serve.
    anchor = anchor_text(
        target, caches["words"], caches["words-held-out"], tokens=1000, background=tiny.BACKGROUND
    )
    options = {"epochs": 4, "batch": 128, "lr": 3e-3, "candidates": 200, "sampled": 32, "probe": 4000}
    fit = Fit(budget=Budget(value=0.02), location_only=True, **options)
    delta = fit_delta(target, caches["digits"], anchor, "digits", fit)
    assert 0.95 * 0.02 <= delta.record["drift_base"] <= 0.02
    fused = fuse(target, {delta: 1.0}, gated=False, by="sum")
    ids = caches["digits"].windows.input_ids[:60][None]
    with torch.no_grad():
        losses = [
            float(torch.nn.functional.cross_entropy(m(input_ids=ids).logits[0, :-1], ids[0, 1:]))
            for m in (target, fused)
        ]
    assert losses[1] < losses[0] - 0.1
    with pytest.raises(CheckpointError, match="learnt on base"):
        fuse(model, {delta: 1.0}, by="sum")


def test_what_cannot_be_aligned(model, aligned, caches):
    axes = fisher_axes(OutputHead(model.action.weight.detach()), caches["words"].states.float())
    with pytest.raises(ConfigError, match="identity abduction"):
        align_latent(aligned[False], axes)


def test_a_saved_aligned_model_comes_back(model, aligned, tmp_path):
    aligned[True].save_pretrained(tmp_path / "aligned")
    again = CausalQwenForCausalLM.from_pretrained(tmp_path / "aligned")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, aligned[True](input_ids=ids).logits)
        assert torch.equal(
            again(input_ids=ids).latent_log_scale, aligned[True](input_ids=ids).latent_log_scale
        )
