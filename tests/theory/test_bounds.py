import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracles
from tether.cauchy.charts import CHARTS, fuse
from tether.cauchy.divergence import drift
from tether.errors import ConfigError, ShapeError
from tether.theory import bounds
from tether.theory.bounds import K_INF, fused_drift_bound, scaling_bound, scaling_bound_total

WEIGHTS = [
    -30.0,
    -3.0,
    -1.0,
    -0.5,
    -1e-3,
    1e-6,
    0.1,
    0.25,
    0.5,
    0.9,
    0.999999,
    1.000001,
    1.5,
    2.0,
    5.0,
    300.0,
]
ROUNDING = 1 + 1e-9  # of the fused drift, where it attains its bound


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tables are small: threads cost more than they bring, far more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def fused_drift(x, y, weights, chart):
    return drift(*fuse(x, y, weights, chart)).sum(-1)


# The scaling bound


@pytest.mark.parametrize("weight", WEIGHTS)
def test_scaling_bound_encloses_the_exact_supremum(weight):
    nats = double(1e-12, 1e-4, 0.1, 1.0, 3.0, 20.0)
    got = scaling_bound(nats, weight)
    for value, bound in zip(nats.tolist(), got.tolist(), strict=True):
        exact = oracles.largest_scaled_drift(value, weight)
        assert exact <= bound * (1 + mp.mpf("1e-15"))
        assert bound <= exact * (1 + mp.mpf("1e-6"))


def test_scaling_bound_reproduces_the_table_of_the_notes():
    nats = double(1e-4, 0.01, 0.1, 1, 10, 100)
    table = {
        -1.0: (1.01558, 1.17295, 1.69498, 3.27399, 3.08630, 3.00863),
        0.25: (0.062865, 0.066566, 0.079306, 0.212074, 1.45720, 1.72072),
        0.5: (0.250974, 0.260819, 0.293683, 0.532352, 1.33521, 1.48352),
        2.0: (4.03041, 4.26187, 4.41377, 3.24848, 2.16739, 2.01674),
    }
    for weight, ratios in table.items():
        assert_close(scaling_bound(nats, weight) / nats, double(*ratios), rtol=1e-5, atol=0)


def test_scaling_bound_of_plain_weights():
    nats = double(0.0, 1e-16, 1e-3, 2.0, 700.0, 1e4, math.inf)
    assert_close(scaling_bound(nats, 1.0), nats, rtol=2e-12, atol=0)
    assert not scaling_bound(nats, 0.0).any()
    assert_close(scaling_bound(double(0.0), 3.0), double(0.0))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_scaling_bounds_hold_for_random_deltas(weight, generator):
    x = torch.randn(20_000, generator=generator, dtype=torch.float64) * 4
    y = torch.randn(20_000, generator=generator, dtype=torch.float64) * torch.exp(x.abs())
    moved, nats = drift(weight * x, weight * y), drift(x, y)
    assert (moved <= scaling_bound(nats, weight)).all()
    assert (moved <= scaling_bound_total(nats, weight)).all()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_scaling_bound_total_covers_every_split_over_dimensions(weight, generator):
    nats = torch.cat([torch.logspace(-11, 1, 40, dtype=torch.float64), double(30.0, 1e3)])
    bound = scaling_bound_total(nats, weight)
    for parts in (1, 2, 3, 10, 1000, 10**6):  # equal shares
        assert (parts * scaling_bound(nats / parts, weight) <= bound * (1 + 1e-6)).all()
    shares = torch.distributions.Dirichlet(torch.full((16,), 0.2).double()).sample((50,))
    split = scaling_bound(nats[:, None, None] * shares, weight).sum(-1)
    assert (split <= bound[:, None] * (1 + 1e-6)).all()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("rounded", [False, True])
def test_scaling_bound_total_is_tight(weight, rounded, monkeypatch):
    if rounded:
        monkeypatch.setattr(bounds, "DISTINCT_WEIGHTS", 0)
    fine = torch.logspace(-13, 2, 3000, dtype=torch.float64)
    ratio = (scaling_bound(fine, weight) / fine).cummax(0).values
    at = fine > 1e-8  # below, the bound is linear in the drift and excess is that of its first ratio
    got = scaling_bound_total(fine, weight) / fine
    assert (got[at] >= ratio[at] * (1 - 2e-6)).all()
    ordinary = at & (fine < 10)
    # A weight below 2^-10 is rounded up to it.
    excess = 0.12 if rounded else 0.01
    if abs(weight) >= 2**-10 or not rounded:
        assert (got[ordinary] <= ratio[ordinary] * (1 + excess)).all()
        assert (got[at] <= ratio[at] * (1 + max(excess, 0.025))).all()


def test_scaling_bound_total_finds_the_sharp_constants():
    """D(N p) <= C_N N^2 D(p) with the constants of the notes, and 3.341584 for a negated delta."""
    sharp = {2: 1.10767457463, 3: 1.16428205089, 4: 1.19881617535, 10: 1.27495826442}
    got = torch.stack([scaling_bound_total(double(5.0), float(n)) for n in sharp]).squeeze() / 5
    want = double(*(c * n * n for n, c in sharp.items()))
    assert (got >= want * (1 - 1e-9)).all()
    assert_close(got, want, rtol=3e-4, atol=0)
    negated = scaling_bound_total(double(5.0), -1.0) / 5
    assert_close(negated, double(3.341584), rtol=1e-3, atol=0)
    assert negated > 3.341583


def test_scaling_bound_total_stays_below_theorem_1_prime_and_two_minus_weight():
    nats = torch.logspace(-10, 4, 200, dtype=torch.float64)
    for weight in (1.1, 1.5, 2.0, 10.0, 1e3):
        assert (scaling_bound_total(nats, weight) <= K_INF * weight**2 * nats).all()
    for weight in (0.01, 0.3, 0.6, 0.99):
        assert (scaling_bound_total(nats, weight) <= (2 - weight) * nats * (1 + 1e-9)).all()
        assert scaling_bound(double(1e4), weight) > 0.99 * (2 - weight) * 1e4


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-12, 1e3), st.floats(1, 50), st.sampled_from(WEIGHTS))
def test_scaling_bound_total_never_falls(nats, factor, weight):
    low, high = scaling_bound_total(double(nats, nats * factor), weight).tolist()
    assert low <= high * (1 + 1e-12)


def test_scaling_bound_total_survives_extremes():
    nats = double(0.0, 1e-300, 1e-20, 1.0, 1e4, 1e6, math.inf)
    for weight in (-1e3, -1.0, 0.5, 4.0, 1e3):
        bound = scaling_bound_total(nats, weight)
        assert not bound.isnan().any()
        assert torch.isfinite(bound[:-1]).all()
        assert bound[0] == 0
        assert bound[-1] == math.inf
        assert (bound[1:-1] >= scaling_bound(nats[1:-1], weight) * (1 - 2e-6)).all()
    assert not scaling_bound_total(nats, 0.0).any()
    assert_close(scaling_bound_total(nats, 1.0), nats, rtol=2e-12, atol=0)


def test_many_weights_are_bounded_like_few(generator):
    """More distinct weights than the table has rows: rounded outwards, never inwards."""
    nats = torch.rand(2000, generator=generator, dtype=torch.float64) * 8
    weights = torch.randn(2000, generator=generator, dtype=torch.float64) * 1.5
    weights[:4] = double(0.0, 1.0, 1e-9, -1e-9)
    together = scaling_bound_total(nats, weights)
    apart = torch.stack(
        [scaling_bound_total(n, w.item()) for n, w in zip(nats[:60], weights[:60], strict=True)]
    )
    assert (together >= scaling_bound(nats, weights) * (1 - 1e-6)).all()
    assert (together[:60] >= apart * (1 - 0.025)).all()
    usual = weights[:60].abs() >= 2**-10
    assert (together[:60][usual] <= apart[usual] * 1.12).all()
    assert together[0] == 0
    assert_close(together[1], nats[1], rtol=2e-12, atol=0)


# Bounds on fused deltas


def test_k_inf_lies_just_above_the_sharp_constant():
    """N equal deltas that add up to the extremal point come within 0.7/N of it and stay below."""
    point = torch.stack([double(-0.974130450), double(1.044405389)])
    for count in (10, 1000, 10**6):
        part = point / count
        ratio = (drift(*point) / (count**2 * drift(*part))).item()
        assert 1.338533402074 - 0.7 / count < ratio < K_INF
    assert 1.338533402074 < K_INF < 1.338535


@pytest.mark.parametrize("chart", CHARTS)
def test_one_delta_of_weight_1_is_its_own_bound(chart):
    nats = torch.stack([torch.logspace(-12, 4, 50, dtype=torch.float64), torch.rand(50).double()])
    assert_close(fused_drift_bound(nats, double(1.0, 0.0), chart), nats[0], rtol=1e-11, atol=0)
    assert not fused_drift_bound(nats, double(0.0, 0.0), chart).any()


@pytest.mark.parametrize(
    ("chart", "factor"), [("symmetric", 1), ("geodesic", 1), ("rootkl", 1), ("linear", K_INF)]
)
def test_unit_weights_add_root_drifts(chart, factor):
    nats = torch.rand(4, 30).double() * 10
    want = factor * nats.sqrt().sum(0) ** 2
    assert_close(fused_drift_bound(nats, torch.ones(4), chart), want, rtol=1e-11, atol=0)


def test_formulas_for_other_weights():
    d, a = (0.3, 2.0, 50.0), (-0.5, 2.0, 0.25)
    with mp.workdps(40):
        root = [mp.sqrt(v) for v in d]
        shrink = [mp.sqrt(mp.log(1 + mp.mpf(w) ** 2 * (mp.exp(v) - 1))) for w, v in zip(a, d, strict=True)]
        symmetric = (shrink[0] + 2 * root[1] + shrink[2]) ** 2
        triangle = (mp.sqrt("0.5") * root[0] + 2 * root[1] + root[2] / 2) ** 2
        geodesic = min(triangle, mp.mpf("2.75") * (mp.mpf("0.15") + 4 + 12.5))
        rootkl = (root[0] / 2 + 2 * root[1] + root[2] / 4) ** 2
        scaled = [mp.sqrt(scaling_bound_total(double(d[k]), a[k]).item()) for k in (0, 2)]
        linear = K_INF * (scaled[0] + 2 * root[1] + scaled[1]) ** 2
    for chart, want in zip(
        ("symmetric", "geodesic", "rootkl", "linear"), (symmetric, geodesic, rootkl, linear), strict=True
    ):
        assert_close(
            fused_drift_bound(double(*d), double(*a), chart),
            torch.tensor(float(want)).double(),
            rtol=1e-6,
            atol=0,
        )


def test_geodesic_bound_takes_the_mean_for_convex_weights():
    nats = torch.rand(3, 20).double() * 5
    weights = double(0.2, 0.3, -0.5)
    want = weights.abs() @ nats
    assert_close(fused_drift_bound(nats, weights, "geodesic"), want, rtol=1e-11, atol=0)


def test_single_scaled_delta_does_without_k_inf():
    nats = torch.stack([torch.logspace(-6, 2, 30, dtype=torch.float64), torch.ones(30).double()])
    for weight in (-1.0, 0.5, 2.0):
        got = fused_drift_bound(nats, double(weight, 0.0), "linear")
        assert_close(got, scaling_bound_total(nats[0], weight), rtol=1e-11, atol=0)
    nothing = torch.stack([nats[0], torch.zeros(30).double()])  # a delta that does not move counts as absent
    assert_close(fused_drift_bound(nothing, double(2.0, 5.0), "linear"), scaling_bound_total(nats[0], 2.0))


def test_the_source_inequality_fails_where_the_repaired_bound_holds():
    """Equal deltas (-log 2, 1/2); a negated one; a halved one: above (sum |a| sqrt D)^2 in the linear chart."""
    cases = [
        ((-math.log(2), -math.log(2)), (0.5, 0.5), (1.0, 1.0)),
        ((math.log(2),), (1.0,), (-1.0,)),
        ((math.log(4),), (2.0,), (0.5,)),
    ]
    for x, y, weights in cases:
        x, y, weights = double(*x)[:, None], double(*y)[:, None], double(*weights)
        moved, nats = fused_drift(x, y, weights, "linear"), drift(x, y).sum(-1)
        assert moved > (weights.abs() * nats.sqrt()).sum() ** 2
        assert moved <= fused_drift_bound(nats, weights, "linear")


@st.composite
def bundles(draw):
    count, dimension = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 8, 64]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([1e-9, 1e-4, 0.1, 1.0, 5.0]))
    x, y = size * torch.randn(2, count, 40, dimension, generator=source, dtype=torch.float64)
    lean = draw(st.sampled_from(["free", "alike", "sharpen", "far"]))
    if lean == "alike":
        x, y = x[:1] + 0.05 * x, y[:1] + 0.05 * y
    elif lean == "sharpen":
        x, y = -x.abs(), y.abs()
    elif lean == "far":
        y = y * torch.exp(x.abs().clamp(max=10))
    weights = torch.tensor(
        draw(
            st.lists(
                st.one_of(
                    st.floats(-3, 3, allow_subnormal=False), st.sampled_from([0.0, 1.0, -1.0, 0.5, 20.0])
                ),
                min_size=count,
                max_size=count,
            )
        ),
        dtype=torch.float64,
    )
    return x, y, weights


@settings(max_examples=150, deadline=None)
@given(bundles(), st.sampled_from(CHARTS))
def test_fused_drift_stays_below_its_bound(bundle, chart):
    x, y, weights = bundle
    moved = fused_drift(x, y, weights, chart)
    known = moved.isfinite()
    bound = fused_drift_bound(drift(x, y).sum(-1), weights, chart)
    assert (moved[known] <= bound[known] * ROUNDING + 1e-300).all()


@settings(max_examples=25, deadline=None)
@given(bundles(), st.sampled_from(CHARTS))
def test_fused_drift_stays_below_its_bound_with_a_weight_a_context(bundle, chart):
    x, y, weights = bundle
    gates = weights[:, None] * torch.linspace(0, 1, x.shape[1], dtype=torch.float64)
    nats = drift(x, y).sum(-1)
    bound = fused_drift_bound(nats, gates, chart)
    moved = fused_drift(x, y, gates, chart)
    known = moved.isfinite()
    assert (moved[known] <= bound[known] * ROUNDING + 1e-300).all()
    for i in (0, 7, 39):
        assert_close(fused_drift_bound(nats[:, i], gates[:, i], chart), bound[i], rtol=1e-9, atol=0)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("signed", [False, True])
def test_gradient_search_does_not_beat_the_bound(chart, signed, generator):
    """Ascent on the ratio, from many starts at once: it must approach the bound and not cross it."""
    count, starts = 3, 64
    size = torch.logspace(-2, 0.7, starts, dtype=torch.float64)[:, None]
    x, y = size * torch.randn(2, count, starts, 2, generator=generator, dtype=torch.float64)
    weights = torch.randn(count, starts, generator=generator, dtype=torch.float64)
    weights = weights if signed else torch.ones_like(weights)
    variables = [v.requires_grad_() for v in ((x, y, weights) if signed else (x, y))]
    optimizer = torch.optim.Adam(variables, lr=0.03)
    for _ in range(100):
        gain = fused_drift(x, y, weights, chart).log()
        cost = 2 * (weights.abs() * drift(x, y).sum(-1).sqrt()).sum(0).log()
        optimizer.zero_grad()
        (cost - gain).sum().backward()
        optimizer.step()
    with torch.no_grad():
        nats, moved = drift(x, y).sum(-1), fused_drift(x, y, weights, chart)
        ratio = moved / fused_drift_bound(nats, weights, chart)
        assert (ratio <= ROUNDING).all()
        if not signed:
            assert ratio.max() > (1.16 / K_INF if chart == "linear" else 0.99)


def test_large_batches_agree_with_small_ones(generator):
    nats = torch.rand(3, 70_000, generator=generator, dtype=torch.float64) * 4
    weights, gates = double(1.0, 0.5, -0.7), torch.rand(3, 70_000, generator=generator, dtype=torch.float64)
    for chart in CHARTS:
        whole = fused_drift_bound(nats, weights, chart)
        assert_close(whole[::7000], fused_drift_bound(nats[:, ::7000], weights, chart), rtol=1e-9, atol=0)
        gated = fused_drift_bound(nats, gates, chart)[::7000]
        few = fused_drift_bound(nats[:, ::7000], gates[:, ::7000], chart)
        assert (gated >= few * (1 - 1e-9)).all()
        assert (gated <= few * 1.12).all()


@pytest.mark.parametrize("chart", CHARTS)
def test_bounds_are_float64_and_ignore_absent_deltas(chart):
    nats = torch.tensor([[0.5, 0.25], [math.inf, 1e30]])
    bound = fused_drift_bound(nats, torch.tensor([1, 0]), chart)
    assert bound.dtype == torch.float64
    assert_close(bound, double(0.5, 0.25), rtol=1e-11, atol=0)
    for weights in (double(1.0, 0.5), double(1.0, 2.0)):
        assert fused_drift_bound(nats, weights, chart)[0] == math.inf


def test_wrong_inputs_are_refused():
    nats, weights = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ConfigError, match=r"'mean'.*linear, symmetric, geodesic, rootkl"):
        fused_drift_bound(nats, weights, "mean")
    for bad in (-1e-9, math.nan):
        for call in (
            lambda v: fused_drift_bound(v, weights[:1], "linear"),
            lambda v: scaling_bound(v, 0.5),
            lambda v: scaling_bound_total(v, 0.5),
        ):
            with pytest.raises(ConfigError, match="drifts"):
                call(torch.tensor([bad]))
    for bad in (math.inf, math.nan):
        for call in (
            lambda v: fused_drift_bound(nats, torch.tensor([1.0, v]), "rootkl"),
            lambda v: scaling_bound(nats, v),
            lambda v: scaling_bound_total(nats, v),
        ):
            with pytest.raises(ConfigError, match="weights"):
                call(bad)
    for shape in ((3,), (3, 2), (2, 1), ()):
        with pytest.raises(ShapeError, match="weights"):
            fused_drift_bound(nats, torch.ones(shape), "symmetric")
