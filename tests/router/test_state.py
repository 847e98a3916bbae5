"""What is read of optimizers that load a state, warm up, precondition their moments, or overflow."""

import pytest
import torch
from torch.testing import assert_close
from transformers.optimization import Adafactor

import tiny_moe
from tether.errors import ConfigError, ShapeError
from tether.router import RoutingShaper
from tether.router.fisher import empirical_fisher


def costs(shaper):
    return torch.stack(list(shaper.costs().values()))


def groups(moe, rates=(1e-3, 4e-3)):
    ups = [p for name, p in moe.named_parameters() if "gate_up" in name]
    others = [p for name, p in moe.named_parameters() if "gate_up" not in name]
    return torch.optim.AdamW([{"params": ups, "lr": rates[0]}, {"params": others, "lr": rates[1]}])


def test_rates_are_those_of_the_groups_a_loaded_state_brings():
    found = []
    for loaded in (False, True):
        moe = tiny_moe.build("qwen3_moe")
        optimizer = groups(moe)
        with RoutingShaper(moe, optimizer, every=1) as shaper:
            if loaded:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] = 5e-2
            tiny_moe.train(moe, shaper, optimizer, steps=2)
            found.append(costs(shaper))
    assert_close(found[1], found[0])


def test_a_rate_of_zero_costs_nothing_yet_and_later_nothing_new(caplog):
    moe = tiny_moe.build("qwen3_moe")
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.0)
    with RoutingShaper(moe, optimizer, every=1) as shaper:
        tiny_moe.train(moe, shaper, optimizer, steps=1)
        with pytest.raises(ConfigError, match="no cost"):
            shaper.costs()
        optimizer.param_groups[0]["lr"] = 1e-3
        tiny_moe.train(moe, shaper, optimizer, steps=2)
        last = costs(shaper)
        optimizer.param_groups[0]["lr"] = 0.0
        tiny_moe.train(moe, shaper, optimizer, steps=1)
        assert_close(costs(shaper), last)
    assert not caplog.records


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p, lr=1e-6, momentum=0.9),
        lambda p: Adafactor(p, lr=1e-6, relative_step=False, beta1=0.9),
        # Finds its rate by itself.
        lambda p: Adafactor(p),
    ],
    ids=["RMSprop with momentum", "Adafactor with momentum", "Adafactor"],
)
def test_means_of_preconditioned_updates_are_no_first_moments(make):
    moe = tiny_moe.build("qwen3_moe")
    experts = moe.model.layers[0].mlp.experts
    optimizer = make(list(experts.parameters()))
    with RoutingShaper(moe, optimizer, every=1, sites=()) as shaper:
        shaper.register_site("layer", moe.model.layers[0].mlp.gate, experts, top_k=2)
        reader = shaper._watches[0].reader
        scale = torch.tensor([1.0, 0.1, 0.01, 0.001] * 2)
        for _ in range(4):
            for p in experts.parameters():
                p.grad = torch.randn_like(p) * scale.view(-1, *[1] * (p.dim() - 1))
            optimizer.step()
        assert reader.source == "gradient"
        share = reader.read("information")
    assert_close(
        (share / share[0])[1:4], torch.tensor([1e-2, 1e-4, 1e-6], dtype=torch.float64), rtol=0.2, atol=0
    )


def test_an_overflow_does_not_end_the_following_of_gradients():
    moe = tiny_moe.build("qwen3_moe")
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-3)
    with RoutingShaper(moe, optimizer, every=1) as shaper:
        tiny_moe.train(moe, shaper, optimizer, steps=2)
        before = costs(shaper)
        reader = shaper._watches[0].reader
        for p in moe.parameters():
            p.grad = torch.full_like(p, float("inf"))
        reader.before_step()
        assert_close(costs(shaper), before)


@pytest.mark.parametrize("form", ["balance", "bias"])
def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(form):
    ends = []
    for stops in (False, True):
        moe = tiny_moe.build("qwen3_moe")
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
        shaper = RoutingShaper(moe, optimizer, form=form, every=1, rate=0.1)
        tiny_moe.train(moe, shaper, optimizer, steps=3)
        if stops:
            saved = shaper.state_dict()
            shaper.close()
            shaper = RoutingShaper(moe, optimizer, form=form, every=1, rate=0.1)
            shaper.load_state_dict(saved)
        for seed in (11, 12):
            ids = tiny_moe.tokens(seed=seed)
            loss = moe(input_ids=ids, labels=ids).loss + shaper.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with shaper:
            ends.append([p.detach().clone() for p in moe.parameters()])
            if form == "bias":
                assert shaper.state_dict()["layers"]["model.layers.0.mlp"]["bias"].abs().max() > 0.1
    for first, second in zip(*ends, strict=True):
        assert torch.equal(first, second)


def test_a_bias_without_loss_is_refused_and_so_is_another_way_to_choose():
    moe = tiny_moe.build("qwen3_moe")
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    with RoutingShaper(moe, optimizer, form="bias"):
        ids = tiny_moe.tokens(seed=1)
        moe(input_ids=ids, labels=ids).loss.backward()
        with pytest.raises(ConfigError, match="counts the load in loss"):
            optimizer.step()
    layer = moe.model.layers[0].mlp
    with RoutingShaper(moe, optimizer, form="bias", sites=()) as shaper:
        shaper.register_site(
            "layer", layer.gate, layer.experts, top_k=2, renormalise=not layer.gate.norm_topk_prob
        )
        with pytest.raises(ConfigError, match="does not choose"):
            moe(input_ids=ids)


def test_ids_and_masks_must_be_of_the_pass():
    moe = tiny_moe.build("qwen3_moe")
    with RoutingShaper(moe, form="none") as shaper:
        ids = tiny_moe.tokens(seed=1)
        moe(input_ids=ids)
        rows = len(ids)
        assert shaper.report([0] * rows)["layers"]
        for wrong in (rows // 2, rows - 1):
            with pytest.raises(ShapeError, match="task ids"):
                shaper.report(torch.zeros(wrong, dtype=torch.int64))
        with pytest.raises(ShapeError, match="mask of 3"):
            shaper.report(torch.zeros(rows, dtype=torch.int64), torch.ones(3))


def test_the_fisher_of_a_frozen_base_is_that_of_a_trainable_one():
    moe = tiny_moe.build("qwen3_moe")
    names = ["lm_head"]

    def losses(model, ids):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")

    wanted = empirical_fisher(moe, [tiny_moe.tokens(seed=1)], losses, names)
    moe.requires_grad_(False)
    found = empirical_fisher(moe, [tiny_moe.tokens(seed=1)], losses, names)
    assert_close(found, wanted)
    assert not any(p.requires_grad for p in moe.parameters())
