"""The table of a length study, and a verdict on each claim of the document's theorem."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from tether.merge.weighting import GAMMA

__all__ = ["Claim", "LengthRow", "LengthStudy", "judge"]

QUIET: Final = 0.1
"""Largest noise at which agreement within it says anything."""
RATE_TOLERANCE: Final = 0.25


class LengthRow(NamedTuple):
    """One weighting and component of phi.

    Attributes:
        weighting: one of WEIGHTINGS.
        component: activation, paper_gradient (the document's) or loss.
        change: ``|phi(L) - phi(L_last)| / |phi(L_last)|`` for each len_max but the last.
        size: ``|phi(L_first)| / |phi(L_last)|``.
        noise: relative difference between disjoint halves of the paths at the last len_max.
        rate: median over neurons of the difference between two quarters of the paths, over that between the
            halves: sqrt(2) where the error falls as 1 / sqrt(N_s). A median, since a few neurons of large
            activation make up most of any norm.
    """

    weighting: str
    component: str
    change: tuple[float, ...]
    size: float
    noise: float
    rate: float


class Claim(NamedTuple):
    """A claim of the document's theorem.

    Attributes:
        name: what is claimed.
        verdict: ``holds``, ``violated``, or ``undecided`` where noise or a vacuous bound forbids a verdict.
        figures: the figures it was judged by.
    """

    name: str
    verdict: str
    figures: str


class LengthStudy(NamedTuple):
    """Results of `study_lengths`.

    Attributes:
        lengths: values of len_max, ascending.
        rows: the table.
        claims: verdicts.
        effective: mean effective number of paths of the document's weights at each len_max.
        underflow: share of paths whose weight is zero in float32, at each len_max.
        paths: K.
        samples: number of probes.
        neurons: number of neurons.
    """

    lengths: tuple[int, ...]
    rows: tuple[LengthRow, ...]
    claims: tuple[Claim, ...]
    effective: tuple[float, ...]
    underflow: tuple[float, ...]
    paths: int
    samples: int
    neurons: int

    def row(self, weighting: str, component: str = "activation") -> LengthRow:
        """Find a row.

        Args:
            weighting: one of WEIGHTINGS.
            component: of phi.

        Returns:
            The row.
        """
        return next(row for row in self.rows if (row.weighting, row.component) == (weighting, component))


def judge(study: LengthStudy) -> tuple[Claim, ...]:
    """Judge the claims of the theorem by a study's table.

    Args:
        study: the table; its own claims are not read.

    Returns:
        A verdict a claim, for the document's sums and for position weights.

    Reference:
        LAPE, theorem and proof, steps 1 to 4.
    """
    paper, ours, mean = (study.row(form) for form in ("paper", "position", "mean"))
    first, last = study.lengths[0], study.lengths[-1]
    claims = []
    for name, row in (("document's sums", paper), ("position weights", ours)):
        still = all(change <= row.noise for change in row.change)
        shown = f"changes {_shown(row.change)}, noise {row.noise:.3f}, |phi({first})| / |phi({last})| {row.size:.2f}"
        claims.append(Claim(f"{name}: phi[0] does not depend on len_max", _verdict(still, row), shown))
    for name, form, row in (("document's sums", "paper", paper), ("position weights", "position", ours)):
        gamma = GAMMA[form]
        allowed = [row.change[0] * gamma ** (length - first) + row.noise for length in study.lengths[:-1]]
        decays = all(change <= limit for change, limit in zip(row.change, allowed, strict=True))
        left = gamma ** (last - first)
        shown = f"changes {_shown(row.change)} against {_shown(allowed)}, gamma^{last - first} = {left:.2g}"
        verdict = "undecided" if decays and left > 0.5 else _verdict(decays, row)
        claims.append(Claim(f"{name}: bias O(gamma^len_max), gamma {gamma}", verdict, shown))
    for name, row in (("document's sums", paper), ("position weights", ours)):
        verdict = "holds" if abs(row.rate / math.sqrt(2) - 1) < RATE_TOLERANCE else "violated"
        claims.append(
            Claim(f"{name}: sampling error O(1 / sqrt(N_s))", verdict, f"quarters to halves {row.rate:.2f}")
        )
    for name, row in (("document's sums", paper), ("position weights", ours)):
        better = all(a < b for a, b in zip(row.change, mean.change, strict=True))
        shown = f"{_shown(row.change)} against {_shown(mean.change)}"
        verdict = "holds" if better else "violated"
        claims.append(Claim(f"{name}: move less with len_max than the plain token mean", verdict, shown))
    return tuple(claims)


def _verdict(agrees: bool, row: LengthRow) -> str:
    if not agrees:
        return "violated"
    return "holds" if row.noise <= QUIET else "undecided"


def _shown(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)
