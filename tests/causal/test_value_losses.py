"""The losses of a model with numbers, against the formulas in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.config import THRESHOLDS
from tether.causal.modeling import CausalQwenForCausalLM
from tether.errors import ConfigError, ShapeError

NUM = 258


def learner(**fields):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), **({"latent_scale": 0.1} | fields))
    model.add_numbers(tiny.tokenizer())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        model.action.bias.normal_(generator=generator)
        model.abduction.log_scale.weight.normal_(std=0.05, generator=generator)
        if len(model.action.threshold) > 1:
            model.action.threshold.normal_(generator=generator)
    return model


@pytest.fixture
def batch(generator):
    ids = torch.randint(256, (3, 8), generator=generator)
    values = torch.zeros(3, 8, dtype=torch.float64)
    for row, place, value in ((0, 2, 12.5), (0, 7, -3e4), (1, 5, 0.25), (2, 0, 7.0)):
        ids[row, place], values[row, place] = NUM, value
    labels = ids.clone()
    labels[1, :4] = -100
    labels[2, 6:] = -100
    return {"input_ids": ids, "numeric_values": values, "labels": labels}


def by_hand(model, batch, mode, alpha, values=None):
    """Class loss and value loss, in float64, one position at a time."""
    action, config = model.action, model.config
    with torch.no_grad():
        output = model(**batch | {"labels": None})
    loc, scale = output.latent_loc.double(), output.latent_log_scale.double().exp()
    weight, bias, noise = action.weight.double(), action.bias.double(), action.class_noise.double()
    values = batch["numeric_values"] if values is None else values
    class_terms, value_terms = [], []
    for row in range(len(loc)):
        for t in range(loc.shape[1] - 1):
            target = int(batch["labels"][row, t + 1])
            if target == -100:
                continue
            scores = weight @ loc[row, t] + bias
            if mode == "softmax":
                prob = torch.softmax(scores, -1)
                class_terms.append(-prob[target].log())
            else:
                level = action.threshold.double()
                if config.threshold_form == "context":
                    level = level + scores.logsumexp(-1)
                spread = weight.abs() @ scale[row, t] + noise
                prob = torch.atan2(spread, level - scores) / math.pi
                hit = torch.zeros(259, dtype=torch.float64)
                hit[target] = 1.0
                class_terms.append(-(hit * prob.log() + (1 - hit) * torch.log1p(-prob)).sum())
            if target == NUM:
                true = values[row, t + 1]
                if config.value_transform == "signed-log":
                    true = true.sign() * torch.log1p(true.abs())
                head = action.value_weight[0].double()
                y, spread = head @ loc[row, t] + action.value_bias.double()[0], head.abs() @ scale[row, t]
                nll = math.log(math.pi) + spread.log() + torch.log1p(((true - y) / spread) ** 2)
                value_terms.append((alpha + (1 - alpha) * prob[NUM]) * nll)
    return torch.stack(class_terms).mean(), torch.stack(value_terms).mean()


def check(model, batch, mode, alpha, **more):
    output = model(**batch, mode=mode, **more)
    class_loss, value_loss = by_hand(model, batch, mode, alpha, more.get("target_values"))
    assert_close(output.class_loss.double(), class_loss, rtol=2e-5, atol=1e-5)
    assert_close(output.value_loss.double(), value_loss, rtol=2e-5, atol=1e-5)
    assert_close(output.loss, output.class_loss + model.config.value_loss_weight * output.value_loss)
    return output


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("transform", ["raw", "signed-log"])
@pytest.mark.parametrize("mode", ["softmax", "deterministic"])
def test_losses_are_the_formulas(mode, transform, alpha, batch):
    model = learner(gate_alpha=alpha, value_transform=transform, value_loss_weight=0.7)
    output = check(model, batch, mode, alpha)
    assert_close(output.loss, output.class_loss + 0.7 * output.value_loss)
    without = model(**batch, mode=mode, return_logits=False)
    assert without.logits is None
    for name in ("loss", "class_loss", "value_loss"):
        assert_close(getattr(without, name), getattr(output, name))


@pytest.mark.parametrize("noise", ["constant", "fill"])
@pytest.mark.parametrize("form", THRESHOLDS)
def test_losses_follow_the_decision(form, noise, batch):
    fields = {"threshold_form": form, "threshold": 1.5, "noise_form": noise, "class_noise": 20.0}
    check(learner(**fields), batch, "deterministic", 0.5)


@pytest.mark.parametrize("form", THRESHOLDS)
@pytest.mark.parametrize("share", [False, True])
def test_forms_of_the_one_vs_rest_loss_agree(form, share, batch):
    results = []
    for impl in ("dense", "chunked"):
        model = learner(threshold_form=form, threshold=1.5, ovr_impl=impl)
        if share:
            torch.nn.init.zeros_(model.abduction.log_scale.weight)
        output = model(**batch, mode="deterministic")
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((output.loss, gradients))
    assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert_close(other, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1e-6))


def test_values_of_labels_may_differ_from_those_that_are_read(batch):
    model = learner()
    check(model, batch, "softmax", 0.5, target_values=batch["numeric_values"] * 3)
    check(model, batch, "deterministic", 0.5, target_values=batch["numeric_values"] * 3)
    # What stands at ignored labels, and before the first target, is not read.
    values = batch["numeric_values"].clone()
    values[1, :4] = torch.nan
    values[2, :1] = torch.inf
    assert_close(model(**batch, target_values=values).loss, model(**batch).loss)


@pytest.mark.parametrize("mode", ["softmax", "deterministic"])
def test_the_last_positions_alone(mode, batch):
    model = learner()
    last = model(**batch, mode=mode, logits_to_keep=4)
    labels = batch["labels"].clone()
    labels[:, :5] = -100
    whole = model(**batch | {"labels": labels}, mode=mode)
    assert_close(last.class_loss, whole.class_loss)
    assert_close(last.value_loss, whole.value_loss)


@pytest.mark.parametrize("mode", ["softmax", "deterministic"])
def test_every_part_learns(mode, batch):
    model = learner(abduction_size=4)
    model(**batch, mode=mode).loss.backward()
    for name in (
        "numeric.direction",
        "abduction.loc.weight",
        "abduction.log_scale.weight",
        "abduction.mlp.2.weight",
        "action.weight",
        "action.bias",
        "action.value_weight",
        "action.value_bias",
        *(("action.threshold", "action.class_noise") if mode == "deterministic" else ()),
    ):
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert bool(torch.isfinite(gradient).all()), name
        assert float(gradient.abs().sum()) > 0, name


def test_the_direction_learns_the_slope_of_the_loss(batch):
    model = learner()
    model(**batch).loss.backward()
    gradient = model.numeric.direction.grad
    step = 1e-2 * gradient / gradient.norm()
    expected = float(gradient @ step)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            model.numeric.direction += sign * step
            losses.append(float(model(**batch).loss))
            model.numeric.direction -= sign * step
    assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("form", THRESHOLDS)
@pytest.mark.parametrize("mode", ["softmax", "deterministic"])
def test_no_number_among_the_labels_costs_nothing(mode, form, batch):
    model = learner(threshold_form=form)
    batch["labels"][batch["labels"] == NUM] = -100
    output = model(**batch, mode=mode)
    assert output.value_loss.item() == 0.0
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name
    batch["labels"][:] = -100
    nothing = model(**batch, mode=mode)
    assert nothing.loss.item() == 0.0
    nothing.loss.backward()


def test_labels_without_their_numbers_are_refused(batch):
    model = learner()
    plain = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    for mode in ("softmax", "deterministic"):
        with pytest.raises(ConfigError, match="labels with <NUM> but no numeric_values"):
            model(**plain, mode=mode)
    plain["labels"] = plain["labels"].masked_fill(plain["labels"] == NUM, -100)
    assert model(**plain).value_loss is None
    # The first label is the target of nothing.
    plain["labels"][2, 0] = NUM
    assert_close(model(**plain).loss, model(**plain).class_loss)


def test_unusable_numbers_of_labels_are_refused(batch):
    model = learner()
    for wrong in (torch.nan, torch.inf, 2e30):
        values = torch.where(batch["numeric_values"] == 12.5, wrong, batch["numeric_values"])
        with pytest.raises(ConfigError, match="finite number"):
            model(**batch, target_values=values)
    with pytest.raises(ShapeError, match="numeric_values"):
        model(**batch, target_values=torch.zeros(3, 7))
    plain = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    ids = batch["input_ids"].clamp(max=255)
    with pytest.raises(ConfigError, match="a model without <NUM>"):
        plain(input_ids=ids, labels=ids, target_values=batch["numeric_values"])
