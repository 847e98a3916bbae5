"""Which of the Cauchy law's statements other laws keep: the worst equal deltas of each law, by numerical search."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from tether.theory.multivariate import drift_of_law
from tether.theory.stable import stable_law

__all__ = ["INDICES", "SIZES", "LawFigures", "examine", "law_figures"]

SIZES = (1, 2, 3, 10)
"""n of the Cauchy laws of R^n that are looked at."""
INDICES = (0.5, 0.8, 1.2, 1.5, 1.8)
"""a of the symmetric stable laws that are looked at; 1 is the first Cauchy law."""

Array = npt.NDArray[np.float64]
Drift: TypeAlias = Callable[[float | Array, float | Array], Array]
STARTS = ((-0.35, 0.35), (-0.9, 1.0), (0.3, 0.3), (-0.2, 0.05), (0.6, 0.05))
LINE = np.concatenate([-np.geomspace(4, 0.05, 24), np.geomspace(0.05, 4, 24)])


class LawFigures(NamedTuple):
    """What a search found for one law; ratios of at most 1 are what the Cauchy law has where charts have constant 1."""

    name: str
    of_scale: float
    """Fisher information about the log scale."""
    of_location: float
    """Fisher information about the location, in one direction."""
    turned: float
    """``D(1, 0) / D(-1, 0)``: 1 where the drift is the same in both directions."""
    shifts: float
    """Largest ``D(2p) / (4 D(p))`` where locations alone move."""
    scales: float
    """The same where scales alone move."""
    symmetric: float
    """The same in the coordinates of chart ``symmetric``."""
    linear: float
    """The same in chart ``linear``: for the Cauchy law ``C_2``."""
    many: float
    """Largest ``D(p)`` over its quadratic form: for the Cauchy law ``K_inf``."""


def law_figures() -> Iterator[LawFigures]:
    """Examine the Cauchy laws of ``SIZES`` and the stable laws of ``INDICES``.

    Yields:
        The figures of one law after the other; about 10 CPU seconds in all.
    """
    for size in SIZES:
        # Score of the scale from Beta(n/2, 1/2), of the location in one direction: see the page of proofs.
        information = (2 * size / (size + 3), (size + 1) / (size + 3))
        yield examine(f"Cauchy, R^{size}", partial(drift_of_law, size), information)
    for index in INDICES:
        law = stable_law(index)
        yield examine(f"stable, a = {index:g}", law.drift, law.information())


def examine(name: str, drift: Drift, information: tuple[float, float]) -> LawFigures:
    """Search for the worst equal deltas of a law.

    Args:
        name: of the law.
        drift: of its moves (x, y).
        information: Fisher information about log scale and location.

    Returns:
        The figures; a ratio is the largest found, from below.
    """
    of_scale, of_location = information

    def doubled(x: float, y: float) -> float:
        return float(drift(2 * x, 2 * y) / (4 * drift(x, y)))

    def doubled_evenly(x: float, w: float) -> float:
        return float(drift(2 * x, 2 * w * np.exp(x)) / (4 * drift(x, w * np.exp(x / 2))))

    def over_form(x: float, y: float) -> float:
        return float(2 * drift(x, y) / (of_scale * x**2 + of_location * y**2))

    return LawFigures(
        name=name,
        of_scale=of_scale,
        of_location=of_location,
        turned=float(drift(1.0, 0.0) / drift(-1.0, 0.0)),
        shifts=max(doubled(0.0, float(v)) for v in LINE),
        scales=max(doubled(float(v), 0.0) for v in LINE),
        symmetric=_largest(doubled_evenly),
        linear=_largest(doubled),
        many=_largest(over_form),
    )


def _largest(ratio: Callable[[float, float], float]) -> float:
    def negative(p: Array) -> float:
        # Nearer to 0 than this a quadrature cannot tell the ratio from 1; farther out it is below.
        inside = np.hypot(*p) >= 0.05 and abs(p[0]) <= 2.5 and abs(p[1]) <= 10
        return -ratio(float(p[0]), float(p[1])) if inside else 0.0

    found = [
        minimize(
            negative,
            np.array(start),
            method="Nelder-Mead",
            options={"maxiter": 120, "xatol": 1e-4, "fatol": 1e-8},
        )
        for start in STARTS
    ]
    return max(-float(one.fun) for one in found)
