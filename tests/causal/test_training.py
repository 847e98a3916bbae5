"""Training: the loss falls, frozen stays frozen, a stopped run goes on exactly."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
from tether.causal import loading
from tether.causal.fingerprint import weights_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numbers import NumericTokenizer
from tether.causal.pairs import Pair
from tether.causal.trainable import TrainOptions, half_backbone, parameter_groups, select
from tether.causal.training import train
from tether.causal.vocabulary import ASLEEP
from tether.errors import CheckpointError, ConfigError

TEXTS = tiny.documents("digits", 12)
QUICK = TrainOptions(steps=6, batch=4, window=48, lr=3e-3, save_every=2)


def wrapped(numbers=False, kind="llama"):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(kind))
    tokenizer = tiny.tokenizer()
    return model, model.add_numbers(tokenizer) if numbers else tokenizer


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("numbers", [False, True], ids=["text", "numbers"])
@pytest.mark.parametrize("mode", ["softmax", "deterministic"])
@pytest.mark.parametrize("part", ["head", "all"])
def test_the_loss_falls_and_what_is_frozen_stays_bit_equal(tmp_path, part, mode, numbers):
    model, tokenizer = wrapped(numbers)
    start = snapshot(model)
    seen = []
    options = replace(QUICK, part=part, mode=mode, steps=16)
    record = train(model, tokenizer, TEXTS, options=options, folder=tmp_path, on_step=seen.append)
    assert record["curve"][-1] < 0.9 * record["curve"][0]
    assert [figures["loss"] for figures in seen] == record["curve"]
    assert seen[-1]["step"] == seen[-1]["steps"] == record["steps"] == 16
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert not moved & {"action.threshold", "action.class_noise"}
    assert "abduction.loc.weight" in moved
    assert any(name.startswith("backbone.") for name in moved) == (part == "all")
    assert ("numeric.direction" in moved) == numbers
    if part == "head":
        # The class weight of this model is its embedding.
        assert torch.equal(model.action.weight, start["backbone.embed_tokens.weight"])
    assert not model.training


def test_the_model_folder_is_read_by_tether_and_by_transformers(tmp_path):
    model, tokenizer = wrapped(numbers=True)
    record = train(model, tokenizer, TEXTS, options=QUICK, folder=tmp_path, held_out=TEXTS[:2])
    assert record["after"]["value_count"] > 0
    assert record["after"]["softmax_nll"] < record["before"]["softmax_nll"]
    read, text = loading.load(record["path"])
    numeric = read.add_numbers(text)
    assert isinstance(numeric, NumericTokenizer)
    assert numeric.num_token_id == tokenizer.num_token_id
    assert read.config.base_fingerprint == record["fingerprint"] == weights_fingerprint(model)
    for name, parameter in AutoModelForCausalLM.from_pretrained(record["path"]).named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == record["curve"]
    # The same command again finds everything done.
    again = train(*wrapped(numbers=True), TEXTS, options=QUICK, folder=tmp_path, held_out=TEXTS[:2])
    assert again == record


@pytest.mark.parametrize("samples", [None, 64], ids=["exact", "sampled"])
@pytest.mark.parametrize("part", ["head", "all"])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, part, samples):
    options = replace(QUICK, part=part, mode="deterministic", samples=samples, learn_threshold=True, steps=7)
    whole, tokenizer = wrapped(numbers=True)
    record = train(whole, tokenizer, TEXTS, options=options, folder=tmp_path / "whole")

    def stop(figures):
        if figures["step"] == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(*wrapped(numbers=True), TEXTS, options=options, folder=tmp_path / "cut", on_step=stop)
    assert not (tmp_path / "cut" / "model").exists()
    rest = []
    model, tokenizer = wrapped(numbers=True)
    resumed = train(model, tokenizer, TEXTS, options=options, folder=tmp_path / "cut", on_step=rest.append)
    # Step 5 was not saved and is taken again.
    assert [figures["step"] for figures in rest] == [5, 6, 7]
    assert resumed["curve"] == record["curve"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.bin"))


def test_dropout_is_drawn_anew_and_the_same_after_a_resume(tmp_path):
    def dropping():
        model, tokenizer = wrapped()
        model.config.backbone_config.attention_dropout = 0.3
        for layer in model.backbone.layers:
            layer.self_attn.attention_dropout = 0.3
        return model, tokenizer

    options = replace(QUICK, part="all", steps=4, save_every=1)
    first = dropping()
    state = torch.random.get_rng_state()
    whole = train(*first, TEXTS, options=options, folder=tmp_path / "whole")
    assert torch.equal(torch.random.get_rng_state(), state)

    def stop(figures):
        if figures["step"] == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(*dropping(), TEXTS, options=options, folder=tmp_path / "cut", on_step=stop)
    assert train(*dropping(), TEXTS, options=options, folder=tmp_path / "cut")["curve"] == whole["curve"]
    plain = train(*wrapped(), TEXTS, options=options, folder=tmp_path / "plain")
    assert plain["curve"] != whole["curve"]


@pytest.mark.parametrize("mode", ["softmax", "deterministic"])
def test_accumulated_parts_add_up_to_the_step_in_one_piece(tmp_path, mode):
    """Parts with different numbers of labels: a mean of means would differ."""
    texts = [Pair("a" * 30, "b 1"), *TEXTS[:3], Pair("7 is odd", "yes"), Pair("x", "1 2 3 4 5 6")]
    options = replace(QUICK, mode=mode, part="all", batch=6, window=64)
    whole = train(*wrapped(True), texts, options=options, folder=tmp_path / "1")["curve"]
    parts = train(*wrapped(True), texts, options=replace(options, accumulate=3), folder=tmp_path / "3")[
        "curve"
    ]
    assert_close(torch.tensor(parts), torch.tensor(whole), rtol=2e-5, atol=1e-5)


def test_under_autocast_only_the_backbone_is_halved(tmp_path):
    model, tokenizer = wrapped(numbers=True)
    encoded = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    state = {}
    model.backbone.layers[0].mlp.register_forward_hook(lambda *call: state.update(inner=call[2].dtype))
    model.abduction.register_forward_hook(lambda *call: state.update(z=call[1][0], loc=call[2][0]))
    with half_backbone(model, "cpu", "bf16"), torch.no_grad():
        out = model(**encoded, labels=encoded["input_ids"], mode="deterministic")
    assert state["inner"] == torch.bfloat16
    assert (
        state["z"].dtype == out.latent_loc.dtype == out.value_scale.dtype == out.loss.dtype == torch.float32
    )
    # The abduction starts as the identity: in half precision it would round z.
    assert_close(state["loc"], state["z"], rtol=0, atol=0)
    assert not torch.equal(state["z"], state["z"].bfloat16().float())
    assert_close(
        out.loss, model(**encoded, labels=encoded["input_ids"], mode="deterministic").loss, rtol=0.02, atol=0
    )
    assert "forward" not in vars(model.backbone)
    half = replace(QUICK, mixed_precision="bf16", part="all")
    curve = train(*wrapped(True), TEXTS, options=half, folder=tmp_path / "half")["curve"]
    whole = train(*wrapped(True), TEXTS, options=replace(QUICK, part="all"), folder=tmp_path / "whole")[
        "curve"
    ]
    assert curve != whole
    assert_close(torch.tensor(curve), torch.tensor(whole), rtol=0.03, atol=0)


def test_an_added_number_class_is_woken_before_the_first_step(tmp_path):
    model, tokenizer = wrapped(numbers=True)
    assert model.action.bias[tokenizer.num_token_id] == ASLEEP
    seen = []
    train(model, tokenizer, TEXTS, options=replace(QUICK, steps=1), folder=tmp_path, on_step=seen.append)
    assert model.action.bias[tokenizer.num_token_id] > ASLEEP / 2
    assert seen[0]["class_loss"] < 50
    silent, tokenizer = wrapped(numbers=True)
    train(silent, tokenizer, ["no numbers here"] * 4, options=replace(QUICK, steps=1), folder=tmp_path / "2")
    assert float(silent.action.bias.detach()[tokenizer.num_token_id]) == pytest.approx(ASLEEP, rel=1e-4)


def test_an_untied_class_weight_is_learnt_and_kept(tmp_path):
    model, tokenizer = wrapped()
    embedding = model.get_input_embeddings().weight.detach().clone()
    record = train(model, tokenizer, TEXTS, options=replace(QUICK, untie=True), folder=tmp_path)
    read = loading.load(record["path"])[0]
    for one in (model, read):
        assert torch.equal(one.get_input_embeddings().weight, embedding)
        assert not torch.equal(one.action.weight, embedding)
        assert torch.equal(one.action.weight, model.action.weight)
    own = select(wrapped(kind="qwen2")[0], QUICK)
    assert "action.weight" in own


def test_only_matrices_of_the_backbone_decay():
    model = wrapped()[0]
    options = replace(QUICK, part="all", mode="deterministic", learn_threshold=True)
    trained = select(model, options)
    groups = dict(zip(trained, parameter_groups(model, trained, options), strict=True))
    decays = {name for name, group in groups.items() if group["weight_decay"]}
    assert decays == {name for name in trained if "_proj.weight" in name}
    assert groups["action.threshold"]["peak"] == pytest.approx(
        options.lr * float(model.action.threshold.detach().abs().mean())
    )


BAD = {
    "part": ({"part": "tail"}, "head, all"),
    "mode": ({"mode": "causal"}, "softmax, deterministic"),
    "precision": ({"mixed_precision": "fp8"}, "no, bf16"),
    "steps": ({"steps": -1}, "steps=-1"),
    "batch": ({"batch": 0}, "batch=0"),
    "rate": ({"lr": 0.0}, "lr and clip > 0"),
    "rate nan": ({"lr": float("nan")}, "lr and clip > 0"),
    "warmup": ({"warmup": 1.0}, "warmup"),
    "threshold": ({"mode": "softmax", "learn_threshold": True}, "mode 'deterministic'"),
    "samples": ({"mode": "deterministic", "samples": 1}, "at least 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case):
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**options)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    model, tokenizer = wrapped()
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="multiple of 3"):
        train(model, tokenizer, TEXTS, options=replace(QUICK, accumulate=3), folder=folder)
    with pytest.raises(ConfigError, match="add_numbers"):
        train(model, NumericTokenizer(tokenizer), TEXTS, options=QUICK, folder=folder)
    with pytest.raises(ConfigError, match="float32"):
        train(wrapped()[0].bfloat16(), tokenizer, TEXTS, options=QUICK, folder=folder)
    with pytest.raises(ConfigError, match="nothing to learn"):
        train(model, tokenizer, [""], options=QUICK, folder=folder)
    assert not folder.exists()


def test_a_folder_of_another_training_or_a_damaged_one_is_refused(tmp_path):
    train(*wrapped(), TEXTS, options=QUICK, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"options\.lr"):
        train(*wrapped(), TEXTS, options=replace(QUICK, lr=1e-2), folder=tmp_path)
    with pytest.raises(ConfigError, match="text"):
        train(*wrapped(), TEXTS[1:], options=QUICK, folder=tmp_path)
    state = tmp_path / "state" / "weights.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="weights"):
        train(*wrapped(), TEXTS, options=QUICK, folder=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("keep")
    with pytest.raises(ConfigError, match="precious"):
        train(*wrapped(), TEXTS, options=QUICK, folder=tmp_path / "other")


def test_sampling_every_class_is_the_exact_loss(tmp_path):
    options = replace(QUICK, part="all", mode="deterministic")
    exact = train(*wrapped(True), TEXTS, options=options, folder=tmp_path / "exact")["curve"]
    every = replace(options, samples=259)
    drawn = train(*wrapped(True), TEXTS, options=every, folder=tmp_path / "drawn")["curve"]
    assert_close(torch.tensor(drawn), torch.tensor(exact), rtol=2e-5, atol=0)


def test_a_fused_model_is_refused(tmp_path):
    model, tokenizer = wrapped()
    model.fusion = torch.nn.Identity()
    with pytest.raises(ConfigError, match="fused deltas"):
        train(model, tokenizer, TEXTS, options=QUICK, folder=tmp_path)
