"""One Cauchy law of R^n in place of n independent ones: its drift, and which statements it keeps.

The law with location l and scale g has the density ``c g / (g^2 + |u - l|^2)^((n+1)/2)``. It is moved by x, the change
of the log scale, and y, the length of the change of location over the base scale. For n = 1 it is the Cauchy law of the
other statements; for n >= 2 its drift depends on which of two laws comes first.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tether.errors import ConfigError

__all__ = [
    "drift_in_space",
    "drift_of_law",
    "shifts",
    "shifts_squared",
    "still",
    "sums_in_space",
    "unscaled",
    "widths_in_space",
]

NODES = 160
Array = npt.NDArray[np.float64]


def drift_of_law(size: int, x: float | Array, y: float | Array) -> Array:
    """KL divergence from the standard Cauchy law of R^n to a moved one, by quadrature.

    ``f(x) + (n+1) int_g^inf (h^2 - g^2)^((n-1)/2) (h+1)^-n (1 - (1 + y^2/(h+1)^2)^(-(n+1)/2)) dh`` with ``g = e^x`` and
    f the divergence where the location stays.

    Args:
        size: n, at least 1.
        x: changes of the log scale, at most about 5 in size.
        y: lengths of the change of location over the base scale, at most about 100, broadcastable.

    Returns:
        Nats, to about 1e-10.

    Raises:
        ConfigError: n is below 1.

    Reference:
        docs/how-drift-adds-up.md, Theorem 11.

    Example:
        >>> float(drift_of_law(1, 0.0, 2.0).round(6))  # log 2, the one-dimensional formula
        0.693147
    """
    if size < 1:
        raise ConfigError(f"n={size}: expected at least one dimension")
    wide, far = (v[..., None] for v in np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float)))
    part, share = _nodes()
    # The scale: E log(1 + (g^2 - 1) A), A from Beta(1/2, n/2); A = sin(angle)^2 leaves a power of the cosine.
    angle = np.pi / 2 * part
    density = np.cos(angle) ** (size - 1)
    spread = np.log1p(np.expm1(2 * wide) * np.sin(angle) ** 2)
    still = -wide[..., 0] + (size + 1) / 2 * (spread * density * share).sum(-1) / (density * share).sum()
    # The location: h = g + v^2, v = t / (1 - t), which takes the root at h = g and the tail away.
    v = part / (1 - part)
    height = np.exp(wide) + v**2
    lost = -np.expm1(-(size + 1) / 2 * np.log1p((far / (height + 1)) ** 2))
    root = (v * np.sqrt(height + np.exp(wide))) ** (size - 1)
    shift = (root * (height + 1) ** -size * lost * 2 * v / (1 - part) ** 2 * share).sum(-1)
    return np.asarray(still + (size + 1) * shift)


@cache
def _nodes() -> tuple[Array, Array]:
    """Return nodes in (0, 1) and their shares."""
    nodes, shares = np.polynomial.legendre.leggauss(NODES)
    return (nodes + 1) / 2, shares / 2


def drift_in_space(x: Float[Tensor, "*batch"], y: Float[Tensor, "*batch"]) -> Float64[Tensor, "*batch"]:
    """KL divergence from the standard Cauchy law of R^3 to a moved one, in closed form.

    ``2 log(((1+g)^2 + y^2) / 4) + (4/y) atan(y / (1+g)) - 2 - x``, ``g = e^x``, evaluated without cancelling.

    Args:
        x: change of the log scale.
        y: length of the change of location over the base scale, of the same shape.

    Returns:
        Nats, float64, of the same shape; differentiable.

    Reference:
        docs/how-drift-adds-up.md, Theorem 11.

    Example:
        >>> import torch
        >>> widened, sharpened = torch.tensor([1.0, -1.0], dtype=torch.float64)
        >>> drift_in_space(widened, 0 * widened), drift_in_space(sharpened, 0 * sharpened)  # not symmetric
        (tensor(0.5562, dtype=torch.float64), tensor(0.4047, dtype=torch.float64))
    """
    wide, far = x.double(), y.double()
    lean = 2 * torch.sigmoid(-wide)  # 2 / (1 + g)
    angle = far * lean / 2
    still = 2 * torch.log1p(torch.sinh(wide / 2).square()) + wide - 2 * torch.tanh(wide / 2)
    return still + 2 * torch.log1p(angle.square()) - 2 * lean * _short(angle)


def _short(angle: Tensor) -> Tensor:
    """Return ``1 - atan(z) / z``, also near 0."""
    small = angle.abs() < 0.2
    near, far = torch.where(small, angle, 0).square(), torch.where(small, 1, angle)
    series = sum((-1) ** k * near ** (k + 1) / (2 * k + 3) for k in range(11))
    return torch.where(small, series, 1 - torch.atan(far) / far)


def _together(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift of the sum of moves and that of each, summed over d laws of R^3 shifted along one axis."""
    return drift_in_space(x.sum(0), y.sum(0)).sum(-1), drift_in_space(x, y).sum(-1)


def sums_in_space(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the source's inequality, N times the sum of drifts."""
    moved, alone = _together(x, y)
    return moved, len(x) * alone.sum(0)


def unscaled(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point with scales that stay."""
    return 0 * x, y, weights


def still(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point with locations that stay."""
    return x, 0 * y, weights


def _triangle(x: Tensor, y: Tensor, holds: Tensor) -> tuple[Tensor, Tensor]:
    moved, alone = _together(x, y)
    return moved, torch.where(holds, alone.sqrt().sum(0).square(), torch.inf)


def widths_in_space(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the triangle inequality of root drifts, claimed where scales alone move."""
    return _triangle(x, y, (y == 0).all(0).all(-1))


def shifts(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of the triangle inequality of root drifts, claimed where locations alone move."""
    return _triangle(x, y, (x == 0).all(0).all(-1))


def shifts_squared(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift of a sum of shifts and a third of its squared length, claimed where locations alone move."""
    moved, _ = _together(x, y)
    return moved, torch.where((x == 0).all(0).all(-1), y.sum(0).square().sum(-1) / 3, torch.inf)
