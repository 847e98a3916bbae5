"""A course of routing over a training: names the dead, goes on where it stopped, says what became of the experts."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_moe
from tether.errors import CheckpointError, ConfigError
from tether.router import RoutingCourse, RoutingShaper, Shaping
from tether.router.course import STRETCH, dead_experts, describe
from tether.router.journal import write_course

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]


def starve(model, experts, by=-30.0):
    """Give some experts of each layer a logit far below the others, by an entry of the states that all tokens share."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, 0] = 0.0
            layer.mlp.gate.weight[experts, 0] = by


def train(model, course, steps, first=0, optimizer=None, lr=1e-2):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr)
    if course is not None and course._shaper is None:
        course.begin(model, optimizer)
    for step in range(first, steps):
        ids = tiny_moe.tokens(seed=step)
        mask = torch.ones_like(ids)
        mask[:2, 9:] = 0
        output = model(input_ids=ids, attention_mask=mask, labels=ids)
        loss = output.loss if course is None else output.loss + course.loss(mask, output.loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if course is not None:
            course.after_step(step + 1, step + 1 == steps)
    return optimizer


def count_used(model):
    """Uses of each expert by the tokens that `train` does not mask, read off the routers; and how to stop counting."""
    used, kept = torch.zeros(2, 8), torch.ones(4, 12, dtype=torch.bool)
    kept[:2, 9:] = False
    handles = []
    for row, layer in enumerate(model.model.layers):

        def count(_, __, output, row=row):
            used[row] += torch.bincount(output[2].view(4, 12, 2)[kept].flatten(), minlength=8)

        handles.append(layer.mlp.gate.register_forward_hook(count))
    return used, lambda: [handle.remove() for handle in handles]


def test_the_dead_are_named_when_they_change(moe):
    starve(moe, [1, 6])
    used, stop = count_used(moe)
    said = []
    course = RoutingCourse(Shaping(form="none"), say=said.append)
    optimizer = train(moe, course, STRETCH, lr=1e-5)
    stop()
    share = used / used.sum(1, keepdim=True)
    expected = {
        name: (row < 0.01 / 8).nonzero().flatten().tolist() for name, row in zip(LAYERS, share, strict=True)
    }
    assert all({1, 6} <= set(own) for own in expected.values())
    report = course.report()
    assert {name: row["dead"] for name, row in report["layers"].items()} == expected
    assert_close(torch.tensor([row["load"] for row in report["layers"].values()]), share)
    number = sum(map(len, expected.values()))
    assert report["history"] == [{"step": STRETCH, "dead": number}]
    assert report["mean"]["dead"] == number / 2
    names = ", ".join(map(str, expected[LAYERS[0]]))
    assert len(said) == 1
    assert said[0].startswith(
        f"step {STRETCH}: {number} of 16 experts are dead: {LAYERS[0]} {names}; {LAYERS[1]} "
    )
    # Nothing has changed: nothing is said.
    train(moe, course, 2 * STRETCH, STRETCH, optimizer)
    assert len(said) == 1
    # Brought back, they are living.
    starve(moe, [1, 6], by=0.0)
    train(moe, course, 3 * STRETCH, 2 * STRETCH, optimizer)
    assert len(said) == 2
    assert said[1].startswith(f"step {3 * STRETCH}: ")
    assert [entry["step"] for entry in course.report()["history"]] == [STRETCH, 2 * STRETCH, 3 * STRETCH]


def test_the_steps_are_those_of_the_shaper_itself(moe):
    course = RoutingCourse(Shaping(form="tax", lam=0.3), say=lambda line: None)
    train(moe, course, 12)
    other = tiny_moe.build("qwen3_moe")
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    with RoutingShaper(other, optimizer, "tax", lam=0.3) as shaper:
        for step in range(12):
            ids = tiny_moe.tokens(seed=step)
            mask = torch.ones_like(ids)
            mask[:2, 9:] = 0
            loss = other(input_ids=ids, attention_mask=mask, labels=ids).loss + shaper.loss(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    plain = tiny_moe.build("qwen3_moe")
    train(plain, None, 12)
    assert all(torch.equal(a, b) for a, b in zip(moe.parameters(), other.parameters(), strict=True))
    assert not torch.equal(moe.model.layers[0].mlp.gate.weight, plain.model.layers[0].mlp.gate.weight)


@pytest.mark.parametrize("cost", ["information", "gradient", "shuffled", "paper"])
def test_a_course_goes_on_where_it_was_saved(cost):
    shaping = Shaping(form="tax", cost=cost, lam=1e6 if cost == "paper" else 0.3)
    whole = tiny_moe.build("qwen3_moe")
    kept = RoutingCourse(shaping, say=lambda line: None)
    train(whole, kept, 45)
    first = tiny_moe.build("qwen3_moe")
    course = RoutingCourse(shaping, say=lambda line: None)
    optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2)
    course.begin(first, optimizer)
    train(first, course, 20, optimizer=optimizer)
    saved = json.loads(json.dumps(course.state_dict()))
    weights, moments = first.state_dict(), optimizer.state_dict()
    second = tiny_moe.build("qwen3_moe")
    second.load_state_dict(weights)
    optimizer = torch.optim.AdamW(second.parameters(), lr=1e-2)
    resumed = RoutingCourse(shaping, say=lambda line: None)
    resumed.begin(second, optimizer)
    optimizer.load_state_dict(moments)
    resumed.load_state_dict(saved)
    train(second, resumed, 45, 20, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    # The last stretch, of five steps, began at step 40 in both.
    assert resumed.report() == kept.report()


def test_what_cannot_be_shaped_is_refused_before_it_is_begun(moe):
    dense = LlamaForCausalLM(LlamaConfig(**tiny_moe.SIZES | {"num_experts_per_tok": 0}))
    with pytest.raises(ConfigError, match="no layer with 'experts'"):
        RoutingCourse(Shaping()).check(dense)
    moe.requires_grad_(False)
    with pytest.raises(ConfigError, match="the router is frozen"):
        RoutingCourse(Shaping()).check(moe)
    RoutingCourse(Shaping(form="none")).check(moe)
    with pytest.raises(ConfigError, match="choose without it"):
        Shaping(form="bias")
    with pytest.raises(ConfigError, match="cost='nats'"):
        Shaping(cost="nats")
    with pytest.raises(ConfigError, match="begin"):
        RoutingCourse(Shaping()).loss()


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {},
        lambda state: state | {"shaper": []},
        lambda state: state | {"shaper": state["shaper"] | {"layers": {}}},
        lambda state: state | {"shaper": state["shaper"] | {"draws": {"tensor": [1], "dtype": "uint8"}}},
        lambda state: state | {"shaper": state["shaper"] | {"draws": {"tensor": "x", "dtype": "nn"}}},
    ],
)
def test_a_damaged_state_is_refused(moe, damage):
    course = RoutingCourse(Shaping(), say=lambda line: None)
    train(moe, course, 2)
    state = course.state_dict()
    course.load_state_dict(state)
    with pytest.raises(CheckpointError, match="does not fit"):
        course.load_state_dict(damage(state))


def test_a_closed_course_leaves_nothing_on_the_model(moe):
    course = RoutingCourse(Shaping(), say=lambda line: None)
    train(moe, course, 1)
    course.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in moe.modules())


def test_the_report_is_written_with_its_figure(moe, tmp_path):
    starve(moe, [1, 6])
    course = RoutingCourse(Shaping(lam=0.02), say=lambda line: None)
    train(moe, course, STRETCH)
    report = course.report()
    assert write_course(tmp_path, report) == [tmp_path / "routing.json", tmp_path / "routing.png"]
    assert json.loads((tmp_path / "routing.json").read_text()) == report
    assert (tmp_path / "routing.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert report["layers"][LAYERS[0]]["cost"][1] == pytest.approx(0, abs=1e-6)
    text = describe(report)
    assert "of 8 experts carry the load" in text
    assert f"{LAYERS[0]} {', '.join(map(str, report['layers'][LAYERS[0]]['dead']))}" in text
    alive = report | {"layers": {name: row | {"dead": []} for name, row in report["layers"].items()}}
    assert describe(alive).endswith(": none")


def test_dead_is_under_a_hundredth_of_a_fair_share():
    load = [0.0024, 0.0026, 0.995, 0.0]
    assert dead_experts({"layers": {"a": {"load": load}, "b": {"load": [0.5, 0.5]}}}) == {
        "a": [0, 3],
        "b": [],
    }
