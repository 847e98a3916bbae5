"""The one-vs-rest loss in three forms: dense, exact in chunks of the vocabulary, and sampled.

All three are sums over pairs of a token and a class. With ``u = (level - loc_S) / scale_S`` where the class
has to stay silent and ``u = (loc_S - level) / scale_S`` where it has to fire, a pair costs
``-log(phi / pi)``, ``phi = atan2(1, -u)``, whose slope in ``u`` is ``-sin(phi)^2 / phi``.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tether.cauchy.functional import log_cdf, log_sf, push_linear
from tether.causal.decisions import Decisions
from tether.errors import ConfigError

__all__ = ["Estimate", "chunked", "dense", "sampled"]

_PAIRS = 2**20
"""Pairs of a token and a class worked on at once: six buffers of 4 MB in float32 stay in the cache."""


class Estimate(NamedTuple):
    """A loss estimated from sampled classes, and how far it may be off.

    Attributes:
        loss: mean loss in nats, a scalar; differentiable, unbiased together with its gradients.
        standard_error: estimated standard deviation of `loss` over the draw of the classes, in nats;
            exactly 0 when every class was drawn. Its square is an unbiased estimate of the variance.
    """

    loss: Tensor
    standard_error: Tensor


def dense(case: Decisions) -> Tensor:
    """Compute the loss holding tokens x vocabulary: the reference, differentiated by autograd.

    Args:
        case: at least one token.

    Returns:
        The mean loss in nats, a scalar.
    """
    weight = case.weight.to(case.dtype)
    loc, scale = push_linear(case.loc.to(case.dtype), case.scale.to(case.dtype), weight)
    scale = (scale + case.noise).expand_as(loc)
    level = case.level.expand_as(loc)
    if case.shift is not None:
        level = level + case.shift
    chosen = case.targets.unsqueeze(-1)
    miss = log_cdf(level, loc, scale)
    hit = log_sf(level.gather(-1, chosen), loc.gather(-1, chosen), scale.gather(-1, chosen))
    return -(miss.scatter(-1, chosen, 0.0).sum(-1) + hit.squeeze(-1)).mean()


def chunked(case: Decisions, chunk: int) -> Tensor:
    """Compute the loss and its gradients chunk by chunk over the vocabulary, each product once.

    Args:
        case: at least one token.
        chunk: classes held at a time, >= 1.

    Returns:
        The mean loss in nats, a scalar. Its gradients exist already: backward multiplies them by the
        incoming one, and can run once.

    Reference: the fused linear cross-entropy of Hsu et al. 2024 (Liger Kernel), carried over to one-vs-rest.
    """
    losses, gradients = _sweep(case, chunk, _wanted(case))
    return _attach(losses, gradients, case)


def sampled(case: Decisions, chunk: int, samples: int, generator: torch.Generator | None) -> Estimate:
    """Estimate the loss from all classes that are a target of some token, and some of the others.

    The others are drawn without replacement, the same for all tokens, and weigh ``rest / samples`` each:
    unbiased for the loss and for every gradient, since both are sums over classes. The variance is that of
    a sample total, ``rest^2 (1 - samples / rest) s^2 / samples``, with s^2 the variance of the drawn
    classes' losses.

    Args:
        case: at least one token.
        chunk: classes held at a time, >= 1.
        samples: classes drawn, >= 2.
        generator: source of the draw; None takes the global one.

    Returns:
        The estimate. Cost grows with the distinct targets and the samples, not with the vocabulary.

    Reference: Cochran 1977, Sampling Techniques, theorems 2.2 and 2.4.
    """
    certain, targets = torch.unique(case.targets, return_inverse=True)
    others = torch.ones(len(case.weight), dtype=torch.bool, device=certain.device)
    others[certain] = False
    pool = others.nonzero().squeeze(-1)
    rest = len(pool)
    samples = min(samples, rest)
    device = certain.device if generator is None else generator.device
    order = torch.randperm(rest, generator=generator, device=device)[:samples].to(certain.device)
    # In the order of memory, so that the rows are read and written forwards.
    classes = torch.cat([certain, pool[order].sort().values])
    share = torch.ones(len(classes), dtype=case.dtype, device=certain.device)
    share[len(certain) :] = rest / max(samples, 1)
    losses, gradients = _sweep(replace(case, targets=targets), chunk, _wanted(case), classes, share)
    drawn = losses[len(certain) :] * (samples / max(rest, 1))  # undo the weights
    variance = drawn.new_zeros(())
    if samples < rest:
        variance = rest**2 * (1 - samples / rest) / samples * drawn.var()
    loss = _attach(losses, gradients, case)
    return Estimate(loss, variance.sqrt())


class _Attached(torch.autograd.Function):
    """A value whose gradients were computed together with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        # Given away, so that the engine takes the gradients over instead of copying them.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise ConfigError(
                "backward through a chunked or sampled loss ran a second time, but its gradients are given away "
                "in the first: compute the loss again, or take impl='dense'"
            )
        if incoming != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(incoming)
        return None, None, *gradients


def _attach(losses: Tensor, gradients: list[Tensor | None], case: Decisions) -> Tensor:
    value: Tensor = _Attached.apply(losses.sum(), gradients, *case.inputs())
    return value


def _wanted(case: Decisions) -> list[bool]:
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in case.inputs()]


@torch.no_grad()
def _sweep(
    case: Decisions,
    chunk: int,
    wanted: list[bool],
    classes: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return each class's part of the loss, and the wanted gradients of their sum.

    With `classes` (K,), distinct, only these are swept, `share` (K,) is the weight of each, and targets
    are positions in `classes`.
    """
    dtype, weight = case.dtype, case.weight
    loc, scale = case.loc.to(dtype), case.scale.to(dtype)
    tokens, total = len(loc), len(weight) if classes is None else len(classes)
    shared = len(scale) == 1
    width = min(chunk, total)
    height = min(max(1, _PAIRS // width), tokens)
    rooms = [loc.new_empty(height * width) for _ in range(6)]
    losses = loc.new_zeros(total)
    start = torch.empty_like if classes is None else torch.zeros_like
    to_loc, to_scale = torch.zeros_like(loc), torch.zeros_like(scale)
    to_weight = start(weight, memory_format=torch.contiguous_format) if wanted[2] else None
    to_level, to_noise = (loc.new_zeros(len(weight)) for _ in range(2))
    to_shift = loc.new_zeros(tokens, 1)

    for first in range(0, total, width):
        part = slice(first, min(first + width, total))
        pick = part if classes is None else classes[part]
        rows = weight[pick].to(dtype)
        magnitude = rows.abs()
        level, noise = case.level[pick], case.noise[pick]
        to_rows, to_magnitude = torch.zeros_like(rows), torch.zeros_like(rows)
        for top in range(0, tokens, height):
            own = slice(top, min(top + height, tokens))
            shape = own.stop - own.start, part.stop - part.start
            gap, spread, *free = (room[: math.prod(shape)].view(shape) for room in rooms)
            if shared:
                spread = spread[:1]
            at = scale if shared else scale[own]
            torch.addmm(level, loc[own], rows.t(), alpha=-1, out=gap)
            if case.shift is not None:
                gap += case.shift[own]
            torch.addmm(noise, at, magnitude.t(), out=spread)
            hits = _hits(case.targets[own], part)
            gap[hits] *= -1
            parts = _pairs(gap, spread, free, any(wanted))
            weights = 1 / tokens if share is None else share[part] / tokens
            losses[part] += parts * weights
            if not any(wanted):
                continue
            on_loc, on_scale = free[2].mul_(weights), gap.mul_(weights)
            on_loc[hits] *= -1
            to_shift[own] -= on_loc.sum(1, keepdim=True)
            to_level[pick] -= on_loc.sum(0)
            on_noise = on_scale.sum(0)
            to_noise[pick] += on_noise
            if shared:
                on_scale = on_noise.unsqueeze(0)
            if wanted[0]:
                to_loc[own].addmm_(on_loc, rows)
            if wanted[1]:
                (to_scale if shared else to_scale[own]).addmm_(on_scale, magnitude)
            if wanted[2]:
                to_rows.addmm_(on_loc.t(), loc[own])
                to_magnitude.addmm_(on_scale.t(), at)
        if to_weight is not None:
            to_weight[pick] = to_rows.addcmul_(to_magnitude, rows.sign()).to(weight.dtype)

    found = (to_loc, to_scale, to_weight, to_level, to_noise, to_shift)
    gradients = [
        gradient.to(tensor.dtype) if want and gradient is not None and tensor is not None else None
        for gradient, tensor, want in zip(found, case.inputs(), wanted, strict=True)
    ]
    return losses, gradients


def _hits(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return the positions, in a block of all given tokens and the classes of a part, of the targets."""
    rows = ((targets >= part.start) & (targets < part.stop)).nonzero().squeeze(-1)
    return rows, targets[rows] - part.start


def _pairs(gap: Tensor, spread: Tensor, free: list[Tensor], slopes: bool) -> Tensor:
    """Return the losses of a block of pairs, summed over tokens, and leave their slopes in the buffers.

    `gap` is u * scale_S and becomes the slope in scale_S; the slope in -gap, times the sign, is left in
    `free[2]`. The slope ``sin(phi)^2 / (phi * scale_S)`` is multiplied up from factors that neither overflow
    nor underflow before it does itself.
    """
    rest, angle, sine, ratio = free
    u = gap.div_(spread)
    one = u.new_ones(())
    torch.atan2(one, u, out=rest)
    torch.atan2(one, torch.neg(u, out=angle), out=angle)
    if slopes:
        torch.minimum(angle, rest, out=sine).sin_()
        torch.div(sine, angle, out=ratio)
        u.mul_(sine.div_(spread)).mul_(ratio)
        sine.mul_(ratio)
    # Where phi < pi/2 the second term is log(1/2), elsewhere the first is 0: no branch, no cancellation.
    angle.mul_(2 / math.pi).clamp_(max=1).log_()
    rest.mul_(-1 / math.pi).clamp_(min=-0.5).log1p_()
    return -(angle.sum(0) + rest.sum(0))
