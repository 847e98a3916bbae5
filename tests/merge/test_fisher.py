"""Fisher-weighted means of a layer: against dense matrices, against the gradients themselves, and through files."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from checkpoints import plan
from merge import lape
from merge.test_lape_tefm import ENCODINGS, MODULES, family, fields, keep, permuted, tensors
from tether.errors import ConfigError, ShapeError
from tether.merge.fisher import INPUTS, fisher_rows
from tether.merge.gram import gram_location
from tether.merge.observation import observe
from tether.merge.run import merge
from tether.merge.tefm.observed import locate, parse_encoding
from tether.theory.fisher import fisher_mean

__all__ = ["family"]


def layer(models, rows, width, generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [draw(rows, width) for _ in range(models)]
    norms = [draw(rows).square() for _ in range(models)]
    states = [draw(3 * width, width) @ torch.diag(draw(width)) for _ in range(models)]
    return weights, norms, [x.T @ x for x in states]


def matrices(norms, grams, inputs, ridge):
    """Fisher matrix of every row in every model, shape (M, o, i, i)."""
    found = []
    for norm, gram in zip(norms, grams, strict=True):
        metric = gram / gram.trace() + ridge / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        metric = torch.diag(metric.diagonal()) if inputs == "diagonal" else metric
        found.append((norm + ridge * norm.mean())[:, None, None] * metric)
    return torch.stack(found)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("ridge", [1e-8, 1e-3, 0.5])
def test_it_is_the_fisher_mean_of_dense_matrices(models, inputs, ridge, generator):
    weights, norms, grams = layer(models, 5, 7, generator)
    found = fisher_rows(weights, norms, grams, inputs=inputs, ridge=ridge)
    expected = fisher_mean(torch.stack(weights), matrices(norms, grams, inputs, ridge))
    assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_the_matrix_is_that_of_the_gradients_where_they_do_not_depend_on_the_inputs(generator):
    """Every input occurs with every output gradient, so that the Kronecker form is exact."""
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    delta = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    gradients = (delta[:, None, :, None] * x[None, :, None, :]).flatten(0, 1)  # (30, o, i)
    exact = torch.einsum("nri,nrj->rij", gradients, gradients) / len(gradients)
    norms = gradients.square().sum(-1).mean(0)
    other = 2 * torch.eye(4, dtype=torch.float64)
    weights = list(torch.randn(2, 3, 4, generator=generator, dtype=torch.float64))
    found = fisher_rows(
        weights, [norms, torch.full((3,), 8.0).double()], [x.T @ x, other], inputs="full", ridge=1e-12
    )
    expected = fisher_mean(torch.stack(weights), torch.stack([exact, other.expand(3, 4, 4)]))
    assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("inputs", INPUTS)
def test_equal_models_stay_and_units_may_be_renamed(inputs, generator):
    weights, norms, grams = layer(3, 6, 5, generator)
    assert_close(fisher_rows([weights[0]] * 3, norms, grams, inputs=inputs), weights[0])
    rows, columns = (torch.randperm(n, generator=generator) for n in (6, 5))
    moved = fisher_rows(
        [w[rows][:, columns] for w in weights],
        [f[rows] for f in norms],
        [g[columns][:, columns] for g in grams],
        inputs=inputs,
    )
    assert_close(moved, fisher_rows(weights, norms, grams, inputs=inputs)[rows][:, columns])


def test_a_model_that_knows_nothing_of_a_row_leaves_it_to_the_other(generator):
    weights, norms, grams = layer(2, 4, 5, generator)
    norms[0][2] = 0.0
    for inputs in INPUTS:
        found = fisher_rows(weights, norms, grams, inputs=inputs, ridge=1e-9)
        assert_close(found[2], weights[1][2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"inputs": "some"}, ConfigError, "diagonal, full"),
        ({"ridge": 0.0}, ConfigError, "ridge > 0"),
        ({"norms": lambda f: [f[0], -f[1]]}, ConfigError, "model 1 has no information"),
        ({"norms": lambda f: [0 * f[0], f[1]]}, ConfigError, "model 0 has no information"),
        ({"grams": lambda g: [g[0], g[1] * float("nan")]}, ConfigError, "model 1 has no information"),
        ({"grams": lambda g: [g[0], 0 * g[1]]}, ConfigError, "model 1 has no information"),
        ({"grams": lambda g: g[:1]}, ShapeError, "of each model"),
        ({"norms": lambda f: [f[0], f[1][:2]]}, ShapeError, "of each model"),
        ({"weights": lambda w: [w[0], w[1][:, :2]]}, ShapeError, "of each model"),
        ({"weights": lambda w: []}, ShapeError, "of each model"),
    ],
)
def test_bad_input(change, error, words, generator):
    given = dict(zip(("weights", "norms", "grams"), layer(2, 4, 5, generator), strict=True))
    for name, value in change.items():
        given[name] = value(given[name]) if callable(value) else value
    with pytest.raises(error, match=words):
        fisher_rows(given.pop("weights"), given.pop("norms"), given.pop("grams"), **given)


def recipe(folder, **options):
    return fields(folder, base=False, **options) | {"operator": "fisher_mean"}


@pytest.mark.parametrize("options", [{}, {"inputs": "full", "signatures": "paper"}])
def test_a_merge_takes_what_was_observed_and_averages_the_rest(family, tmp_path, options):
    folder, models = family
    given = recipe(folder, **options)
    given["models"]["b"]["weight"] = 3.0
    merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    found, encoding = tensors(tmp_path / "out"), parse_encoding(options.get("signatures", "position"))
    for name in MODULES:
        norms, grams = [], []
        for each in "ab":
            seen = folder / f"seen-{each}"
            at = locate(seen, encoding, name.removeprefix("model."))
            norms.append(load_file(at.file)[f"{name}.fisher"].double().mean(0) * (3 if each == "b" else 1))
            file, tensor = gram_location(seen, int(name.split(".")[2]), name)
            grams.append(load_file(file)[tensor].double())
        weights = [models[each].get_submodule(name).weight.detach().double() for each in "ab"]
        dense = matrices(norms, grams, options.get("inputs", "diagonal"), 1e-6)
        expected = fisher_mean(torch.stack(weights), dense)
        assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-4, atol=1e-5)
        assert float((expected - weights[0] / 4 - weights[1] * 3 / 4).abs().max()) > 1e-3
    for name in set(found) - {f"{module}.weight" for module in MODULES}:
        one, two = (models[each].state_dict()[name] for each in "ab")
        assert_close(found[name], one / 4 + two * 3 / 4)


def test_a_model_in_other_order_is_brought_along_with_what_was_observed(family, tmp_path):
    folder, models = family
    other, maps = permuted(models["b"], 5)
    keep(other, tmp_path / "p")
    observe(other, lape.probes(6), tmp_path / "seen", paths=4, shortest=2, longest=8, encodings=ENCODINGS)
    save_file({name: torch.from_numpy(index) for name, index in maps.items()}, tmp_path / "maps.safetensors")
    for inputs in INPUTS:
        plain = recipe(folder, inputs=inputs) | {"into": "a"}
        aligned = copy.deepcopy(plain)
        aligned["models"]["b"] = {
            "path": str(tmp_path / "p"),
            "observed": str(tmp_path / "seen"),
            "align": str(tmp_path / "maps.safetensors"),
        }
        merge(plan(tmp_path, **plain), tmp_path / f"{inputs}-plain", threads=1)
        merge(plan(tmp_path, **aligned), tmp_path / f"{inputs}-aligned", threads=1)
        one, two = tensors(tmp_path / f"{inputs}-plain"), tensors(tmp_path / f"{inputs}-aligned")
        for name in one:
            assert_close(one[name], two[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("signatures", "words"),
    [("mean", "has no neurons under weighting mean.*--signatures mean"), ("every", "expected a weighting")],
)
def test_what_was_not_observed_is_refused(family, tmp_path, signatures, words):
    with pytest.raises(ConfigError, match=words):
        plan(tmp_path, **recipe(family[0], signatures=signatures))
