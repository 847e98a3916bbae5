import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
from merge import lape
from tether.errors import ConfigError
from tether.merge.flat import flat_step, gradient_variance, paper_flat_step, search_scale


def test_search_takes_the_vertex_of_the_parabola():
    tried = []

    def measure(scale):
        tried.append(scale)
        return 3 * (scale - 0.83) ** 2 + 1

    found = search_scale(measure, [0.4, 0.7, 1.1])
    assert found.best == pytest.approx(0.83)
    assert found.scales == tuple(tried)
    assert len(tried) == 4


def test_search_never_returns_worse_than_a_candidate():
    values = {0.0: 2.0, 1.0: 1.0, 2.0: 1.9}
    found = search_scale(lambda s: values.get(s, 5.0), [0.0, 1.0, 2.0])
    assert found.best == 1.0
    assert search_scale(lambda s: s, [0.5, 1.0]).scales == (0.5, 1.0)
    with pytest.raises(ConfigError, match="ascending"):
        search_scale(lambda s: s, [1.0, 0.5])
    with pytest.raises(ConfigError, match="no-numbers"):
        search_scale(lambda s: float("nan"), [1.0])


class Valley(nn.Module):
    """A quadratic loss with known gradients."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.curve = torch.tensor([10.0, 1.0], dtype=torch.float64)

    def loss(self):
        return 0.5 * (self.curve * self.weight.square()).sum()


def test_flat_step_is_the_sharpness_aware_step():
    model = Valley()
    start = model.weight.detach().clone()
    gradient = model.curve * start
    raised = start + 0.05 * gradient / gradient.norm()
    descent = model.curve * raised
    expected = start - 0.01 * start.norm() * descent / descent.norm()
    found = flat_step(model, Valley.loss, lambda m: float(m.loss()), radius=0.05, eta=0.01)
    assert_close(model.weight.detach(), expected)
    assert found.eta == 0.01
    assert found.after < found.before
    sharpness = 0.5 * (model.curve * (raised**2 - start**2)).sum()
    assert found.sharpness == pytest.approx(float(sharpness))


def test_flat_step_is_halved_and_taken_back_where_the_held_out_loss_rises():
    model = Valley()
    start = model.weight.detach().clone()
    found = flat_step(model, Valley.loss, lambda m: -float(m.loss()), eta=0.01)
    assert found.eta == 0
    assert_close(model.weight.detach(), start)
    once = flat_step(model, Valley.loss, lambda m: float(m.loss()), eta=1.6, halvings=4)
    assert 0 < once.eta < 1.6
    with pytest.raises(ConfigError, match="expected positive numbers"):
        flat_step(model, Valley.loss, lambda m: 0.0, radius=0.0)


def test_paper_step_moves_every_weight_of_a_row_by_eta():
    weight = torch.randn(3, 4)
    moved = paper_flat_step(weight, torch.tensor([2.0, -0.1, 0.0]), 0.01)
    assert_close(
        weight - moved, torch.tensor([0.01, -0.01, 0.0]).unsqueeze(-1).expand(3, 4), atol=1e-6, rtol=0
    )


def test_gradient_variance_is_that_of_plain_backpropagation():
    model = tiny.backbone("llama").double()
    bank = lape.bank(model, count=2, paths=1, shortest=4, longest=4)
    discount = 0.9 ** torch.arange(4, dtype=torch.float64)
    means = []
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        total = 0
        for sample in range(2):
            prompt, length = bank.probes[sample].input_ids, int(bank.lengths[sample, 0])
            whole = torch.cat([prompt, bank.tokens[sample, 0, :length]])
            kept = []

            def hook(module, args, output, kept=kept):
                del module, args
                output.retain_grad()
                kept.append(output)

            handle = model.get_submodule(name).register_forward_hook(hook)
            logits = model(input_ids=whole[None, :-1]).logits[0, len(prompt) - 1 :]
            handle.remove()
            losses = torch.nn.functional.cross_entropy(logits, whole[len(prompt) :], reduction="none")
            weights = discount[:length] / discount[:length].sum()
            (weights @ losses).backward()
            # The prompt's own positions (all but the last) are no part of a path.
            total = total + (kept[0] * kept[0].grad)[0, len(prompt) - 1 :].detach().sum(0) / 2
        means.append(total)
    expected = torch.cat(means).var()
    found = gradient_variance(model, bank, ("mlp.up_proj",))
    assert found == pytest.approx(float(expected), rel=1e-4)
