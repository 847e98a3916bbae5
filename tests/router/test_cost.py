import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import tiny_moe
from tether.errors import ConfigError, ShapeError
from tether.router.cost import (
    information_cost,
    log_information,
    normalise_cost,
    shuffle_cost,
    step_snr,
    temper_cost,
)
from tether.router.experts import find_experts
from tether.router.shaper import RoutingShaper
from tether.router.state import StateReader

E, D = 4, 6


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(E, D, D))
        self.second = nn.Parameter(torch.randn(E, D))


class Single(nn.Module):
    def __init__(self, stacked, e):
        super().__init__()
        self.first = nn.Parameter(stacked.first[e].detach().clone())
        self.second = nn.Parameter(stacked.second[e].detach().clone())


def pair():
    stacked = Stacked()
    return stacked, nn.ModuleList(Single(stacked, e) for e in range(E))


def give(stacked, separate, gradients, hit):
    """The same gradients to both layouts; separate experts that are not hit get none at all."""
    stacked.first.grad = gradients[0] * hit[:, None, None]
    stacked.second.grad = gradients[1] * hit[:, None]
    for e, expert in enumerate(separate):
        expert.first.grad = gradients[0][e].clone() if hit[e] else None
        expert.second.grad = gradients[1][e].clone() if hit[e] else None


def step(optimizer, reader):
    reader.before_step()
    optimizer.step()
    reader.after_step()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax])
def test_information_cost_is_the_documents_formula(make):
    stacked = Stacked()
    optimizer = make([{"params": [stacked.first], "lr": 0.1}, {"params": [stacked.second], "lr": 0.02}])
    reader = StateReader(optimizer, find_experts(stacked, E))
    moments = [torch.zeros(E, D, D, dtype=torch.float64), torch.zeros(E, D, dtype=torch.float64)]
    for _ in range(5):
        gradients = [torch.randn(E, D, D), torch.randn(E, D)]
        stacked.first.grad, stacked.second.grad = gradients
        moments = [0.9 * m + 0.1 * g.double() for m, g in zip(moments, gradients, strict=True)]
        step(optimizer, reader)
    expected = 0.5 * (0.1**2 * moments[0].square().sum((1, 2)) + 0.02**2 * moments[1].square().sum(1))
    assert reader.source == "exp_avg"
    assert_close(reader.read("information"), expected, rtol=1e-5, atol=0)


def test_momentum_is_read_as_a_mean_of_gradients():
    stacked = Stacked()
    optimizer = torch.optim.SGD(stacked.parameters(), lr=0.3, momentum=0.8)
    reader = StateReader(optimizer, find_experts(stacked, E))
    first, second = torch.randn(E, D, D), torch.randn(E, D)
    for _ in range(60):
        stacked.first.grad, stacked.second.grad = first, second
        step(optimizer, reader)
    assert reader.source == "momentum_buffer"
    expected = 0.5 * 0.09 * (first.double().square().sum((1, 2)) + second.double().square().sum(1))
    assert_close(reader.read("information"), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_gradients_stand_in_where_there_are_no_first_moments(make):
    stacked = Stacked()
    optimizer = make(stacked.parameters())
    reader = StateReader(optimizer, find_experts(stacked, E))
    assert reader.read("information") is None
    expected = torch.zeros(E, dtype=torch.float64)
    for number in range(6):
        stacked.first.grad, stacked.second.grad = torch.randn(E, D, D), torch.randn(E, D)
        energy = stacked.first.grad.double().square().sum((1, 2)) + stacked.second.grad.double().square().sum(
            1
        )
        if number > 0:  # what the source is shows after the first step
            expected = 0.9 * expected + 0.1 * energy
        step(optimizer, reader)
        if number == 0:
            assert reader.read("information") is None
    assert reader.source == "gradient"
    assert_close(reader.read("information"), 0.5 * 0.01 * expected, rtol=1e-5, atol=0)


def test_the_gradient_stand_in_ranks_as_moments_do():
    stacked, ranks = Stacked(), []
    scale = torch.tensor([1.0, 0.1, 3.0, 0.4])
    for gradients in (False, True):
        optimizer = torch.optim.Adam(stacked.parameters(), lr=1e-3)
        reader = StateReader(optimizer, find_experts(stacked, E), gradients=gradients)
        for _ in range(50):
            stacked.first.grad = torch.randn(E, D, D) * scale[:, None, None]
            stacked.second.grad = torch.randn(E, D) * scale[:, None]
            step(optimizer, reader)
        ranks.append(reader.read("information").argsort())
    assert_close(ranks[0], scale.argsort())
    assert_close(ranks[1], scale.argsort())


def test_direction_one_and_the_sources_cost():
    stacked = Stacked()
    optimizer = torch.optim.Adam(stacked.parameters(), lr=0.1, eps=1e-6)
    reader = StateReader(optimizer, find_experts(stacked, E))
    for _ in range(4):
        stacked.first.grad, stacked.second.grad = torch.randn(E, D, D), torch.randn(E, D)
        step(optimizer, reader)
    states = [optimizer.state[p] for p in stacked.parameters()]
    m, v = (torch.cat([s[k].double().reshape(E, -1) for s in states], 1) for k in ("exp_avg", "exp_avg_sq"))
    assert_close(reader.read("snr"), (m / (v.sqrt() + 1e-6)).norm(dim=1), rtol=1e-5, atol=0)
    assert_close(reader.read("fisher"), v.sqrt().mean(1), rtol=1e-5, atol=0)


def test_direction_one_ignores_the_scale_of_gradients():
    gradient = torch.randn(3, 4096)
    scales = torch.tensor([1e-4, 1e-2, 1.0])[:, None]
    found = step_snr(0.1 * gradient * scales, 1e-3 * (gradient * scales).square(), eps=0.0)
    assert_close(found, found[:1].expand(3), rtol=1e-5, atol=0)


def test_the_documents_log_is_one_number_for_every_expert():
    cost = torch.logspace(-9, -7, 8, dtype=torch.float64)
    logs = log_information(cost, 10_000)
    assert_close(logs, torch.full_like(logs, -18.420681), rtol=0, atol=2e-3)


@given(st.lists(st.floats(1e-12, 1e6), min_size=2, max_size=8), st.floats(1e-9, 1e9))
@settings(max_examples=50)
def test_normalised_costs_have_mean_one_under_the_cap_and_no_scale(values, scale):
    cost = torch.tensor(values, dtype=torch.float64)
    found = normalise_cost(cost, cap=100.0)
    assert_close(found.mean(), torch.tensor(1.0), rtol=1e-5, atol=0)
    assert_close(normalise_cost(cost * scale, cap=100.0), found, rtol=1e-5, atol=1e-12)
    assert float(normalise_cost(cost).max()) <= 4.0


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_no_normalised_cost_without_a_positive_finite_mean(values):
    assert normalise_cost(torch.tensor(values)) is None


def test_tempered_costs_are_geometric_means_with_the_load():
    cost, load = torch.tensor([2.0, 0.5, 0.0, 1.5]), torch.tensor([0.5, 0.5, 0.9, 0.1])
    root = [(c * f) ** 0.5 for c, f in zip(cost.tolist(), load.tolist(), strict=True)]
    expected = torch.tensor(root) / (sum(root) / 4)
    assert_close(temper_cost(cost, load), expected)
    # Neither's level counts.
    assert_close(temper_cost(1e-6 * cost, 8 * load), expected)
    assert float(temper_cost(torch.tensor([8.0, 0.0, 0.0]), load[:3], cap=1.5).max()) == 1.5
    assert_close(temper_cost(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])), torch.zeros(2))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_tempered_costs_are_level_at_one_over_the_root_of_the_energy_a_token(power):
    # A cost is load times energy a token; what is level is not pushed.
    energy = torch.tensor([1.0, 4.0, 16.0])
    load = energy**-power
    level = normalise_cost(load * energy) if power == 1.0 else temper_cost(load * energy, load)
    assert_close(level, torch.ones(3))


def test_shuffling_keeps_the_costs(generator):
    cost = torch.arange(8.0)
    shuffled = shuffle_cost(cost, generator)
    assert not torch.equal(cost, shuffled)
    assert_close(shuffled.sort().values, cost)


@pytest.mark.parametrize(("rate", "within"), [(1.0, 0.0), (0.5, 0.1), (0.1, 0.2)])
@pytest.mark.parametrize(
    ("kind", "cost"),
    [
        (torch.optim.Adam, "information"),
        (torch.optim.SGD, "information"),
        (torch.optim.Adam, "snr"),
        (torch.optim.Adam, "fisher"),
    ],
)
def test_lists_of_experts_cost_what_stacked_ones_do(kind, cost, rate, within):
    # An optimizer skips a parameter without a gradient: its moments freeze, and only the running share of steps
    # lets its cost fall.
    stacked, separate = pair()
    first, second = (kind(module.parameters(), lr=1e-3) for module in (stacked, separate))
    readers = StateReader(first, find_experts(stacked, E)), StateReader(second, find_experts(separate, E))
    size = torch.tensor([1.0, 2.0, 0.5, 1.5])
    found, rates, generator = [], torch.tensor([1.0, rate, rate, 1.0]), torch.Generator().manual_seed(0)
    for number in range(1000):
        gradients = torch.randn(E, D, D, generator=generator), torch.randn(E, D, generator=generator)
        gradients = gradients[0] * size[:, None, None], gradients[1] * size[:, None]
        give(stacked, separate, gradients, (torch.rand(E, generator=generator) < rates).float())
        step(first, readers[0])
        step(second, readers[1])
        if number > 100:
            found.append(torch.stack([normalise_cost(r.read(cost), cap=100.0) for r in readers]))
    means = torch.stack(found).mean(0)
    assert_close(means[1], means[0], rtol=max(within, 1e-5), atol=0)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize(
    ("kind", "cost"),
    [(torch.optim.Adam, "information"), (torch.optim.SGD, "information"), (torch.optim.Adam, "snr")],
)
def test_a_starved_expert_costs_nothing_after_a_hundred_steps(layout, kind, cost):
    modules = pair()
    optimizers = [kind(module.parameters(), lr=1e-3) for module in modules]
    readers = [StateReader(o, find_experts(m, E)) for o, m in zip(optimizers, modules, strict=True)]
    hit = torch.ones(E)
    for number in range(120):
        if number == 20:
            hit[0] = 0.0
        give(*modules, (torch.randn(E, D, D), torch.randn(E, D)), hit)
        for optimizer, reader in zip(optimizers, readers, strict=True):
            step(optimizer, reader)
    # The root of a root falls more slowly.
    assert float(normalise_cost(readers[layout].read(cost))[0]) < (0.02 if cost == "snr" else 1e-3)


@pytest.mark.parametrize("change", ["loss", "rate"])
def test_costs_do_not_know_the_scale_of_the_loss_or_the_rate(change):
    found = []
    for changed in (False, True):
        model = tiny_moe.build("qwen3_moe").double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        # Rate 0 for the model, so that it takes the same gradients; the reader sees another one.
        with RoutingShaper(model, optimizer, lam=0.0, every=1) as shaper:
            scale = 1000.0 if changed and change == "loss" else 1.0
            tiny_moe.train(model, shaper, optimizer, scale=scale)
            for group in optimizer.param_groups:
                group["lr"] = 1e-5 if changed and change == "rate" else 1e-3
            found.append(shaper.costs())
    for name, cost in found[0].items():
        assert_close(found[1][name], cost, rtol=0, atol=1e-5)


def test_costs_do_not_know_the_scale_of_the_loss_under_adam():
    found = []
    for scale in (1.0, 1000.0):
        model = tiny_moe.build("qwen3_moe").double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-30)
        with RoutingShaper(model, optimizer, lam=0.0, every=1) as shaper:
            tiny_moe.train(model, shaper, optimizer, scale=scale)
            found.append(shaper.costs())
    for name, cost in found[0].items():
        assert_close(found[1][name], cost, rtol=0, atol=1e-5)


def test_bad_experts_are_refused():
    unequal = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5)])
    with pytest.raises(ShapeError, match=r"experts \[1\] have other parameters"):
        find_experts(unequal, 2)
    with pytest.raises(ShapeError, match="2 experts, the router has 3"):
        find_experts(unequal, 3)
    with pytest.raises(ShapeError, match="first axis"):
        find_experts(nn.Linear(4, 5), 4)
    frozen = copy.deepcopy(Stacked()).requires_grad_(False)
    with pytest.raises(ConfigError, match="no expert is trainable"):
        find_experts(frozen, E)
    half = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)])
    with pytest.raises(ConfigError, match="some experts are frozen"):
        find_experts(half, 2)
    with pytest.raises(ConfigError, match="expected one rate"):
        information_cost([torch.ones(2)], [])


def test_an_optimizer_without_the_experts_is_refused():
    stacked = Stacked()
    other = torch.optim.Adam(Stacked().parameters())
    with pytest.raises(ConfigError, match="not in the optimizer"):
        StateReader(other, find_experts(stacked, E))


def test_no_usable_source_is_an_error_and_not_zero():
    stacked = Stacked()
    optimizer = torch.optim.Adam(stacked.parameters())
    reader = StateReader(optimizer, find_experts(stacked, E))
    # As with optimizers that move gradients elsewhere: steps, no gradients, no state.
    step(optimizer, reader)
    with pytest.raises(ConfigError, match="no usable source"):
        reader.read("information")


def test_a_cost_of_second_moments_needs_them():
    stacked = Stacked()
    optimizer = torch.optim.SGD(stacked.parameters(), lr=0.1, momentum=0.9)
    reader = StateReader(optimizer, find_experts(stacked, E))
    stacked.first.grad, stacked.second.grad = torch.randn(E, D, D), torch.randn(E, D)
    step(optimizer, reader)
    with pytest.raises(ConfigError, match="needs exp_avg and exp_avg_sq"):
        reader.read("snr")
