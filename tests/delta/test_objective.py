import pytest
import torch
from torch.testing import assert_close

from tether.delta.objective import CandidateSoftmax, mean_probability, output_fisher


@pytest.fixture
def case(generator):
    weight = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    loc = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return weight, loc, torch.randint(60, (40,), generator=generator)


def test_with_all_classes_as_candidates_it_is_the_cross_entropy(case, generator):
    weight, loc, targets = (t.float() if t.is_floating_point() else t for t in case)
    loss = CandidateSoftmax(weight, mean_probability(weight, loc), size=60, sampled=10)
    expected = torch.nn.functional.cross_entropy(loc @ weight.T, targets)
    assert_close(loss(loc, targets, generator), expected)


@pytest.mark.parametrize("candidate", [True, False])
def test_the_sampled_rest_estimates_the_normaliser_without_bias(case, generator, candidate):
    weight, loc, _ = (t.float() if t.is_floating_point() else t for t in case)
    prob = mean_probability(weight, loc)
    target = prob.argmax() if candidate else prob.argmin()
    loss = CandidateSoftmax(weight, prob, size=20, sampled=8)
    assert (loss.slot[target] >= 0) == candidate
    row, targets = loc[:1], target[None]
    # Beside the target, the drawn classes stand for the others: the target's own draw is closed.
    exact = (torch.logsumexp(row @ weight.T, -1) - (row * weight[target]).sum(-1)).exp()
    draws = torch.stack([loss(row, targets, generator) for _ in range(6000)]).exp()
    error = draws.std() / len(draws) ** 0.5
    assert abs(float(draws.mean() - exact)) < 4 * float(error)
    plain = CandidateSoftmax(weight, prob, size=20, sampled=0)
    assert float(plain(row, targets, generator)) < float(exact.log())


def test_gradients_flow_to_the_latent_only_through_finite_terms(case, generator):
    weight, loc, targets = (t.float() if t.is_floating_point() else t for t in case)
    loc.requires_grad_()
    CandidateSoftmax(weight, torch.rand(60, generator=generator), size=10, sampled=30)(
        loc, targets, generator
    ).backward()
    assert bool(torch.isfinite(loc.grad).all())


def test_mean_probability(case):
    weight, loc, _ = case
    assert_close(
        mean_probability(weight, loc).double(),
        torch.softmax(loc @ weight.T, -1).mean(0),
        rtol=1e-5,
        atol=1e-7,
    )


def test_output_fisher_is_the_hessian_of_the_kl(case):
    weight, loc, _ = case

    def kl(move):
        base = torch.log_softmax(loc @ weight.T, -1)
        moved = torch.log_softmax((loc + move) @ weight.T, -1)
        return (base.exp() * (base - moved)).sum(-1).mean()

    expected = torch.autograd.functional.hessian(kl, torch.zeros(6, dtype=torch.float64))
    assert_close(output_fisher(weight, loc).double(), expected, rtol=1e-4, atol=1e-4)
