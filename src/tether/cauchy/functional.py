"""The Cauchy law on tensors: densities, tails, quantiles, shared noise and its image under a linear map.

Everything is a pure function of ``(loc, scale)``. The standardised value ``t = (value - loc) / scale`` has
to be representable; within that, values and gradients stay finite and accurate where the textbook forms
give ``log(0)`` or ``inf * 0``.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from tether.errors import ShapeError

__all__ = ["cdf", "from_noise", "icdf", "log_cdf", "log_prob", "log_sf", "push_linear"]


def log_prob(
    value: Float[Tensor, "*#batch"] | float, loc: Float[Tensor, "*#batch"], scale: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """Log density of a Cauchy law.

    ``-log(pi * scale) - log(1 + t^2)`` with ``t = (value - loc) / scale``; the second term is taken as
    ``2 log hypot(1, t)``, whose value and gradient do not overflow where ``t^2`` does.

    Args:
        value: where to evaluate, in the units of ``loc``; any real number.
        loc: location (median), same units.
        scale: half width at half maximum, same units, positive.

    Returns:
        Log density in nats per unit of ``value``, of the broadcast shape.

    Reference:
        Johnson, Kotz and Balakrishnan 1994, Continuous Univariate Distributions 1, chapter 16.

    Example:
        >>> import torch
        >>> log_prob(torch.tensor(1e30), torch.tensor(0.0), torch.tensor(1.0))
        tensor(-139.2998)
    """
    t = (value - loc) / scale
    return -torch.log(math.pi * scale) - 2 * torch.log(torch.hypot(torch.ones_like(t), t))


def cdf(
    value: Float[Tensor, "*#batch"] | float, loc: Float[Tensor, "*#batch"], scale: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """Probability of a Cauchy variable lying below ``value``.

    ``atan2(1, -t) / pi``: the angle under which the half line is seen. Unlike ``1/2 + atan(t)/pi`` it keeps
    its relative accuracy in the lower tail. For the upper tail take ``cdf`` of the mirrored law, or
    ``exp(log_sf(...))``.

    Args:
        value: where to evaluate, in the units of ``loc``; any real number.
        loc: location (median), same units.
        scale: half width at half maximum, same units, positive.

    Returns:
        Probability in [0, 1], of the broadcast shape.

    Reference:
        Johnson, Kotz and Balakrishnan 1994, Continuous Univariate Distributions 1, chapter 16.

    Example:
        >>> import torch
        >>> cdf(torch.tensor([-1e8, 0.0, 1.0]), torch.tensor(0.0), torch.tensor(1.0))
        tensor([3.1831e-09, 5.0000e-01, 7.5000e-01])
    """
    t = (value - loc) / scale
    return torch.atan2(torch.ones_like(t), -t) / math.pi


def log_cdf(
    value: Float[Tensor, "*#batch"] | float, loc: Float[Tensor, "*#batch"], scale: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """Log probability of a Cauchy variable lying below ``value``.

    Args:
        value: where to evaluate, in the units of ``loc``; any real number.
        loc: location (median), same units.
        scale: half width at half maximum, same units, positive.

    Returns:
        Log probability in nats, at most 0, of the broadcast shape; within 4 ulp of the exact value at the
        rounded ``t``, in both tails.

    Reference:
        Johnson, Kotz and Balakrishnan 1994, chapter 16, in the two-branch form of ``log_sf``.

    Example:
        >>> import torch
        >>> log_cdf(torch.tensor([-1e8, 1e30]), torch.tensor(0.0), torch.tensor(1.0))
        tensor([-1.9565e+01, -3.1831e-31])
    """
    return _log_upper_tail((loc - value) / scale)


def log_sf(
    value: Float[Tensor, "*#batch"] | float, loc: Float[Tensor, "*#batch"], scale: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """Log probability of a Cauchy variable exceeding ``value``: the one-vs-rest logit of a score.

    Args:
        value: where to evaluate, in the units of ``loc``; any real number, such as a decision threshold.
        loc: location (median), same units.
        scale: half width at half maximum, same units, positive.

    Returns:
        Log probability in nats, at most 0, of the broadcast shape; within 4 ulp of the exact value at the
        rounded ``t``, in both tails.

    Reference:
        Johnson, Kotz and Balakrishnan 1994, chapter 16. Two branches: ``log(atan(1/t)/pi)`` from ``t = 1``
        on, ``log1p(-atan2(1, -t)/pi)`` below.

    Example:
        >>> import torch
        >>> log_sf(1e8, torch.zeros(1), torch.ones(1))
        tensor([-19.5654])
    """
    return _log_upper_tail((value - loc) / scale)


def icdf(
    probability: Float[Tensor, "*#batch"], loc: Float[Tensor, "*#batch"], scale: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """Quantile of a Cauchy law, ``loc + scale * tan(pi (probability - 1/2))``.

    In the outer quarters the tangent is written as a cotangent of the distance to the nearer end, so that
    the relative accuracy does not decay as ``probability`` approaches 0 or 1 (there ``1 - probability`` is
    exact, but floating point can only name the values ``1 - k * eps/2``: 0 is resolved far better than 1).

    Args:
        probability: in [0, 1]; 0 and 1 give the infinite ends.
        loc: location (median), any real number.
        scale: half width at half maximum, in the units of ``loc``, positive.

    Returns:
        The value below which the given probability lies, in the units of ``loc``, of the broadcast shape;
        the standard quantile (loc 0, scale 1) is within 4 ulp. Its derivative with respect to
        ``probability`` is of order ``1 / (pi p^2)`` and overflows where that does (float32: p below 1e-19).

    Reference:
        Johnson, Kotz and Balakrishnan 1994, Continuous Univariate Distributions 1, chapter 16.

    Example:
        >>> import torch
        >>> icdf(torch.tensor([1e-10, 0.5, 0.75]), torch.tensor(0.0), torch.tensor(1.0))
        tensor([-3.1831e+09,  0.0000e+00,  1.0000e+00])
    """
    # No branch has an infinite derivative where it is not taken: pi is not a floating point number.
    lower = -1 / torch.tan(math.pi * probability)
    upper = 1 / torch.tan(math.pi * (1 - probability))
    middle = torch.tan(math.pi * (probability - 0.5))
    standard = torch.where(probability < 0.25, lower, torch.where(probability > 0.75, upper, middle))
    return loc + scale * standard


def from_noise(
    noise: Float[Tensor, "*#batch"], loc: Float[Tensor, "*#batch"], scale: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """Turn uniform noise into Cauchy draws; the same noise in two laws is the same individual in two worlds.

    ``loc + scale * tan(pi (noise - 1/2))``, evaluated as the quantile ``icdf`` is: a cotangent near 0 and 1.
    ``cdf`` takes a draw back to its noise.

    Args:
        noise: uniform in the open interval (0, 1). ``torch.rand`` can return 0 (in float32 once in 2^24
            draws), which gives -inf: draw with ``torch.rand(...).clamp(min=2**-25)``.
        loc: location (median), any real number.
        scale: half width at half maximum, in the units of ``loc``, non-negative (0 returns ``loc``).

    Returns:
        One draw per element, in the units of ``loc``, of the broadcast shape; differentiable in ``loc`` and
        ``scale``.

    Reference:
        Inverse transform sampling; Devroye 1986, Non-Uniform Random Variate Generation, section II.2.

    Example:
        >>> import torch
        >>> from_noise(torch.tensor([0.25, 0.5]), torch.tensor(3.0), torch.tensor(2.0))
        tensor([1., 3.])
    """
    return icdf(noise, loc, scale)


def push_linear(
    loc: Float[Tensor, "*loc_batch c"],
    scale: Float[Tensor, "*scale_batch c"],
    weight: Float[Tensor, "k inputs"],
    bias: Float[Tensor, " k"] | None = None,
) -> tuple[Float[Tensor, "*loc_batch k"], Float[Tensor, "*scale_batch k"]]:
    """Law of ``weight @ U + bias`` for independent Cauchy ``U``: Cauchy again, by linear stability.

    ``loc' = weight @ loc + bias`` and ``scale' = |weight| @ scale``. The marginals are exact; the outputs
    are dependent, since they share ``U``.

    Args:
        loc: locations of the C independent inputs, shape (..., C).
        scale: their scales, non-negative, shape (..., C); one scale for a whole batch may keep its own,
            shorter shape.
        weight: linear map, shape (K, C), in output units per input unit.
        bias: shift of the outputs, shape (K,), or None.

    Returns:
        Location and scale of the K outputs, shapes (..., K).

    Raises:
        ShapeError: ``weight`` does not have as many columns as there are inputs.

    Reference:
        Characteristic function ``exp(i loc s - scale |s|)``; Samorodnitsky and Taqqu 1994, properties 1.2.1
        and 1.2.3 with stability index 1.

    Example:
        >>> import torch
        >>> push_linear(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([[1.0, -3.0]]))
        (tensor([-5.]), tensor([4.]))
    """
    if weight.shape[1] != loc.shape[-1] or weight.shape[1] != scale.shape[-1]:
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}, but loc {tuple(loc.shape)} and scale"
            f" {tuple(scale.shape)}: give weight (K, C) with C the last dimension of loc and of scale"
        )
    return linear(loc, weight, bias), linear(scale, weight.abs())


def _log_upper_tail(t: Tensor) -> Tensor:
    """Return log P(T > t) for a standard Cauchy T."""
    # Below 1 the tail is at least a quarter, and log1p of the complement is accurate. From 1 on
    # log(atan(1/t)/pi) is split into -log t, whose gradient never underflows, and a correction that is
    # constant to rounding beyond t = 1e9. The clamps keep the branch not taken at finite derivatives.
    near = t.clamp(max=1)
    far = t.clamp(min=1)
    inverse = (1 / far).clamp(min=1e-9)
    tail = torch.log(torch.atan(inverse) / inverse) - torch.log(far) - math.log(math.pi)
    return torch.where(t < 1, torch.log1p(-torch.atan2(torch.ones_like(t), -near) / math.pi), tail)
