"""Hutchinson's estimator against dense Hessians, the claim on the trace, and the bound that is drawn from it."""

import math

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.errors import ConfigError
from tether.merge.tefm.trace import Fall, Trace, fall_of_trace, hessian_trace

NORMS = ("model.layers.0.input_layernorm.weight", "model.norm.weight")
IDS = torch.randint(1, 250, (3, 2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return tiny.backbone("llama", layers=1).double()


def loss_of(model, ids):
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def dense(model, rows):
    """The whole Hessian with respect to two norms, one before attention and one after all layers, column by column."""
    weights = [model.get_parameter(name) for name in NORMS]
    total = 0
    model.set_attn_implementation("eager")
    for ids in rows:
        gradients = torch.autograd.grad(loss_of(model, ids)(), weights, create_graph=True)
        columns = [
            torch.cat(torch.autograd.grad(each, weights, retain_graph=True)).detach()
            for each in torch.cat(gradients)
        ]
        total = total + torch.stack(columns) / len(rows)
    model.set_attn_implementation("sdpa")
    return total


# Norms and rotary embeddings of transformers are float32 inside, whatever the model is.
FLOAT32 = {"rel": 1e-5, "abs": 1e-5}


def test_each_draw_is_the_quadratic_form_of_the_dense_hessian(model):
    weights = [model.get_parameter(name) for name in NORMS]
    found = hessian_trace(
        [loss_of(model, ids) for ids in IDS], weights, vectors=5, generator=torch.Generator().manual_seed(3)
    )
    hessian = dense(model, IDS)
    seeds = torch.randint(2**31, (5,), generator=torch.Generator().manual_seed(3)).tolist()
    for seed, draw in zip(seeds, found.draws, strict=True):
        generator = torch.Generator().manual_seed(seed)
        signs = [torch.randint(0, 2, each.shape, generator=generator) * 2 - 1 for each in weights]
        v = torch.cat(signs).double()
        assert draw == pytest.approx(float(v @ hessian @ v), **FLOAT32)
    assert found.mean == pytest.approx(sum(found.draws) / 5)
    spread = torch.tensor(found.draws, dtype=torch.float64).std() / math.sqrt(5)
    assert found.standard_error == pytest.approx(float(spread))


def test_many_vectors_find_the_trace(model):
    found = hessian_trace(
        [loss_of(model, IDS[0])], [model.get_parameter(name) for name in NORMS], vectors=150,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    exact = float(dense(model, IDS[:1]).trace())
    assert abs(found.mean - exact) < 4 * found.standard_error
    assert found.standard_error < 0.25 * abs(exact)


def test_a_diagonal_hessian_needs_one_vector():
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    losses = [lambda: (w**4).sum(), lambda: (u**2).sum() + 0 * w.sum()]
    found = hessian_trace(losses, [w, u], vectors=1, generator=torch.Generator())
    assert found == Trace((12 * 14 + 2) / 2, 0.0, ((12 * 14 + 2) / 2,))
    assert hessian_trace([lambda: 3 * w.sum()], [w, u], generator=torch.Generator()).draws == (0.0,) * 8
    with pytest.raises(ConfigError, match="0 losses, 2 parameters, 1 vectors: expected at least one"):
        hessian_trace([], [w, u], vectors=1, generator=torch.Generator())


def traces(*draws):
    return [Trace(0.0, 0.0, tuple(each)) for each in draws]


def test_the_fall_is_that_of_the_sums_and_its_error_that_of_a_ratio():
    before = traces([4.0, 6.0, 5.0], [1.0, 2.0, 3.0])
    after = traces([2.0, 3.0, 2.5], [1.0, 1.0, 2.0])
    found = fall_of_trace(before, after)
    first, last = torch.tensor([5.0, 8.0, 8.0]), torch.tensor([3.0, 4.0, 4.5])
    assert found.share == pytest.approx(1 - 11.5 / 21)
    expected = float((last - 11.5 / 21 * first).std() / math.sqrt(3) / 7)
    assert found.standard_error == pytest.approx(expected, rel=1e-5)
    assert_close(torch.tensor(found.share), 1 - last.sum() / first.sum())


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([0.6, 0.61, 0.59], "holds"),
        ([0.2, 0.21, 0.19], "holds"),
        ([0.9, 0.91, 0.89], "violated"),
        ([1.5, 1.4, 1.6], "violated"),
        ([0.5, 0.7, 0.95], "undecided"),
    ],
)
def test_the_claim_is_judged_by_two_standard_errors(after, verdict):
    found = fall_of_trace(traces([1.0, 1.0, 1.0]), traces(after))
    assert isinstance(found, Fall)
    assert found.verdict == verdict


def test_nothing_is_said_of_a_trace_that_may_be_negative():
    found = fall_of_trace(traces([3.0, -1.0, 2.0]), traces([0.6, -0.2, 0.4]))
    assert found.share == pytest.approx(0.8)
    assert found.verdict == "undecided"


def test_traces_of_other_vectors_are_not_compared():
    for before, after in (
        (traces([1.0, 2.0]), traces([1.0])),
        (traces([1.0]), traces([1.0])),
        ([], []),
        (traces([1.0, 2.0]), traces([1.0, 2.0], [1.0, 2.0])),
    ):
        with pytest.raises(ConfigError, match="expected as many, of the same vectors, at least two"):
            fall_of_trace(before, after)


def test_the_documents_bound_fails_for_every_constant():
    """eps_gen <= eps_train + c sqrt(Tr(Hess) / n): a separable sample whose weights grow refutes it for any c.

    One training point x = 1 of label 1, one test point x = -1 of label 1, logistic loss log(1 + exp(-w x)): at w the
    training loss and its curvature vanish like exp(-w), and the test loss grows like w.
    """
    for constant, size in ((1.0, 5.0), (1e3, 25.0), (1e6, 40.0)):
        w = torch.tensor([size], dtype=torch.float64, requires_grad=True)
        train = torch.nn.functional.softplus(-w.detach()).sum()
        trace = hessian_trace(
            [lambda w=w: torch.nn.functional.softplus(-w).sum()], [w], vectors=1, generator=torch.Generator()
        ).mean
        assert trace == pytest.approx(math.exp(-size) / (1 + math.exp(-size)) ** 2, rel=1e-9)
        test = float(torch.nn.functional.softplus(w.detach()).sum())
        assert test > float(train) + constant * math.sqrt(trace / 1)
