"""Stage 4: choose a scale by measurement, and step towards flat minima."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tether.errors import ConfigError
from tether.merge.encoding import token_losses
from tether.merge.packing import pack_sample, spread
from tether.merge.paths import PathBank
from tether.merge.recorder import Recorder
from tether.merge.towers import FAMILIES
from tether.merge.weighting import path_weights

__all__ = ["FlatStep", "ScaleSearch", "flat_step", "gradient_variance", "paper_flat_step", "search_scale"]


class ScaleSearch(NamedTuple):
    """A search over one number.

    Attributes:
        best: the scale with the smallest value.
        scales: all that were tried, in order.
        values: what was measured at each.
    """

    best: float
    scales: tuple[float, ...]
    values: tuple[float, ...]


def search_scale(measure: Callable[[float], float], candidates: Sequence[float]) -> ScaleSearch:
    """Find the lambda with the smallest measured value: candidates, then the vertex of a parabola.

    The parabola goes through the best candidate and its neighbours, where it has two. Measure the loss of held
    out probes; the document's criterion, the variance of g' (`gradient_variance`), can be given as well.

    Args:
        measure: value at a scale.
        candidates: at least one scale, ascending.

    Returns:
        The search.

    Raises:
        ConfigError: no candidates, or not ascending; or a value that is no number.

    Reference:
        TEFM, stage 3: lambda by ``min Var(g'*)``.

    Example:
        >>> round(search_scale(lambda s: (s - 0.6) ** 2, [0.0, 0.5, 1.0]).best, 6)
        0.6
    """
    if not candidates or any(b <= a for a, b in pairwise(candidates)):
        raise ConfigError(f"candidates {list(candidates)}: expected at least one scale, ascending")
    scales, values = list(candidates), [measure(scale) for scale in candidates]
    if any(math.isnan(value) for value in values):
        raise ConfigError(f"the measured values {values} hold no-numbers; check the model at these scales")
    i = min(range(len(values)), key=values.__getitem__)
    if 0 < i < len(values) - 1:
        (x0, x1, x2), (y0, y1, y2) = scales[i - 1 : i + 2], values[i - 1 : i + 2]
        left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
        if left != right:
            vertex = x1 - ((x1 - x0) * left - (x1 - x2) * right) / (2 * (left - right))
            if x0 < vertex < x2 and vertex != x1:
                scales.append(vertex)
                values.append(measure(vertex))
    return ScaleSearch(scales[min(range(len(values)), key=values.__getitem__)], tuple(scales), tuple(values))


def gradient_variance(model: Any, bank: PathBank, families: Sequence[str] = FAMILIES) -> float:
    """The document's criterion for lambda: the variance over neurons of ``g'``, phi[1] averaged over samples.

    Args:
        model: a fused model.
        bank: paths.
        families: whose neurons.

    Returns:
        The variance.

    Reference:
        TEFM, stage 3.
    """
    weights = path_weights(bank.log_prob, bank.lengths, "position")
    total: dict[str, Tensor] = {}
    for sample in range(len(bank.probes)):
        pack = pack_sample(bank, sample, model)
        position = spread(pack, weights.weights[sample].to(pack.path.device)).float()

        def gradient(y: Tensor, x: Tensor, dy: Tensor, inside: Tensor = pack.blocks) -> Tensor:
            del x
            return (y * dy)[inside].sum(0)

        with Recorder(model, families, lambda y, x: y[0, 0], gradient) as recorder:
            (position[pack.blocks] @ token_losses(model, pack, gradients=True)).backward()
        for name, value in recorder.backward.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value / len(bank.probes)
    return float(torch.cat(list(total.values())).double().var())


def paper_flat_step(
    weight: Float[Tensor, "o i"], gradient: Float[Tensor, "o"], eta: float, epsilon: float = 1e-8
) -> Float[Tensor, "o i"]:
    """The document's stage 4, for study: ``W - eta g' / (|g'| + epsilon)``.

    g' is a number a neuron, so its quotient is its sign: every weight of a row moves by the same eta.

    Args:
        weight: fused rows.
        gradient: phi*[1] of each row.
        eta: step.
        epsilon: keeps the quotient finite.

    Returns:
        The moved rows.

    Reference:
        TEFM, stage 4.
    """
    return weight - eta * (gradient / (gradient.abs() + epsilon)).to(weight.dtype).unsqueeze(-1)


class FlatStep(NamedTuple):
    """What a flat step did.

    Attributes:
        eta: length of the step that was kept relative to the weights' norm; 0 if none lowered the held-out loss.
        before: held-out loss before.
        after: held-out loss after.
        sharpness: ``L(W + radius g / |g|) - L(W)`` on the probes before the step.
    """

    eta: float
    before: float
    after: float
    sharpness: float


def flat_step(
    model: Any,
    loss: Callable[[Any], Tensor],
    held_out: Callable[[Any], float],
    *,
    radius: float = 0.05,
    eta: float = 1e-3,
    halvings: int = 3,
) -> FlatStep:
    """One sharpness-aware step with backtracking: it is kept only where the held-out loss falls.

    The gradient is taken at ``W + radius g / |g|``, the ascent point of ``max_{|d| < radius} L(W + d)``; the step
    from W has length ``eta |W|`` and is halved until the held-out loss falls.

    Args:
        model: moved in place; all parameters that require gradients take part.
        loss: mean loss of the probes under the model, differentiable.
        held_out: loss of other probes, without gradients.
        radius: ascent, in the norm of the weights, > 0.
        eta: longest step relative to the norm of the weights, > 0.
        halvings: how often to halve before giving up.

    Returns:
        What was done.

    Raises:
        ConfigError: a number outside its range, or a model without trainable parameters.

    Reference:
        TEFM, stage 4; Foret et al. 2021, equations 2 and 3.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not radius > 0 or not eta > 0 or halvings < 0 or not parameters:
        raise ConfigError(
            f"radius={radius}, eta={eta}, halvings={halvings}, {len(parameters)} trainable parameters: expected "
            "positive numbers, halvings >= 0 and at least one parameter"
        )
    with torch.no_grad():
        before = held_out(model)
    value = loss(model)
    ascent = torch.autograd.grad(value, parameters)
    with torch.no_grad():
        scale = radius / _norm(ascent)
        torch._foreach_add_(parameters, ascent, alpha=scale)
    raised = loss(model)
    descent = torch.autograd.grad(raised, parameters)
    with torch.no_grad():
        torch._foreach_sub_(parameters, ascent, alpha=scale)
        unit = _norm(parameters) / _norm(descent)
        moved = 0.0
        for attempt in range(halvings + 1):
            step = eta / 2**attempt
            torch._foreach_sub_(parameters, descent, alpha=unit * (step - moved))
            moved = step
            after = held_out(model)
            if after < before:
                return FlatStep(step, before, after, float(raised.detach() - value.detach()))
        torch._foreach_add_(parameters, descent, alpha=unit * moved)
    return FlatStep(0.0, before, before, float(raised.detach() - value.detach()))


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())
