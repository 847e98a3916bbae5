"""What a fit minimises and what it is held to: candidate softmax on the domain, output Fisher on the base."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.delta.output_head import OutputHead, chunk_rows

__all__ = [
    "CandidateSoftmax",
    "full_cross_entropy",
    "mean_probability",
    "output_fisher",
]


class CandidateSoftmax:
    """Cross-entropy over likely classes and the target exactly, and over the rest by sampling.

    The normaliser is the sum over a fixed set of candidates and the target, plus an unbiased estimate of the
    other classes' sum from a fresh uniform sample each call. Without that sample the rest would be free to
    drift, which costs held-out loss (research: 0.09 nats).

    Cost per token: (candidates + sampled) x C instead of V x C.

    Args:
        head: the output head.
        prob: how likely each class is on the domain, shape (V,), >= 0; the likeliest become candidates.
        size: number of candidates, clipped to V.
        sampled: number of other classes drawn each call.
    """

    def __init__(
        self,
        head: OutputHead,
        prob: Float[Tensor, " vocab"],
        *,
        size: int = 2048,
        sampled: int = 512,
    ) -> None:
        weight, bias = head.weight, head.bias
        ranked = prob.topk(min(size, len(weight))).indices
        self.head, self.weight = head, weight
        self.bias = weight.new_zeros(len(weight), dtype=torch.float32) if bias is None else bias.float()
        self.chosen, self.chosen_bias = weight[ranked].float(), self.bias[ranked]
        self.slot = torch.full((len(weight),), -1, device=weight.device)
        self.slot[ranked] = torch.arange(len(ranked), device=weight.device)
        self.rest = (self.slot < 0).nonzero().squeeze(-1)
        self.sampled = min(sampled, len(self.rest))

    def __call__(
        self,
        latent_loc: Float[Tensor, "tokens latent"],
        targets: Int[Tensor, " tokens"],
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Mean negative log likelihood.

        Args:
            latent_loc: loc of U, shape (N, C), float32.
            targets: next tokens, shape (N,).
            generator: draws the other classes.

        Returns:
            Nats, a scalar.
        """
        capped = self.head.capped
        columns = [capped(latent_loc @ self.chosen.T + self.chosen_bias)]
        outside = self.slot[targets] < 0
        # A target that is no candidate gets a column of its own, closed for the tokens that do not need it.
        own = capped((latent_loc * self.weight[targets].float()).sum(-1) + self.bias[targets])
        columns.append(own.masked_fill(~outside, -math.inf).unsqueeze(-1))
        if self.sampled:
            draw = torch.randint(
                len(self.rest), (self.sampled,), generator=generator, device=generator.device
            )
            drawn = self.rest[draw.to(self.rest.device)]
            # Each drawn class stands for many: its share of the normaliser is that much larger. The target is
            # counted already, so its copy is closed where it is drawn.
            share = math.log(len(self.rest) / self.sampled)
            other = capped(latent_loc @ self.weight[drawn].float().T + self.bias[drawn]) + share
            columns.append(other.masked_fill(drawn == targets.unsqueeze(-1), -math.inf))
        slot = torch.where(outside, len(self.chosen), self.slot[targets])
        return torch.nn.functional.cross_entropy(torch.cat(columns, dim=-1), slot)


class _FullCrossEntropy(torch.autograd.Function):
    """Cross-entropy over all classes in chunks of tokens; its gradient is formed on the way."""

    @staticmethod
    def forward(ctx: Any, latent_loc: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
        weight = head.weight
        rows = chunk_rows(weight)
        total = latent_loc.new_zeros((), dtype=torch.float64)
        gradients = []
        for part, target in zip(latent_loc.split(rows), targets.split(rows), strict=True):
            logits = head.logits(part)
            log_prob, slope = logits.log_softmax(-1), head.slope(logits)
            total -= log_prob.gather(-1, target.unsqueeze(-1)).double().sum()
            prob = log_prob.exp_()
            prob[torch.arange(len(part), device=prob.device), target] -= 1
            prob = prob if slope is None else prob.mul_(slope)
            gradients.append((prob.to(weight.dtype) @ weight).to(part))
        ctx.save_for_backward(torch.cat(gradients) / len(targets))
        return (total / len(targets)).to(latent_loc)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * upstream[0], None, None


def full_cross_entropy(
    latent_loc: Float[Tensor, "tokens latent"],
    targets: Int[Tensor, " tokens"],
    head: OutputHead,
) -> Float[Tensor, ""]:
    """Mean negative log likelihood over all classes, in memory of a few tokens' logits.

    Cost per token: two products with the (V, C) head, gradient included.

    Args:
        latent_loc: loc of U, shape (N, C), float32.
        targets: next tokens, shape (N,).
        head: the output head; gets no gradient.

    Returns:
        Nats, a scalar; differentiable in `latent_loc`.
    """
    loss: Tensor = _FullCrossEntropy.apply(latent_loc, targets, head)
    return loss


@torch.no_grad()
def mean_probability(
    head: OutputHead,
    latent_loc: Float[Tensor, "tokens latent"],
) -> Float[Tensor, " vocab"]:
    """Mean probability of each class under the base.

    Args:
        head: the output head.
        latent_loc: loc of U, shape (N, C).

    Returns:
        Probabilities, shape (V,), summing to 1.
    """
    total = torch.zeros(len(head.weight), device=head.weight.device)
    for log_prob in head.log_prob(latent_loc):
        total += log_prob.exp_().sum(0)
    return total / len(latent_loc)


@torch.no_grad()
def output_fisher(
    head: OutputHead,
    latent_loc: Float[Tensor, "tokens latent"],
) -> Float[Tensor, "latent latent"]:
    """Fisher information of the base's softmax about its latent, averaged over tokens.

    F = E[J^T (diag p - p p^T) J], so that 1/2 d^T F d is KL(base || base moved by d) to second order. J is the head W,
    each row times the slope of its logit where logits are capped.

    Args:
        head: the output head.
        latent_loc: loc of U on base text, shape (N, C).

    Returns:
        F, shape (C, C), symmetric positive semidefinite, float32.
    """
    weight = head.weight
    # The weight of each class in the second moment: its probability times the square of its slope.
    shares = torch.zeros(len(weight), device=weight.device)
    outer = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    full = weight.float()
    for part in latent_loc.split(chunk_rows(weight)):
        logits = head.logits(part)
        p, slope = logits.softmax(-1), head.slope(logits)
        sloped = p if slope is None else p * slope
        shares += (p if slope is None else sloped * slope).sum(0)
        mean = (sloped @ full).double()
        outer += mean.T @ mean
    second = torch.zeros_like(outer)
    # In chunks of classes, so that no second copy of the head is held.
    for rows, share in zip(full.split(8192), shares.split(8192), strict=True):
        second += (rows.T @ (rows * share.unsqueeze(-1))).double()
    return ((second - outer) / len(latent_loc)).float()
