import itertools

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracles
from tether.cauchy.charts import CHARTS, from_chart, fuse, to_chart
from tether.cauchy.divergence import distance, drift
from tether.errors import ConfigError, ShapeError

DTYPES = [torch.float32, torch.float64]
CURVED = ["geodesic", "rootkl"]
SUBADDITIVE = ["symmetric", "geodesic", "rootkl"]

real = st.floats(-8, 8, allow_subnormal=False)
weight = st.floats(-3, 3, allow_subnormal=False)


def deltas(dtype, count=250):
    """Small, ordinary and large deltas of either sign; coordinates alone and together."""
    top = 40 if dtype == torch.float32 else 300
    x = [oracles.spread(count, 1e-12, top, dtype, 1), oracles.spread(count, 0.05, 8, dtype, 2)]
    y = [oracles.spread(count, 1e-12, 1e4, dtype, 3), oracles.spread(count, 0.05, 8, dtype, 4)]
    axis = oracles.spread(30, 1e-12, 30, dtype, 5)
    return torch.cat([*x, axis, 0 * axis]), torch.cat([*y, 0 * axis, axis])


def pairs(*tensors):
    return zip(*(oracles.exact(t) for t in tensors), strict=True)


def lengths(x, y):
    return [mp.hypot(a, b) for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chart", CHARTS)
def test_to_chart_matches_60_digits(dtype, chart):
    x, y = deltas(dtype)
    first, second = to_chart(x, y, chart)
    want = [oracles.to_chart(a, b, chart) for a, b in pairs(x, y)]
    in_first, in_second = zip(*want, strict=True)
    if chart in CURVED:
        unit = lengths(in_first, in_second)
        assert max(oracles.ulp_errors(first, in_first, unit)) <= 4
        assert max(oracles.ulp_errors(second, in_second, unit)) <= 4
    else:
        assert torch.equal(first, x)
        assert max(oracles.ulp_errors(second, in_second)) <= (2 if chart == "symmetric" else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chart", CHARTS)
def test_from_chart_matches_60_digits(dtype, chart):
    first, second = to_chart(*deltas(dtype), chart)
    x, y = from_chart(first, second, chart)
    want_x, want_y = zip(*(oracles.from_chart(a, b, chart) for a, b in pairs(first, second)), strict=True)
    if chart in CURVED:
        rho = [oracles.distance(a, b) for a, b in zip(want_x, want_y, strict=True)]
        assert max(oracles.ulp_errors(x, want_x, rho)) <= 8
        errors = oracles.ulp_errors(y, want_y)
        assert max(error / float(1 + r) for error, r in zip(errors, rho, strict=True)) <= 8
    else:
        assert torch.equal(x, first)
        assert max(oracles.ulp_errors(y, want_y)) <= (2 if chart == "symmetric" else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chart", CURVED)
def test_one_curved_delta_of_weight_1_comes_back(dtype, chart):
    x, y = deltas(dtype)
    still = torch.stack([x, torch.randn_like(x)]), torch.stack([y, torch.randn_like(y)])
    back_x, back_y = fuse(*still, torch.tensor([1.0, 0.0], dtype=dtype), chart)
    rho = [oracles.distance(a, b) for a, b in pairs(x, y)]
    assert max(oracles.ulp_errors(back_x, oracles.exact(x), rho)) <= 8
    errors = oracles.ulp_errors(back_y, oracles.exact(y))
    assert max(error / float(1 + r) for error, r in zip(errors, rho, strict=True)) <= 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chart", ["linear", "symmetric"])
def test_one_delta_of_weight_1_comes_back_bit_for_bit(dtype, chart):
    x, y = oracles.spread(2000, 1e-12, 1e4, dtype, 1), oracles.spread(2000, 1e-12, 1e4, dtype, 2)
    for others in (0, 1, 4):
        all_x, all_y = 100 * torch.randn(2, others + 1, 2000, dtype=dtype)
        all_x[others], all_y[others] = x, y
        weights = torch.zeros(others + 1, dtype=dtype)
        weights[others] = 1
        back_x, back_y = fuse(all_x, all_y, weights, chart)
        assert torch.equal(back_x, x)
        assert torch.equal(back_y, y)


@pytest.mark.parametrize("chart", CHARTS)
def test_directions_of_the_charts(chart):
    """A wider law lies at a positive first coordinate, a law to the right at a positive second."""
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    first, second = to_chart(one, zero, chart)
    assert first > 0
    assert second == 0
    assert to_chart(zero, one, chart)[1] > 0
    assert to_chart(zero, -one, chart)[1] < 0


def test_lengths_are_what_the_charts_are_named_for():
    x, y = deltas(torch.float64)
    keep = x.abs() < 100
    x, y = x[keep], y[keep]
    assert_close(torch.hypot(*to_chart(x, y, "geodesic")), distance(x, y), rtol=1e-14, atol=0)
    assert_close(torch.hypot(*to_chart(x, y, "rootkl")).square(), drift(x, y), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chart", CHARTS)
def test_extremes_stay_finite_where_the_result_is(dtype, chart):
    """All sign combinations of 0, 1e-12 and 1e4; the drift survives even where y cannot come back."""
    values = torch.tensor([0.0, 1e-12, -1e-12, 1.0, 1e4, -1e4], dtype=dtype)
    x, y = (v.reshape(-1) for v in torch.meshgrid(values, values, indexing="ij"))
    first, second = to_chart(x, y, chart)
    assert torch.isfinite(first).all()
    visible = torch.isfinite(second)
    # y e^5000 is beyond either type; nothing else is.
    assert torch.equal(visible, (x != -1e4) | (y == 0) if chart == "symmetric" else torch.ones_like(visible))
    x, y, first, second = (v[visible] for v in (x, y, first, second))
    back_x, back_y = from_chart(first, second, chart)
    assert torch.isfinite(back_x).all()
    assert torch.isfinite(back_y).all()
    before, after = drift(x, y), drift(back_x, back_y)
    small = before < 1  # beyond, an error of x by 8 ulp of rho
    eps = torch.finfo(dtype).eps
    assert_close(after[small], before[small], rtol=40 * eps, atol=0)
    assert_close(after[~small], before[~small], rtol=8 * eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_fusion_needs_no_representable_w(dtype):
    """w = y e^{-x/2} overflows at x = -4000; fused with its opposite scale move it does not matter."""
    x = torch.tensor([[-4000.0], [3990.0]], dtype=dtype)
    y = torch.tensor([[2.0], [1e-3]], dtype=dtype)
    fused_x, fused_y = fuse(x, y, torch.tensor([1.0, 1.0]))
    assert fused_x.item() == -10
    assert torch.isinf(fused_y).all()  # e^1995: true overflow
    fused_x, fused_y = fuse(x, y, torch.tensor([1.0, 0.0]))
    assert (fused_x.item(), fused_y.item()) == (-4000.0, 2.0)
    fused_x, fused_y = fuse(x, y * torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 1.0]))
    assert (fused_x.item(), fused_y.item()) == (-10.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chart", CHARTS)
def test_fusion_matches_60_digits(dtype, chart):
    count, contexts = 3, 120
    x = oracles.spread(count * contexts, 1e-3, 3, dtype, 1).reshape(count, contexts)
    y = oracles.spread(count * contexts, 1e-3, 3, dtype, 2).reshape(count, contexts)
    weights = torch.tensor([0.75, -0.5, 1.25], dtype=dtype)
    fused_x, fused_y = fuse(x, y, weights, chart)
    want = [
        oracles.fuse(x[:, i].tolist(), y[:, i].tolist(), weights.tolist(), chart) for i in range(contexts)
    ]
    want_x, want_y = (
        torch.tensor([float(p[i]) for p in want], dtype=torch.float64).to(dtype) for i in (0, 1)
    )
    # Errors in ulp of the terms, times what e^rho makes of them.
    eps = torch.finfo(dtype).eps
    stretch = torch.exp(distance(want_x, want_y)) if chart in CURVED else torch.ones(())
    reach = 1 + distance(x, y).sum(0)
    assert ((fused_x - want_x).abs() <= 8 * eps * reach * stretch).all()
    assert ((fused_y - want_y).abs() <= 16 * eps * reach * stretch * (1 + want_y.abs())).all()


def test_charts_agree_where_they_must():
    """Location moves alone: linear and symmetric; scale moves alone: all but rootkl."""
    still, move = torch.zeros(3, 5).double(), torch.randn(3, 5).double()
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for one, other in zip(fuse(still, move, weights, "linear"), fuse(still, move, weights), strict=True):
        assert_close(one, other)
    for chart in ("symmetric", "geodesic"):
        fused_x, fused_y = fuse(move, still, weights, chart)
        assert_close(fused_x, fuse(move, still, weights, "linear")[0])
        assert not fused_y.any()


def test_second_order_semantics_of_three_location_moves():
    """Three copies of y = 1 (bound 2.00829 nats): the values of the theory notes."""
    x, y = torch.zeros(3, 1).double(), torch.ones(3, 1).double()
    want = {
        "linear": (0.0, 3.0, 1.17866),
        "symmetric": (0.0, 3.0, 1.17866),
        "geodesic": (-1.609, 1.6, 1.60944),
        "rootkl": (-2.041, 1.610, 2.00829),
    }
    for chart, (at_x, at_y, nats) in want.items():
        fused = fuse(x, y, torch.ones(3).double(), chart)
        assert_close(torch.cat(fused), torch.tensor([at_x, at_y], dtype=torch.float64), atol=6e-4, rtol=0)
        assert_close(drift(*fused), torch.tensor([nats], dtype=torch.float64), atol=6e-6, rtol=0)


def test_two_sharpening_deltas_in_all_charts():
    """The refutation (-log 2, 1/2) twice: only the linear chart exceeds (sum sqrt D)^2 = 0.89257."""
    x = torch.full((2, 1), 0.5, dtype=torch.float64).log()
    y = torch.full((2, 1), 0.5, dtype=torch.float64)
    want = {"linear": 0.94098, "symmetric": 0.72392, "geodesic": 0.81093, "rootkl": 0.89257}
    for chart, nats in want.items():
        moved = drift(*fuse(x, y, torch.ones(2).double(), chart))
        assert_close(moved, torch.tensor([nats], dtype=torch.float64), atol=6e-6, rtol=0)
    bound = drift(x, y).sqrt().sum() ** 2
    assert want["linear"] > bound > want["geodesic"]


@st.composite
def bundles(draw, numbers=real):
    count, dimension = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7, 64]))
    seed, size = draw(st.integers(0, 2**31)), draw(st.sampled_from([1e-10, 1e-3, 0.3, 1.0, 4.0]))
    pool = torch.tensor(draw(st.lists(numbers, min_size=4, max_size=4)), dtype=torch.float64)
    source = torch.Generator().manual_seed(seed)
    pick = torch.randint(4, (2, count, dimension), generator=source)
    noise = torch.randn(2, count, dimension, generator=source, dtype=torch.float64)
    x, y = size * (noise + pool[pick] / 4)
    return x, y


@settings(max_examples=60, deadline=None)
@given(bundles(), st.sampled_from(SUBADDITIVE))
def test_root_drift_is_subadditive(bundle, chart):
    x, y = bundle
    total = drift(*fuse(x, y, torch.ones(len(x)), chart)).sum(-1).sqrt()
    assert total <= drift(x, y).sum(-1).sqrt().sum() * (1 + 1e-9) + 1e-150


def test_root_drift_is_not_subadditive_in_the_linear_chart():
    x = torch.full((2, 1), -0.337761845, dtype=torch.float64)
    y = torch.full((2, 1), 0.347267317, dtype=torch.float64)
    total = drift(*fuse(x, y, torch.ones(2), "linear")).sum()
    assert_close(
        total / drift(x, y).sqrt().sum() ** 2,
        torch.tensor(1.10767457463, dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )


@settings(max_examples=50, deadline=None)
@given(bundles(), st.sampled_from(CHARTS), st.randoms(use_true_random=False))
def test_fusion_does_not_depend_on_the_order(bundle, chart, shuffler):
    x, y = bundle
    weights = torch.linspace(-1, 1.5, len(x), dtype=torch.float64)
    order = list(range(len(x)))
    shuffler.shuffle(order)
    for one, other in zip(
        fuse(x, y, weights, chart), fuse(x[order], y[order], weights[order], chart), strict=True
    ):
        assert_close(one, other, rtol=1e-7, atol=1e-9 * float(one.abs().max()))


@settings(max_examples=80, deadline=None)
@given(real, real, st.sampled_from(CHARTS))
def test_round_trip(x, y, chart):
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    back_x, back_y = from_chart(*to_chart(x, y, chart), chart)
    assert_close(back_x, x, rtol=0, atol=2e-15 * (float(distance(x, y)) + 1e-300))
    assert_close(back_y, y, rtol=2e-15 * (1 + float(distance(x, y))), atol=0)


@settings(max_examples=50, deadline=None)
@given(bundles(), st.lists(weight, min_size=5, max_size=5))
def test_rootkl_drift_is_a_quadratic_form(bundle, weights):
    x, y = bundle
    weights = torch.tensor(weights[: len(x)], dtype=torch.float64)
    total = drift(*fuse(x, y, weights, "rootkl")).sum()
    coordinates = torch.cat(to_chart(x, y, "rootkl"), dim=-1)
    gram = coordinates @ coordinates.T
    want = weights @ gram @ weights
    scale = float((weights.abs() @ gram.diagonal().sqrt()) ** 2)
    # Squares of weights below 1e-150 leave the floating point range.
    assert_close(total, want, rtol=0, atol=1e-12 * scale * (1 + scale) + 1e-300)


@settings(max_examples=50, deadline=None)
@given(bundles(), st.floats(0, 1), st.floats(0, 1), st.sampled_from(SUBADDITIVE))
def test_drift_shrinks_with_the_weights(bundle, one, other, chart):
    x, y = bundle
    weights = torch.linspace(-1.5, 1, len(x), dtype=torch.float64)
    less, more = sorted((one, other))
    small = drift(*fuse(x, y, less * weights, chart)).sum(-1)
    large = drift(*fuse(x, y, more * weights, chart)).sum(-1)
    assert small <= large * (1 + 1e-9)


def test_shrinking_can_raise_the_linear_drift():
    x, y = torch.tensor([[6.0]], dtype=torch.float64), torch.tensor([[1000.0]], dtype=torch.float64)
    values = drift(*fuse(x, y, torch.tensor([1.0], dtype=torch.float64), "linear"))
    shrunk = drift(*fuse(x, y, torch.tensor([1 / 3], dtype=torch.float64), "linear"))
    assert_close(
        torch.cat([values, shrunk]),
        torch.tensor([6.580703, 8.232625], dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("chart", CHARTS)
def test_gates_weigh_each_context(chart):
    x, y = torch.randn(3, 2, 5, 4).double(), torch.randn(3, 2, 5, 4).double()
    gates = torch.rand(3, 2, 5).double()
    fused_x, fused_y = fuse(x, y, gates, chart)
    assert fused_x.shape == fused_y.shape == (2, 5, 4)
    for i, j in itertools.product(range(2), range(5)):
        want_x, want_y = fuse(x[:, i, j], y[:, i, j], gates[:, i, j], chart)
        assert_close(fused_x[i, j], want_x)
        assert_close(fused_y[i, j], want_y)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_zero_and_no_delta_are_the_base(chart, dtype):
    x, y = torch.randn(3, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    for fused in (*fuse(x, y, torch.zeros(3), chart), *fuse(x[:0], y[:0], torch.zeros(0), chart)):
        assert fused.dtype == dtype
        assert fused.shape == (5,)
        assert not fused.any()


@pytest.mark.parametrize("chart", CHARTS)
def test_derivatives_agree_with_differences(chart):
    """On the axes, at the seams of the branches and in general position."""
    values = [0.0, 0.4, -0.4, 1.0, -2.0, 3.0]
    points = [p for p in itertools.product(values, values) if p != (0.0, 0.0)]
    first, second = torch.tensor(points, dtype=torch.float64).T.clone()
    first.requires_grad_()
    second.requires_grad_()
    # A difference quotient of e^rho-sized functions is itself only good to 1e-4.
    assert torch.autograd.gradcheck(lambda a, b: to_chart(a, b, chart), (first, second), rtol=1e-4)
    inner = (first / 2).detach().requires_grad_(), (second / 2).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: from_chart(a, b, chart), inner, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("chart", "stretch"), [("linear", 1), ("symmetric", 1), ("geodesic", 1), ("rootkl", 0.5)]
)
def test_gradients_at_the_base(dtype, chart, stretch):
    """At exactly 0 every chart is a multiple of the identity."""
    zeros = torch.zeros(2, dtype=dtype)
    for function, slope in ((to_chart, stretch), (from_chart, 1 / stretch)):
        rows = torch.autograd.functional.jacobian(
            lambda v, f=function: torch.stack(f(v[0], v[1], chart)), zeros
        )
        assert_close(rows, slope * torch.eye(2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chart", CHARTS)
def test_gradients_are_finite_from_1e_12_to_where_e_2rho_overflows(dtype, chart):
    values = torch.tensor([0.0, 1e-30, 1e-12, 1e-3, 1.0, 5.0], dtype=dtype)
    far = torch.tensor([40.0, -40.0] if dtype == torch.float32 else [300.0, -300.0], dtype=dtype)
    x, y = torch.meshgrid(torch.cat([values, -values, far]), torch.cat([values, -values]), indexing="ij")
    limit = 42 if dtype == torch.float32 else 350
    for function in (to_chart, from_chart):
        a, b = x.clone(), y.clone()
        if function is from_chart and chart == "rootkl":
            a, b = a.clamp(-(limit**0.5), limit**0.5), b
        a.requires_grad_()
        b.requires_grad_()
        first, second = function(a, b, chart)
        for gradient in torch.autograd.grad((first + second).sum(), (a, b)):
            assert torch.isfinite(gradient).all()


def test_gradients_reach_deltas_and_weights():
    x, y = torch.randn(2, 3).double().requires_grad_(), torch.randn(2, 3).double().requires_grad_()
    weights = torch.tensor([0.7, -0.4], dtype=torch.float64).requires_grad_()
    for chart in CHARTS:
        assert torch.autograd.gradcheck(lambda *a, c=chart: drift(*fuse(*a, c)), (x, y, weights))
        zero = torch.zeros(2, 3).double().requires_grad_()
        fused = fuse(zero, zero, weights, chart)
        for gradient in torch.autograd.grad(sum(f.sum() for f in fused), (zero, weights)):
            assert torch.isfinite(gradient).all()


def test_unknown_chart_names_the_known_ones():
    one = torch.ones(1, 1)
    for call in (
        lambda: to_chart(one, one, "lie"),
        lambda: from_chart(one, one, "lie"),
        lambda: fuse(one, one, one[0], "lie"),
    ):
        with pytest.raises(ConfigError, match=r"'lie'.*linear, symmetric, geodesic, rootkl"):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_have_to_be_finite(bad):
    with pytest.raises(ConfigError, match="1 of 2"):
        fuse(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([1.0, bad]))


@pytest.mark.parametrize(
    ("x", "y", "weights"),
    [
        ((2, 3), (2, 4), (2,)),
        ((2, 3), (3,), (2,)),
        ((3,), (3,), (3,)),
        ((2, 5, 3), (2, 5, 3), (5,)),
        ((2, 5, 3), (2, 5, 3), (2, 5, 3)),
        ((2, 5, 3), (2, 5, 3), ()),
        ((2, 5, 3), (2, 5, 3), (2, 1)),
    ],
)
def test_shapes_have_to_fit(x, y, weights):
    with pytest.raises(ShapeError):
        fuse(torch.ones(x), torch.ones(y), torch.ones(weights))
