"""Stages 1 to 3 of one layer: the literal path is the pieces' own, every switch is its definition."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from merge import tefm
from tether.errors import ConfigError, ShapeError
from tether.merge.ensembles import mean_curvature, neuron_features, spectral_labels
from tether.merge.matching import ensemble_similarity, match_ensembles
from tether.merge.paper import fuse_paper
from tether.merge.task_vectors import (
    fuse_projected,
    fuse_shared,
    input_directions,
    interference,
    interference_mask,
)
from tether.merge.tefm.layer import directions_of, fuse_layer
from tether.merge.tefm.neurons import curvature
from tether.merge.tefm.switches import PRESETS, Options, Switches

EXACT = {"rtol": 0, "atol": 1e-12}
CHOICES = {
    "gradient": ("paper", "true"),
    "hessian": ("paper", "squared", "fisher"),
    "features": ("mean", "samples"),
    "affinity": ("cosine", "shifted"),
    "matching": ("ensembles", "rows"),
    "task_vector": ("ensemble", "row"),
    "sigma": (1.0, 0.0),
    "interference": ("paper", "ensembles", "rows"),
    "mask": ("paper", "exponential", "none"),
    "direction": ("paper", "inputs"),
    "rest": ("masked", "whole"),
    "update": ("ensemble", "row", "symmetric"),
}
FLIPS = [(form, name, value) for form in PRESETS for name, values in CHOICES.items() for value in values]


@pytest.fixture
def sides():
    return tefm.side(1), tefm.side(2)


@pytest.fixture
def parent():
    return torch.randn(tefm.ROWS, tefm.INPUTS, dtype=torch.float64)


def basis(chosen):
    return tefm.directions() if chosen.direction == "inputs" else None


@pytest.mark.parametrize("affinity", ["cosine", "shifted"])
@pytest.mark.parametrize("with_parent", [True, False])
def test_the_literal_path_is_the_pieces_own(sides, parent, affinity, with_parent):
    a, b = sides
    c = parent if with_parent else None
    found = fuse_layer(a, b, c, None, tefm.switches(affinity=affinity, parent=with_parent))
    phi = [torch.from_numpy(tefm.mean_phi(side.neurons)) for side in sides]
    labels = [spectral_labels(one, 4, affinity=affinity) for one in phi]
    curves = [one[:, 1].square() + one[:, 2] for one in phi]
    match = match_ensembles(ensemble_similarity(*phi, *labels, *curves))
    expected = fuse_paper(a.weight, b.weight, c, *phi, *labels, match)
    assert_close(found.weight, expected, **EXACT)
    assert float((expected - a.weight).abs().max()) > 0.1


def test_the_corrected_path_is_the_pieces_own(sides, parent):
    a, b = sides
    axes = tefm.directions()
    chosen = tefm.switches("corrected")
    mean = [torch.from_numpy(tefm.mean_phi(side.neurons)) for side in sides]
    both = torch.cat(mean)
    one, other = ((both - both.mean(0)) / both.std(0)).chunk(2)
    curve = mean_curvature(b.neurons.gradient.double())
    score = interference(one, other, curve / curve.mean())
    labels = spectral_labels(neuron_features(b.neurons.phi), 4)
    shared = torch.stack([score[labels == k].mean() for k in range(4)])[labels]
    mask = interference_mask(shared)
    tau = b.weight - parent
    by_row = fuse_layer(a, b, parent, axes, chosen._replace(update="row", lambda_ortho=0.5))
    assert_close(by_row.weight, fuse_projected(a.weight, tau, axes, mask), **EXACT)
    both_ways = fuse_layer(a, b, parent, axes, chosen)
    expected = fuse_projected(parent, a.weight - parent + tau, axes, mask, lambda_ortho=0.7)
    assert_close(both_ways.weight, expected, **EXACT)
    unmasked = fuse_layer(a, b, parent, axes, chosen._replace(mask="none"))
    half = torch.full((tefm.ROWS,), 0.5, dtype=torch.float64)
    assert_close(unmasked.weight, fuse_shared(parent, a.weight - parent, tau, axes, half), **EXACT)
    assert float((both_ways.weight - unmasked.weight).abs().max()) > 0.01


@pytest.mark.parametrize(("form", "name", "value"), FLIPS)
def test_every_switch_is_its_definition(sides, parent, form, name, value):
    a, b = sides
    chosen = tefm.switches(form, **{name: value})
    assert getattr(chosen, name) == value
    found = fuse_layer(a, b, parent, basis(chosen), chosen)
    expected = tefm.fused(a, b, parent, basis(chosen), found.partners, chosen)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", PRESETS)
@pytest.mark.parametrize("value", ["paper", "weights"])
@pytest.mark.parametrize("task_vector", ["ensemble", "row"])
def test_without_a_parent(sides, form, value, task_vector):
    a, b = sides
    chosen = tefm.switches(form, parent=False, without_parent=value, task_vector=task_vector)
    assert chosen.update == {"literal": "ensemble", "corrected": "row"}[form]
    found = fuse_layer(a, b, None, basis(chosen), chosen)
    expected = tefm.fused(a, b, None, basis(chosen), found.partners, chosen)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=0, atol=1e-10)


def other_value(form, name):
    return next(value for value in CHOICES[name] if value != PRESETS[form][name])


def gap_of(sides, parent, form, name, **given):
    results = []
    for choice in ({}, {name: other_value(form, name)}):
        chosen = tefm.switches(form, **given, **choice)
        results.append(fuse_layer(*sides, parent, basis(chosen), chosen).weight)
    return float((results[0] - results[1]).abs().max())


@pytest.mark.parametrize("form", PRESETS)
@pytest.mark.parametrize("name", sorted(set(CHOICES) - {"gradient"}))
def test_every_switch_changes_the_result(sides, parent, form, name):
    assert gap_of(sides, parent, form, name, lambda_ortho=0.8) > 1e-4


@pytest.mark.parametrize("name", ["direction", "interference", "mask"])
def test_as_written_the_projection_cancels_where_both_lambdas_are_equal(sides, parent, name):
    assert gap_of(sides, parent, "literal", name) < 1e-12
    assert gap_of(sides, parent, "literal", name, rest="whole") > 1e-3


def test_lambda_stands_for_both_weights():
    one = Options(**{"lambda": 0.3}).chosen(parent=True)
    assert (one.lambda_proj, one.lambda_ortho) == (0.3, 0.3)
    two = Options(**{"lambda": 0.3, "lambda_ortho": 0.9}).chosen(parent=True)
    assert (two.lambda_proj, two.lambda_ortho) == (0.3, 0.9)
    assert Options().chosen(parent=True).lambda_ortho == 0.7
    literal = Options(form="literal").chosen(parent=True)
    assert (literal.beta, literal.lambda_proj, literal.lambda_ortho, literal.sigma) == (0.1, 0.5, 0.5, 1.0)


def test_presets_make_every_choice_in_two_ways():
    assert set(PRESETS["literal"]) == set(PRESETS["corrected"])
    same = {name for name, value in PRESETS["literal"].items() if PRESETS["corrected"][name] == value}
    assert same == {"lambda_proj"}
    assert set(Switches._fields) - set(PRESETS["literal"]) == {"gamma", "ensembles", "beta", "rank"}


def test_equal_models_give_themselves_where_each_row_has_its_own_update(sides):
    a, _ = sides
    chosen = tefm.switches("corrected", parent=False)
    assert_close(fuse_layer(a, a, None, tefm.directions(), chosen).weight, a.weight, **EXACT)


def test_rows_that_no_unit_of_b_takes_stay_as_they_are(sides, parent):
    a, b = sides
    gone = [3, 11, 12]
    known = b.neurons._replace(
        activation=b.neurons.activation.clone(), gradient=b.neurons.gradient.clone(), fisher=None
    )
    known.activation[:, gone] = 0
    known.gradient[:, gone] = 0
    weight = b.weight.clone()
    weight[gone] = parent[gone]
    for form in PRESETS:
        chosen = tefm.switches(form)
        found = fuse_layer(a, b._replace(weight=weight, neurons=known), parent, basis(chosen), chosen)
        kept = torch.ones(tefm.ROWS).bool()
        kept[gone] = False
        assert len(found.partners.labels_b) == tefm.ROWS - 3
        if form == "corrected":
            assert torch.equal(found.moved, kept)
            assert torch.equal(found.weight[gone], a.weight[gone])
        small = b._replace(weight=weight[kept], neurons=known.rows(kept))
        reference = parent[kept]
        if form == "literal":
            # A model of other width by itself: the document's form takes unequal numbers of rows as they are.
            phi = [torch.from_numpy(tefm.mean_phi(each)) for each in (a.neurons, small.neurons)]
            labels = [spectral_labels(one, 4, affinity="cosine") for one in phi]
            match = match_ensembles(
                ensemble_similarity(*phi, *labels, *(one[:, 1] ** 2 + one[:, 2] for one in phi))
            )
            expected = fuse_paper(a.weight, small.weight, reference, *phi, *labels, match)
            assert_close(found.weight, expected, **EXACT)
    known.activation[:] = 0
    found = fuse_layer(a, b._replace(neurons=known), parent, None, tefm.switches())
    assert torch.equal(found.weight, a.weight)
    assert found.partners is None


def test_directions_count_both_models_alike():
    draw = torch.randn(2, 40, tefm.INPUTS)
    grams = [one.T @ one for one in draw]
    found = directions_of([grams[0], 1e6 * grams[1]], 3)
    total = sum(gram.double() / gram.double().diagonal().mean() for gram in grams)
    expected = input_directions(total, 3)
    assert_close(found @ found.T, expected @ expected.T, rtol=1e-5, atol=1e-6)
    assert torch.equal(directions_of(grams, 99), torch.eye(tefm.INPUTS, dtype=torch.float64))


def test_bad_layers_are_refused(sides, parent):
    a, b = sides
    with pytest.raises(ShapeError, match="expected equal shapes, and as many neurons as rows"):
        fuse_layer(a, b._replace(weight=b.weight[:, :5]), parent, None, tefm.switches())
    with pytest.raises(ShapeError, match=r"expected \(10, rank\) for inputs"):
        fuse_layer(a, b, parent, None, tefm.switches("corrected"))
    fewer = tefm.side(2, samples=5)
    with pytest.raises(ShapeError, match="A was observed on 6 samples, B on 5"):
        fuse_layer(a, fewer, parent, tefm.directions(), tefm.switches("corrected"))
    # The document's three numbers need no common samples.
    fuse_layer(a, fewer, parent, None, tefm.switches())
    with pytest.raises(ConfigError, match=r"symmetric.*there is none; give base"):
        tefm.switches(update="symmetric", parent=False)
    with pytest.raises(ConfigError, match=r"add up to exp\(-2000\), which is 0 even in float64"):
        fuse_layer(
            a._replace(neurons=a.neurons._replace(log_mass=torch.full((6,), -2000.0))), b, parent, None,
            tefm.switches(),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="no Fisher norms"):
        curvature(a.neurons._replace(fisher=None), a.neurons.mean(), "fisher")
