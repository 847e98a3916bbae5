"""Calibration of the head's start, against dense formulas in float64 and by what it promises."""

import math

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal import calibration
from tether.causal.calibration import calibrate, frontier, greedy_share, match_diversity
from tether.causal.losses import normalised_ovr_nll, ovr_log_prob
from tether.causal.modeling import CausalQwenForCausalLM
from tether.errors import ConfigError

SCALE = 0.05


def wrapped(kind="qwen2"):
    return CausalQwenForCausalLM.from_backbone(tiny.backbone(kind)).requires_grad_(False)


@pytest.fixture
def contexts(generator):
    """More than are held at a time, so that the sums over chunks are tested too."""
    count = calibration.ROWS + 21
    return torch.randn(count, 32, generator=generator), torch.randint(258, (count,), generator=generator)


def texts(count=6, length=40):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(256, (length,), generator=generator) for _ in range(count)]


def test_softmax_share_is_the_mean_of_the_largest_probabilities(contexts):
    action = wrapped().action
    scores = contexts[0].double() @ action.weight.detach().double().mT
    assert greedy_share(action, contexts[0], SCALE, None) == pytest.approx(
        float(torch.softmax(scores, -1).amax(-1).mean()), rel=1e-5
    )


def test_causal_share_counts_what_sampled_causes_choose(contexts, generator):
    action, loc = wrapped().action, contexts[0]
    noise = torch.rand(loc.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    weight = action.weight.detach().double()
    drawn = loc.double() + SCALE * torch.tan(math.pi * (noise.double() - 0.5))
    same = (drawn @ weight.mT).argmax(-1) == (loc.double() @ weight.mT).argmax(-1)
    assert greedy_share(action, loc, SCALE, noise) == pytest.approx(float(same.double().mean()))
    assert greedy_share(action, loc, 0.0, noise) == 1.0


def test_the_matched_scale_is_as_diverse_as_softmax_on_other_noise(generator):
    model = wrapped()
    loc = 0.3 * torch.randn(2000, 32, generator=generator)
    scale = match_diversity(model.action, loc, generator=generator)
    fresh = torch.rand(loc.shape, generator=torch.Generator().manual_seed(9)).clamp(1e-6, 1 - 1e-6)
    # Two shares of 2,000 positions: a standard error of about a point each.
    assert greedy_share(model.action, loc, scale, fresh) == pytest.approx(
        greedy_share(model.action, loc, 0.0, None), abs=0.035
    )


def test_every_point_of_the_frontier_is_what_dense_formulas_give(contexts):
    action = wrapped().action
    loc, targets = contexts
    weight = action.weight.detach().double()
    scores, own = loc.double() @ weight.mT, weight.abs().sum(-1) * SCALE
    points = frontier(action, loc, SCALE, targets)
    assert {(point.noise_form, point.threshold_form) for point in points} == {
        ("constant", "context"),
        ("constant", "constant"),
        ("fill", "context"),
        ("fill", "constant"),
    }
    assert any(point.class_noise == 0 for point in points)
    for point in points:
        spread = own.clamp(min=point.class_noise) if point.noise_form == "fill" else own + point.class_noise
        level = point.threshold
        if point.threshold_form == "context":
            level = level + scores.logsumexp(-1, keepdim=True)
        fires = torch.atan2(spread.expand_as(scores), level - scores) / math.pi
        chosen = torch.nn.functional.one_hot(targets, 258).bool()
        loss = -(torch.where(chosen, fires, 1 - fires)).log().sum(-1).mean()
        nll = -(fires / fires.sum(-1, keepdim=True))[chosen].log().mean()
        agreement = (fires.argmax(-1) == scores.argmax(-1)).double().mean()
        assert point.ovr_loss == pytest.approx(float(loss), rel=1e-5)
        assert point.normalised_nll == pytest.approx(float(nll), rel=1e-5)
        # Far thresholds leave differences of one float32 rounding between the best two.
        assert point.agreement == pytest.approx(float(agreement), abs=0.02)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_calibrated_model_acts_as_its_record_says(kind, tmp_path):
    model = wrapped(kind)
    record = calibrate(model, texts(), tokens=200)
    chosen, config = record["chosen"], model.config
    good = [point for point in record["frontier"] if point["agreement"] >= 0.99]
    assert chosen == min(good, key=lambda point: point["ovr_loss"])
    assert record["positions"] == 6 * 39
    assert config.latent_scale == pytest.approx(record["latent_scale"])
    assert config.calibration == {name: value for name, value in record.items() if name != "frontier"}

    ids = torch.stack(texts())
    with torch.no_grad():
        out = model(ids, mode="deterministic")
        again = model(ids, mode="softmax").logits
    assert_close(out.latent_log_scale.exp(), torch.full_like(out.latent_log_scale, record["latent_scale"]))
    # The positions that the decision was chosen on, by the model's own forward pass.
    some = torch.linspace(0, 6 * 39 - 1, 200).long()
    log_prob, targets = out.logits[:, :-1].flatten(0, 1)[some], ids[:, 1:].flatten()[some]
    agreement = (log_prob.argmax(-1) == again[:, :-1].flatten(0, 1)[some].argmax(-1)).double().mean()
    assert float(agreement) == pytest.approx(chosen["agreement"], abs=0.006)
    assert float(normalised_ovr_nll(log_prob, targets)) == pytest.approx(chosen["normalised_nll"], rel=1e-4)

    model.save_pretrained(tmp_path)
    read = CausalQwenForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(ids, mode="deterministic").logits, out.logits)
    assert read.config.calibration["chosen"]["threshold"] == chosen["threshold"]


def test_the_noise_that_is_served_fills_each_class_up_to_the_size(generator):
    model = wrapped()
    record = calibrate(model, texts(), tokens=200)
    point = calibration.Point(**record["chosen"])._replace(noise_form="fill", class_noise=2.0, threshold=9.0)
    with torch.no_grad():
        calibration._apply(model, 0.1, point)
        loc = torch.randn(5, 32, generator=generator)
        got = model.action.log_prob(loc, torch.full((5, 32), 0.1))
    own = 0.1 * model.action.weight.detach().abs().sum(-1)
    scores = loc @ model.action.weight.detach().mT
    level = 9.0 + (scores.logsumexp(-1, keepdim=True) if point.threshold_form == "context" else 0.0)
    expected = ovr_log_prob(scores, own.clamp(min=2.0).expand_as(scores), torch.as_tensor(level))
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_too_little_text_and_an_agreement_out_of_reach_are_refused(monkeypatch):
    model = wrapped()
    with pytest.raises(ConfigError, match="39 positions"):
        calibrate(model, texts(1))
    only = calibration.Point("constant", 0.0, "context", 0.0, 0.5, 10.0, 5.0)
    monkeypatch.setattr(calibration, "frontier", lambda *_: [only])
    before = model.config.latent_scale
    with pytest.raises(ConfigError, match=r"best 50\.0%"):
        calibrate(model, texts(), tokens=200)
    assert model.config.latent_scale == before


def test_the_same_text_gives_the_same_calibration():
    first, second = (calibrate(wrapped(), texts(), tokens=200) for _ in range(2))
    assert first == second
