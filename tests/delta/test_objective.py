import pytest
import torch
from torch.testing import assert_close

from tether.delta.objective import CandidateSoftmax, full_cross_entropy, mean_probability, output_fisher
from tether.delta.output_head import OutputHead


@pytest.fixture
def case(generator):
    weight = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    loc = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return weight, loc, torch.randint(60, (40,), generator=generator)


def test_with_all_classes_as_candidates_it_is_the_cross_entropy(case, generator):
    weight, loc, targets = (t.float() if t.is_floating_point() else t for t in case)
    loss = CandidateSoftmax(
        OutputHead(weight), mean_probability(OutputHead(weight), loc), size=60, sampled=10
    )
    expected = torch.nn.functional.cross_entropy(loc @ weight.T, targets)
    assert_close(loss(loc, targets, generator), expected)


@pytest.mark.parametrize("candidate", [True, False])
def test_the_sampled_rest_estimates_the_normaliser_without_bias(case, generator, candidate):
    weight, loc, _ = (t.float() if t.is_floating_point() else t for t in case)
    prob = mean_probability(OutputHead(weight), loc)
    target = prob.argmax() if candidate else prob.argmin()
    loss = CandidateSoftmax(OutputHead(weight), prob, size=20, sampled=8)
    assert (loss.slot[target] >= 0) == candidate
    row, targets = loc[:1], target[None]
    # Beside the target, the drawn classes stand for the others: the target's own draw is closed.
    exact = (torch.logsumexp(row @ weight.T, -1) - (row * weight[target]).sum(-1)).exp()
    draws = torch.stack([loss(row, targets, generator) for _ in range(6000)]).exp()
    error = draws.std() / len(draws) ** 0.5
    assert abs(float(draws.mean() - exact)) < 4 * float(error)
    plain = CandidateSoftmax(OutputHead(weight), prob, size=20, sampled=0)
    assert float(plain(row, targets, generator)) < float(exact.log())


def test_gradients_flow_to_the_latent_only_through_finite_terms(case, generator):
    weight, loc, targets = (t.float() if t.is_floating_point() else t for t in case)
    loc.requires_grad_()
    CandidateSoftmax(OutputHead(weight), torch.rand(60, generator=generator), size=10, sampled=30)(
        loc, targets, generator
    ).backward()
    assert bool(torch.isfinite(loc.grad).all())


@pytest.fixture(params=[None, 1.5])
def head(case, request, generator):
    """Classes with a bias, capped where 1.5 is the cap: scores are as large, so caps matter."""
    return OutputHead(case[0], torch.randn(60, generator=generator, dtype=torch.float64), request.param)


def logits_of(head, loc):
    scores = loc @ head.weight.T + head.bias
    return scores if head.cap is None else head.cap * torch.tanh(scores / head.cap)


def test_mean_probability(case, head):
    expected = torch.softmax(logits_of(head, case[1]), -1).mean(0)
    assert_close(mean_probability(head, case[1]).double(), expected, rtol=1e-5, atol=1e-7)


def test_output_fisher_is_the_hessian_of_the_kl(case, head):
    loc = case[1]

    def kl(move):
        base = torch.log_softmax(logits_of(head, loc), -1)
        moved = torch.log_softmax(logits_of(head, loc + move), -1)
        return (base.exp() * (base - moved)).sum(-1).mean()

    expected = torch.autograd.functional.hessian(kl, torch.zeros(6, dtype=torch.float64))
    assert_close(output_fisher(head, loc).double(), expected, rtol=1e-4, atol=1e-4)


def test_losses_and_gradients_are_those_of_the_dense_formula(case, head, generator):
    _, loc, targets = case
    wanted = loc.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits_of(head, wanted), targets)
    expected.backward()
    small = OutputHead(head.weight.float(), head.bias.float(), head.cap)
    every = CandidateSoftmax(small, mean_probability(small, loc.float()), size=60)
    for loss in (lambda at: full_cross_entropy(at, targets, small), lambda at: every(at, targets, generator)):
        at = loc.float().requires_grad_()
        found = loss(at)
        found.backward()
        assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        assert_close(at.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)


def test_the_sampled_rest_is_unbiased_under_a_cap(case, generator):
    weight, loc, _ = case
    head = OutputHead(weight.float(), cap=1.5)
    loss = CandidateSoftmax(head, mean_probability(head, loc.float()), size=20, sampled=8)
    row, target = loc[:1].float(), torch.tensor([7])
    exact = (torch.logsumexp(head.logits(row), -1) - head.logits(row)[:, 7]).exp()
    draws = torch.stack([loss(row, target, generator) for _ in range(6000)]).exp()
    assert abs(float(draws.mean() - exact)) < 4 * float(draws.std() / len(draws) ** 0.5)
