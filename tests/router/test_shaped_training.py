"""`tether train` shapes routers: its steps, its resume, several processes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import tiny
from processes import run_two
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.trainable import TrainOptions
from tether.causal.training import train
from tether.errors import CheckpointError, ConfigError
from tether.router import RoutingCourse, Shaping

TEXTS = tiny.documents("digits", 12)
QUICK = TrainOptions(part="all", steps=8, batch=4, window=48, lr=3e-3, save_every=3)
STRONG = Shaping(form="tax", lam=0.5)
SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import test_shaped_training as here
from pathlib import Path
here.two_process_run(Path(sys.argv[1]))
"""


def mixture(kind="qwen3_moe"):
    sizes = tiny.SIZES | {"num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        if kind == "qwen3_moe":
            config = Qwen3MoeConfig(**sizes, num_experts=6, moe_intermediate_size=24, head_dim=8)
            plain = Qwen3MoeForCausalLM(config)
        else:
            plain = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=6))
        for name, parameter in plain.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3 if "gate.weight" in name else 0.1)
    return CausalQwenForCausalLM.from_backbone(plain)


def fit(folder, shaping=STRONG, model=None, options=QUICK, **more):
    said = []
    term = None if shaping is None else RoutingCourse(shaping, say=said.append)
    model = model or mixture()
    record = train(model, tiny.tokenizer(), TEXTS, options=options, folder=folder, term=term, **more)
    return model, record, said


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_routers_are_shaped_and_the_report_says_who_is_dead(tmp_path, kind):
    plain, bare, _ = fit(tmp_path / "plain", None, mixture(kind))
    assert "term" not in bare
    measured, record, said = fit(tmp_path / "none", Shaping(form="none"), mixture(kind))
    assert same(measured, plain)
    assert record["curve"] == bare["curve"]
    assert len(said) == 1
    shaped, record, _ = fit(tmp_path / "tax", STRONG, mixture(kind))
    assert not same(shaped, plain)
    report = record["term"]
    assert list(report["layers"]) == ["backbone.layers.0.mlp", "backbone.layers.1.mlp"]
    assert all(sum(row["load"]) == pytest.approx(1) for row in report["layers"].values())
    # Nothing has cost anything before the first step; then a tax is lam times a mean of costs.
    first, *rest = terms(tmp_path / "tax")
    assert first == 0
    assert all(0 < term < 4 * STRONG.lam for term in rest)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in shaped.modules())


FORMS = {
    "balance": Shaping(form="balance", lam=0.5),
    "switch": Shaping(form="switch", lam=0.5),
    "prior": Shaping(form="prior", cost="uniform", lam=0.5),
    "goodness": Shaping(form="goodness", cost="paper-log", lam=0.5),
    "entropy": Shaping(form="entropy", lam=0.5),
    "z": Shaping(form="z", lam=0.5),
    "snr": Shaping(form="tax", cost="snr", lam=0.5),
    "fisher": Shaping(form="tax", cost="fisher", lam=0.5),
    "gradient": Shaping(form="tax", cost="gradient", lam=0.5),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_and_cost_reaches_the_routers(tmp_path, name):
    # A running mean of gradients can be read from the second step on.
    options = replace(QUICK, steps=4)
    plain, _, _ = fit(tmp_path / "plain", None, options=options)
    shaped, _, _ = fit(tmp_path / "shaped", FORMS[name], options=options)
    for layer, other in zip(shaped.backbone.layers, plain.backbone.layers, strict=True):
        moved = (layer.mlp.gate.weight - other.mlp.gate.weight).detach().abs().max()
        assert float(moved) > 1e-4


@pytest.mark.parametrize("cost", ["paper", "paper-log"])
def test_the_documents_own_costs_do_nothing_as_a_tax(tmp_path, cost):
    plain, bare, _ = fit(tmp_path / "plain", None)
    shaped, record, _ = fit(tmp_path / "shaped", Shaping(form="tax", cost=cost, lam=1.0))
    # Values near 1e-10, or one number for all: rounding is what differs.
    assert record["curve"] == pytest.approx(bare["curve"], abs=1e-4)
    for layer, other in zip(shaped.backbone.layers, plain.backbone.layers, strict=True):
        assert_close(layer.mlp.gate.weight, other.mlp.gate.weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cost", ["information", "shuffled"])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, cost):
    shaping = replace(STRONG, cost=cost)
    whole, record, _ = fit(tmp_path / "whole", shaping)

    def stop(figures):
        if figures["step"] == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(tmp_path / "cut", shaping, on_step=stop)
    model, resumed, _ = fit(tmp_path / "cut", shaping)
    assert same(model, whole)
    assert resumed["curve"] == record["curve"]
    # Done, it is found as it was, routing included.
    assert fit(tmp_path / "cut", shaping)[1] == resumed
    with pytest.raises(ConfigError, match=r"term\.lam"):
        fit(tmp_path / "cut", replace(shaping, lam=0.1))
    state = tmp_path / "cut" / "state" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"term": {"shaper": {}}}))
    with pytest.raises(CheckpointError, match="does not fit"):
        fit(tmp_path / "cut", shaping)


def terms(folder):
    return [json.loads(line)["term"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_part_of_a_step_counts_by_its_share(tmp_path):
    # The probability of an expert, which a tax is linear in, is a mean over tokens, of which parts have as many here.
    options = replace(QUICK, steps=3, packed=True, window=32)
    found = []
    for parts in (1, 2, 4):
        fit(tmp_path / str(parts), options=replace(options, accumulate=parts))
        found.append(torch.tensor(terms(tmp_path / str(parts))))
    assert float(found[0][1]) > 0.1
    for cut in found[1:]:
        assert_close(cut, found[0], rtol=1e-4, atol=0)


def test_what_cannot_be_shaped_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="the router is frozen"):
        fit(folder, options=replace(QUICK, part="head"))
    with pytest.raises(ConfigError, match="no layer with 'experts'"):
        fit(folder, model=CausalQwenForCausalLM.from_backbone(tiny.backbone()))
    assert not folder.exists()
    # Measuring needs no gradient.
    _, record, said = fit(folder, Shaping(form="none"), options=replace(QUICK, part="head"))
    assert record["term"]["layers"]
    assert len(said) == 1


def two_process_run(folder):
    model, record, said = fit(folder / "run", replace(STRONG, lam=0.3), options=replace(QUICK, accumulate=2))
    there = torch.distributed.is_initialized()
    if there and torch.distributed.get_rank():
        assert said == []
    else:
        routers = [layer.mlp.gate.weight.tolist() for layer in model.backbone.layers]
        (folder / "record.json").write_text(json.dumps(record | {"routers": routers, "said": said}))
    if there:
        torch.distributed.barrier()  # the store lives in rank 0
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_count_all_tokens(tmp_path):
    (tmp_path / "alone").mkdir()
    two_process_run(tmp_path / "alone")
    run_two(SCRIPT.format(tests=str(Path(__file__).parent)), tmp_path, tmp_path)
    one, both = (
        json.loads((folder / "record.json").read_text()) for folder in (tmp_path / "alone", tmp_path)
    )
    assert_close(torch.tensor(both["curve"]), torch.tensor(one["curve"]), rtol=1e-5, atol=1e-5)
    assert_close(torch.tensor(both["routers"]), torch.tensor(one["routers"]), rtol=0, atol=1e-4)
    assert len(both["said"]) == len(one["said"]) == 1
    for mine, other in zip(both["term"]["layers"].values(), one["term"]["layers"].values(), strict=True):
        assert mine["tokens"] == other["tokens"]
        assert_close(torch.tensor(mine["load"]), torch.tensor(other["load"]), rtol=0, atol=2e-3)
