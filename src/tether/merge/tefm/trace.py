"""The trace of a loss's Hessian by Hutchinson's estimator, and whether it falls as the document says."""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tether.errors import ConfigError

__all__ = ["CLAIMED", "Fall", "Trace", "fall_of_trace", "hessian_trace"]

CLAIMED: Final = (0.3, 0.5)
"""Shares by which the document says that the Hessian falls."""


class Trace(NamedTuple):
    """An estimate of a trace.

    Attributes:
        mean: over random vectors.
        standard_error: of the mean; 0 for one vector.
        draws: v^T H v of each vector, in an order that depends on the generator alone.
    """

    mean: float
    standard_error: float
    draws: tuple[float, ...]


class Fall(NamedTuple):
    """How far a trace fell.

    Attributes:
        share: ``1 - after / before``, below 0 where it rose.
        standard_error: over the random vectors, which both estimates share.
        verdict: ``holds`` where the share is at least 0.3 by two standard errors, ``violated`` where it is less by two,
            else ``undecided``, as where the trace before is not above 0 by two.
    """

    share: float
    standard_error: float
    verdict: str


def hessian_trace(
    losses: Sequence[Callable[[], Tensor]],
    parameters: Sequence[Tensor],
    *,
    vectors: int = 8,
    generator: torch.Generator,
) -> Trace:
    """Estimate the trace of the Hessian of a mean loss: the mean of ``v^T H v`` over vectors of random signs.

    Each loss is run once, its gradient is differentiated once for each vector, and then it is let go.

    Args:
        losses: parts of the data; each runs the model on one of them and gives a mean loss, and all count alike.
        parameters: with respect to which; leaves that require gradients.
        vectors: how many vectors, >= 1; equal generators give equal vectors, for models of equal shapes.
        generator: source of the signs.

    Returns:
        The estimate, in units of the loss over squared units of the weights.

    Raises:
        ConfigError: No losses, no parameters, or fewer than one vector.

    Reference:
        Hutchinson 1990, A stochastic estimator of the trace of the influence matrix, equation 4.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_trace([lambda: (w**3).sum()], [w], vectors=1, generator=torch.Generator()).mean
        18.0
    """
    if not losses or not parameters or vectors < 1:
        raise ConfigError(
            f"{len(losses)} losses, {len(parameters)} parameters, {vectors} vectors: expected at least one of each"
        )
    seeds = torch.randint(2**31, (vectors,), generator=generator).tolist()
    draws = [0.0] * vectors
    # The fused kernels of attention cannot be differentiated twice.
    with sdpa_kernel([SDPBackend.MATH]):
        for loss in losses:
            gradients = torch.autograd.grad(
                loss(), parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            for number, seed in enumerate(seeds):
                signs = _signs(parameters, seed)
                product = torch.stack([(g * s).sum() for g, s in zip(gradients, signs, strict=True)]).sum()
                if not product.requires_grad:
                    continue  # linear in all parameters
                curved = torch.autograd.grad(product, parameters, retain_graph=True, materialize_grads=True)
                draws[number] += sum(
                    float((c.double() * s).sum()) for c, s in zip(curved, signs, strict=True)
                ) / len(losses)
            del gradients
    mean, error = _mean_and_error(draws)
    return Trace(mean, error, tuple(draws))


def _signs(parameters: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, 2, each.shape, generator=generator) * 2 - 1).to(each) for each in parameters]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def fall_of_trace(before: Sequence[Trace], after: Sequence[Trace]) -> Fall:
    """Judge the document's claim that the Hessian falls by 30 to 50 %.

    Args:
        before: traces of the models that are merged, on data of each, from equal vectors.
        after: of the merged model on the same data, in the same order.

    Returns:
        The fall of the sum of traces; its error is that of a ratio, vector by vector.

    Raises:
        ConfigError: Other numbers of traces or vectors, or fewer than two vectors.

    Reference:
        TEFM, "performance and implementation".
    """
    counts = {len(trace.draws) for trace in (*before, *after)}
    if len(before) != len(after) or not before or len(counts) != 1 or counts <= {0, 1}:
        raise ConfigError(
            f"{len(before)} traces before and {len(after)} after, of {sorted(counts)} vectors: expected as many, of "
            "the same vectors, at least two"
        )
    first = [math.fsum(values) for values in zip(*(trace.draws for trace in before), strict=True)]
    last = [math.fsum(values) for values in zip(*(trace.draws for trace in after), strict=True)]
    low, high = math.fsum(last), math.fsum(first)
    ratio = low / high
    # Of a ratio of sums over the same vectors, to first order.
    _, error = _mean_and_error([y - ratio * x for x, y in zip(first, last, strict=True)])
    error = abs(error / (high / len(first)))
    share = 1 - ratio
    start, spread = _mean_and_error(first)
    if start - 2 * spread <= 0:
        verdict = "undecided"
    elif share - 2 * error >= CLAIMED[0]:
        verdict = "holds"
    else:
        verdict = "violated" if share + 2 * error < CLAIMED[0] else "undecided"
    return Fall(share, error, verdict)
