"""Figures of an evaluation against their formulas, written out in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.evaluation import calibration_error, evaluate
from tether.causal.modeling import CausalQwenForCausalLM

TEXTS = ["ab 1.5 cd", "x -20 and 7e3 yz", "3"]


def wrapped(numbers, form="constant"):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(), threshold_form=form)
    tokenizer = tiny.tokenizer()
    if numbers:
        tokenizer = model.add_numbers(tokenizer)
        with torch.no_grad():
            model.action.bias[-1] = 0.0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.abduction.log_scale.weight.normal_(std=0.05, generator=generator)
    return model, tokenizer


def oracle(model, tokenizer):
    """Every scored token's quantities, one text at a time, without the library's loss functions."""
    rows = []
    for text in TEXTS:
        encoded = tokenizer(text, return_tensors="pt")
        ids = encoded["input_ids"][0]
        if len(ids) < 2:
            continue
        with torch.no_grad():
            out = model(**encoded)
        action = model.action
        weight = action.weight.detach().double()
        bias = 0.0 if action.bias is None else action.bias.detach().double()
        noise = action.class_noise.detach().double().clamp(min=0)
        for place in range(len(ids) - 1):
            loc = out.latent_loc[0, place].double()
            scale = out.latent_log_scale[0, place].double().exp()
            scores = weight @ loc + bias
            level = action.threshold.detach().double()
            if model.config.threshold_form == "context":
                level = level + scores.logsumexp(0)
            t = (level - scores) / (weight.abs() @ scale + noise)
            fires = 0.5 - torch.atan(t) / math.pi
            target = int(ids[place + 1])
            others = torch.ones(len(scores), dtype=torch.bool)
            others[target] = False
            row = {
                "softmax_nll": scores.logsumexp(0) - scores[target],
                "ovr_loss": -fires[target].log() - torch.log1p(-fires[others]).sum(),
                "ovr_nll": -(fires[target] / fires.sum()).log(),
                "agreement": (fires.argmax() == scores.argmax()).double(),
                "softmax_accuracy": (scores.argmax() == target).double(),
                "ovr_accuracy": (fires.argmax() == target).double(),
                "fires": fires.max(),
                "target": target,
            }
            if target == model.config.num_token_id:
                value = encoded["numeric_values"][0, place + 1].double()
                row["value"] = value
                row["prob"] = fires[target]
                row["y"] = (action.value_weight.detach().double() @ loc + action.value_bias.detach()).item()
                row["y_scale"] = (action.value_weight.detach().double().abs() @ scale).item()
            rows.append(row)
    return rows


@pytest.mark.parametrize("form", ["constant", "class", "context"])
@pytest.mark.parametrize("numbers", [False, True])
def test_the_figures_are_those_of_the_formulas(numbers, form):
    model, tokenizer = wrapped(numbers, form)
    figures = evaluate(model, tokenizer, TEXTS, batch=2)
    rows = oracle(model, tokenizer)
    assert figures["tokens"] == len(rows)
    for name in ("softmax_nll", "ovr_loss", "ovr_nll", "agreement", "softmax_accuracy", "ovr_accuracy"):
        expected = float(torch.stack([row[name] for row in rows]).mean())
        assert figures[name] == pytest.approx(expected, rel=2e-5), name
    probs, hits = (torch.stack([row[name] for row in rows]) for name in ("fires", "ovr_accuracy"))
    order = probs.argsort()
    groups = list(zip(probs[order].tensor_split(15), hits[order].tensor_split(15), strict=True))
    expected = sum(len(p) * abs(float(p.mean() - h.mean())) for p, h in groups if len(p)) / len(rows)
    assert figures["ovr_calibration_error"] == pytest.approx(expected, abs=1e-5)
    if not numbers:
        assert figures["value_count"] == 0
        assert figures["value_nll"] is None
        return
    valued = [row for row in rows if "value" in row]
    assert figures["value_count"] == len(valued) == 3
    errors = [abs(math.copysign(math.expm1(abs(row["y"])), row["y"]) - float(row["value"])) for row in valued]
    assert figures["value_median_error"] == pytest.approx(sorted(errors)[1], rel=1e-5)
    nll, inside = [], []
    for row in valued:
        wanted = math.copysign(math.log1p(abs(float(row["value"]))), float(row["value"]))
        t = (wanted - row["y"]) / row["y_scale"]
        gate = model.config.gate_alpha + (1 - model.config.gate_alpha) * float(row["prob"])
        nll.append(gate * (math.log(math.pi * row["y_scale"]) + math.log1p(t * t)))
        inside.append(0.5 + math.atan(abs(t)) / math.pi)
    assert figures["value_nll"] == pytest.approx(sum(nll) / 3, rel=1e-5)
    assert figures["value_coverage_50"] == pytest.approx(sum(p <= 0.75 for p in inside) / 3)
    assert figures["value_coverage_80"] == pytest.approx(sum(p <= 0.9 for p in inside) / 3)
    values = [float(row["value"]) for row in valued]
    spread = sum((value - sum(values) / 3) ** 2 for value in values)
    assert figures["value_r2"] == pytest.approx(1 - sum(error**2 for error in errors) / spread, rel=1e-4)
    assert figures["value_coverage_90"] == pytest.approx(sum(p <= 0.95 for p in inside) / 3)


def test_chunks_batches_and_training_mode_change_nothing(monkeypatch):
    model, tokenizer = wrapped(True)
    whole = evaluate(model, tokenizer, TEXTS)
    monkeypatch.setattr("tether.causal.evaluation._PAIRS", 1)
    model.train()
    pieces = evaluate(model, tokenizer, TEXTS, batch=1)
    assert model.training
    assert whole.keys() == pieces.keys()
    for name, value in whole.items():
        assert pieces[name] == pytest.approx(value, rel=1e-4), name


def test_coverage_of_a_law_that_is_right_and_of_one_that_is_not(generator):
    hits = torch.rand(60000, generator=generator)
    probs = torch.rand(60000, generator=generator)
    right, shifted = calibration_error(probs, hits < probs), calibration_error(probs, hits < probs - 0.2)
    assert right < 0.01
    assert_close(shifted, 0.18, atol=0.01, rtol=0)  # 0.2, less where probs < 0.2 leave nothing to miss
    assert math.isnan(calibration_error(probs[:0], hits[:0] > 0))
