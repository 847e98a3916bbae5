"""Proven upper bounds on the drift of fused deltas, from the drift of each delta alone.

A delta moves a Cauchy law by ``p = (x, y)``, the change of the log scale and the change of the location over
the base scale; ``D(p)`` is its drift (``tether.cauchy.divergence.drift``), in d dimensions the sum over them.
The bounds hold for every context by itself and for deltas about which nothing but their drift is known.

All results are float64 whatever the input, and rounded outwards by a factor ``1 + 2^-40``, far more than the
rounding of these formulas; the drifts given are taken as exact. They are figures for a certificate, not
functions to differentiate.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from tether.cauchy.charts import CHARTS
from tether.cauchy.divergence import distance_of_drift
from tether.errors import ConfigError, ShapeError

__all__ = ["K_INF", "fused_drift_bound", "scaling_bound", "scaling_bound_total"]

# Constant of Theorem 1 (linear chart, any number of deltas): the proven upper end of its enclosure. The sharp
# constant, 1.338533402074..., is approached by many equal deltas that add up to (-0.97413, 1.04441).
K_INF = 1.338534

OUTWARD = 1 + 2**-40
BISECTIONS = 32
# The table of scaling bounds: its first drift (nats), and points an octave.
GRID_START = 2.0**-34
DRIFTS_PER_OCTAVE, COARSE_DRIFTS_PER_OCTAVE = 32, 8
WEIGHTS_PER_OCTAVE, SMALLEST_WEIGHT = 64, 2.0**-10
DISTINCT_WEIGHTS, MANY_WEIGHTS = 256, 2**16


def scaling_bound(
    drift: Float[Tensor, "*#batch"], weight: Float[Tensor, "*#batch"] | float
) -> Float64[Tensor, "*batch"]:
    """Largest drift that ``weight * (x, y)`` can have in one dimension when ``(x, y)`` has at most ``drift``.

    ``B(e, a) = sup {D(a p) : D(p) <= e} = log(1 + max_z h(z))``, with ``rho`` the distance that belongs to
    ``e``, ``0 <= z <= rho``, ``m = exp(e) - 1`` and
    ``h(z) = sinh(a z/2)^2 + a^2 exp(|1-a| z) (m - sinh(z/2)^2)``. ``h'`` has one zero there and is positive
    before it: it is bisected, and the last bracket gives a guaranteed upper bound, the three factors being
    monotone. ``B`` can exceed ``a^2 e``, and for ``0 < a < 1`` even ``e``: a weight is no safe rein here.

    Args:
        drift: drift of the delta in one dimension, nats, non-negative.
        weight: its weight, any finite real number.

    Returns:
        Bound in nats, of the broadcast shape, float64: at most 1e-6 of the supremum above it.

    Raises:
        ConfigError: a drift is negative or nan, or a weight is not finite.

    Reference:
        Theory notes, "Weights in the linear chart": exact B(eps, alpha), proven. Assumption: one dimension.

    Example:
        >>> import torch
        >>> scaling_bound(torch.tensor(1.0), -1.0)  # negating a delta can triple its drift
        tensor(3.2740, dtype=torch.float64)
    """
    nats, weights = drift.double(), torch.as_tensor(weight, dtype=torch.float64, device=drift.device)
    if problem := _problem(nats, weights):
        raise ConfigError(problem)
    bound = _softplus(_log_peak(nats, weights)) * OUTWARD
    return torch.where((nats == 0) | (weights == 0), 0, torch.where(nats.isinf(), math.inf, bound))


def scaling_bound_total(
    drift: Float[Tensor, "*#batch"], weight: Float[Tensor, "*#batch"] | float
) -> Float64[Tensor, "*batch"]:
    """Largest drift, summed over dimensions, that a scaled delta can have, from its summed drift.

    ``e sup_{t <= e} B(t) / t`` with the ``B`` of ``scaling_bound``: however ``e`` is spread over the
    dimensions, each contributes at most that ratio times its share.

    ``B`` is tabled at drifts 2 % apart, once for each distinct weight. Between them the bound stays
    guaranteed: ``exp(B) - 1`` is, as a function of ``exp(e) - 1``, a supremum of affine functions, so convex
    and 0 at 0, and lies below its chords. The logarithm of a chord is convex or concave in ``e``, so the
    supremum of its ratio to ``e`` over an interval is at an end, or below that of the tangent at the left
    end. For ``0 < a < 1``, ``B <= (2 - a) e`` in addition: the scaling lemma with
    ``exp(rho/2) <= 2 cosh(rho/2)`` and ``a^2 4^(1-a) <= 1``.

    More than 256 distinct weights, as of gates (or more than 65536 in all), are rounded away from 0, by 1.1 %
    at most, and charged for it: for ``|a| <= |b|`` of one sign on one side of 1, term by term in ``h``,
    ``exp(B(e, a)) - 1 <= (a/b)^2 exp((b - a) rho) (exp(B(e, b)) - 1)``, the middle factor being needed for
    ``0 < a < 1`` only. Weights 0 and 1 stay exact.

    Args:
        drift: drift of the delta alone, summed over any number of dimensions, nats, non-negative.
        weight: its weight, any finite real number.

    Returns:
        Bound in nats, of the broadcast shape, float64: at most 1 % of the supremum above it for
        drifts up to 10 nats, 2.5 % beyond; 12 % where weights are rounded.

    Raises:
        ConfigError: a drift is negative or nan, or a weight is not finite.

    Reference:
        Theory notes, "Weights in the linear chart", d dimensions (proven). Assumptions: linear chart, any d.

    Example:
        >>> import torch
        >>> scaling_bound_total(torch.tensor(0.1), torch.tensor([0.5, 1.0, 2.0]))
        tensor([0.0294, 0.1000, 0.4431], dtype=torch.float64)
    """
    nats, weights = drift.double(), torch.as_tensor(weight, dtype=torch.float64, device=drift.device)
    if problem := _problem(nats, weights):
        raise ConfigError(problem)
    levels, row, rounded = _table_rows(weights)
    per_octave = COARSE_DRIFTS_PER_OCTAVE if rounded else DRIFTS_PER_OCTAVE
    table = _table(levels, nats, per_octave)

    cell = torch.floor(torch.log2(nats / GRID_START) * per_octave).clamp(0, len(table.grid) - 1).long()
    entry = row * len(table.grid) + cell
    start = table.grid[cell]
    step = (nats - start).clamp(0, 700)
    share = (torch.expm1(step) / table.widest[cell]).clamp(max=1)
    chord = _softplus(table.log_peak.take(entry) + torch.log1p(share * table.growth.take(entry)))
    tangent = table.bound.take(entry) + table.slope.take(entry) * step
    # B itself is monotone: where a cell is too wide for the tangent, that is the better bound.
    inside = torch.maximum(chord, torch.minimum(tangent, chord * (nats / start)))
    bound = torch.maximum(nats * table.ratio.take(entry), torch.where(nats < GRID_START, 0, inside))

    between = (weights > 0) & (weights < 1)
    if rounded:
        excess = 2 * torch.log(weights.abs() / levels[row].abs())
        excess = excess + torch.where(between, (levels[row] - weights) * distance_of_drift(nats), 0)
        bound = bound * torch.exp(excess.clamp(min=0))
    bound = torch.where(between, torch.minimum(bound, (2 - weights) * nats), bound)
    bound = torch.where(weights == 1, nats, bound) * OUTWARD
    return torch.where((nats == 0) | (weights == 0), 0, torch.where(nats.isinf(), math.inf, bound))


def fused_drift_bound(
    drifts: Float[Tensor, "..."], weights: Num[Tensor, "..."], chart: str
) -> Float64[Tensor, "..."]:
    """Upper bound on the drift of fused deltas, from the drift of each delta alone.

    With ``D_k`` the drifts and ``a_k`` the weights:

    - ``symmetric``, Theorem 3 with its scaling rule: ``(sum c_k)^2``, ``c_k = |a_k| sqrt(D_k)`` for
      ``|a_k| >= 1`` and ``sqrt(log(1 + a_k^2 (exp(D_k) - 1)))`` below.
    - ``geodesic``, Fisher-Rao fusion: the smaller of ``(sum max(|a_k|, sqrt|a_k|) sqrt(D_k))^2`` and
      ``max(1, sum |a_k|) sum |a_k| D_k`` (drift is a convex function of the distance, which adds up, and
      grows at most with the square of a factor above 1).
    - ``rootkl``, root-KL normal coordinates: ``(sum |a_k| sqrt(D_k))^2``, attained by parallel deltas.
    - ``linear``, Theorem 1' on what scaling leaves: ``K_INF (sum t_k)^2``, ``t_k = a_k sqrt(D_k)`` for
      ``a_k >= 1`` and otherwise the root of ``scaling_bound_total``. Where at most one delta has a non-zero
      weight and drift, its ``scaling_bound_total`` without ``K_INF`` (its drift itself at weight 1).

    Args:
        drifts: drift of each delta alone, summed over dimensions, nats, non-negative, shape (N, ...).
        weights: any finite real numbers, shape (N,), or (N, ...) for one a context.
        chart: the chart in which the deltas are fused, one of ``tether.cauchy.charts.CHARTS``.

    Returns:
        Bound on the fused delta's drift, summed over dimensions, nats, shape (...), float64.

    Raises:
        ConfigError: the chart is unknown, a drift is negative or nan, or a weight is not finite.
        ShapeError: ``weights`` has neither of its two shapes.

    Reference:
        Theory notes, "Three repaired fusions" 4a (Theorem 3), 4b, 4c: proven; "Weights in the linear chart":
        Theorem 1' (Theorem 1 at weights 1) proven by a computation, scaling bound proven. Assumptions: all
        deltas move the same base law and are fused in the named chart, by dimension; any d, N, signs.

    Example:
        >>> import torch
        >>> two, unit = torch.tensor([0.1, 0.1]), torch.tensor([1.0, 1.0])
        >>> fused_drift_bound(two, unit, "symmetric"), fused_drift_bound(two, unit, "linear")
        (tensor(0.4000, dtype=torch.float64), tensor(0.5354, dtype=torch.float64))
    """
    if chart not in CHARTS:
        raise ConfigError(f"unknown chart {chart!r}: choose one of {', '.join(CHARTS)}")
    if weights.ndim == 0 or weights.shape not in {drifts.shape[:1], drifts.shape}:
        raise ShapeError(
            f"weights has shape {tuple(weights.shape)}, but drifts {tuple(drifts.shape)}: give"
            f" {tuple(drifts.shape[:1])}, one weight a delta, or {tuple(drifts.shape)}, also one a context"
        )
    nats, signed = drifts.double(), weights.double()
    if problem := _problem(nats, signed):
        raise ConfigError(problem)
    signed = signed.reshape(*signed.shape, *[1] * (nats.ndim - signed.ndim))
    size = signed.abs()
    root = torch.where(size == 0, 0, size * nats.sqrt())  # 0 * inf: a delta of weight 0 adds nothing
    if chart == "rootkl":
        return root.sum(0).square() * OUTWARD
    if chart == "symmetric":
        shrunk = torch.where(size == 0, 0, _softplus(2 * torch.log(size) + _log_expm1(nats)))
        return torch.where(size < 1, shrunk.sqrt(), root).sum(0).square() * OUTWARD
    if chart == "geodesic":
        share = torch.where(size == 0, 0, size * nats)
        triangle = torch.where(size < 1, share.sqrt(), root).sum(0).square()
        return torch.minimum(triangle, share.sum(0) * size.sum(0).clamp(min=1)) * OUTWARD
    scaled = scaling_bound_total(nats, signed)
    total = torch.where(signed >= 1, root, scaled.sqrt()).sum(0)
    several = ((size != 0) & (nats != 0)).sum(0) > 1
    return torch.where(several, K_INF * total.square() * OUTWARD, scaled.sum(0))


class _Table(NamedTuple):
    """Scaling bounds on a grid of drifts, in nats, a row a weight; entry i is about the cell right of i."""

    grid: Tensor  # (G,)
    widest: Tensor  # (G,) exp(width of the cell) - 1
    log_peak: Tensor  # (W, G) log of exp(B) - 1
    growth: Tensor  # (W, G) its relative growth to the next
    bound: Tensor  # (W, G) B
    slope: Tensor  # (W, G) derivative of the bound on B
    ratio: Tensor  # (W, G) sup of B(t) / t for t up to here


def _table(levels: Tensor, nats: Tensor, per_octave: int) -> _Table:
    """Return the table for the given weights that covers the finite drifts."""
    finite = nats[nats.isfinite()]
    largest = max(finite.max().item(), GRID_START) if len(finite) else GRID_START
    count = math.ceil(math.log2(largest / GRID_START) * per_octave) + 2
    grid = GRID_START * 2 ** (torch.arange(count + 1, dtype=torch.float64, device=nats.device) / per_octave)
    log_peak = _log_peak(grid, levels[:, None])
    low, high = log_peak[:, :-1], log_peak[:, 1:]
    left, right = _softplus(low), _softplus(high)
    start, end, width = grid[:-1], grid[1:], grid.diff()
    widest, growth = torch.expm1(width.clamp(max=700)), torch.expm1((high - low).clamp(max=700))
    slope = torch.sigmoid(low) * growth / widest
    inside = torch.maximum(right, torch.minimum(left + slope * width, right * (end / start))) / end
    ratio = torch.cat([torch.exp(low[:, :1]) / start[0], inside], dim=1).cummax(dim=1).values
    # Cells too steep for a chord: B at their right end bounds it everywhere in them.
    steep = (high - low > 700) | (width > 700)
    return _Table(
        grid=start,
        widest=widest,
        log_peak=torch.where(steep, high, low),
        growth=torch.where(steep, 0, growth),
        bound=torch.where(steep, right, left),
        slope=torch.where(steep, right / start, slope),
        ratio=ratio[:, :-1],
    )


def _table_rows(weights: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return the weights to table, the row of each weight among them, and whether weights were rounded."""
    if weights.numel() <= MANY_WEIGHTS:
        levels, row = torch.unique(weights, return_inverse=True)
        if len(levels) <= DISTINCT_WEIGHTS:
            return levels, row, False
    power = torch.ceil(torch.log2(weights.abs().clamp(min=SMALLEST_WEIGHT)) * WEIGHTS_PER_OCTAVE)
    first, last = int(power.min()), int(power.max())
    powers = torch.arange(first, last + 1, dtype=torch.float64, device=weights.device)
    lattice = 2 ** (powers / WEIGHTS_PER_OCTAVE)
    row = (power - first).long() + len(lattice) * (weights < 0)
    return torch.cat([lattice, -lattice]) if (weights < 0).any() else lattice, row, True


def _log_peak(nats: Tensor, weights: Tensor) -> Tensor:
    """Return a guaranteed upper bound on the log of ``max h``; see ``scaling_bound``."""
    size, tilt = weights.abs(), (1 - weights).abs()
    rho = distance_of_drift(nats)
    near, far = torch.zeros_like(rho + size), rho + torch.zeros_like(size)
    for _ in range(BISECTIONS):
        z = (near + far) / 2
        # The sign of h', divided by what is positive and by e^rho so that nothing overflows.
        climb = torch.exp((size - tilt) * z - rho) * -torch.expm1(-2 * size * z) / (2 * size)
        climb = climb + tilt * torch.expm1(-rho - z) * torch.expm1(z - rho) / 2
        rising = climb + torch.exp(z - rho) * torch.expm1(-2 * z) / 2 > 0
        near, far = torch.where(rising, z, near), torch.where(rising, far, z)
    # One more bracket on either side covers signs that rounding got wrong near the zero.
    slack = rho * 2.0**-BISECTIONS
    near, far = (near - slack).clamp(min=0), torch.minimum(far + slack, rho)
    spread = size * far + 2 * torch.log(-torch.expm1(-size * far)) - 2 * math.log(2)
    room = rho + torch.log(-torch.expm1(-rho - near)) + torch.log(-torch.expm1(near - rho)) - 2 * math.log(2)
    peak = torch.logaddexp(spread, 2 * torch.log(size) + tilt * far + room)
    lemma = 2 * torch.log(size) + tilt * rho + _log_expm1(nats)  # scaling lemma: sharp for a small tilt
    return torch.where(tilt * rho < 1e-6, lemma, torch.minimum(peak, lemma))


def _log_expm1(value: Tensor) -> Tensor:
    """Return ``log(e^value - 1)`` for a non-negative value."""
    return value + torch.log(-torch.expm1(-value))


def _softplus(value: Tensor) -> Tensor:
    """Return ``log(1 + e^value)`` to relative accuracy, for any value."""
    return value.clamp(min=0) + torch.log1p(torch.exp(-value.abs()))


def _problem(nats: Tensor, weights: Tensor) -> str | None:
    """Return what is wrong with drifts or weights, if anything."""
    if not (nats >= 0).all():  # false for nan as well
        return "drifts must be non-negative numbers (nats), but some are negative or nan"
    if not torch.isfinite(weights).all():
        return "weights must be finite numbers, but some are infinite or nan"
    return None
