import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tether.errors import ConfigError, ShapeError
from tether.router.shaping import (
    balanced_bias,
    expert_load,
    masked_mean,
    meta_entropy,
    prior_divergence,
    route_probability,
    switch_balance,
    tax,
    z_loss,
)


def logits(tokens=10, experts=5, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_of_the_tax_is_the_stated_one():
    z = logits(1).requires_grad_()
    cost = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
    tax(route_probability(z).mean(0), cost).backward()
    p = z.detach().softmax(-1)[0]
    assert_close(z.grad[0], p * (cost - (p * cost).sum()))


@given(st.lists(st.floats(0.01, 4.0), min_size=5, max_size=5), st.integers(0, 1000))
@settings(max_examples=30)
def test_a_gradient_of_the_tax_is_bounded_by_the_cap(costs, seed):
    z = (5 * logits(1, seed=seed)).requires_grad_()
    tax(route_probability(z).mean(0), torch.tensor(costs)).backward()
    assert bool((z.grad.abs() <= 4 * z.detach().softmax(-1) + 1e-12).all())


def test_prior_against_fifty_digits():
    p, c = [0.7, 0.2, 0.1], [3.0, 0.5, 0.0]
    with mpmath.workdps(50):
        weight = [1 / (mpmath.mpf(x) + mpmath.mpf("0.01") * mpmath.mpf("0.5")) for x in c]
        total = mpmath.fsum(weight)
        expected = mpmath.fsum(a * mpmath.log(a / (w / total)) for a, w in zip(p, weight, strict=True))
    found = prior_divergence(torch.tensor(p, dtype=torch.float64), torch.tensor(c, dtype=torch.float64))
    assert_close(found, torch.tensor(float(expected), dtype=torch.float64))


def test_a_uniform_cost_gives_the_divergence_from_uniform():
    p = logits(1).softmax(-1)[0]
    expected = torch.log(torch.tensor(5.0)).double() - torch.distributions.Categorical(p).entropy()
    assert_close(prior_divergence(p, torch.full((5,), 7.0, dtype=torch.float64)), expected)


def test_prior_is_finite_with_most_experts_dead():
    p = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert torch.isfinite(prior_divergence(p, torch.tensor([1.0, 0.0, 0.0, 0.0])))


@pytest.mark.parametrize("masked", [False, True])
def test_switch_is_what_transformers_computes(masked):
    z, k = logits(24, 6).float(), 2
    mask = torch.arange(24) % 4 > 0 if masked else None
    expected = load_balancing_loss_func((z,), 6, k, mask.reshape(2, 12).long() if masked else None)
    load = expert_load(z.topk(k).indices, 6, mask)
    assert_close(switch_balance(masked_mean(z.softmax(-1), mask), load), expected)


def test_switch_pooled_over_layers_is_what_transformers_computes():
    layers = [logits(24, 6, seed).float() for seed in range(3)]
    expected = load_balancing_loss_func(tuple(layers), 6, 2)
    load = torch.stack([expert_load(z.topk(2).indices, 6) for z in layers]).mean(0)
    assert_close(switch_balance(torch.stack([z.softmax(-1).mean(0) for z in layers]).mean(0), load), expected)


def test_switch_is_constant_where_all_experts_are_used():
    z = logits().requires_grad_()
    load = expert_load(z.topk(5).indices, 5)
    switch_balance(route_probability(z).mean(0), load.double()).backward()
    assert_close(z.grad, torch.zeros_like(z))


def test_entropy_of_shifted_logits():
    z, g = logits(), logits(seed=1)
    expected = torch.distributions.Categorical(logits=z + g).entropy()
    assert_close(meta_entropy(z, g), expected.mean())
    mask = torch.arange(10) < 4
    assert_close(meta_entropy(z, g, mask), expected[:4].mean())


def test_goodness_is_a_constant_for_the_gradient():
    g = logits(seed=1).requires_grad_()
    z = logits().requires_grad_()
    meta_entropy(z, g).backward()
    assert g.grad is None
    assert float(z.grad.abs().sum()) > 0


def test_sigmoid_gates_over_their_sum():
    z = logits()
    assert_close(route_probability(z, "sigmoid"), z.sigmoid() / z.sigmoid().sum(-1, keepdim=True))
    with pytest.raises(ConfigError, match="expected one of softmax, sigmoid"):
        route_probability(z, "tanh")


def test_z_loss_is_the_square_of_the_normaliser():
    z = logits()
    assert_close(z_loss(z), z.exp().sum(-1).log().square().mean())


def test_bias_moves_against_the_load_and_does_not_wander():
    bias = torch.zeros(4)
    for _ in range(10):
        bias = balanced_bias(bias, torch.tensor([4.0, 2.0, 1.0, 1.0]), 0.1)
    assert bool((bias[0] < bias[1:]).all())
    assert_close(bias.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="rate=-1"):
        balanced_bias(bias, bias, -1)


def test_a_mask_of_other_tokens_is_refused():
    with pytest.raises(ShapeError, match="mask of 3 tokens for 10"):
        masked_mean(logits(), torch.ones(3, dtype=torch.bool))
