import itertools
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import tiny_moe
from tether.errors import ConfigError, ShapeError
from tether.router import RoutingShaper
from tether.router.attach import find_sites
from tether.router.cost import temper_cost
from tether.router.experts import Experts
from tether.router.options import FORMS
from tether.router.shaping import expert_load, route_probability, tax

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def adam(model, lr=1e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


@pytest.mark.parametrize("family", tiny_moe.FAMILIES)
def test_costs_do_not_depend_on_how_experts_are_computed(family):
    found = []
    for implementation in IMPLEMENTATIONS:
        model = tiny_moe.build(family, implementation)
        optimizer = adam(model)
        with RoutingShaper(model, optimizer, every=1) as shaper:
            tiny_moe.train(model, shaper, optimizer)
            found.append(shaper.costs())
    assert len(found[0]) == (1 if family == "deepseek_v3" else 2)
    for other in found[1:]:
        for name, cost in found[0].items():
            assert_close(other[name], cost, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", tiny_moe.FAMILIES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_and_gradients_are_bit_equal_with_and_without_hooks(family, implementation):
    ids = tiny_moe.tokens()
    found = []
    for hooked in (False, True, False):
        model = tiny_moe.build(family, implementation)
        optimizer = adam(model)
        if hooked:
            with RoutingShaper(model, optimizer):
                output = model(input_ids=ids, labels=ids)
                output.loss.backward()
        else:
            with RoutingShaper(model, optimizer):
                pass
            output = model(input_ids=ids, labels=ids)
            output.loss.backward()
        found.append([output.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("family", tiny_moe.FAMILIES)
def test_the_hook_sees_what_the_model_reports(family):
    model = tiny_moe.build(family).eval()
    ids = tiny_moe.tokens()
    with RoutingShaper(model, form="none") as shaper:
        output = model(input_ids=ids, output_router_logits=True)
        for logits, watch in zip(output.router_logits, shaper._watches, strict=True):
            assert torch.equal(watch.live[0].logits, logits)


def test_all_hooks_are_gone_after_closing(moe):
    optimizer = adam(moe)
    before = [(m, len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in moe.modules()]
    for form in FORMS:
        with RoutingShaper(moe, optimizer, form=form):
            pass
    assert [(m, len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in moe.modules()] == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_loss_is_the_tax_on_the_models_own_logits(moe):
    optimizer = adam(moe)
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[1, 7:] = mask[3, :5] = 0
    with RoutingShaper(moe, optimizer, form="tax", lam=0.02) as shaper:
        tiny_moe.train(moe, shaper, optimizer, steps=1)
        ids = tiny_moe.tokens(seed=9)
        output = moe(input_ids=ids, output_router_logits=True, attention_mask=mask)
        found, costs = shaper.loss(mask), shaper.costs()
    kept = mask.flatten().bool()
    expected = [
        tax(route_probability(z)[kept].mean(0), cost)
        for z, cost in zip(output.router_logits, costs.values(), strict=True)
    ]
    assert_close(found, 0.02 * torch.stack(expected).mean())


@pytest.mark.parametrize(("top_k", "total"), [(2, 2), (8, 1)])
def test_balance_is_the_tax_tempered_by_the_load_of_the_batch(top_k, total):
    moe = tiny_moe.build("qwen3_moe", num_experts_per_tok=top_k)
    optimizer = adam(moe)
    kept = torch.arange(48) % 12 < 9
    with RoutingShaper(moe, optimizer, form="balance", lam=0.02) as shaper:
        tiny_moe.train(moe, shaper, optimizer, steps=1)
        output = moe(input_ids=tiny_moe.tokens(seed=9), output_router_logits=True)
        found, costs = shaper.loss(kept), shaper.costs()
    expected = []
    for z, cost in zip(output.router_logits, costs.values(), strict=True):
        mean = route_probability(z)[kept].mean(0)
        # Where every token uses every expert, the probabilities are the load.
        load = expert_load(z[kept].topk(top_k).indices, 8) if top_k < 8 else mean.detach()
        expected.append(total * tax(mean, temper_cost(cost, load)))
    assert_close(found, 0.02 * torch.stack(expected).mean())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains(form):
    model = tiny_moe.build("qwen3_moe")
    before = model.model.layers[0].mlp.gate.weight.detach().clone()
    optimizer = adam(model)
    with RoutingShaper(model, optimizer, form=form, every=1, z=1e-3) as shaper:
        for step in range(3):
            ids = tiny_moe.tokens(seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            term = shaper.loss(task_loss=loss if form == "goodness" else None)
            optimizer.zero_grad()
            (loss + term).backward()
            optimizer.step()
    assert bool(torch.isfinite(term))
    assert not torch.equal(before, model.model.layers[0].mlp.gate.weight)


def test_nothing_is_taxed_before_the_first_step(moe):
    optimizer = adam(moe)
    ids = tiny_moe.tokens()
    with RoutingShaper(moe, optimizer) as shaper:
        moe(input_ids=ids)
        term = shaper.loss()
        assert term.item() == 0
        term.backward()
        assert float(moe.model.layers[0].mlp.gate.weight.grad.abs().max()) == 0
        with pytest.raises(ConfigError, match="after 0 steps: expected at least one step"):
            shaper.costs()


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adafactor])
def test_optimizers_without_first_moments_are_followed_by_gradients(make, moe):
    optimizer = make(moe.parameters(), lr=1e-4)
    with RoutingShaper(moe, optimizer, every=1) as shaper:
        tiny_moe.train(moe, shaper, optimizer, steps=3)
        costs = shaper.costs()
    assert all(float(cost.max()) > float(cost.min()) > 0 for cost in costs.values())


def test_costs_are_read_every_so_many_steps(moe):
    optimizer = adam(moe, lr=1e-2)
    seen = []
    with RoutingShaper(moe, optimizer, every=3) as shaper:
        for _step in range(7):
            tiny_moe.train(moe, shaper, optimizer, steps=1)
            seen.append(shaper._watches[0].cost.clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    # Read after steps 1, 3 and 6.
    assert changed == [False, True, False, False, True, False]


def test_state_that_is_not_a_number_is_a_no_op_with_a_warning(moe, caplog):
    optimizer = adam(moe)
    with RoutingShaper(moe, optimizer, every=1) as shaper:
        tiny_moe.train(moe, shaper, optimizer, steps=1)
        experts = moe.model.layers[1].mlp.experts
        optimizer.state[experts.down_proj]["exp_avg"][3] = float("nan")
        with caplog.at_level(logging.WARNING):
            shaper._refresh()
            shaper._refresh()
        assert [record for record in caplog.records if "not taxed" in record.message][1:] == []
        assert "model.layers.1.mlp" in caplog.text
        optimizer.zero_grad()
        moe(input_ids=tiny_moe.tokens())
        shaper.loss().backward()
        assert float(moe.model.layers[1].mlp.gate.weight.grad.abs().max()) == 0
        assert float(moe.model.layers[0].mlp.gate.weight.grad.abs().max()) > 0
        with pytest.raises(ConfigError, match=r"no cost of model.layers.1.mlp"):
            shaper.costs()


def test_a_checkpoint_that_recomputes_counts_once():
    found = []
    for checkpointed in (False, True):
        model = tiny_moe.build("qwen3_moe").train()
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        optimizer = adam(model)
        with RoutingShaper(model, optimizer, every=1) as shaper:
            loss = tiny_moe.train(model, shaper, optimizer)
            found.append((loss, shaper.costs()["model.layers.1.mlp"], shaper.report()["mean"]["tokens"]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)
    assert found[0][2] == found[1][2] == 48


@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*:UserWarning")
def test_reentrant_checkpointing_is_refused():
    model = tiny_moe.build("qwen3_moe").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with RoutingShaper(model, adam(model)) as shaper:
        model(input_ids=tiny_moe.tokens())
        with pytest.raises(ConfigError, match="use_reentrant"):
            shaper.loss()


def test_a_frozen_router_is_refused(moe):
    optimizer = adam(moe)
    with RoutingShaper(moe, optimizer) as shaper:
        for layer in moe.model.layers:
            layer.mlp.gate.requires_grad_(False)
        moe.model.embed_tokens.requires_grad_(False)
        for layer in moe.model.layers:
            layer.requires_grad_(False)
        moe(input_ids=tiny_moe.tokens())
        with pytest.raises(ConfigError, match="frozen by now"):
            shaper.loss()
    with pytest.raises(ConfigError, match="the router is frozen"):
        RoutingShaper(moe, optimizer)
    with RoutingShaper(moe, optimizer, form="none") as shaper:
        moe(input_ids=tiny_moe.tokens())
        assert shaper.report()["mean"]["tokens"] == 48


def test_frozen_experts_are_refused(moe):
    for layer in moe.model.layers:
        layer.mlp.experts.requires_grad_(False)
    optimizer = adam(moe)
    with pytest.raises(ConfigError, match="no expert is trainable"):
        RoutingShaper(moe, optimizer)
    with RoutingShaper(moe, optimizer, form="prior", cost="uniform") as shaper:
        tiny_moe.train(moe, shaper, optimizer, steps=1)


def test_a_measurement_in_between_does_not_change_the_load(moe):
    with RoutingShaper(moe, form="switch") as shaper:
        moe(input_ids=tiny_moe.tokens())
        expected = shaper.loss().item()
        moe(input_ids=tiny_moe.tokens())
        with torch.no_grad():
            moe(input_ids=tiny_moe.tokens(batch=2, seed=5))
        assert shaper.loss(torch.ones(4, 12)).item() == pytest.approx(expected)


def test_loss_needs_a_forward_pass_with_gradients(moe):
    with RoutingShaper(moe, adam(moe)) as shaper:
        with pytest.raises(ConfigError, match="no forward pass with gradients"):
            shaper.loss()
        moe(input_ids=tiny_moe.tokens())
        with torch.no_grad():
            moe(input_ids=tiny_moe.tokens(batch=2))
        # A measurement between pass and loss leaves the pass as it was.
        assert shaper.loss().requires_grad
        with pytest.raises(ConfigError, match="one call of loss"):
            shaper.loss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.1}, "lam=-0.1"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"lam": float("inf")}, "lam=inf"),
        ({"every": 0}, "every=0"),
        ({"form": "fars"}, "expected one of tax"),
        ({"cost": "auto"}, "expected one of information"),
        ({"cap": 1.0}, "cap=1.0"),
        ({"rate": -1.0}, "rate=-1.0"),
        ({"form": "tax", "cost": "uniform"}, "without a gradient"),
        ({"form": "prior", "cost": "paper-log"}, "is negative"),
        ({"form": "balance", "cost": "paper-log"}, "is negative"),
    ],
)
def test_bad_options_are_refused(moe, options, message):
    with pytest.raises(ConfigError, match=message):
        RoutingShaper(moe, adam(moe), **options)


def test_a_form_without_its_optimizer_is_refused(moe):
    for options in ({}, {"form": "bias"}):
        with pytest.raises(ConfigError, match="without an optimizer"):
            RoutingShaper(moe, **options)
    with pytest.raises(ConfigError, match="not in the optimizer"):
        RoutingShaper(moe, adam(tiny_moe.build("qwen3_moe")))


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="no layer with 'experts'"):
        RoutingShaper(nn.Linear(2, 2), form="none")


@pytest.mark.parametrize("form", ["switch", "bias"])
def test_balancing_where_all_experts_are_used_is_refused(form):
    model = tiny_moe.build("qwen3_moe", num_experts_per_tok=8)
    with pytest.raises(ConfigError, match="is constant"):
        RoutingShaper(model, adam(model), form=form)


def test_a_mask_or_ids_of_another_batch_are_refused(moe):
    with RoutingShaper(moe, adam(moe)) as shaper:
        moe(input_ids=tiny_moe.tokens())
        with pytest.raises(ShapeError, match="mask of 5 tokens"):
            shaper.loss(torch.ones(5))
        with pytest.raises(ShapeError, match="5 task ids for 48 tokens"):
            shaper.report(torch.zeros(5))


def test_a_strong_tax_is_warned_of(moe, caplog):
    RoutingShaper(moe, adam(moe), lam=0.05).close()
    assert "undo specialisation" in caplog.text


def test_goodness_needs_the_task_loss_and_reads_its_gradient(moe):
    optimizer = adam(moe)
    with RoutingShaper(moe, optimizer, form="goodness", lam=1.0) as shaper:
        ids = tiny_moe.tokens()
        moe(input_ids=ids)
        with pytest.raises(ConfigError, match="task_loss"):
            shaper.loss()
        loss = moe(input_ids=ids, labels=ids).loss
        shaper.loss(task_loss=loss)
        (loss).backward()
        optimizer.step()
        output = moe(input_ids=ids, labels=ids, output_router_logits=True)
        watch = shaper._watches[0]
        gradient = torch.autograd.grad(output.loss, watch.mixtures[0], retain_graph=True)[0].norm(dim=-1)
        expected = []
        for z, held in zip(output.router_logits, shaper._watches, strict=True):
            size = torch.autograd.grad(output.loss, held.mixtures[0], retain_graph=True)[0]
            size = size.reshape(-1, 32).norm(dim=-1)
            top, chosen = z.softmax(-1).topk(2)
            gates = torch.zeros_like(z).scatter(1, chosen, top)
            goodness = gates * (size / size.mean())[:, None] * (z - held.cost)
            expected.append(torch.distributions.Categorical(logits=z + goodness).entropy().mean())
        assert float(gradient.min()) > 0
        assert_close(shaper.loss(task_loss=output.loss), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_bias_levels_the_load(family):
    # DeepSeek chooses groups first, by their best two: with one group the bias rules alone.
    model = tiny_moe.build(family, **({"n_group": 1} if family == "deepseek_v3" else {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ids = tiny_moe.tokens(batch=16)
    with RoutingShaper(model, optimizer, form="bias", rate=0.01) as shaper:
        violations = []
        for _ in range(60):
            model(input_ids=ids)
            assert shaper.loss().item() == 0
            violations.append(shaper.report()["mean"]["max_violation"])
            optimizer.step()
    assert violations[0] > 0.25
    assert violations[-1] < 0.5 * violations[0]


def test_report_tells_tasks_apart_and_counts_drift(moe):
    ids = torch.cat([torch.full((2, 12), 3), torch.full((2, 12), 9)])
    with RoutingShaper(moe, adam(moe)) as shaper, torch.no_grad():
        moe(input_ids=ids)
        tasks = torch.tensor([0, 0, 1, 1])
        by_sequence = shaper.report(tasks)
        assert by_sequence == shaper.report(tasks[:, None].expand(4, 12))
        assert by_sequence["mean"]["itjd"] > 0.2
        shaper.mark()
        moe(input_ids=ids)
        assert shaper.report(tasks)["mean"]["drift"] == 0
        moe.model.layers[0].mlp.gate.weight.mul_(-1)
        moe(input_ids=ids)
        assert shaper.report(tasks)["layers"]["model.layers.0.mlp"]["drift"] > 0.5


def test_observed_batches_are_reported_together(moe):
    with RoutingShaper(moe, form="none") as shaper, torch.no_grad():
        for seed in range(3):
            moe(input_ids=tiny_moe.tokens(seed=seed))
            shaper.observe(torch.tensor([seed] * 4), mask=torch.arange(12).expand(4, 12) < 10)
        report = shaper.report()
        assert report["mean"]["tokens"] == 120
        assert len(report["layers"]["model.layers.0.mlp"]["gates"]) == 3
        # A report begins anew.
        assert shaper.report()["mean"]["tokens"] == 48


class Listed(nn.Module):
    """A layer as older models have it: a linear gate beside a list of experts."""

    def __init__(self, separate=True):
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.top_k = 2

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slot = (chosen == e).nonzero(as_tuple=True)
            if len(rows):
                y = y.index_add(0, rows, weights[rows, slot, None] * expert(x[rows]))
        return y


def test_lists_of_experts_with_a_linear_gate_are_found():
    layer = Listed()
    (site,) = find_sites(layer)
    assert (site.count, site.top_k) == (4, 2)
    optimizer = adam(layer)
    with RoutingShaper(layer, optimizer, every=1) as shaper:
        for _ in range(3):
            x = torch.randn(20, 6)
            loss = (layer(x) - x).square().mean() + shaper.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_close(shaper.costs()[""].mean(), torch.tensor(1.0))


class Bank(nn.Module):
    """Experts of a shape of its own, with the expert on the second axis."""

    def __init__(self):
        super().__init__()
        self.route = nn.Linear(6, 4, bias=False)
        self.bank = nn.ParameterList(nn.Parameter(torch.randn(6, 6)) for _ in range(4))

    def forward(self, x):
        return torch.einsum("ne,eoi,ni->no", self.route(x).softmax(-1), torch.stack(list(self.bank)), x)


def test_other_layouts_are_registered():
    layer = Bank()
    optimizer = adam(layer)
    with RoutingShaper(layer, optimizer, sites=(), every=1) as shaper:
        with pytest.raises(ConfigError, match="register_site"):
            shaper.loss()
        own = Experts(4, (), tuple((p,) for p in layer.bank))
        shaper.register_site("bank", layer.route, layer.bank, top_k=4, parameters=own)
        with pytest.raises(ConfigError, match="under observation already"):
            shaper.register_site("bank", layer.route, layer.bank, top_k=4, parameters=own)
        x = torch.randn(20, 6)
        loss = (functional.mse_loss(layer(x), x)) + shaper.loss()
        loss.backward()
        optimizer.step()
        assert set(shaper.costs()) == {"bank"}
