"""Symmetric stable laws in place of the Cauchy law: their density and drift, by quadrature.

The law of index a has the characteristic function ``exp(-|t|^a)``, 0 < a < 2; a = 1 is the Cauchy law, and a = 2 would
be a normal law of variance 2. Like the Cauchy law it is moved by x, the change of the log scale, and y, the change of
the location over the base scale.
"""

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline

from tether.errors import ConfigError

__all__ = ["StableLaw", "stable_density", "stable_law"]

SMALLEST, LARGEST = 0.4, 1.95
"""Indices between which the quadratures were checked."""
TURN_NEAR, TURN_FAR = 0.5, 0.8
NODES, KNOTS, STEP = 1200, 4000, 0.01

Array = npt.NDArray[np.float64]


def stable_density(index: float, u: float | Array) -> Array:
    """Density of the standard symmetric stable law.

    ``1/pi int_0^inf cos(u t) exp(-t^a) dt``, along a ray of the complex plane on which nothing oscillates for long. Far
    out the integral of ``cos(u t)`` itself, which is 0, is taken off, so that nothing cancels.

    Args:
        index: a, from 0.4 to 1.95.
        u: where.

    Returns:
        The density, to about 1e-9 of itself, of the shape of u.

    Raises:
        ConfigError: an index outside this range.

    Example:
        >>> float(stable_density(1.0, 0.0).round(9))  # 1 / pi
        0.318309886
    """  # noqa: DOC502 - raised by _check
    _check(index)
    at = np.abs(np.atleast_1d(np.asarray(u, float)))
    found = np.empty_like(at)
    least = min(1.0, index)
    # The integrand falls like e^v at one end, or e^((1 + a) v), and like exp(-e^(a v)) at the other.
    log_t = np.linspace(-60.0 if index >= 1 else -90.0 / least, 12 / least, NODES)
    t, step = np.exp(log_t), log_t[1] - log_t[0]
    for far in (False, True):
        rows = (at >= 1) == far
        turn = (TURN_FAR if far else TURN_NEAR) * min(np.pi / 2, np.pi / (2 * index))
        ray, decay = np.exp(1j * turn), -(t**index) * np.exp(1j * index * turn)
        here = at[rows][:, None]
        wave = 1j * here * (t * ray)
        integrand = np.exp(wave) * np.expm1(decay) if far else np.exp(wave + decay)
        found[rows] = (integrand * (t * ray)).real.sum(1) * step / np.pi
    return np.asarray(found.reshape(np.shape(u)))


class StableLaw:
    """A symmetric stable law and the drift of its moves.

    Args:
        index: a, from 0.4 to 1.95.

    Raises:
        ConfigError: an index outside this range.
    """

    def __init__(self, index: float) -> None:
        _check(index)
        self.index = index
        # Everything is a function of asinh(u): the tails are straight lines there.
        self._end = min(45.0, 25 / index + 10)
        knots = np.linspace(0, self._end, KNOTS)
        # An even function is flat at 0.
        heights = np.log(stable_density(index, np.sinh(knots)))
        self._spline = CubicSpline(knots, heights, bc_type=("clamped", "not-a-knot"))
        reach = 32 / index + 8
        grid = np.arange(-reach, reach, STEP)
        self._at = np.sinh(grid)
        self._log_density = self._log(self._at)
        self._mass = np.exp(self._log_density) * np.cosh(grid) * STEP

    def drift(self, x: float | Array, y: float | Array) -> Array:
        """KL divergence from the law to a moved one.

        Args:
            x: changes of the log scale, at most about 5 in size.
            y: changes of the location over the base scale, at most about 30, broadcastable.

        Returns:
            Nats, to about 1e-7.
        """
        wide, far = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
        found = [
            float(self._mass @ (self._log_density - self._log((self._at - b) * math.exp(-a)) + a))
            for a, b in zip(wide.ravel(), far.ravel(), strict=True)
        ]
        return np.array(found).reshape(wide.shape)

    def information(self) -> tuple[float, float]:
        """Fisher information about the log scale and about the location.

        Returns:
            The mean squares of the two scores; 1/2 each for the Cauchy law.
        """
        place = np.arcsinh(np.abs(self._at))
        slope = self._spline(np.minimum(place, self._end), 1)
        slope = np.where(place <= self._end, slope, -(1 + self.index)) / np.cosh(place)
        score = np.abs(self._at) * slope
        return float(self._mass @ (1 + score) ** 2), float(self._mass @ slope**2)

    def _log(self, u: Array) -> Array:
        place = np.arcsinh(np.abs(u))
        inside = self._spline(np.minimum(place, self._end))
        return np.asarray(inside - (1 + self.index) * np.maximum(place - self._end, 0))


@cache
def stable_law(index: float) -> StableLaw:
    """Return a law, whose tables are made once.

    Args:
        index: a, from 0.4 to 1.95.

    Returns:
        The law.

    Raises:
        ConfigError: an index outside this range.
    """  # noqa: DOC502 - raised by StableLaw
    return StableLaw(index)


def _check(index: float) -> None:
    if not SMALLEST <= index <= LARGEST:
        raise ConfigError(f"index={index}: expected a number from {SMALLEST} to {LARGEST}")
