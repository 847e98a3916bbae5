"""One Cauchy law of R^n and symmetric stable laws: their drift, what they keep and what they break."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from flint import arb, ctx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

import oracles
from tether.errors import ConfigError
from tether.theory.catalogue import statement
from tether.theory.constants import equal_constant, many_constant
from tether.theory.laws import LINE, examine
from tether.theory.multivariate import drift_in_space, drift_of_law
from tether.theory.search import falsify
from tether.theory.stable import stable_density, stable_law

LOWERED = 0.99
SIZES = (1, 2, 3, 4, 10)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def direct_drift(size, x, y):
    """The divergence from its definition, an integral over the length of u and its angle to the shift, for n >= 2."""
    scale = math.exp(x)

    def log_ratio(length, angle):
        far = scale**2 + length**2 - 2 * length * y * math.cos(angle) + y**2
        return (size + 1) / 2 * (math.log(far) - math.log1p(length**2)) - x

    def integrand(angle, turn):  # length = tan(turn), whose density is sin(turn)^(n-1)
        return math.sin(turn) ** (size - 1) * math.sin(angle) ** (size - 2) * log_ratio(math.tan(turn), angle)

    sphere = integrate.quad(lambda a: math.sin(a) ** (size - 2), 0, math.pi)[0]
    ball = integrate.quad(lambda t: math.sin(t) ** (size - 1), 0, math.pi / 2)[0]
    total = integrate.dblquad(integrand, 0, math.pi / 2 - 1e-9, 0, math.pi, epsabs=1e-8)[0]
    return total / sphere / ball


# One Cauchy law of R^n


@pytest.mark.parametrize(("size", "x", "y"), [(2, -0.8, 1.2), (3, 0.5, 0.9), (4, 0.7, 2.0)])
def test_the_formula_is_the_divergence(size, x, y):
    assert float(drift_of_law(size, x, y)) == pytest.approx(direct_drift(size, x, y), abs=1e-6)


def test_the_formula_of_one_dimension_and_of_three():
    for x, y in ((0.3, 0.7), (-2.0, 3.0), (-4.0, 50.0), (3.0, 1e-3), (0.0, 100.0)):
        assert float(drift_of_law(1, x, y)) == pytest.approx(float(oracles.drift(x, y)), rel=1e-9)
        with mp.workdps(40):
            scale, far = mp.exp(mp.mpf(x)), mp.mpf(y)
            closed = (
                2 * mp.log(((1 + scale) ** 2 + far**2) / 4) + 4 / far * mp.atan(far / (1 + scale)) - 2 - x
            )
        assert float(drift_of_law(3, x, y)) == pytest.approx(float(closed), rel=1e-9)
        assert drift_in_space(double(x), double(y)).item() == pytest.approx(float(closed), rel=1e-12)
    assert drift_in_space(double(0.0), double(1e-9)).item() == pytest.approx(1e-18 / 3, rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_shifts_are_below_their_quadratic_form_which_small_ones_attain(size):
    length = np.geomspace(1e-3, 100, 60)
    ratio = drift_of_law(size, 0.0, length) / length**2
    sharp = (size + 1) / (2 * (size + 3))
    assert (ratio <= sharp * (1 + 1e-9)).all()
    assert ratio[0] > LOWERED * sharp
    assert (np.diff(ratio) < 0).all()  # D is concave in the squared length
    assert (np.diff(drift_of_law(size, -1.5, length)) > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5), st.sampled_from(SIZES), st.sampled_from([0.01, 1.0, 20.0]))
def test_root_drifts_of_shifts_obey_the_triangle_inequality(seed, count, size, spread):
    moves = spread * np.random.default_rng(seed).standard_normal((count, 20, size))
    alone = np.sqrt(drift_of_law(size, 0.0, np.linalg.norm(moves, axis=-1)))
    together = drift_of_law(size, 0.0, np.linalg.norm(moves.sum(0), axis=-1))
    assert (together <= alone.sum(0) ** 2 * (1 + 1e-9)).all()


def test_small_equal_shifts_attain_the_triangle_inequality():
    y = torch.full((3, 1, 2), 1e-3, dtype=torch.float64)
    for name in ("space-shifts", "space-shifts-squared"):
        moved, bound = statement(name).evaluate(0 * y, y, torch.ones(3))
        assert (moved <= bound).all()
        assert (moved > LOWERED * bound).all()
        assert statement(name).slack(y, y, torch.ones(3)).isinf().all()


@pytest.mark.parametrize("size", SIZES)
def test_scales_alone_break_the_inequality_beyond_one_dimension(size):
    """The third derivative, 4n(n-1)/((n+3)(n+5)), and slopes of n and 1 far out, on the definition of f."""

    def still(x):
        power = mp.mpf(size) / 2 - 1
        weight = mp.beta(mp.mpf(1) / 2, mp.mpf(size) / 2)

        def integrand(root):  # A = root^2 from Beta(1/2, n/2)
            return 2 * (1 - root**2) ** power * mp.log(1 + mp.expm1(2 * x) * root**2) / weight

        return -x + mp.mpf(size + 1) / 2 * mp.quad(integrand, [0, mp.mpf(1) / 2, 1])

    with mp.workdps(25):
        step = mp.mpf("0.05")
        # Central differences of both orders agree to the fourth power of the step.
        ends = [still(k * step) - still(-k * step) for k in (1, 2, 3)]
        third = (-13 * ends[0] + 8 * ends[1] - ends[2]) / 8 / step**3
        assert float(third) == pytest.approx(4 * size * (size - 1) / ((size + 3) * (size + 5)), abs=2e-4)
        assert float(still(mp.mpf("0.3"))) == pytest.approx(float(drift_of_law(size, 0.3, 0.0)), rel=1e-9)
    far = drift_of_law(size, np.array([8.0, -8.0]), 0.0) - drift_of_law(size, np.array([7.0, -7.0]), 0.0)
    assert far == pytest.approx([size, 1], abs=0.03 * size)
    doubled = drift_of_law(size, 0.4, 0.0) / (4 * drift_of_law(size, 0.2, 0.0))
    assert doubled < 1 if size == 1 else doubled > 1.01


def test_two_equal_widenings_break_it_in_ball_arithmetic():
    """R^3, x = 1/5 twice: D(2x) > 4 D(x), each number an interval."""
    ctx.prec = 200

    def still(x):
        scale = x.exp()
        return 2 * ((1 + scale) ** 2 / 4).log() + 4 / (1 + scale) - 2 - x

    x = arb(1) / 5
    assert still(2 * x) > 4 * still(x)
    assert still(2 * x) > arb("1.02") * 4 * still(x)


@pytest.mark.parametrize("name", ["space-scales", pytest.param("space-main", marks=pytest.mark.slow)])
def test_the_search_finds_the_same(name):
    found = falsify(statement(name))
    assert found.ratio == pytest.approx(1.0390133, abs=1e-6)
    x = np.linspace(0.3, 0.6, 3001)
    assert (drift_of_law(3, 2 * x, 0.0) / (4 * drift_of_law(3, x, 0.0))).max() == pytest.approx(
        1.0390133, abs=1e-6
    )


# Symmetric stable laws


@pytest.mark.parametrize("index", [0.5, 1.0, 1.5, 1.8])
def test_stable_densities(index):
    at = np.array([0.0, 0.3, 0.999, 1.0, 4.0, 300.0])
    want = stats.cauchy.pdf(at) if index == 1 else stats.levy_stable.pdf(at, index, 0)
    assert stable_density(index, at) == pytest.approx(want, rel=1e-8)
    assert stable_density(index, -at) == pytest.approx(want, rel=1e-8)


def test_the_stable_law_of_index_one_drifts_as_the_cauchy_law():
    law = stable_law(1.0)
    for x, y in ((0.3, 0.5), (-2.0, 1.0), (-3.0, 5.0), (2.0, 10.0)):
        assert float(law.drift(x, y)) == pytest.approx(float(oracles.drift(x, y)), abs=2e-7)
    assert law.information() == pytest.approx((0.5, 0.5), abs=1e-9)


@pytest.mark.slow
def test_the_worst_deltas_of_the_cauchy_law_are_those_of_its_constants():
    law = stable_law(1.0)
    found = examine("Cauchy", law.drift, law.information())
    assert found.linear == pytest.approx(equal_constant(2).value, abs=1e-5)
    assert found.many == pytest.approx(many_constant().value, abs=1e-5)
    assert max(found.shifts, found.scales, found.symmetric) <= 1 + 1e-6


def test_the_drift_of_another_stable_law():
    """By quadrature over densities of another library, and by its Fisher information for small moves."""
    grid = np.arange(-9, 9, 0.05)
    u, x, y = np.sinh(grid), -0.7, 0.9
    own = stats.levy_stable.pdf(u, 1.5, 0)
    moved = stats.levy_stable.pdf((u - y) * math.exp(-x), 1.5, 0) * math.exp(-x)
    want = float((own * np.log(own / moved) * np.cosh(grid)).sum() * 0.05)
    law = stable_law(1.5)
    assert float(law.drift(x, y)) == pytest.approx(want, rel=2e-4)
    of_scale, of_location = law.information()
    assert float(law.drift(0.01, 0.0) + law.drift(-0.01, 0.0)) == pytest.approx(of_scale * 1e-4, rel=1e-3)
    assert float(2 * law.drift(0.0, 0.01)) == pytest.approx(of_location * 1e-4, rel=1e-3)


@pytest.mark.parametrize("index", [0.6, 1.5])
def test_what_stable_laws_keep_and_break(index):
    law = stable_law(index)
    length = np.geomspace(0.02, 20, 30)
    drifts = law.drift(0.0, length)
    assert (np.diff(drifts) > 0).all()
    assert (np.diff(law.drift(-1.0, length)) > 0).all()
    assert (drifts <= math.gamma(1 + 2 / index) * length**2 / 4).all()
    assert (law.drift(0.0, 2 * length) <= 4 * drifts * (1 + 1e-6)).all()
    # Slopes far out: 1 for widening, the index for sharpening, so the drift depends on the direction.
    steps = law.drift(np.array([12.0, -12.0]), 0.0) - law.drift(np.array([11.0, -11.0]), 0.0)
    assert steps == pytest.approx([1, index], abs=0.01)
    doubled = [float(law.drift(2 * x, 0.0) / (4 * law.drift(x, 0.0))) for x in LINE]
    assert max(doubled) > 1.005


def test_wrong_laws_are_refused():
    with pytest.raises(ConfigError, match="n=0"):
        drift_of_law(0, 0.0, 1.0)
    for index in (0.1, 2.0):
        with pytest.raises(ConfigError, match="index"):
            stable_density(index, 0.0)
        with pytest.raises(ConfigError, match="index"):
            stable_law(index)
