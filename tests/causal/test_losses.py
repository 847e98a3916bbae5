import inspect
import math
from unittest import mock

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from tether.causal import ovr
from tether.causal.losses import (
    IGNORE,
    gated_cauchy_nll,
    normalised_ovr_nll,
    ovr_log_prob,
    ovr_loss,
    ovr_loss_estimate,
    signed_log,
    signed_log_inverse,
    softmax_loss,
)
from tether.errors import ConfigError, ShapeError

FORMS = ["dense", "chunked", "sampled"]


def naive(loc, scale, weight, targets, threshold, noise):
    """One binary cross-entropy at a time, in float64."""
    total = 0.0
    for n, target in enumerate(targets.tolist()):
        for k in range(len(weight)):
            score = sum(float(loc[n, c]) * float(weight[k, c]) for c in range(weight.shape[1]))
            spread = (
                sum(float(scale[n, c]) * abs(float(weight[k, c])) for c in range(weight.shape[1])) + noise
            )
            fires = 0.5 + math.atan((score - threshold) / spread) / math.pi
            total -= math.log(fires) if k == target else math.log(1 - fires)
    return total / len(targets)


@pytest.fixture
def case(generator):
    loc = torch.randn(5, 7, generator=generator)
    scale = torch.rand(5, 7, generator=generator) + 0.1
    weight = torch.randn(11, 7, generator=generator)
    return loc, scale, weight, torch.randint(11, (5,), generator=generator)


@pytest.mark.parametrize("noise", [0.0, 2.5])
@pytest.mark.parametrize("impl", FORMS)  # 11 classes: all of them are sampled
def test_ovr_loss_matches_one_class_at_a_time(case, noise, impl):
    expected = naive(*case, threshold=0.7, noise=noise)
    got = ovr_loss(*case, threshold=0.7, class_noise=noise, impl=impl)
    assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", FORMS)
def test_ignored_targets_carry_no_loss(case, impl):
    loc, scale, weight, targets = case
    kept = torch.tensor([0, 3])
    mixed = torch.full_like(targets, IGNORE)
    mixed[kept] = targets[kept]
    assert_close(
        ovr_loss(loc, scale, weight, mixed, threshold=0.0, impl=impl),
        ovr_loss(loc[kept], scale[kept], weight, targets[kept], threshold=0.0),
    )


@pytest.mark.parametrize("impl", FORMS)
def test_no_target_at_all_gives_zero_with_gradients(case, impl):
    loc, scale, weight, targets = case
    level = torch.zeros(5, 1)
    for tensor in (loc, scale, weight, level):
        tensor.requires_grad_()
    empty = torch.full_like(targets, IGNORE)
    loss = ovr_loss(loc, scale, weight, empty, threshold=level, impl=impl)
    loss = loss + softmax_loss(loc @ weight.T, empty)
    loss.backward()
    assert loss.item() == 0.0
    for tensor in (loc, scale, weight, level):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    none = ovr_loss(loc[:0], scale[:0], weight, targets[:0], threshold=0.0, impl=impl)
    assert none.item() == 0.0
    assert none.requires_grad


@pytest.mark.parametrize("impl", FORMS)
def test_far_tails_stay_finite_with_gradients(impl):
    loc = torch.tensor([[1e12], [-1e12], [3e30]], requires_grad=True)
    scale = torch.tensor([[1e-6], [1e-6], [1.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = ovr_loss(loc, scale, weight, torch.tensor([1, 0, 1]), threshold=1.0, impl=impl)
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(torch.isfinite(loc.grad).all() and torch.isfinite(scale.grad).all())


def test_log_prob_against_torch_distributions(case):
    loc, scale, _, _ = (tensor.double() for tensor in case)
    tail = 1 - torch.distributions.Cauchy(loc, scale).cdf(torch.tensor(0.3, dtype=torch.float64))
    assert_close(ovr_log_prob(loc, scale, 0.3), tail.log())


@pytest.mark.parametrize("level", [torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 5).unsqueeze(-1)])
def test_log_prob_takes_a_threshold_per_class_or_context(case, level):
    loc, scale, _, _ = case
    assert_close(ovr_log_prob(loc, scale, level), ovr_log_prob(loc - level, scale, 0.0))


SHAPES = {"number": None, "scalar": (), "class": "V", "context": "N1"}


@st.composite
def problems(draw):
    """Arguments of ovr_loss in float64, with odd shapes, some labels ignored, options of every shape."""
    n, v, c = draw(st.integers(1, 9)), draw(st.integers(1, 23)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape, size=1.0):
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    def option(kinds, make):
        kind = SHAPES[draw(st.sampled_from(kinds))]
        if kind is None:
            return float(make())
        return make(*{"V": (v,), "N1": (n, 1)}.get(kind, kind))

    size = draw(st.sampled_from([0.01, 1.0, 100.0]))
    spread = max(size, 1.0)
    targets = torch.randint(v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < 0.3] = IGNORE
    tensors = {
        "latent_loc": normal(n, c, size=size),
        # Scores that lie many scales from their threshold are known no better than their own rounding.
        "latent_scale": spread * (normal(draw(st.sampled_from([1, n])), c).abs() + 0.01),
        "weight": normal(v, c),
    }
    options = {
        "threshold": option(list(SHAPES), lambda *shape: normal(*shape, size=size)),
        "class_noise": option(["number", "scalar", "class"], lambda *shape: spread * normal(*shape).abs()),
        "bias": normal(v) if draw(st.booleans()) else None,
    }
    return tensors | options, targets, draw(st.integers(1, 25)), draw(st.sampled_from([1, 7, 40, 2**20]))


def as_leaves(arguments, dtype):
    """Copies of the arguments in a dtype, with gradients wanted."""
    return {
        name: value.detach().to(dtype, copy=True).requires_grad_()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


def gradients(leaves):
    return {name: leaf.grad for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}


def assert_near(actual, expected, relative, floor):
    """Compare up to a share of the largest entry: sums that cancel carry the error of their terms."""
    atol = relative * float(expected.abs().max()) + floor
    assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


@settings(max_examples=150, deadline=None)
@given(
    problems(), st.sampled_from(["float32", "float64", "bfloat16"]), st.sampled_from(["chunked", "sampled"])
)
def test_other_forms_agree_with_dense_in_loss_and_all_gradients(problem, name, impl):
    arguments, targets, chunk, pairs = problem
    dtype = getattr(torch, name)
    ours = as_leaves(arguments, dtype)
    narrow = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in ours.items()}
    exact = as_leaves(narrow, torch.float64)  # float64, from the same rounded numbers
    reference = ovr_loss(**exact, targets=targets)
    with mock.patch.object(ovr, "_PAIRS", pairs):
        loss = ovr_loss(**ours, targets=targets, impl=impl, chunk=chunk)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    precise = 1e-13 if dtype == torch.float64 else 1e-6
    assert_close(loss.double(), reference, rtol=precise, atol=0)
    if dtype != torch.float64:
        assert_close(loss, ovr_loss(**narrow, targets=targets), rtol=1e-6, atol=0)
    (2.5 * reference).backward()
    (2.5 * loss).backward()
    # In bfloat16 rounded twice, in the gradient and in its product with the incoming one.
    tolerance = {
        torch.float64: (1e-12, 1e-13),
        torch.float32: (1e-4, 1e-5),
        torch.bfloat16: (2**-7, 1e-5),
    }[dtype]
    expected = gradients(exact)
    for key, gradient in gradients(ours).items():
        assert gradient.dtype == dtype
        assert_near(gradient, expected[key], *tolerance)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("contexts", [False, True])
def test_float32_gradients_are_as_good_as_dense_ones(generator, shared, contexts):
    arguments = {
        "latent_loc": torch.randn(150, 48, generator=generator),
        "latent_scale": 0.1 * torch.rand(1 if shared else 150, 48, generator=generator),
        "weight": torch.randn(1100, 48, generator=generator),
        "threshold": 10 + torch.randn(*((150, 1) if contexts else (1100,)), generator=generator),
        "class_noise": 0.5 * torch.rand(1100, generator=generator),
        "bias": torch.randn(1100, generator=generator),
    }
    targets = torch.randint(1100, (150,), generator=generator)
    exact, ours, dense = (as_leaves(arguments, d) for d in (torch.float64, torch.float32, torch.float32))
    ovr_loss(**exact, targets=targets).backward()
    ovr_loss(**ours, targets=targets, impl="chunked", chunk=256).backward()
    ovr_loss(**dense, targets=targets).backward()
    for name, expected in gradients(exact).items():
        for other in (expected, dense[name].grad.double()):
            assert (ours[name].grad.double() - other).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("spread", [1e-25, 1.0, 1e4])
def test_slopes_are_exact_out_to_1e30(spread):
    """Each class its own score -x and spread, so that its slopes stand alone in the gradients."""
    fixed = torch.tensor([0.0, 1.0, -1.0, 1e-30, 1e8, -1e8, 1e30, -1e30], dtype=torch.float64)
    t = torch.cat([fixed, oracles.spread(80, 1e-12, 1e30), oracles.spread(40, 0.03, 30)])
    noise = torch.full((len(t),), spread).requires_grad_()
    bias = (-t * spread).float().requires_grad_()
    weight, loc, scale = torch.zeros(len(t), 1), torch.zeros(3, 1), torch.zeros(3, 1)
    targets = torch.tensor([0, 6, 7])
    loss = ovr_loss(
        loc, scale, weight, targets, threshold=0.0, class_noise=noise, bias=bias, impl="chunked", chunk=50
    )
    loss.backward()
    total, on_loc, on_scale = mp.mpf(0), [], []
    with mp.workdps(120):
        for k, (place, size) in enumerate(zip(oracles.exact(bias), oracles.exact(noise), strict=True)):
            u = -place / size
            hits = sum(k == target for target in targets.tolist())
            below, above = mp.mpf(1) / 2 + mp.atan(u) / mp.pi, mp.mpf(1) / 2 - mp.atan(u) / mp.pi
            density = 1 / (mp.pi * (1 + u * u) * size)
            total -= (3 - hits) * mp.log(below) + hits * mp.log(above)
            slope = (3 - hits) * density / below - hits * density / above
            on_loc.append(float(slope / 3))
            on_scale.append(float(slope * u / 3))
    assert_close(loss.double(), torch.tensor(float(total / 3)).double(), rtol=1e-6, atol=0)
    tiny = torch.finfo(torch.float32).tiny
    assert_close(bias.grad, torch.tensor(on_loc, dtype=torch.float64).float(), rtol=1e-6, atol=tiny)
    assert_close(noise.grad, torch.tensor(on_scale, dtype=torch.float64).float(), rtol=1e-6, atol=tiny)


@pytest.fixture
def wide(generator):
    """300 classes, 20 tokens with some targets in common."""
    arguments = {
        "latent_loc": 2 * torch.randn(20, 6, generator=generator, dtype=torch.float64),
        "latent_scale": 0.1 * torch.rand(20, 6, generator=generator, dtype=torch.float64),
        "weight": torch.randn(300, 6, generator=generator, dtype=torch.float64),
        "threshold": torch.tensor(4.0, dtype=torch.float64),
        "class_noise": torch.full((300,), 0.3, dtype=torch.float64),
        "bias": torch.randn(300, generator=generator, dtype=torch.float64),
    }
    return arguments, torch.randint(12, (20,), generator=generator)


def test_sampled_gradient_is_unbiased(wide, generator):
    arguments, targets = wide
    exact = as_leaves(arguments, torch.float64)
    ovr_loss(**exact, targets=targets).backward()
    draws = {name: [] for name in gradients(exact)}
    for _ in range(200):
        leaves = as_leaves(arguments, torch.float64)
        ovr_loss(**leaves, targets=targets, impl="sampled", samples=40, generator=generator).backward()
        for name, gradient in gradients(leaves).items():
            draws[name].append(gradient)
    for name, expected in gradients(exact).items():
        stack = torch.stack(draws[name])
        difference, error = stack.mean(0) - expected, stack.std(0) / math.sqrt(200)
        assert difference.norm() <= 3 * error.norm()
        # One number: the part along the dense gradient.
        along = (stack * expected).reshape(200, -1).sum(1) / expected.norm()
        assert abs(float(along.mean() - expected.norm())) <= 3 * float(along.std()) / math.sqrt(200)
        fixed = error < 1e-12 * expected.abs().max()  # rows of targets: no sampling, no error
        assert_close(difference[fixed], torch.zeros_like(difference[fixed]), rtol=0, atol=1e-10)


def test_sampled_loss_is_unbiased_and_its_standard_error_right(wide, generator):
    arguments, targets = wide
    expected = ovr_loss(**arguments, targets=targets)
    found = [
        ovr_loss_estimate(**arguments, targets=targets, samples=60, generator=generator) for _ in range(1500)
    ]
    loss = torch.stack([estimate.loss for estimate in found])
    assert abs(float(loss.mean() - expected)) <= 3 * float(loss.std()) / math.sqrt(1500)
    variance = torch.stack([estimate.standard_error for estimate in found]).square()
    assert 0.9 < float(variance.mean() / loss.var()) < 1.1


def test_drawing_every_class_leaves_no_error(wide, generator):
    arguments, targets = wide
    estimate = ovr_loss_estimate(**arguments, targets=targets, samples=300, generator=generator)
    assert_close(estimate.loss, ovr_loss(**arguments, targets=targets))
    assert estimate.standard_error.item() == 0
    none = torch.full_like(targets, IGNORE)
    assert [float(part) for part in ovr_loss_estimate(**arguments, targets=none)] == [0, 0]


def test_the_generator_decides_the_draw(wide):
    arguments, targets = wide

    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return ovr_loss(**arguments, targets=targets, impl="sampled", samples=9, generator=generator).item()

    assert loss(1) == loss(1) != loss(2)


class Watch(TorchDispatchMode):
    """Note size and dtype of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add((tensor.numel(), tensor.dtype, func.overloadpacket.__name__))
        return result


@pytest.mark.parametrize("impl", ["chunked", "sampled"])
def test_neither_tokens_by_vocabulary_nor_a_wide_weight_is_held(impl, generator):
    loc = torch.randn(64, 8, generator=generator, dtype=torch.bfloat16).requires_grad_()
    scale = torch.rand(64, 8, generator=generator, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(5000, 8, generator=generator, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(5000, (64,), generator=generator)
    with mock.patch.object(ovr, "_PAIRS", 5000), Watch() as watch:
        loss = ovr_loss(loc, scale, weight, targets, threshold=1.0, impl=impl, chunk=100, samples=500)
    largest = max(size for size, _, _ in watch.seen)
    assert largest == weight.numel()  # its gradient
    assert max(size for size, dtype, _ in watch.seen if dtype == torch.float32) <= 5000
    with Watch() as watch:
        loss.backward()
    copies = {name for size, _, name in watch.seen if size == weight.numel()}
    assert copies <= {"detach"}  # the gradient is handed over, not copied


def test_an_expanded_scale_is_the_scale_of_all(case):
    loc, scale, weight, targets = case
    one = scale[:1]
    with Watch() as watch:
        loss = ovr_loss(loc, one.expand(5, 7), weight, targets, threshold=0.5, impl="chunked")
    assert_close(loss, ovr_loss(loc, one.repeat(5, 1), weight, targets, threshold=0.5))
    products = [size for size, _, name in watch.seen if name == "addmm"]
    assert sorted(products) == [11, 55]


def test_an_expanded_scale_that_wants_gradients_gets_one_per_token(case):
    loc, scale, weight, targets = case
    found = []
    for impl in ("dense", "chunked"):
        leaf = scale[:1].expand(5, 7).detach().requires_grad_()
        loss = ovr_loss(loc, leaf, weight, targets, threshold=0.5, impl=impl)
        found.append(torch.autograd.grad(loss, leaf)[0])
    assert_close(*found)
    assert bool((found[0] != 0).all())


def test_backward_runs_once_and_says_so(case):
    loc, scale, weight, targets = case
    loss = ovr_loss(loc.requires_grad_(), scale, weight, targets, threshold=0.5, impl="chunked")
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="dense"):
        loss.backward()


@pytest.mark.parametrize("impl", FORMS)
def test_without_gradients_the_loss_is_the_same(case, impl):
    loc, scale, weight, targets = case
    weight.requires_grad_()
    wanted = ovr_loss(loc, scale, weight, targets, threshold=0.5, impl=impl)
    with torch.no_grad(), Watch() as watch:
        loss = ovr_loss(loc, scale, weight, targets, threshold=0.5, impl=impl)
    assert torch.equal(loss, wanted)
    assert "addmm_" not in {name for _, _, name in watch.seen}  # nor is any computed


@pytest.mark.parametrize("impl", FORMS)
def test_autocast_does_not_reach_the_loss(case, impl):
    expected = ovr_loss(*case, threshold=0.5, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ovr_loss(*case, threshold=0.5, impl=impl), expected)


def test_normalised_nll_divides_by_the_sum(case):
    loc, scale, weight, targets = case
    log_prob = ovr_log_prob(loc @ weight.T, scale @ weight.abs().T, 0.4)
    share = log_prob.exp() / log_prob.exp().sum(-1, keepdim=True)
    mixed = targets.clone()
    mixed[2] = IGNORE
    kept = torch.tensor([0, 1, 3, 4])
    assert_close(normalised_ovr_nll(log_prob, mixed), -share[kept, targets[kept]].log().mean())


def gated_by_hand(loc, scale, values, mask, num_prob, alpha):
    with mp.workdps(50):
        rows = zip(*map(oracles.exact, (loc, scale, values, num_prob)), mask.flatten().tolist(), strict=True)
        return mp.fsum(
            (mp.mpf(alpha) + (1 - mp.mpf(alpha)) * p) * mp.log(mp.pi * s * (1 + ((v - m) / s) ** 2))
            for m, s, v, p, kept in rows
            if kept
        )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_nll_matches_the_formula(alpha, dtype, generator):
    loc, scale = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator) + 0.1
    values = (10 ** (8 * torch.randn(3, 5, generator=generator).double())).to(dtype)
    mask, num_prob = torch.rand(3, 5, generator=generator) < 0.6, torch.rand(3, 5, generator=generator)
    arguments = (loc, scale, values, mask, num_prob, alpha)
    expected = torch.tensor(float(gated_by_hand(*arguments)), dtype=dtype)
    assert_close(gated_cauchy_nll(*arguments, reduction="sum"), expected, rtol=2e-6, atol=0)
    assert_close(gated_cauchy_nll(*arguments), expected / mask.sum(), rtol=2e-6, atol=0)


def test_gated_nll_reads_nothing_outside_the_mask_and_gates_with_gradient():
    loc, scale = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    values, num_prob = torch.tensor([3.0, math.nan]), torch.tensor([0.5, 0.5], requires_grad=True)
    gated_cauchy_nll(loc, scale, values, torch.tensor([True, False]), num_prob, 0.2).backward()
    assert_close(num_prob.grad, torch.tensor([0.8 * math.log(10 * math.pi), 0.0]))
    assert_close(loc.grad, torch.tensor([-0.6 * 2 * 3 / 10, 0.0]))
    assert_close(scale.grad, torch.tensor([0.6 * (1 - 2 * 9 / 10), 0.0]))


def test_gated_nll_of_no_value_is_zero_with_gradients():
    loc = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    one = torch.ones(2)
    loss = gated_cauchy_nll(loc, one, one * math.inf, one < 0, one, 0.5)
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    assert torch.equal(loc.grad, torch.zeros_like(loc))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signed_log_and_back(dtype):
    values = torch.cat(
        [torch.tensor([0.0, 1e30, -1e30], dtype=dtype), oracles.spread(300, 1e-30, 1e30, dtype)]
    )
    with mp.workdps(60):
        reference = [mp.sign(v) * mp.log1p(abs(v)) for v in oracles.exact(values)]
    assert max(oracles.ulp_errors(signed_log(values), reference)) <= 2
    y = oracles.spread(300, 1e-30, 80, dtype)
    with mp.workdps(60):
        reference = [mp.sign(v) * mp.expm1(abs(v)) for v in oracles.exact(y)]
    assert max(oracles.ulp_errors(signed_log_inverse(y), reference)) <= 2
    eps = torch.finfo(dtype).eps
    assert_close(signed_log_inverse(signed_log(values)), values, rtol=150 * eps, atol=0)
    ends = torch.tensor([-1000.0, 1000.0], dtype=dtype)
    assert signed_log_inverse(ends).tolist() == [-math.inf, math.inf]
    assert bool(signed_log_inverse(torch.tensor([math.nan], dtype=dtype)).isnan())


def test_signed_log_is_smooth():
    v = torch.tensor([-1e30, -3.0, -1e-30, 0.0, 1e-30, 3.0, 1e30], requires_grad=True)
    (slope,) = torch.autograd.grad(signed_log(v).sum(), v)
    assert_close(slope, 1 / (1 + v.detach().abs()))
    y = torch.tensor([-100.0, -3.0, 0.0, 3.0, 60.0], requires_grad=True)
    (slope,) = torch.autograd.grad(signed_log_inverse(y).sum(), y)
    assert_close(slope, y.detach().abs().exp())


BAD_LOSSES = [
    ({"impl": "fast"}, ConfigError, "dense"),
    ({"impl": "chunked", "chunk": 0}, ConfigError, "chunk=0"),
    ({"impl": "sampled", "samples": 1}, ConfigError, "samples=1"),
    ({"class_noise": -0.1}, ConfigError, "class_noise=-0.1"),
    ({"targets": torch.tensor([0, 1, 2, 3, 11])}, ConfigError, "target 11 with 11"),
    ({"targets": torch.tensor([0, 1, 2, 3, -1])}, ConfigError, "target -1"),
    ({"latent_loc": torch.zeros(4, 7)}, ShapeError, "flatten"),
    ({"latent_scale": torch.ones(2, 7)}, ShapeError, "flatten"),
    ({"weight": torch.ones(11, 6)}, ShapeError, "flatten"),
    ({"threshold": torch.zeros(5)}, ShapeError, "threshold"),
    ({"threshold": torch.zeros(4, 1)}, ShapeError, "threshold"),
    ({"class_noise": torch.ones(5, 1)}, ShapeError, "class_noise"),
    ({"bias": torch.ones(5)}, ShapeError, "bias"),
]


REQUESTS = [(ovr_loss, *row) for row in BAD_LOSSES] + [(ovr_loss_estimate, *row) for row in BAD_LOSSES[3:]]


@pytest.mark.parametrize(("function", "change", "error", "match"), REQUESTS)
def test_bad_requests(case, function, change, error, match):
    names = ("latent_loc", "latent_scale", "weight", "targets")
    arguments = {"threshold": 0.0} | dict(zip(names, case, strict=True)) | change
    with pytest.raises(error, match=match):
        # The annotations of the tests' type checker stand in front of the check that users meet.
        inspect.unwrap(function)(**arguments)


def test_bad_requests_to_the_gated_loss():
    one = torch.ones(2)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="alpha"):
            gated_cauchy_nll(one, one, one, one > 0, one, alpha)
    unchecked = inspect.unwrap(gated_cauchy_nll)
    with pytest.raises(ConfigError, match="reduction='none'"):
        unchecked(one, one, one, one > 0, one, 0.5, reduction="none")
    with pytest.raises(ShapeError, match="mask"):
        unchecked(one, one, one, torch.ones(3) > 0, one, 0.5)
