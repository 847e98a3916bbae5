"""A base that caps its logits: softmax after the cap, decisions before it, and what needs linear logits is refused."""

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.calibration import Point, calibrate, frontier, greedy_share
from tether.causal.config import CausalQwenConfig
from tether.causal.evaluation import evaluate
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.causal.vocabulary import wake_numbers
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.errors import ConfigError

CAP = 2.0
FIRST = Point("constant", 0.0, "constant", 20.0, 0.0, 0.0, 0.0)


@pytest.fixture
def base():
    return tiny.backbone("gemma2")


@pytest.fixture
def model(base):
    return CausalQwenForCausalLM.from_backbone(base, latent_scale=0.05)


@pytest.fixture
def ids(generator):
    return torch.randint(256, (3, 11), generator=generator)


def states(base, ids):
    with torch.no_grad():
        return base.model(ids).last_hidden_state.double()


def test_softmax_mode_and_its_loss_are_the_bases(base, model, ids):
    with torch.no_grad():
        out, expected = (each(input_ids=ids, labels=ids) for each in (model, base))
        lean = model(input_ids=ids, labels=ids, return_logits=False)
    assert torch.equal(out.logits, expected.logits)
    assert_close(out.loss, expected.loss)
    assert_close(lean.loss, expected.loss)
    # The cap is felt.
    head = base.get_output_embeddings().weight.detach().double()
    assert float((states(base, ids) @ head.T).abs().max()) > 2 * CAP


def test_one_vs_rest_asks_of_the_capped_score_what_it_asks_of_the_score(base, model, ids):
    # P(cap tanh(S / cap) > cap tanh(C / cap)) = P(S > C), whatever the level C.
    weight, level = base.get_output_embeddings().weight.detach().double(), 3.0
    with torch.no_grad():
        model.action.threshold.fill_(level)
        got = model(input_ids=ids, mode="deterministic").logits
    loc, scale = (
        states(base, ids) @ weight.T,
        model.action.scores(torch.zeros(1, 32), torch.full((1, 32), 0.05))[1].detach().double(),
    )
    expected = (0.5 + torch.atan((loc - level) / scale) / torch.pi).log()
    assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.argmax(-1), model(input_ids=ids).logits.argmax(-1))


def test_the_one_vs_rest_loss_is_the_summed_binary_cross_entropy_of_these(model, ids):
    with torch.no_grad():
        out = model(input_ids=ids, mode="deterministic", labels=ids)
    prob = out.logits[:, :-1].double().exp()
    hit = torch.nn.functional.one_hot(ids[:, 1:], prob.shape[-1]).double()
    expected = torch.nn.functional.binary_cross_entropy(prob, hit, reduction="none").sum(-1).mean()
    assert_close(out.loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_cause_far_out_chooses_its_class_where_capped_scores_are_equal(base, model, ids):
    noise = Noise.draw(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.abduction.log_scale.bias.fill_(3.0)
        out = model(input_ids=ids, mode="causal", noise=noise)
    scores = out.latent.double() @ base.get_output_embeddings().weight.detach().double().T
    assert torch.equal(out.logits.argmax(-1), scores.argmax(-1))
    capped = CAP * torch.tanh(scores.float() / CAP)
    assert bool((capped.argmax(-1) != scores.argmax(-1)).any())


def test_calibration_measures_decisions_before_the_cap(base, model, generator):
    ids = torch.randint(256, (4, 60), generator=generator)
    loc = states(base, ids).flatten(0, 1)
    weight, targets = base.get_output_embeddings().weight.detach().double(), ids.flatten()
    scores = loc @ weight.T
    point = next(p for p in frontier(model.action, loc.float(), 0.05, targets) if p[:4] == FIRST[:4])
    prob = 0.5 + torch.atan((scores - FIRST.threshold) / (0.05 * weight.abs().sum(-1))) / torch.pi
    hit = torch.nn.functional.one_hot(targets, len(weight)).double()
    expected = torch.nn.functional.binary_cross_entropy(prob, hit, reduction="none").sum(-1).mean()
    assert point.ovr_loss == pytest.approx(float(expected), rel=1e-4)
    noise = torch.rand(loc.shape, generator=generator)
    drawn = loc + 2.0 * torch.tan(torch.pi * (noise.double() - 0.5))
    share = ((drawn @ weight.T).argmax(-1) == scores.argmax(-1)).double().mean()
    assert share > 0
    assert greedy_share(model.action, loc.float(), 2.0, noise) == pytest.approx(float(share), abs=1e-6)


def test_calibration_of_a_capped_base_keeps_its_choices(model, generator):
    record = calibrate(model, [torch.randint(256, (130,), generator=generator)], tokens=60)
    assert {point["threshold_form"] for point in record["frontier"]} == {"constant"}
    assert record["chosen"]["agreement"] >= 0.99
    text = torch.randint(256, (1, 40), generator=generator)
    with torch.no_grad():
        chosen = model(input_ids=text, mode="deterministic").logits.argmax(-1)
        greedy = model(input_ids=text).logits.argmax(-1)
    assert float((chosen == greedy).float().mean()) >= 0.95


def test_evaluation_scores_softmax_after_the_cap(base, model):
    text = "the leash of the model"
    figures = evaluate(model, tiny.tokenizer(), [text])
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        expected = base(input_ids=ids, labels=ids).loss
    assert figures["softmax_nll"] == pytest.approx(float(expected), rel=1e-5)


def test_an_added_number_token_is_woken_to_its_share_under_the_cap(model, ids):
    numeric = model.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        loc = model(input_ids=ids).latent_loc.flatten(0, 1)
        wake_numbers(model, loc, 0.01)
        law = model(input_ids=ids).logits.softmax(-1)
    assert float(law[..., numeric.num_token_id].mean()) == pytest.approx(0.01, rel=0.05)


def test_it_comes_back_from_its_folder(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    again = CausalQwenForCausalLM.from_pretrained(tmp_path)
    assert again.config.logit_cap == CAP
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_takes_logits_for_linear_is_refused(model):
    shape = (32, 32)
    moved = Delta(
        name="a",
        chart="linear",
        first=None,
        second=torch.ones(shape),
        gate=None,
        base=model.config.base_fingerprint,
    )
    with pytest.raises(ConfigError, match=r"(?s)leash in metric 'softmax'.*caps its logits at 2"):
        fuse(model, {moved: 1.0}, leash=0.1)
    assert fuse(model, {moved: 1.0}, leash=0.1, leash_metric="latent").action.logit_cap == CAP
    with pytest.raises(ConfigError, match="threshold_form='context' on a base that caps"):
        CausalQwenForCausalLM.from_backbone(tiny.backbone("gemma2"), threshold_form="context")


@pytest.mark.parametrize(
    "fields",
    [{"logit_scale": 0.0}, {"logit_scale": float("nan")}, {"logit_cap": 0.0}, {"logit_cap": float("inf")}],
)
def test_numbers_that_mean_nothing_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        CausalQwenConfig(backbone_config=tiny.backbone().config, **fields)
