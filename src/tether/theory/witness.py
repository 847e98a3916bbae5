"""Exact counterexamples: deltas of small rational numbers at which an inequality fails, checked with integers.

With ``k = e^D`` every statement of the form ``D(fused) <= sum_k c_k D(p_k)`` reads
``k_fused <= prod k_k^(c_k)``. For rational ``u = e^x``, ``y`` and ``c_k = p_k / q`` both sides, raised to the
power ``q``, are rational numbers, and the comparison is one of two products of integers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from tether.errors import ConfigError

__all__ = ["DENOMINATORS", "EXAMPLES", "KINDS", "Witness", "find_witness", "k_of"]

DENOMINATORS = (*range(2, 33), 40, 50, 64, 80, 100, 128, 200, 256, 400, 500, 1000)
"""Tried in this order, so that the counterexample has small numbers."""

# Tiny deltas need not ask for huge denominators: a violation by small deltas persists while they grow.
STRETCHES = tuple(2.0**power for power in range(40, -9, -1))
MOST_BITS = 200_000

KINDS = ("main", "appendix", "sqrt", "weighted", "positive-scale")

Rounded: TypeAlias = tuple[tuple[Fraction, ...], tuple[Fraction, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Witness:
    """Deltas at which a statement fails, all in rational numbers.

    Delta k has ``u_k = e^{x_k} = roots[k]^root`` and ``y_k = shifts[k]``; its weight is ``powers[k] / root``, so
    that ``u_k`` to the power of its weight is rational too.
    """

    kind: str
    """The statement: one of ``KINDS``."""
    roots: tuple[Fraction, ...]
    shifts: tuple[Fraction, ...]
    powers: tuple[int, ...]
    root: int = 1
    factor: int = 1
    """For ``positive-scale``: the constant K that is beaten, ``D <= K N sum D_k``."""

    def fused_k(self) -> Fraction:
        """Return ``e^D`` of the fused delta, exactly.

        Returns:
            A rational number, at least 1.

        Raises:
            ConfigError: the fused scale is not positive.
        """
        shift = sum(
            (Fraction(m, self.root) * y for m, y in zip(self.powers, self.shifts, strict=True)), Fraction(0)
        )
        if self.kind == "positive-scale":
            scale = 1 + sum((v**self.root - 1 for v in self.roots), Fraction(0))
            if scale <= 0:
                raise ConfigError(
                    f"the scales add up to {scale}: not a scale; expected deltas that keep it positive"
                )
            return k_of(scale, shift)
        return k_of(
            math.prod((v**m for v, m in zip(self.roots, self.powers, strict=True)), start=Fraction(1)), shift
        )

    def single_k(self) -> tuple[Fraction, ...]:
        """Return ``e^{D_k}`` of each delta, exactly.

        Returns:
            Rational numbers, at least 1.
        """
        return tuple(k_of(v**self.root, y) for v, y in zip(self.roots, self.shifts, strict=True))

    def exponent(self) -> Fraction:
        """Return a rational number that is at least the ``c`` of ``D(fused) <= c sum D_k``.

        It is ``c`` itself but for ``sqrt``, where it lies above ``sqrt(N)``; refuting the weaker inequality
        refutes the stronger.

        Returns:
            The exponent.

        Raises:
            ConfigError: a weighted witness has several deltas that are not equal, or no exponent in range.
        """
        count = len(self.roots)
        if self.kind in {"main", "appendix"}:
            return Fraction(count)
        if self.kind == "positive-scale":
            return Fraction(count * self.factor)
        if self.kind == "sqrt":
            # The best upper bounds with small denominators, for short integers: p^2 >= N q^2.
            q = min(range(1, 17), key=lambda q: Fraction(_root_up(count * q * q), q))
            return Fraction(_root_up(count * q * q), q)
        if len(set(zip(self.roots, self.shifts, strict=True))) > 1:
            raise ConfigError(
                "a weighted witness has several different deltas: expected one, or equal ones, since"
                " (sum |a_k| sqrt D_k)^2 is a sum of drifts only then"
            )
        return Fraction(sum(map(abs, self.powers)), self.root) ** 2 / count

    def holds(self) -> bool:
        """Check with integers that the statement fails here.

        Returns:
            Whether ``k_fused^q > (prod k_k)^p`` with ``p / q`` the exponent.
        """
        return self.integers()[0] > self.integers()[1]

    def integers(self) -> tuple[int, int]:
        """Return the two integers whose comparison decides.

        Returns:
            ``k_fused^q`` and ``(prod k_k)^p``, both times the product of their denominators.
        """
        exponent, fused = self.exponent(), self.fused_k()
        singles = math.prod(self.single_k(), start=Fraction(1))
        p, q = exponent.numerator, exponent.denominator
        return (
            fused.numerator**q * singles.denominator**p,
            singles.numerator**p * fused.denominator**q,
        )

    def ratio(self) -> float:
        """Return drift over bound at the witness.

        Returns:
            ``log k_fused / (c sum log k_k)``, above 1 where it holds; with the rational ``c`` for ``sqrt``. 0 for
            deltas that do not move.
        """
        bound = float(self.exponent()) * sum(map(_log, self.single_k()))
        return _log(self.fused_k()) / bound if bound else 0.0

    def describe(self) -> dict[str, object]:
        """Return the witness as JSON, fractions as text.

        Returns:
            Deltas (u, y, weight), the two values of k, exponent and the result of the check.
        """
        text = {
            "deltas": [
                {"u": str(v**self.root), "y": str(y), "weight": str(Fraction(m, self.root))}
                for v, y, m in zip(self.roots, self.shifts, self.powers, strict=True)
            ],
            "k_fused": str(self.fused_k()),
            "k_single": [str(k) for k in self.single_k()],
            "exponent": str(self.exponent()),
            "check": "k_fused^q > (product of k_single)^p, p/q = exponent, with integers",
            "holds": self.holds(),
            "ratio": self.ratio(),
        }
        return text | ({"K": self.factor} if self.kind == "positive-scale" else {})


def k_of(u: Fraction, y: Fraction) -> Fraction:
    """Return ``k = ((1 + u)^2 + y^2) / (4 u)``, the exponential of a drift.

    Args:
        u: ratio of scales, positive.
        y: change of the location over the base scale.

    Returns:
        A rational number, at least 1.

    Example:
        >>> k_of(Fraction(1, 2), Fraction(1, 2))
        Fraction(5, 4)
    """
    return ((1 + u) ** 2 + y**2) / (4 * u)


def find_witness(
    kind: str, x: Sequence[float], y: Sequence[float], weights: Sequence[Fraction], *, factor: int = 1
) -> Witness | None:
    """Round deltas of one dimension to small rational numbers at which a statement still fails.

    Denominators are tried from small to large, and for each the deltas stretched and shrunk by powers of 2.

    Args:
        kind: one of ``KINDS``.
        x: changes of the log scale.
        y: changes of the location over the base scale.
        weights: rational weights.
        factor: the constant K to beat, for ``positive-scale``.

    Returns:
        The witness with the shortest numbers for the smallest denominator, or None.

    Raises:
        ConfigError: there are no exact certificates for that statement.
    """
    if kind not in KINDS:
        raise ConfigError(f"no exact certificates for {kind!r}: expected one of {', '.join(KINDS)}")
    root = math.lcm(*(w.denominator for w in weights))
    powers = tuple(int(w * root) for w in weights)
    for rounded in _roundings(x, y, root, kind):
        witnesses = [
            Witness(kind=kind, roots=roots, shifts=shifts, powers=powers, root=root, factor=factor)
            for roots, shifts in rounded
        ]
        failing = [w for w in witnesses if _fits(w) and w.ratio() > 1 and w.holds()]
        if failing:
            return min(failing, key=_bits)
    return None


def _roundings(x: Sequence[float], y: Sequence[float], root: int, kind: str) -> Iterator[list[Rounded]]:
    """Yield the roundings of the deltas, those of one denominator together."""
    if kind == "positive-scale":  # upwards, so that the sum of scales stays positive
        for power in (10**digits for digits in range(1, 14)):
            scales = tuple(Fraction(math.ceil(math.exp(v) * power), power) for v in x)
            yield [(scales, tuple(_near(v, power) for v in y))]
        return
    widest, farthest = max(map(abs, x)) / root, max(map(abs, y))
    stretches = [t for t in STRETCHES if widest * t <= 6 and farthest * t <= 1e4]
    for denominator in DENOMINATORS:
        found = {
            (
                tuple(_near(math.exp(v * t / root), denominator) for v in x),
                tuple(_near(v * t, denominator) for v in y),
            )
            for t in stretches
        }
        yield [(roots, shifts) for roots, shifts in found if min(roots) > 0]


def _near(value: float, denominator: int) -> Fraction:
    return Fraction(value).limit_denominator(denominator)


def _fits(witness: Witness) -> bool:
    """Return whether the witness is about lawful scales and its integers stay short."""
    if witness.kind == "positive-scale" and sum(v**witness.root - 1 for v in witness.roots) <= -1:
        return False
    length = sum(k.numerator.bit_length() + k.denominator.bit_length() for k in witness.single_k())
    return length * witness.exponent().numerator < MOST_BITS


def _bits(witness: Witness) -> int:
    """Return how long the numbers of a witness are, written out."""
    parts = (*witness.roots, *witness.shifts)
    return sum(part.numerator.bit_length() + part.denominator.bit_length() for part in parts)


def _root_up(value: int) -> int:
    """Return the smallest integer whose square is at least ``value``."""
    return math.isqrt(value - 1) + 1


def _log(value: Fraction) -> float:
    """Return the logarithm of a rational number at least 1, also where it is close to 1 or very large."""
    return (
        math.log1p(float(value - 1)) if value < 2 else math.log(value.numerator) - math.log(value.denominator)
    )


def _half(numerator: int) -> Fraction:
    return Fraction(numerator, 2)


EXAMPLES: dict[str, Witness] = {
    "main, N = 2": Witness(kind="main", roots=(_half(1),) * 2, shifts=(_half(1),) * 2, powers=(1, 1)),
    "appendix": Witness(kind="appendix", roots=(_half(1),) * 2, shifts=(_half(1),) * 2, powers=(1, 1)),
    **{
        f"sqrt, N = {n}": Witness(
            kind="sqrt", roots=(Fraction(1),) * n, shifts=(Fraction(2, n),) * n, powers=(1,) * n
        )
        for n in (2, 3, 4, 5, 10, 20)
    },
    "weighted, a = -1": Witness(kind="weighted", roots=(Fraction(2),), shifts=(Fraction(1),), powers=(-1,)),
    "weighted, a = 1/2": Witness(
        kind="weighted", roots=(Fraction(2),), shifts=(Fraction(2),), powers=(1,), root=2
    ),
    "positive scale, K = 10": Witness(
        kind="positive-scale",
        roots=(Fraction(501, 1000),) * 2,
        shifts=(Fraction(0),) * 2,
        powers=(1, 1),
        factor=10,
    ),
}
"""Exact counterexamples by hand, one or more for each refuted statement."""
