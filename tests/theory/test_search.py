"""The search finds what is false, from any seed, and nothing where the statement is true."""

import math

import mpmath as mp
import pytest

import oracles
from tether.errors import ConfigError
from tether.theory.catalogue import STATEMENTS, statement
from tether.theory.constants import equal_constant, negation_constant
from tether.theory.precise import polish_equal, precise_ratio
from tether.theory.search import falsify


@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(k, marks=pytest.mark.slow) for k in range(2, 20))]
)
def test_main_is_refuted_from_any_seed(seed):
    finding = falsify(statement("main"), seed=seed)
    assert finding.ratio >= 1.1076
    assert finding.ratio == pytest.approx(1.1076745746274175, rel=1e-11)
    assert finding.violated
    assert finding.witness.holds()
    assert finding.cpu_seconds < 5
    assert not finding.at_border


def test_the_ratio_of_a_finding_is_that_of_its_deltas():
    finding = falsify(statement("main"), count=3, dimension=2)
    with mp.workdps(30):
        fused = sum(
            oracles.drift(*(mp.fsum(row[i] for row in part) for part in (finding.x, finding.y)))
            for i in (0, 1)
        )
        singles = [
            sum(oracles.drift(a, b) for a, b in zip(x, y, strict=True))
            for x, y in zip(finding.x, finding.y, strict=True)
        ]
        assert finding.ratio == pytest.approx(float(fused / (3 * sum(singles))), rel=1e-11)
    assert finding.ratio == pytest.approx(equal_constant(3).value, rel=1e-6)
    assert finding.witness is None  # exact certificates are about one dimension


@pytest.mark.parametrize("count", [2, 20])
def test_the_sqrt_conjecture_is_refuted(count):
    finding = falsify(statement("sqrt"), count=count)
    assert finding.ratio == pytest.approx(math.sqrt(count) * equal_constant(count).value, rel=1e-5)
    assert finding.witness.holds()


def test_the_weighted_form_is_refuted():
    turned = falsify(statement("weighted"), count=1, weights=[-1.0])
    assert turned.ratio == pytest.approx(negation_constant().value, rel=1e-9)
    assert turned.witness.holds()
    halved = falsify(statement("weighted"), count=1, weights=[0.5])
    assert halved.ratio > 5
    assert halved.at_border  # there is no constant: the ratio tends to (2 - a) / a^2 = 6
    assert halved.witness.holds()
    assert falsify(statement("weighted"), count=2).witness.holds()


def test_positive_scales_diverge():
    finding = falsify(statement("positive-scale"))
    assert finding.ratio > 25
    assert finding.at_border
    assert finding.witness.holds()
    assert finding.witness.factor == 10


QUICK = ("symmetric", "k-inf", "two")
TRUE = [name for name, one in STATEMENTS.items() if one.verdict != "refuted" and name != "scaling"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TRUE]
)
def test_true_statements_resist(name):
    finding = falsify(statement(name), count=2)
    assert not finding.violated
    assert finding.ratio > 0.25  # the search went somewhere
    assert finding.describe()["violated"] is False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["symmetric", "geodesic", "rootkl", "k-inf", "equal", "scaling"])
def test_true_statements_resist_in_more_dimensions(name):
    for count, dimension in ((5, 3), (20, 1)):
        assert not falsify(statement(name), count=count, dimension=dimension).violated


def test_polishing_agrees_with_mpmath():
    ratio, (x, y) = polish_equal(2, -0.3, 0.3)
    with mp.workdps(60):
        x, y = mp.mpf(str(x)), mp.mpf(str(y))
        want = oracles.drift(2 * x, 2 * y) / (4 * oracles.drift(x, y))
        assert abs(mp.mpf(str(ratio)) - want) < mp.mpf(10) ** -40
        eps = mp.mpf(10) ** -15
        for dx, dy in ((eps, 0), (-eps, 0), (0, eps), (0, -eps)):
            assert oracles.drift(2 * (x + dx), 2 * (y + dy)) / (4 * oracles.drift(x + dx, y + dy)) < want
    with pytest.raises(ConfigError, match="no maximum"):
        polish_equal(2, 5.0, 9.0)


def test_precise_ratios_agree_with_mpmath():
    x, y, weights = (0.25, -1.5), (2.0, 0.5), (0.5, -2.0)
    with mp.workdps(60):
        singles = [oracles.drift(a, b) for a, b in zip(x, y, strict=True)]
        fused = oracles.drift(mp.mpf("3.125"), mp.mpf(0))
        want = fused / (mp.sqrt(singles[0]) / 2 + 2 * mp.sqrt(singles[1])) ** 2
        got = mp.mpf(str(precise_ratio("weighted", x, y, weights)))
        assert abs(got - want) < mp.mpf(10) ** -40
        unit = oracles.drift(mp.mpf("-1.25"), mp.mpf("2.5")) / (mp.sqrt(2) * sum(singles))
        assert abs(mp.mpf(str(precise_ratio("sqrt", x, y, (1, 1)))) - unit) < mp.mpf(10) ** -40
    with pytest.raises(ConfigError, match="no precise ratio"):
        precise_ratio("geodesic", x, y, weights)


def test_wrong_searches_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        falsify(statement("main"), count=0)
    with pytest.raises(ConfigError, match="expected 2 finite"):
        falsify(statement("weighted"), weights=[1.0])
    with pytest.raises(ConfigError, match="expected 1 finite"):
        falsify(statement("weighted"), count=1, weights=[math.nan])
    with pytest.raises(ConfigError, match="falsify 'weighted'"):
        falsify(statement("main"), weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="1 and more"):
        falsify(statement("k-inf-weighted"), weights=[1.0, 0.2])
    with pytest.raises(ConfigError, match="add up to 1"):
        falsify(statement("mixture"), weights=[0.5, 0.6])
