import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from tether.causal.losses import IGNORE, ovr_log_prob, ovr_loss, softmax_loss
from tether.errors import ConfigError, ShapeError


def naive(loc, scale, weight, targets, threshold, noise):
    """One binary cross-entropy at a time, in float64."""
    total = 0.0
    for n, target in enumerate(targets.tolist()):
        for k in range(len(weight)):
            score = sum(float(loc[n, c]) * float(weight[k, c]) for c in range(weight.shape[1]))
            spread = (
                sum(float(scale[n, c]) * abs(float(weight[k, c])) for c in range(weight.shape[1])) + noise
            )
            fires = 0.5 + math.atan((score - threshold) / spread) / math.pi
            total -= math.log(fires) if k == target else math.log(1 - fires)
    return total / len(targets)


@pytest.fixture
def case(generator):
    loc = torch.randn(5, 7, generator=generator)
    scale = torch.rand(5, 7, generator=generator) + 0.1
    weight = torch.randn(11, 7, generator=generator)
    return loc, scale, weight, torch.randint(11, (5,), generator=generator)


@pytest.mark.parametrize("noise", [0.0, 2.5])
def test_ovr_loss_matches_one_class_at_a_time(case, noise):
    expected = naive(*case, threshold=0.7, noise=noise)
    got = ovr_loss(*case, threshold=0.7, class_noise=noise)
    assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_ignored_targets_carry_no_loss(case):
    loc, scale, weight, targets = case
    kept = torch.tensor([0, 3])
    mixed = torch.full_like(targets, IGNORE)
    mixed[kept] = targets[kept]
    assert_close(
        ovr_loss(loc, scale, weight, mixed, threshold=0.0),
        ovr_loss(loc[kept], scale[kept], weight, targets[kept], threshold=0.0),
    )


def test_no_target_at_all_gives_zero_with_gradients(case):
    loc, scale, weight, targets = case
    loc.requires_grad_()
    empty = torch.full_like(targets, IGNORE)
    loss = ovr_loss(loc, scale, weight, empty, threshold=0.0) + softmax_loss(loc @ weight.T, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(loc.grad, torch.zeros_like(loc))


def test_far_tails_stay_finite_with_gradients():
    loc = torch.tensor([[1e12], [-1e12], [3e30]], requires_grad=True)
    scale = torch.tensor([[1e-6], [1e-6], [1.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = ovr_loss(loc, scale, weight, torch.tensor([1, 0, 1]), threshold=1.0)
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(torch.isfinite(loc.grad).all() and torch.isfinite(scale.grad).all())


def test_log_prob_against_torch_distributions(case):
    loc, scale, _, _ = (tensor.double() for tensor in case)
    tail = 1 - torch.distributions.Cauchy(loc, scale).cdf(torch.tensor(0.3, dtype=torch.float64))
    assert_close(ovr_log_prob(loc, scale, 0.3), tail.log())


def test_bad_requests(case):
    loc, scale, weight, targets = case
    with pytest.raises(ConfigError, match="dense"):
        ovr_loss(loc, scale, weight, targets, threshold=0.0, impl="fast")
    # The annotations of the tests' type checker stand in front of the check that users meet.
    unchecked = inspect.unwrap(ovr_loss)
    with pytest.raises(ShapeError, match="flatten"):
        unchecked(loc[:-1], scale, weight, targets, threshold=0.0)
