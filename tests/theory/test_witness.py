"""Exact counterexamples, checked again with fractions that share no code with the library."""

import math
from fractions import Fraction

import pytest

from tether.errors import ConfigError
from tether.theory.witness import EXAMPLES, Witness, find_witness, k_of


def k(u, x):
    return ((1 + u) ** 2 + x**2) / (4 * u)


def test_the_appendix_inequality_fails_at_one_half():
    assert k(Fraction(1, 4), Fraction(1)) == Fraction(41, 16)
    assert k(Fraction(1, 2), Fraction(1, 2)) == Fraction(5, 4)
    assert Fraction(41, 16) > (Fraction(5, 4) ** 2) ** 2 == Fraction(625, 256)
    witness = EXAMPLES["appendix"]
    assert witness.fused_k() == Fraction(41, 16)
    assert witness.single_k() == (Fraction(5, 4),) * 2
    assert witness.integers() == (41 * 4**4, 5**4 * 16)
    assert witness.holds()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_hold(name):
    assert EXAMPLES[name].holds()
    assert EXAMPLES[name].ratio() > 1


@pytest.mark.parametrize("count", range(2, 21))
def test_the_sqrt_conjecture_fails_for_every_count(count):
    witness = find_witness("sqrt", [0.0] * count, [2 / count] * count, [Fraction(1)] * count)
    p, q = witness.exponent().numerator, witness.exponent().denominator
    assert p * p >= count * q * q  # the exponent is at least sqrt(N)
    u = math.prod((v for v in witness.roots), start=Fraction(1))
    left = k(u, sum(witness.shifts, Fraction(0)))
    right = math.prod(
        (k(v, y) for v, y in zip(witness.roots, witness.shifts, strict=True)), start=Fraction(1)
    )
    assert left**q > right**p


@pytest.mark.parametrize(
    "weight", [Fraction(-1), Fraction(1, 2), Fraction(-1, 2), Fraction(1, 3), Fraction(3, 2)]
)
def test_the_weighted_form_fails_for_one_delta(weight):
    x = -0.8 if weight > 1 else 1.2  # stretching raises drift beyond a^2 on the sharpening side
    witness = find_witness("weighted", [x], [2.5], [weight])
    root = witness.root
    u, y = witness.roots[0] ** root, witness.shifts[0]
    fused = k(witness.roots[0] ** witness.powers[0], weight * y)
    assert Fraction(witness.powers[0], root) == weight
    assert fused ** (weight.denominator**2) > k(u, y) ** (weight.numerator**2)


@pytest.mark.parametrize("factor", [1, 2, 10, 14])
def test_positive_scales_beat_any_constant(factor):
    witness = find_witness(
        "positive-scale", [math.log(0.5 + 1e-13)] * 2, [0.0, 0.0], [Fraction(1)] * 2, factor=factor
    )
    u = witness.roots[0]
    assert k(2 * u - 1, Fraction(0)) > k(u, Fraction(0)) ** (4 * factor)
    assert witness.describe()["K"] == factor


def test_a_true_inequality_has_no_witness():
    """Widening deltas keep to the triangle inequality, so no rounding of them is a counterexample."""
    assert find_witness("main", [0.3, 0.4], [0.5, 0.1], [Fraction(1)] * 2) is None
    witness = Witness(
        kind="main", roots=(Fraction(2), Fraction(3)), shifts=(Fraction(1), Fraction(1)), powers=(1, 1)
    )
    assert not witness.holds()
    assert witness.ratio() < 1


def test_ratio_is_right_for_tiny_and_huge_k():
    tiny = Witness(kind="main", roots=(Fraction(1),) * 2, shifts=(Fraction(1, 10**9),) * 2, powers=(1, 1))
    assert tiny.ratio() == pytest.approx(1, rel=1e-9)
    still = Witness(kind="main", roots=(Fraction(1),) * 2, shifts=(Fraction(0),) * 2, powers=(1, 1))
    assert still.ratio() == 0
    assert k_of(Fraction(1), Fraction(0)) == 1


def test_what_cannot_be_certified_is_refused():
    with pytest.raises(ConfigError, match=r"'geodesic'.*main"):
        find_witness("geodesic", [0.0], [1.0], [Fraction(1)])
    with pytest.raises(ConfigError, match="not a scale"):
        Witness(
            kind="positive-scale", roots=(Fraction(1, 2),) * 2, shifts=(Fraction(0),) * 2, powers=(1, 1)
        ).fused_k()
    different = Witness(
        kind="weighted", roots=(Fraction(1), Fraction(2)), shifts=(Fraction(1), Fraction(1)), powers=(1, 1)
    )
    with pytest.raises(ConfigError, match="equal ones"):
        different.holds()
