"""Every statement against mpmath, against random deltas of all sizes, and its refusals."""

import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracles
from tether.cauchy.charts import fuse
from tether.cauchy.divergence import drift
from tether.errors import ConfigError, ShapeError
from tether.theory.bounds import K_INF
from tether.theory.catalogue import C_2, K_SPLIT, STATEMENTS, statement
from tether.theory.constants import MONOTONE_DRIFT
from tether.theory.search import TOLERANCE
from tether.theory.statements import positive_scale_drift

TRUE = [name for name, one in STATEMENTS.items() if one.verdict != "refuted"]
REPAIRED = ["symmetric", "geodesic", "rootkl"]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def column(*values):
    return double(*values)[:, None]


def one_dimension(name, x, y, weights):
    """Drift and bound of a statement, from lists."""
    return [side.item() for side in statement(name).evaluate(column(*x), column(*y), double(*weights))]


def test_sides_agree_with_mpmath():
    x, y, weights = (-0.7, 0.2, -0.1), (0.5, 0.9, 0.3), (0.5, -2.0, 1.5)
    with mp.workdps(40):
        singles = [oracles.drift(a, b) for a, b in zip(x, y, strict=True)]
        total, roots = sum(singles), sum(map(mp.sqrt, singles)) ** 2
        weighted = sum(abs(w) * mp.sqrt(d) for w, d in zip(weights, singles, strict=True)) ** 2
        unit = oracles.drift(sum(map(mp.mpf, x)), sum(map(mp.mpf, y)))
        signed = oracles.drift(
            *(sum(mp.mpf(w) * v for w, v in zip(weights, vs, strict=True)) for vs in (x, y))
        )
        want = {
            "main": (unit, 3 * total),
            "sqrt": (unit, mp.sqrt(3) * total),
            "four": (unit, 4 * roots),
            "split": (unit, mp.mpf(K_SPLIT) * roots),
            "k-inf": (unit, mp.mpf(K_INF) * roots),
            "weighted": (signed, weighted),
        }
    for name, sides in want.items():
        given_weights = weights if name == "weighted" else (1.0,) * 3
        assert one_dimension(name, x, y, given_weights) == pytest.approx([float(v) for v in sides], rel=1e-12)


def test_charted_statements_agree_with_mpmath():
    x, y, weights = (-0.7, 0.2), (0.5, 0.9), (0.5, -2.0)
    with mp.workdps(40):
        singles = [oracles.drift(a, b) for a, b in zip(x, y, strict=True)]
        shrunk = mp.sqrt(mp.log(1 + mp.expm1(singles[0]) / 4))
        symmetric = (shrunk + 2 * mp.sqrt(singles[1])) ** 2
        points = [oracles.to_chart(a, b, "rootkl") for a, b in zip(x, y, strict=True)]
        gram = sum(sum(w * p[i] for w, p in zip(weights, points, strict=True)) ** 2 for i in (0, 1))
        fused = {
            chart: oracles.drift(*oracles.fuse(x, y, weights, chart)) for chart in ("symmetric", "rootkl")
        }
    for name, want in (
        ("symmetric", (fused["symmetric"], symmetric)),
        ("rootkl-gram", (fused["rootkl"], gram)),
    ):
        assert one_dimension(name, x, y, weights) == pytest.approx([float(v) for v in want], rel=1e-11)


def test_positive_scale_drift_agrees_with_mpmath():
    x, y = (-0.4, -0.6), (0.3, -1.0)
    with mp.workdps(40):
        scale = 1 + sum(mp.expm1(mp.mpf(v)) for v in x)
        want = oracles.drift(mp.log(scale), sum(map(mp.mpf, y)))
    got = positive_scale_drift(column(*x), column(*y), torch.ones(2))
    assert got.item() == pytest.approx(float(want), rel=1e-13)
    assert positive_scale_drift(column(-1.0, -1.0), column(0.0, 0.0), torch.ones(2)).item() == math.inf


def test_known_points():
    third = -math.log(2)
    assert statement("main").ratio(
        column(third, third), column(0.5, 0.5), torch.ones(2)
    ).item() == pytest.approx(1.0542354225817648, rel=1e-14)
    moved, bound = one_dimension("appendix", (third, third), (0.5, 0.5), (1.0, 1.0))
    assert (math.exp(moved), math.exp(bound)) == pytest.approx((41 / 16, 625 / 256), rel=1e-14)
    for weight, x, y in ((-1.0, math.log(2), 1.0), (0.5, math.log(4), 2.0)):
        assert statement("weighted").slack(column(x), column(y), double(weight)).item() < 0


def test_verdicts_are_complete():
    assert {one.verdict for one in STATEMENTS.values()} == {"refuted", "proved", "enclosed", "supported"}
    assert [name for name, one in STATEMENTS.items() if one.verdict == "refuted"] == [
        "main", "appendix", "sqrt", "weighted", "positive-scale", "mixture-means", "fisher-base", "space-main",
        "space-scales",
    ]  # fmt: skip
    assert all(one.basis and one.source and one.assumptions for one in STATEMENTS.values())


def test_nothing_is_claimed_where_assumptions_fail():
    x, y, one = column(-0.5, -0.5), column(0.4, 0.4), torch.ones(2)
    for name in ("location", "scale", "signs", "widening"):
        assert statement(name).slack(x, y, one).item() == math.inf
        assert statement(name).ratio(x, y, one).item() == 0
    far = column(6.0), column(1000.0)
    assert drift(*far).item() > MONOTONE_DRIFT
    assert statement("shrinking").slack(*far, double(0.3)).item() == math.inf


@pytest.mark.parametrize("name", TRUE)
def test_places_satisfy_the_assumptions(name, generator):
    one = statement(name)
    count = one.count or 4
    x, y = 2 * torch.randn(2, count, 500, 3, generator=generator, dtype=torch.float64)
    weights = (
        torch.ones(count, 500) if one.weights == "unit" else torch.randn(count, 500, generator=generator)
    )
    moved, bound = one.evaluate(*one.place(x, y, weights.double()))
    assert bound.isfinite().all()
    assert (moved <= bound * (1 + 1e-12)).all()


@st.composite
def deltas(draw):
    """A few deltas of many dimensions, from tiny to huge, and signed weights."""
    count, dimension = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 7, 64]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([1e-12, 1e-6, 1e-3, 0.1, 1.0, 10.0, 60.0, 300.0]))
    spread = torch.exp(
        draw(st.sampled_from([0.0, 2.0])) * torch.randn(count, 1, 1, generator=source).double()
    )
    moves = size * spread * torch.randn(2, count, 20, dimension, generator=source, dtype=torch.float64)
    x, y = moves[0].clamp(-300, 300), moves[1]
    if draw(st.booleans()):
        y = y * torch.exp(x.abs().clamp(max=40))
    weights = draw(st.lists(st.floats(-4, 4, allow_subnormal=False), min_size=count, max_size=count))
    return x, y, double(*weights)


@settings(max_examples=60, deadline=None)
@given(deltas(), st.sampled_from([*REPAIRED, "symmetric-quadratic"]))
def test_repaired_charts_keep_their_bounds(points, name):
    ratio = statement(name).ratio(*points)
    known = ratio.isfinite()
    assert (ratio[known] <= 1 + TOLERANCE).all()


@settings(max_examples=40, deadline=None)
@given(deltas())
def test_rootkl_drift_is_a_quadratic_form_in_the_weights(points):
    x, y, weights = points
    keep = drift(x, y).sum((0, 2)) < 100
    moved, form = statement("rootkl-gram").evaluate(x[:, keep], y[:, keep], weights)
    # Deltas that cancel leave the rounding of the coordinates, which grows with their lengths.
    scale = (weights.abs()[:, None] * drift(x, y).sum(-1)[:, keep].sqrt()).sum(0).square()
    assert ((moved - form).abs() <= 1e-9 * scale + 1e-300).all()


@settings(max_examples=40, deadline=None)
@given(deltas(), st.floats(0, 1))
def test_symmetric_drift_falls_with_the_weights(points, share):
    x, y, weights = points
    before, after = (drift(*fuse(x, y, w, "symmetric")).sum(-1) for w in (weights, share * weights))
    known = before.isfinite()
    assert (after[known] <= before[known] * (1 + 1e-9) + 1e-25).all()


@settings(max_examples=40, deadline=None)
@given(deltas(), st.floats(-3, 3))
def test_one_delta_in_the_repaired_charts(points, weight):
    """D(a p) for one delta: log(1 + a^2 (e^D - 1)) symmetric, rho a geodesic, a^2 D rootkl, as stated."""
    x, y, _ = points
    x, y = x[:1, :, :1], y[:1, :, :1]
    alone = drift(x, y).squeeze()
    keep = (alone < 300) & (alone > 1e-20)
    moved = {c: drift(*fuse(x, y, double(weight), c)).squeeze()[keep] for c in REPAIRED}
    alone = alone[keep]
    assert_close(moved["rootkl"], weight**2 * alone, rtol=1e-8, atol=1e-30)
    rho = 2 * torch.acosh(torch.exp(alone / 2))
    fine = alone > 1e-6
    want = 2 * torch.log(torch.cosh(weight * rho[fine] / 2))
    usable = want.isfinite()
    assert_close(moved["geodesic"][fine][usable], want[usable], rtol=1e-6, atol=1e-12)
    if abs(weight) < 1:
        assert (moved["symmetric"] <= torch.log1p(weight**2 * torch.expm1(alone)) * (1 + 1e-9) + 1e-99).all()


def test_constants_of_the_catalogue_lie_above_the_sharp_ones():
    assert 1.10767457462741 < C_2 < 1.1076746
    assert 1.51180135996 < K_SPLIT < 1.511802
    assert MONOTONE_DRIFT < 2.9115713


def test_wrong_points_are_refused():
    x, one = torch.ones(2, 1), torch.ones(2)
    with pytest.raises(ConfigError, match=r"'mean'.*main"):
        statement("mean")
    with pytest.raises(ConfigError, match="weights 1"):
        statement("main").slack(x, x, double(1.0, 2.0))
    with pytest.raises(ConfigError, match="1 and more"):
        statement("k-inf-weighted").slack(x, x, double(1.0, 0.5))
    with pytest.raises(ConfigError, match="about 2 deltas, but 3"):
        statement("two").slack(torch.ones(3, 1), torch.ones(3, 1), torch.ones(3))
    for shape in ((2,), (3, 1), (2, 2)):
        with pytest.raises(ShapeError, match="expected"):
            statement("main").slack(x, torch.ones(shape), one)
    with pytest.raises(ShapeError, match="expected"):
        statement("main").slack(x, x, torch.ones(3))
