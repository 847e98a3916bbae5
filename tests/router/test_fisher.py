import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tether.errors import ConfigError, ShapeError
from tether.router import delta_cost, empirical_fisher


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def batches(count=3, size=6):
    return [(torch.randn(size, 5), torch.randint(4, (size,))) for _ in range(count)]


def test_fisher_is_the_mean_square_of_each_tokens_own_gradient(net):
    text = batches()
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters() if "weight" in name}
    for inputs, targets in text:
        for token in range(len(inputs)):
            loss = losses(net, (inputs[token : token + 1], targets[token : token + 1])).sum()
            own = torch.autograd.grad(loss, [net.get_parameter(name) for name in expected])
            for name, gradient in zip(expected, own, strict=True):
                expected[name] += gradient.square() / 18
    found = empirical_fisher(net, text, losses)
    for name, value in expected.items():
        assert_close(found[name], value)
    assert all(p.grad is None for p in net.parameters())
    assert not net[0]._forward_hooks


def test_cost_predicts_the_divergence_of_a_small_delta_of_a_model_that_fits_its_text(net):
    # Where targets are drawn from the model itself the empirical Fisher is the Fisher, and a delta of a single
    # entry has no off-diagonal part: half the quadratic form is the divergence.
    inputs = torch.randn(4000, 5)
    with torch.no_grad():
        before = net(inputs).log_softmax(-1)
        targets = torch.distributions.Categorical(logits=before).sample()
    fisher = empirical_fisher(net, [(inputs, targets)], losses)
    change = torch.zeros(4, 7)
    change[1, 2] = 0.1
    (cost,) = delta_cost(fisher, [{"2.weight": change}])
    with torch.no_grad():
        net[2].weight += change
        after = net(inputs).log_softmax(-1)
    measured = (before.exp() * (before - after)).sum(-1).mean().double()
    assert_close(cost, measured, rtol=0.1, atol=0)


def test_bad_input_is_refused(net):
    with pytest.raises(ConfigError, match="no batch"):
        empirical_fisher(net, [], losses)
    with pytest.raises(ConfigError, match=r"\['5'\]"):
        empirical_fisher(net, batches(), losses, ["5"])
    with pytest.raises(ConfigError, match="does not depend"):
        empirical_fisher(net, batches(), lambda model, batch: model[0](batch[0]).sum(-1), ["2", "0"])
    fisher = {"w": torch.ones(2)}
    with pytest.raises(ConfigError, match="no Fisher"):
        delta_cost(fisher, [{"v": torch.ones(2)}])
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        delta_cost(fisher, [{"w": torch.ones(3)}])
