"""Constants of a model by name, and the mode it acts and learns in unless a call says otherwise."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

import tiny
from tether.causal.config import CausalQwenConfig
from tether.causal.constants import CONSTANTS, OF_LOSSES, read_constants, set_constants
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.trainable import Objective, TrainOptions
from tether.cli.app import app
from tether.delta.continuations import continue_texts, not_drawn, prompts
from tether.errors import ConfigError


def made(**constants):
    return CausalQwenForCausalLM.from_backbone(tiny.backbone(), threshold=3.0, latent_scale=0.5, **constants)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_model_acts_and_learns_in_its_own_mode(ids, tmp_path):
    model, plain = made(mode="deterministic"), made()
    labels = ids.clone()
    with torch.no_grad():
        own, named = (
            model(input_ids=ids, labels=labels),
            plain(input_ids=ids, labels=labels, mode="deterministic"),
        )
        softmax, default = (
            model(input_ids=ids, labels=labels, mode="softmax"),
            plain(input_ids=ids, labels=labels),
        )
    assert torch.equal(own.logits, named.logits)
    assert torch.equal(own.loss, named.loss)
    assert torch.equal(softmax.loss, default.loss)
    assert float((own.loss - softmax.loss).abs()) > 0.1
    given = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    assert torch.equal(model.generate(ids, **given), plain.generate(ids, mode="deterministic", **given))
    again = model.generate(ids, mode="softmax", do_sample=False, **given)
    assert torch.equal(again, plain.generate(ids, do_sample=False, **given))
    model.save_pretrained(tmp_path / "m")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.mode == "deterministic"


def test_a_stock_trainer_minimises_the_loss_of_the_mode(ids, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids]
    logged = {}
    for mode in ("softmax", "deterministic"):
        model = made(mode=mode)
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids, mode=mode).loss
        options = TrainingArguments(
            tmp_path / mode, max_steps=1, per_device_train_batch_size=2, logging_steps=1, learning_rate=0.0,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=rows)
        trainer.train()
        logged[mode] = trainer.state.log_history[0]["loss"]
        assert logged[mode] == pytest.approx(float(expected), rel=1e-3)
    assert abs(logged["softmax"] - logged["deterministic"]) > 0.1


def test_what_is_measured_in_softmax_stays_so_whatever_the_mode():
    model, plain = made(mode="deterministic"), made()
    begun = prompts(tiny.documents("words", 3), tiny.tokenizer(), 2)
    written = [continue_texts(each, begun, 4) for each in (model, plain)]
    assert torch.equal(written[0].ids, written[1].ids)
    assert not_drawn(model, written[0]) == 0


def test_our_trainer_takes_the_models_mode(ids):
    batch = {"input_ids": ids, "labels": ids}
    model, plain = made(mode="deterministic"), made()
    own = Objective(model, TrainOptions())(batch, 22, 0)[0]
    assert_close(own, Objective(plain, TrainOptions(mode="deterministic"))(batch, 22, 0)[0])
    assert TrainOptions(learn_threshold=True).on(model).mode == "deterministic"
    with pytest.raises(ConfigError, match="learn_threshold"):
        TrainOptions(learn_threshold=True).on(plain)
    with pytest.raises(ConfigError, match="mode is 'causal'"):
        TrainOptions().on(made(mode="causal"))


def test_every_constant_is_a_field_with_its_type():
    given = {
        "latent_scale": "0.5", "class_noise": "1", "noise_form": "constant", "threshold": "100",
        "threshold_form": "class", "value_transform": "raw", "abduction_size": "4", "mode": "causal",
        "gate_alpha": "0.25", "value_loss_weight": "2", "ovr_impl": "dense",
    }  # fmt: skip
    assert set(given) == set(CONSTANTS)
    read = read_constants([f"{name}={value}" for name, value in given.items()])
    config = CausalQwenForCausalLM.from_backbone(tiny.backbone(), **read).config
    for name, value in read.items():
        assert getattr(config, name) == value
        assert str(value) == given[name] or float(given[name]) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["gate_alpha"], "NAME=VALUE"),
        (["gate_alpha=a"], "gate_alpha=a"),
        (["gate_alpha=1", "gate_alpha=1"], "each name once"),
        (["seed=1"], "of latent_scale, "),
        (["abduction_size=1.5"], "abduction_size=1.5"),
    ],
)
def test_what_is_no_constant_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        read_constants(given)


@pytest.mark.parametrize(
    "given", [{"gate_alpha": 2.0}, {"mode": "loud"}, {"ovr_impl": "fast"}, {"value_loss_weight": -1.0}]
)
def test_what_is_out_of_range_changes_nothing(given):
    config = CausalQwenConfig(backbone_config=tiny.backbone().config)
    with pytest.raises(ConfigError, match=next(iter(given))):
        set_constants(config, {"gate_alpha": 0.75} | given)
    assert [getattr(config, name) for name in OF_LOSSES] == ["softmax", 0.5, 1.0, "chunked"]
    with pytest.raises(ConfigError, match="latent_scale: weights depend"):
        set_constants(config, {"latent_scale": 1.0})
    set_constants(config, {"gate_alpha": 0.75})
    assert config.gate_alpha == 0.75


def test_convert_and_train_take_constants(tmp_path):
    runner = CliRunner()
    tiny.backbone().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("the leash of the model and its drift " * 20)
    out, ran = tmp_path / "converted", tmp_path / "run"
    given = ["--set", "mode=deterministic", "--set", "threshold=5"]
    done = runner.invoke(app, ["convert", str(tmp_path / "base"), "--out", str(out), *given])
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.mode, model.config.threshold) == ("deterministic", 5.0)
    assert float(model.action.threshold.detach()) == 5.0
    given = ["--text", str(tmp_path / "text.txt"), "--steps", "1", "--set", "gate_alpha=1"]
    done = runner.invoke(app, ["train", str(out), "--out", str(ran), *given])
    assert done.exit_code == 0, done.output
    trained = AutoModelForCausalLM.from_pretrained(ran / "model")
    assert (trained.config.gate_alpha, trained.config.mode) == (1.0, "deterministic")
    recorded = json.loads((ran / "run.json").read_text())["config"]
    assert recorded["options"]["mode"] == recorded["constants"]["mode"] == "deterministic"
    done = runner.invoke(app, ["generate", str(out), "the model", "--temperature", "1"])
    assert "mode deterministic" in str(done.exception)
