"""Every operator against its dense formula in float64, and against values that mergekit itself gave."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from checkpoints import plan, save
from tether.errors import ConfigError
from tether.merge.inputs import BLOCK
from tether.merge.operators import OPERATORS
from tether.merge.operators.dare_ties import kept
from tether.merge.operators.selection import thresholds, trim
from tether.merge.run import merge

MERGEKIT = json.loads((Path(__file__).parent / "mergekit_0_1_5.json").read_text())["cases"]


def run(folder, tensors, operator, options=None, settings=None, base="base"):
    """Merge tensors (name to array each, the parent under `base`) through files."""
    for name, each in tensors.items():
        save(folder / name, each)
    settings = settings or {}
    models = {
        name: {"path": str(folder / name), **settings.get(name, {})} for name in tensors if name != base
    }
    fields = {"operator": operator, "models": models, "options": options or {}}
    if base in tensors:
        fields["base"] = {"path": str(folder / base)}
    merge(plan(folder, **fields), folder / "out", threads=1)
    return load_file(folder / "out" / "model.safetensors")


def wave(seed):
    index = torch.arange(24, dtype=torch.float64)
    return torch.sin((index + 1) ** 2 * 0.37 + seed * 1.7).float().reshape(4, 6).numpy()


@pytest.mark.parametrize("case", MERGEKIT)
def test_values_of_mergekit(tmp_path, case):
    expected = np.float32(MERGEKIT[case]["values"]).reshape(4, 6)
    if case == "slerp":
        found = run(tmp_path, {"a": {"w": wave(1)}, "b": {"w": wave(2)}}, "slerp", {"t": MERGEKIT[case]["t"]})
        np.testing.assert_allclose(found["w"], expected, rtol=1e-6)
        return
    given_ = MERGEKIT[case]
    operator = "task_arithmetic" if case == "task_arithmetic" else "ties/mergekit"
    options = {"lambda": given_["lam"]}
    settings = {name: {"weight": weight} for name, weight in zip("abc", given_["weight"], strict=True)}
    if operator == "ties/mergekit":
        options["normalize"] = given_["norm"]
        for name, density in zip("abc", given_["density"], strict=True):
            settings[name]["density"] = density
    tensors = {name: {"w": wave(seed)} for seed, name in enumerate(["base", "a", "b", "c"])}
    found = run(tmp_path, tensors, operator, options, settings)
    # Same operations in the same order and precision: the same bits.
    np.testing.assert_array_equal(found["w"], expected)


def big(seed, size=BLOCK + 12345):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_linear_is_the_weighted_mean(tmp_path):
    one, two = big(1), big(2)
    settings = {"a": {"weight": 3}, "b": {"weight": 1.5}}
    found = run(tmp_path, {"a": {"w": one}, "b": {"w": two}}, "linear", None, settings)["w"]
    expected = (3 * one.astype(np.float64) + 1.5 * two) / 4.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 * 5)


def test_linear_refuses_weights_that_cancel(tmp_path):
    settings = {"a": {"weight": 1}, "b": {"weight": -1}}
    with pytest.raises(ConfigError, match="sum to 0"):
        run(tmp_path, {"a": {"w": wave(1)}, "b": {"w": wave(2)}}, "linear", None, settings)
    assert not (tmp_path / "out").exists()


def dense_ties(base, models, weights, densities, normalize, scale):
    """Definition in float64 with one full sort a model."""
    deltas = []
    for model, density in zip(models, densities, strict=True):
        delta = torch.from_numpy(model - base)  # float32, as the operator sees it
        order = torch.sort(delta.abs(), descending=True, stable=True).indices
        keep = torch.zeros(len(delta), dtype=torch.bool)
        keep[order[: max(1, int(density * len(delta)))]] = True
        deltas.append(torch.where(keep, delta, 0).double())
    weighted = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == sign
    mixed = (weighted * agree).sum(0)
    if normalize:
        divisor = (torch.tensor(weights).double().unsqueeze(1) * agree).sum(0)
        mixed = mixed / torch.where(divisor == 0, 1, divisor)
    return base + scale * mixed.numpy()


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_its_definition_over_several_blocks(tmp_path, normalize):
    base, one, two = big(0), big(0) + 0.1 * big(1), big(0) + 0.1 * big(2)
    settings = {"a": {"weight": 0.6, "density": 0.2}, "b": {"weight": 0.9, "density": 0.45}}
    tensors = {"base": {"w": base}, "a": {"w": one}, "b": {"w": two}}
    found = run(tmp_path, tensors, "ties/mergekit", {"normalize": normalize, "lambda": 0.7}, settings)["w"]
    expected = dense_ties(base, [one, two], [0.6, 0.9], [0.2, 0.45], normalize, 0.7)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_ties_keeps_exactly_so_many_where_magnitudes_are_equal(tmp_path):
    base = np.zeros(BLOCK + 10, np.float32)
    model = base.copy()
    model[::2] = 1.0  # half of them equal, across two blocks
    model[-1] = 5.0
    settings = {"a": {"density": 0.25}}
    found = run(tmp_path, {"base": {"w": base}, "a": {"w": model}}, "ties/mergekit", None, settings)["w"]
    keep = int(0.25 * len(base))
    assert (found != 0).sum() == keep
    assert found[-1] == 5.0
    assert (found[: 2 * (keep - 1) : 2] == 1.0).all()


def test_ties_leaves_out_a_model_of_density_0(tmp_path):
    base, one, two = wave(0), wave(1), wave(2)
    settings = {"a": {"density": 0.5}, "b": {"density": 0.0, "weight": 3.0}}
    both = run(
        tmp_path / "x",
        {"base": {"w": base}, "a": {"w": one}, "b": {"w": two}},
        "ties/mergekit",
        None,
        settings,
    )
    alone = run(
        tmp_path / "y", {"base": {"w": base}, "a": {"w": one}}, "ties/mergekit", None, {"a": settings["a"]}
    )
    np.testing.assert_array_equal(both["w"], alone["w"])
    assert (both["w"] != base).sum() == 12


@given(
    parts=st.lists(st.lists(st.integers(-6, 6), min_size=1, max_size=7), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_the_kth_largest_is_that_of_a_sort(parts, share):
    blocks = [np.float32(part) / 4 for part in parts]
    values = np.concatenate(blocks)
    keep = max(1, int(share * len(values)))
    (limit,) = thresholds(lambda: [[block] for block in blocks], [keep])
    assert np.uint32(limit.bits).view(np.float32) == np.sort(np.abs(values))[::-1][keep - 1]
    trimmed, seen = [], 0
    for block in blocks:
        part = block.copy()
        seen = trim(part, limit, seen)
        trimmed.append(part)
    order = np.argsort(-np.abs(values), kind="stable")[:keep]
    expected = np.zeros_like(values)
    expected[order] = values[order]
    np.testing.assert_array_equal(np.concatenate(trimmed), expected)


def test_dare_drops_at_its_rate_and_keeps_the_mean(tmp_path):
    base, model = np.zeros(BLOCK * 2 + 5, np.float32), np.ones(BLOCK * 2 + 5, np.float32)
    settings = {"a": {"density": 0.3}}
    found = run(tmp_path, {"base": {"w": base}, "a": {"w": model}}, "dare_ties", None, settings)["w"]
    assert set(np.unique(found)) == {np.float32(0), np.float32(1) / np.float32(0.3)}
    spread = np.sqrt(0.3 * 0.7 / len(base))
    assert abs((found > 0).mean() - 0.3) < 4 * spread
    halves = found[:BLOCK] > 0, found[BLOCK : 2 * BLOCK] > 0
    assert abs(np.corrcoef(*halves)[0, 1]) < 4 / np.sqrt(BLOCK)


def test_dare_draws_for_each_tensor_and_model_alone(tmp_path):
    zeros, ones = np.zeros(4000, np.float32), np.ones(4000, np.float32)
    tensors = {"base": {"v": zeros, "w": zeros}, "a": {"v": ones, "w": ones}}
    found = run(tmp_path / "x", tensors, "dare_ties", None, {"a": {"density": 0.5}})
    assert abs(np.corrcoef(found["v"], found["w"])[0, 1]) < 0.07
    # Another model beside it, another density elsewhere: this tensor's mask stays.
    tensors["b"] = {"v": zeros, "w": zeros}
    again = run(tmp_path / "y", tensors, "dare_ties", None, {"a": {"density": 0.5}, "b": {"density": 0.9}})
    np.testing.assert_array_equal(found["v"], again["v"])


def test_dare_is_its_definition(tmp_path):
    tensors = {"base": {"w": wave(0)}, "a": {"w": wave(1)}, "b": {"w": wave(2)}}
    settings = {"a": {"density": 1.0, "weight": 0.5}, "b": {"density": 1.0, "weight": 0.8}}
    found = run(tmp_path, tensors, "dare_ties", {"lambda": 0.5, "normalize": True}, settings)["w"]
    flat = [tensors[name]["w"].reshape(-1) for name in ("base", "a", "b")]
    expected = dense_ties(flat[0], flat[1:], [0.5, 0.8], [1.0, 1.0], True, 0.5).reshape(4, 6)
    np.testing.assert_allclose(found, expected, atol=3e-7)


def test_masks_have_their_density():
    for density in (0.01, 0.5, 0.999):
        assert abs(kept(1, 100_000, density).mean() - density) < 0.006
    assert kept(1, 9, 1.0).all()
    assert kept(1, 7, 0.5).tolist() == kept(1, 9, 0.5)[:7].tolist()


def test_slerp_of_orthogonal_vectors_keeps_the_norm(tmp_path):
    one, two = np.zeros(8, np.float32), np.zeros(8, np.float32)
    one[0], two[1] = 2, 2
    found = run(tmp_path, {"a": {"w": one}, "b": {"w": two}}, "slerp", {"t": 0.5})["w"]
    np.testing.assert_allclose(found[:2], [2**0.5, 2**0.5], rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, 0.0])
def test_slerp_of_parallel_vectors_is_a_straight_line(tmp_path, factor):
    one = big(1, 1000)
    two = np.float32(factor) * one
    found = run(tmp_path, {"a": {"w": one}, "b": {"w": two}}, "slerp", {"t": 0.25})["w"]
    np.testing.assert_allclose(found, 0.75 * one + 0.25 * two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_slerp_with_a_tensor_that_has_no_direction_is_a_straight_line(tmp_path, zero):
    tensors = {
        name: {"w": np.zeros((4, 6), np.float32) if zero in {name, "both"} else wave(1)} for name in "ab"
    }
    found = run(tmp_path, tensors, "slerp", {"t": 0.25})["w"]
    expected = 0.75 * tensors["a"]["w"].astype(np.float64) + 0.25 * tensors["b"]["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_as_near_to_the_mean_as_it_says(tmp_path, count, normalize):
    draw = np.random.default_rng(count)
    weights = draw.uniform(0.1, 3, count)
    tensors = {f"m{n}": {"w": draw.standard_normal((40, 50)).astype(np.float32)} for n in range(count)}
    settings = {f"m{n}": {"weight": float(weight)} for n, weight in enumerate(weights)}
    found = run(tmp_path, tensors, "linear", {"normalize": normalize}, settings)["w"]
    parts = [
        weight * each["w"].astype(np.float64) for weight, each in zip(weights, tensors.values(), strict=True)
    ]
    total = weights.sum() if normalize else 1.0
    bound = (count + 3) * 2.0**-24 * np.abs(parts).sum(0) / total
    assert (np.abs(found - np.sum(parts, 0) / total) <= bound).all()


# The others need what was observed of the models.
@pytest.mark.parametrize(
    "operator", sorted(OPERATORS.keys() - {"regression_mean", "fisher_mean", "lape_tefm"})
)
def test_merging_a_model_with_itself_gives_it_back(tmp_path, operator):
    values = {"w": wave(3), "scalar": np.array(0.7, np.float32), "empty": np.zeros((0, 3), np.float32)}
    tensors = {"base": values, "a": values, "b": values}
    found = run(tmp_path, tensors, operator, {"t": 0.3} if operator == "slerp" else None)
    np.testing.assert_allclose(found["w"], values["w"], rtol=3e-7)
    assert found["scalar"].shape == ()
    assert found["empty"].shape == (0, 3)
