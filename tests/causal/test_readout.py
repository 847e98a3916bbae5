"""The fitted value head, against scikit-learn and against refits without each row."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.testing import assert_close

import tiny
from tether.causal.dataset import make_examples
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.pairs import Pair
from tether.causal.readout import fit_readout, fit_values
from tether.causal.trainable import TrainOptions
from tether.causal.training import train
from tether.errors import ConfigError

QUICK = TrainOptions(steps=2, batch=4, window=64, lr=1e-3)


def pairs(count=40, seed=0):
    """The number to learn is linear in the logarithms that the model reads."""
    generator = np.random.default_rng(seed)
    rows = generator.uniform(1, 50, size=(count, 2)).round(2)
    return [
        Pair(f"a {x:g} b {y:g} c", f" {0.5 * math.log1p(x) + math.log1p(y):.4f}") for x, y in rows.tolist()
    ]


def reader(**fields):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(), **fields)
    return model, model.add_numbers(tiny.tokenizer())


@pytest.mark.parametrize(("rows", "width"), [(12, 5), (9, 20)])
def test_the_fit_is_the_ridge_regression_of_the_best_strength(rows, width, generator):
    z = (
        torch.randn(rows, width, generator=generator, dtype=torch.float64)
        * torch.logspace(0, 2, width).double()
    )
    y = z @ torch.randn(width, generator=generator, dtype=torch.float64) + torch.randn(rows).double() + 7
    fit = fit_readout(z, y)
    largest = float(torch.linalg.eigvalsh((z - z.mean(0)).mT @ (z - z.mean(0)))[-1])
    errors = []
    for strength in largest * np.logspace(-8, 1, 37):
        left_out = []
        for row in range(rows):
            kept = [each for each in range(rows) if each != row]
            model = Ridge(alpha=strength, solver="svd").fit(z[kept].numpy(), y[kept].numpy())
            left_out.append(abs(float(model.predict(z[[row]].numpy())[0] - y[row])))
        errors.append((np.mean(left_out), strength, np.sort(left_out)[(rows - 1) // 2]))
    _, strength, middle = min(errors)
    expected = Ridge(alpha=strength, solver="svd").fit(z.numpy(), y.numpy())
    assert_close(fit.weight, torch.from_numpy(expected.coef_), rtol=1e-6, atol=1e-9)
    assert float(fit.bias) == pytest.approx(float(expected.intercept_), rel=1e-6)
    assert fit.error == pytest.approx(middle, rel=1e-6)


def test_states_that_are_all_alike_give_the_mean():
    fit = fit_readout(torch.ones(5, 3), torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]))
    assert fit.weight.tolist() == [0.0] * 3
    assert float(fit.bias) == 4.0
    with pytest.raises(ConfigError, match="2 numbers"):
        fit_readout(torch.ones(2, 3), torch.ones(2))


def learnt(model, tokenizer, examples):
    """States that the learnt number follows, and the numbers, one row at a time."""
    states, values = [], []
    for row in range(examples.windows):
        batch = examples.collate([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            out = model(**batch)
        here = int((labels[0] == tokenizer.num_token_id).nonzero()[-1])
        states.append(out.latent_loc[0, here - 1])
        values.append(batch["numeric_values"][0, here])
    return torch.stack(states), torch.stack(values)


@pytest.mark.parametrize("transform", ["raw", "signed-log"])
def test_a_fitted_model_predicts_as_the_fit_to_its_states_does(transform):
    model, tokenizer = reader(value_transform=transform)
    examples = make_examples(pairs(), tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    error = fit_values(model, examples, batch=7)
    after = model.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == {
        "action.value_weight",
        "action.value_bias",
        "abduction.log_scale.weight",
        "abduction.log_scale.bias",
    }
    states, values = learnt(model, tokenizer, examples)
    wanted = values if transform == "raw" else torch.log1p(values)
    fit = fit_readout(states, wanted)
    assert error == pytest.approx(fit.error, rel=1e-3)
    got = model.action.values(states, torch.ones_like(states))[0].detach()
    assert_close(got.double(), states.double() @ fit.weight + fit.bias, rtol=1e-4, atol=1e-4)
    assert float((got - wanted).abs().median()) < 0.5 * float((wanted - wanted.median()).abs().median())


def test_a_fitted_model_is_as_wide_as_rows_left_out_miss():
    model, tokenizer = reader()
    examples = make_examples(pairs(), tokenizer)
    batch = examples.collate(range(examples.windows))
    labels = batch.pop("labels")[:, 1:]
    here, elsewhere = labels == tokenizer.num_token_id, batch["attention_mask"][:, 1:].bool()
    elsewhere &= ~here
    start = model.config.latent_scale
    with torch.no_grad():
        plain = model(**batch)
        error = fit_values(model, examples)
        out = model(**batch)
    assert_close(out.logits, plain.logits, rtol=0, atol=0)
    assert float(out.value_scale[:, :-1][here].median()) == pytest.approx(error, rel=0.25)
    # Elsewhere the scale of U stays what causal sampling was calibrated with, up to what a linear map can tell apart.
    scale = out.latent_log_scale[:, :-1].exp()
    assert float(scale[elsewhere].median()) == pytest.approx(start, rel=0.25)
    assert abs(math.log(float(scale[here].median()) / start)) > 0.5


def test_training_fits_in_the_end_and_once_when_it_is_resumed(tmp_path):
    fitted = replace(QUICK, fit_values=True, part="all", save_every=1)

    def stop(figures):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(*reader(), pairs(), options=fitted, folder=tmp_path / "cut", on_step=stop)
    model, tokenizer = reader()
    train(model, tokenizer, pairs(), options=fitted, folder=tmp_path / "cut")
    whole, tokenizer = reader()
    record = train(whole, tokenizer, pairs(), options=fitted, folder=tmp_path / "whole")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    examples = make_examples(pairs(), tokenizer)
    states, values = learnt(whole, tokenizer, examples)
    fit = fit_readout(states, torch.log1p(values))
    assert_close(whole.action.value_weight.detach()[0].double(), fit.weight, rtol=1e-3, atol=1e-4)
    # What is published is the fitted model.
    read = CausalQwenForCausalLM.from_pretrained(record["path"])
    assert torch.equal(read.action.value_weight, whole.action.value_weight)


def test_a_fit_without_numbers_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="fit_values with 0 numbers"):
        train(*reader(), ["no numbers"], options=replace(QUICK, fit_values=True), folder=tmp_path / "run")
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    with pytest.raises(ConfigError, match="add_numbers"):
        train(
            model,
            tiny.tokenizer(),
            ["1 2 3 4"],
            options=replace(QUICK, fit_values=True),
            folder=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
