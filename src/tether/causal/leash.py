"""The leash: a context whose law has moved too far is pulled back along a path on which drift only falls.

In metric `latent` the drift is that of the law of U, summed over its dimensions; in metric `softmax` it is
KL(base || fused) of the softmax that is served. Either is computed from what is served, rounding included, so
the limit holds for any input, whatever the deltas do there. Where it does not bind, nothing changes.

========== =================== ====================================================== ==================
metric     chart               path, t from 1 (fused) to 0 (base)                     factor t
========== =================== ====================================================== ==================
latent     symmetric, linear   (t x, t w), w = y e^{-x/2}                             safeguarded Newton
latent     geodesic            geodesics, at constant speed                           safeguarded Newton
latent     rootkl              geodesics, sqrt(D) times t                             sqrt(limit / D)
softmax    any                 y times t, x no faster than the latent drift allows    safeguarded Newton
========== =================== ====================================================== ==================

In metric `latent` and all charts but `linear`, whose own ray is not monotone, that is the fusion with all
weights times t. For metric `softmax` see `tether.causal.score_leash`.

On each path the latent drift falls with t, so a-priori bounds on it hold under either metric.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tether.cauchy.charts import from_chart, to_chart
from tether.cauchy.divergence import drift
from tether.errors import ConfigError

__all__ = ["METRICS", "Law", "check_leash", "largest_factor", "leash_law", "no_step", "shrink"]

METRICS = ("latent", "softmax")

STEPS = 16
"""Steps at most; contexts of a text take three to six."""
AIM = 1 - 2e-5
"""Where Newton aims, as a share of the limit: room for the rounding of what is served."""
SCREEN = 1e-5
"""Relative error of a float32 drift: contexts this near the limit are looked at again in float64."""


class Law(NamedTuple):
    """The law of U that is served.

    Attributes:
        loc: shape (..., C), float32.
        log_scale: shape (..., C), float32.
        factor: how far along the path each context was left, shape (...), 1 where the leash did not bind.
    """

    loc: Tensor
    log_scale: Tensor
    factor: Tensor


def check_leash(nats: float, metric: str) -> None:
    """Refuse a leash that means nothing.

    Args:
        nats: the limit.
        metric: what it is in.

    Raises:
        ConfigError: the limit is not a positive finite number, or the metric is unknown.
    """
    if metric not in METRICS:
        raise ConfigError(f"leash metric {metric!r}: expected one of {', '.join(METRICS)}")
    if not (math.isfinite(nats) and nats > 0):
        raise ConfigError(
            f"leash of {nats} nats: expected a positive finite number; leave it out for no leash"
        )


def shrink(
    x: Float[Tensor, "*batch latent"],
    y: Float[Tensor, "*batch latent"],
    nats: float | Float[Tensor, "*batch"],
    chart: str,
) -> tuple[Float[Tensor, "*batch latent"], Float[Tensor, "*batch latent"], Float[Tensor, "*batch"]]:
    """Pull moves of the law of U back until their drift, summed over dimensions, is at most a limit.

    Along u = log t the drift is convex (cosh(t a)^2 is a power series in t with positive coefficients), so a
    chord between a factor that fits and one that does not leads to one that fits: the result never relies on
    Newton having converged. Cost: `STEPS` evaluations of the drift.

    Args:
        x: change of log scale, shape (..., C), finite.
        y: change of loc in units of the base scale, shape (..., C), finite.
        nats: the limit, > 0.
        chart: the chart the deltas were added in, which chooses the path.

    Returns:
        The moves pulled back, and the factors in [0, 1], float64. Moves that fit come back as they are.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(1, 2), torch.tensor([[4.0, 3.0]])
        >>> y, t = shrink(x, y, 0.5, "symmetric")[1:]
        >>> round(float(torch.log1p(y**2 / 4).sum()), 3), round(float(t), 3)
        (0.5, 0.303)
    """
    x, y = x.double(), y.double()
    total = drift(x, y).sum(-1)
    limit = torch.as_tensor(nats, dtype=x.dtype, device=x.device).expand_as(total)
    fits = total <= limit
    if chart == "rootkl":
        log_factor = (AIM * limit / total).log() / 2
    elif chart == "geodesic":
        rho = torch.hypot(*to_chart(x, y, "geodesic"))
        log_factor = largest_factor(
            _Latent(rho, torch.full_like(rho, -math.inf)), limit, (limit / total).log()
        )
    else:
        # As a mixture, exp(D) - 1 shrinks at least like t^2 (theory notes, 4a): a factor that surely fits.
        sure = (_log_expm1(limit) - _log_expm1(total)) / 2
        log_factor = largest_factor(_Latent(x, y.abs().log() - x / 2 - math.log(2)), limit, sure)
    log_factor = torch.where(fits, 0, log_factor.nan_to_num(-math.inf, 0, -math.inf).clamp(max=0))
    factor = log_factor.exp()
    t = factor.unsqueeze(-1)
    if chart in ("geodesic", "rootkl"):
        first, second = to_chart(x, y, chart)
        near_x, near_y = from_chart(t * first, t * second, chart)
    else:
        # t e^{(t-1) x / 2} exists where t itself is too small for a float.
        near_x, near_y = t * x, y * torch.exp(log_factor.unsqueeze(-1) + (t - 1) * x / 2)
    keep = fits.unsqueeze(-1)
    return torch.where(keep, x, near_x), torch.where(keep, y, near_y), factor


def leash_law(
    loc: Float[Tensor, "*batch latent"],
    log_scale: Float[Tensor, "*batch latent"],
    x: Float[Tensor, "*batch latent"],
    y: Float[Tensor, "*batch latent"],
    nats: float,
    chart: str,
) -> Law:
    """Move a law by (x, y), and pull back what drifts more than a limit, in metric `latent`.

    The drift is that between the float32 laws before and after, rounding included. Cost: one drift for every
    context; float64 arithmetic for those beyond the limit.

    Args:
        loc: base loc of U, shape (..., C), float32.
        log_scale: base log scale of U, shape (..., C), float32.
        x: change of log scale, shape (..., C).
        y: change of loc in units of the base scale, shape (..., C).
        nats: the limit, > 0.
        chart: the chart the deltas were added in.

    Returns:
        The law served. Where the move or the base is not finite, or no shorter move can be told from the base in
        float32, it is the base's bit for bit.
    """
    scale = log_scale.exp()
    moved_loc, moved_log_scale = loc + scale * y, log_scale + x
    with torch.no_grad():
        total = drift(moved_log_scale - log_scale, (moved_loc - loc) / scale).sum(-1)
        over = ~(total <= nats * (1 - SCREEN))  # nan counts as over
        factor = torch.ones_like(total)
        if not bool(over.any()):
            return Law(moved_loc, moved_log_scale, factor)
        base = loc[over], log_scale[over]
        rows = _pull(*base, moved_loc[over], moved_log_scale[over], x[over], y[over], nats, chart)
    # Pulled contexts follow the base's law: what they were pulled by is a constant to the gradient.
    served_loc = moved_loc.index_put((over,), rows.loc + no_step(base[0]))
    served_log_scale = moved_log_scale.index_put((over,), rows.log_scale + no_step(base[1]))
    factor[over] = rows.factor
    return Law(served_loc, served_log_scale, factor)


def no_step(values: Tensor) -> Tensor:
    """Give zeros that have the gradient of values, to be added to what is served in their place.

    Args:
        values: any tensor; what is not finite in it has no gradient, and leaves what it is added to as it is.

    Returns:
        Zeros of the same shape.
    """
    return torch.where(values.isfinite(), values - values.detach(), 0)


def _pull(
    loc: Tensor,
    log_scale: Tensor,
    moved_loc: Tensor,
    moved_log_scale: Tensor,
    x: Tensor,
    y: Tensor,
    nats: float,
    chart: str,
) -> Law:
    """Return the laws of contexts that may be beyond the limit, each checked as it is served."""
    law = Law(moved_loc.clone(), moved_log_scale.clone(), torch.ones_like(loc[:, 0]))
    finite = (x.isfinite() & y.isfinite()).all(-1)
    left = torch.arange(len(loc), device=loc.device)
    # What float32 makes of the exact path may still be too far where its grid is coarse against the scale of
    # U: then a shorter move is tried, and at last the base itself.
    for share in (1.0, 0.99, 0.5, 0.0):
        left = left[~(_served_drift(loc[left], log_scale[left], law.loc[left], law.log_scale[left]) <= nats)]
        if not len(left):
            break
        law.loc[left], law.log_scale[left], law.factor[left] = loc[left], log_scale[left], 0
        movable = left[finite[left]]
        if share and len(movable):
            near_x, near_y, factor = shrink(x[movable], y[movable], share * nats, chart)
            scale = log_scale[movable].double().exp()
            law.loc[movable] = _towards(loc[movable], loc[movable].double() + scale * near_y)
            law.log_scale[movable] = _towards(log_scale[movable], log_scale[movable].double() + near_x)
            law.factor[movable] = factor.to(law.factor)
    return law


def _served_drift(loc: Tensor, log_scale: Tensor, moved_loc: Tensor, moved_log_scale: Tensor) -> Tensor:
    """Return the drift of laws as they are stored, in float64; 0 for those equal bit for bit."""
    same = ((moved_loc == loc) & (moved_log_scale == log_scale)).all(-1)
    x = moved_log_scale.double() - log_scale.double()
    total = drift(x, (moved_loc.double() - loc.double()) / log_scale.double().exp()).sum(-1)
    return torch.where(same, 0, total)


def _towards(base: Tensor, target: Tensor) -> Tensor:
    """Return a float64 target in the dtype of the base, rounded towards it."""
    near = target.to(base.dtype)
    beyond = (near.double() - base.double()).abs() > (target - base.double()).abs()
    return torch.where(beyond, torch.nextafter(near, base), near)


@dataclass(frozen=True, slots=True)
class _Latent:
    """Drift along a path: sum of log(cosh(t first / 2)^2 + t^2 second^2), log |second| given."""

    first: Tensor
    log_second: Tensor

    def __call__(self, log_factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift and its derivative by log t, both without overflow for any finite input."""
        u = log_factor.unsqueeze(-1)
        half = (self.first.abs().clamp(min=1e-300).log() + u).exp() / 2
        widening = torch.where(
            half < 1,
            torch.log1p(torch.sinh(half.clamp(max=1)).square()),
            2 * (half - math.log(2)) + 2 * torch.log1p(torch.exp(-2 * half)),
        )
        excess = 2 * (u + self.log_second) - widening
        value = widening + excess.clamp(min=0) + torch.log1p(torch.exp(-excess.abs()))
        share = torch.sigmoid(excess)
        growth = 2 * half * torch.tanh(half)
        return value.sum(-1), (growth + share * (2 - growth)).sum(-1)


def largest_factor(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    limit: Tensor,
    sure: Tensor,
    *,
    straight: bool = False,
) -> Float[Tensor, "*contexts"]:
    """Return log t at which a function of log t, convex and increasing, is just below its limit.

    Newton on the logarithm of the function, right where it is a power of t, takes turns with Newton on the
    function itself, which for a convex one never overshoots, and with bisection where either leaves the bracket.

    Args:
        function: gives values and derivatives by log t.
        limit: of the values.
        sure: a log t where the value is at most the limit; only read where t = 1 does not fit.
        straight: whether the function is convex in t as well, so that tangents are drawn there.

    Returns:
        log t, <= 0, of the shape of `limit`.
    """
    high, low = torch.zeros_like(limit), sure.clamp(max=0)
    (high_value, high_slope), (low_value, low_slope) = function(high), function(low)
    aim = AIM * limit
    for step in range(STEPS):
        if step % 3 < 2:
            over, under = (high_value / aim).log(), (low_value / aim).log()
            nearer = over < -under
            newton = torch.where(
                nearer, high - over * high_value / high_slope, low - under * low_value / low_slope
            )
        else:
            fall = (high_value - aim) / high_slope
            newton = high + torch.log1p(-fall) if straight else high - fall
        at = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        value, slope = function(at)
        fits = value <= limit
        low, low_value = torch.where(fits, at, low), torch.where(fits, value, low_value)
        low_slope = torch.where(fits, slope, low_slope)
        high, high_value = torch.where(fits, high, at), torch.where(fits, high_value, value)
        high_slope = torch.where(fits, high_slope, slope)
        if bool(((low_value >= (1 - 1e-4) * limit) | ~(high_value > limit)).all()):
            break
    share = ((aim - low_value) / (high_value - low_value)).clamp(0, 1)
    chord = low + (high - low) * share
    if straight:
        chord = high + torch.log(torch.exp(low - high) * (1 - share) + share)
    return torch.where((chord > low) & (chord < high), chord, low)


def _log_expm1(value: Tensor) -> Tensor:
    """Return log(e^value - 1) for a positive value."""
    return value + torch.log(-torch.expm1(-value))
