"""How deltas are added: four coordinate systems on the moves of a Cauchy law, and the fusion in each.

A delta is ``(x, y)``: the change of the log scale, and the change of the location over the base scale. A
chart maps it to two coordinates, fusion adds the weighted coordinates, and the way back gives the fused
``(x, y)``. Every chart returns a single delta of weight 1 and knows 0 as the base.

==========  =========================================  ===================================================
chart       coordinates                                drift of the fused delta, unit weights
==========  =========================================  ===================================================
linear      (x, y)                                     at most K_inf (sum sqrt(D_k))^2
symmetric   (x, w), w = y e^{-x/2}                     at most (sum sqrt(D_k))^2; shrinks with the weights
geodesic    direction of the geodesic, length rho      at most (sum sqrt(D_k))^2
rootkl      the same direction, length sqrt(D)         equal to a^T M a, M the Gram matrix of the deltas
==========  =========================================  ===================================================

A delta may also be two matrices that are added to those of the base itself (``matrix``, see ``read_move``). In each
context it is a move like any other, and its moves are added in ``linear``: only there are N deltas one matrix again.

Range. Inputs of magnitude 1e-12 to 1e4 are handled without overflow or nan wherever the result is itself
representable; ``drift`` is right for all of them. Beyond the reach of float32 (float64) lie

- ``w = y e^{-x/2}`` of the symmetric chart for ``x < 2 log|y| - 177`` (-1419), where it is inf, and for
  ``x > 2 log|y| + 174`` (1416), where it fades into 0;
- the second component of the direction in the geodesic and rootkl charts, about ``2 y e^{-2x}``, for
  ``x > 44 + log|y|/2`` (354), where it fades into 0.

Where a coordinate has faded, the way back gives ``y = 0`` and, for ``|y|`` up to 1e4, the same drift to
rounding. ``fuse`` in the symmetric chart does not form ``w`` and has neither limit.
"""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor

from tether.cauchy.divergence import distance, distance_of_drift, drift
from tether.errors import ConfigError, ShapeError

__all__ = ["CHARTS", "NATIVE", "added_in", "from_chart", "fuse", "read_move", "to_chart"]

CHARTS = ("linear", "symmetric", "geodesic", "rootkl")
"""Coordinates in which deltas can be added."""
NATIVE = (*CHARTS, "matrix")
"""What the two heads of a delta can give: coordinates of a chart, or changes of the base's two heads themselves."""


def to_chart(
    x: Float[Tensor, "*batch"], y: Float[Tensor, "*batch"], chart: str
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Coordinates of a delta in a chart.

    - ``linear``: ``(x, y)``. A delta that is linear in the hidden state in these coordinates is a change of the base's
      two matrices where the base's scale is the same in every context, and nowhere else: see ``read_move``.
    - ``symmetric``: ``(x, y e^{-x/2})``: the second is the change of location in units of the geometric mean
      of old and new scale.
    - ``geodesic``: ``rho * n``, the logarithm map of the half-plane at the base. With
      ``rho = distance(x, y)`` the direction is ``n = (y^2 + e^{2x} - 1, 2y) / (2 e^x sinh(rho))``.
    - ``rootkl``: ``sqrt(drift(x, y)) * n``.

    Args:
        x: change of the log scale, any finite real number.
        y: change of the location over the scale of the base, any finite real number, of the same shape.
        chart: one of ``CHARTS``.

    Returns:
        First coordinate (towards a larger scale) and second coordinate (towards a larger location),
        dimensionless, of the shape of ``x``. ``linear`` is exact; the second coordinate of ``symmetric`` is
        within 2 ulp; both of ``geodesic`` and ``rootkl`` are within 4 ulp of their length, for inputs from
        1e-12 to 1e4 (measured in float32 and float64). Differentiable, also at 0.

    Raises:
        ConfigError: the chart is unknown.

    Reference:
        Nielsen 2020 (arXiv:2006.07020), section 2, for the half-plane of Cauchy laws; the symmetric and the
        rootkl chart are this project's ("Three repaired fusions" in the theory notes).

    Example:
        >>> import torch
        >>> to_chart(torch.tensor(0.0), torch.tensor(1.0), "geodesic")
        (tensor(0.4304), tensor(0.8608))
    """
    if chart not in CHARTS:
        raise ConfigError(_unknown(chart))
    if chart == "linear":
        return x, y
    if chart == "symmetric":
        return x, _times_exp(y, -x / 2)
    # At the origin the direction is undefined but the coordinates are not: they are (x, y) times the ratio
    # of length to distance. Elsewhere the substitute never reaches the result or its gradient.
    at_base = (x == 0) & (y == 0)
    x_away = torch.where(at_base, 1, x)
    length, at_origin = _length(x_away, y, chart)
    rise, run = _direction(x_away, y)
    first = torch.where(at_base, at_origin * x, length * rise)
    return first, torch.where(at_base, at_origin * y, length * run)


def from_chart(
    first: Float[Tensor, "*batch"], second: Float[Tensor, "*batch"], chart: str
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Delta that has the given coordinates in a chart: the inverse of ``to_chart``.

    Args:
        first: coordinate towards a larger scale, any finite real number.
        second: coordinate towards a larger location, any finite real number, of the same shape.
        chart: one of ``CHARTS``.

    Returns:
        ``(x, y)`` of the shape of ``first``: change of the log scale, change of the location over the base
        scale. ``linear`` is exact; ``y`` in ``symmetric`` is within 2 ulp. In ``geodesic`` and ``rootkl``,
        with ``rho`` the distance moved, ``x`` is within 8 ulp of ``rho`` and ``y`` within ``8 (1 + rho)``
        ulp of itself, because ``y`` grows like ``e^rho``; a ``y`` beyond the floating point range
        (``rho > 89`` in float32, 710 in float64) is inf. Differentiable, also at 0, as far as the derivatives
        are representable; in ``geodesic`` and ``rootkl`` they reach ``e^{2 rho}``, so ``rho < 44`` (354).

    Raises:
        ConfigError: the chart is unknown.

    Reference:
        Inverse of ``to_chart``: ``e^{-x} = cosh(rho) - n_x sinh(rho)``, ``y = n_y sinh(rho) e^x``.

    Example:
        >>> import torch
        >>> from_chart(torch.tensor(-2.0), torch.tensor(0.0), "rootkl")  # drift 4
        (tensor(-5.3771), tensor(0.))
    """
    if chart not in CHARTS:
        raise ConfigError(_unknown(chart))
    if chart == "linear":
        return first, second
    if chart == "symmetric":
        return first, _times_exp(second, first / 2)
    at_base = (first == 0) & (second == 0)
    first_away = torch.where(at_base, 1, first)
    length = torch.hypot(first_away, second)
    if chart == "geodesic":
        rho, at_origin = length, 1
    else:
        tiny = length < 1e-9  # where rho = 2 length to rounding, and length^2 leaves the float32 range
        rho = torch.where(tiny, 2 * length, distance_of_drift(torch.where(tiny, 1, length) ** 2))
        at_origin = 2
    x, y = _walk(first_away / length, second / length, rho)
    return torch.where(at_base, at_origin * first, x), torch.where(at_base, at_origin * second, y)


def added_in(chart: str) -> str:
    """Name the chart in which moves are added.

    Args:
        chart: one of ``NATIVE``.

    Returns:
        The chart, and ``linear`` for ``matrix``: matrices add up exactly where their moves do.
    """
    return "linear" if chart == "matrix" else chart


def read_move(
    first: Float[Tensor, "*batch"],
    second: Float[Tensor, "*batch"],
    native: str,
    log_scale: Float[Tensor, "*#batch"] | None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Turn what the heads of a delta give in a context into its move.

    In ``matrix`` the heads are matrices that are added to the base's own: to that of the log scale and to that of the
    location, so the second is in units of the location, whatever the scale. Added in chart ``linear`` such deltas are
    one model whose two matrices are ``W_base + sum_k weight_k delta_k``, with any base. The scale stays positive
    whatever is added, because it is the exponential of what its matrix gives.

    A delta of ``linear`` is that too where the base's scale is the same in every context, with its second matrix times
    that scale; where the scale depends on the context no matrix is.

    Args:
        first: what the first head gives.
        second: what the second head gives.
        native: one of ``NATIVE``.
        log_scale: base log scale of U in that context; only read in ``matrix``.

    Returns:
        ``x`` and ``y``: change of the log scale, and of the location over the scale of the base.

    Raises:
        ConfigError: unknown chart, or no scale where it is read.

    Reference:
        The source's dialogue on domain knowledge, "the secret weapon": ``W_fused = W_base + sum_j alpha_j delta_j``.

    Example:
        >>> import torch
        >>> first, second, log_scale = torch.tensor(0.1), torch.tensor(3.0), torch.tensor(0.5).log()
        >>> read_move(first, second, "matrix", log_scale)  # location + 3, six times a scale of one half
        (tensor(0.1000), tensor(6.))
    """
    if native != "matrix":
        return from_chart(first, second, native)
    if log_scale is None:
        raise ConfigError(
            "chart 'matrix' without the base's scale: expected the log scale of U in each context"
        )
    return first, second * torch.exp(-log_scale)


def fuse(
    x: Float[Tensor, "..."],
    y: Float[Tensor, "..."],
    weights: Num[Tensor, "..."],
    chart: str = "symmetric",
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Weighted sum of N deltas in a chart.

    ``from_chart(sum_k weights_k * to_chart(x_k, y_k))``. The symmetric chart is evaluated as
    ``X = sum a_k x_k``, ``Y = sum a_k y_k e^{(X - x_k)/2}``, which is the same and has a delta of weight 1
    alone come back bit for bit.

    Args:
        x: changes of the log scale, shape (N, ..., d).
        y: changes of the location over the scale of the base, shape (N, ..., d).
        weights: any finite real numbers, of shape (N,), or of shape (N, ...), that of ``x`` without its last
            axis, for weights that differ from context to context (a gate). Taken in the type of ``x``.
        chart: one of ``CHARTS``.

    Returns:
        Fused ``(x, y)``, shape (..., d). A delta of weight 1 beside deltas of weight 0 comes back exactly in
        ``linear`` and ``symmetric``; in ``geodesic`` and ``rootkl``, with ``rho`` its distance, ``x`` within
        8 ulp of ``rho`` and ``y`` within ``8 (1 + rho)`` ulp of itself. Differentiable in the deltas and in
        the weights, also where deltas are 0.

    Raises:
        ConfigError: the chart is unknown, or a weight is not finite.
        ShapeError: ``x`` and ``y`` differ in shape or have fewer than two axes, or ``weights`` has neither
            of its two shapes.

    Reference:
        Theory notes, "Three repaired fusions": Theorem 3 (symmetric), Fisher-Rao (geodesic), root-KL normal
        coordinates (rootkl); Theorem 1 for what the linear chart costs.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[-0.5], [-0.5]]), torch.tensor([[1.0], [1.0]])
        >>> fuse(x, y, torch.tensor([1.0, 1.0]))
        (tensor([-1.]), tensor([1.5576]))
    """
    if chart not in CHARTS:
        raise ConfigError(_unknown(chart))
    if x.shape != y.shape or x.ndim < 2:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: both must be (N, ..., d), N deltas of"
            " dimension d"
        )
    if weights.shape not in {x.shape[:1], x.shape[:-1]}:
        raise ShapeError(
            f"weights has shape {tuple(weights.shape)}, but x {tuple(x.shape)}: give {tuple(x.shape[:1])},"
            f" one weight a delta, or {tuple(x.shape[:-1])}, one a delta and context"
        )
    if not torch.isfinite(weights).all():
        bad = int((~torch.isfinite(weights)).sum())
        raise ConfigError(f"weights must be finite numbers, but {bad} of {weights.numel()} are not")
    trailing = x.ndim - weights.ndim
    weights = weights.to(x.dtype).reshape(*weights.shape, *[1] * trailing)
    lost = ~(torch.isfinite(x) & torch.isfinite(y)) & (weights == 0)
    if bool(lost.any()):
        # A delta of weight 0 adds nothing, even where it is too large for its dtype.
        x, y = x.masked_fill(lost, 0), y.masked_fill(lost, 0)
    if chart == "symmetric":
        fused_x = (weights * x).sum(0)
        return fused_x, _times_exp(weights * y, (fused_x - x) / 2).sum(0)
    first, second = to_chart(x, y, chart)
    return from_chart((weights * first).sum(0), (weights * second).sum(0), chart)


def _unknown(chart: str) -> str:
    """Return what to say about the name of a chart that does not exist."""
    return f"unknown chart {chart!r}: choose one of {', '.join(CHARTS)}"


def _times_exp(value: Tensor, exponent: Tensor) -> Tensor:
    """Return ``value * e^exponent``, finite whenever the product is, although ``e^exponent`` may not be."""
    # The second factor is 1 unless the first is at the end of the range, so it costs no accuracy. Cutting it
    # as well keeps 0 * inf from becoming nan.
    top = math.floor(math.log(torch.finfo(value.dtype).max))
    head = exponent.clamp(1 - top, top)
    return value * torch.exp(head) * torch.exp((exponent - head).clamp(max=top))


def _length(x: Tensor, y: Tensor, chart: str) -> tuple[Tensor, float]:
    """Return the length of the coordinate vector, and its ratio to the distance of (x, y) -> 0."""
    rho = distance(x, y)
    if chart == "geodesic":
        return rho, 1.0
    tiny = rho < 1e-8  # where sqrt(D) = rho / 2 to rounding, and D leaves the float32 range
    return torch.where(tiny, rho / 2, torch.sqrt(torch.where(tiny, 1, drift(x, y)))), 0.5


def _direction(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit vector along ``(y^2 + e^{2x} - 1, 2y)``, formed without squares that overflow."""
    # Dividing both by e^{2x} where x > 0, and then by |q| where that exceeds 1, leaves terms of order |q| at
    # most. The last divisor cancels in the direction, so no gradient has to go through it.
    shrink = torch.exp(-x.clamp(min=0))
    q = y * shrink
    size = q.detach().abs().clamp(min=1)
    growth = torch.where(x > 0, -torch.expm1(-2 * x.clamp(min=0)), torch.expm1(2 * x.clamp(max=0)))
    rise, run = q * (q / size) + growth / size, 2 * (q / size) * shrink
    norm = torch.hypot(rise, run)
    return rise / norm, run / norm


def _walk(rise: Tensor, run: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Return the end (x, y) of the geodesic that leaves the base along a unit vector, after length ``rho``.

    ``e^{-x} = e^{-rho} + (1 - rise) sinh(rho)`` with ``1 - rise = run^2 / (1 + rise)``. Three ranges keep
    every factor in range and every difference free of cancellation: a falling start, a start so steep that
    ``|run| e^rho <= 1`` (or a short way), and a rising start whose geodesic has come down again.
    """
    rising = rise >= 0
    # abs() has derivative 0 at 0, where this needs a one-sided one.
    foot = 1 + torch.where(rising, rise, -rise)
    half = -torch.expm1(-2 * rho) / 2  # e^{-rho} sinh(rho)

    steep = (run.abs() <= torch.exp(-rho)) | (rho <= 1)
    up, over = rising & steep, rising & ~steep

    fall = run * run * half / foot
    x_fall, y_fall = -rho - torch.log1p(-fall), run * half / (1 - fall)

    # Each branch sees harmless arguments where it is not taken: its derivatives there are multiplied by 0.
    rho_up, run_up = torch.where(up, rho, 0), torch.where(up, run, 0)
    grow = torch.exp(rho_up.clamp(max=math.floor(math.log(torch.finfo(rho.dtype).max))))
    climb = (run_up * grow) ** 2 * half / foot
    x_up, y_up = rho_up - torch.log1p(climb), run_up * grow * half / (1 + climb) * grow

    rho_over, run_over = torch.where(over, rho, 1), torch.where(over, run, 1)
    rest = (torch.exp(-rho_over) / run_over) ** 2 + half / foot
    x_over = -rho_over - 2 * torch.log(run_over.abs()) - torch.log(rest)
    y_over = half / rest / run_over

    x = torch.where(up, x_up, torch.where(over, x_over, x_fall))
    return x, torch.where(up, y_up, torch.where(over, y_over, y_fall))
