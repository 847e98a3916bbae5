import pytest
import torch
from torch.testing import assert_close

from tether.errors import ConfigError, ShapeError
from tether.merge.fusion import regression_mean, responsibilities, row_shares


def layer(outputs=5, inputs=8, models=2, tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) for _ in range(models)]
    mixing = [torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) for _ in range(models)]
    seen = [torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix for mix in mixing]
    return weights, seen, [x.T @ x for x in seen]


def test_solves_the_least_squares_problem_of_both_models():
    weights, seen, grams = layer()
    # Without shrinkage the solution is ordinary least squares on both models' tokens at equal mean energy.
    rows = [x / gram.diagonal().mean().sqrt() for x, gram in zip(seen, grams, strict=True)]
    targets = [x @ w.T for x, w in zip(rows, weights, strict=True)]
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
    found = regression_mean(weights, grams, shrinkage=1.0, ridge=1e-14)
    assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_row_shares_weigh_rows_one_by_one():
    weights, _, grams = layer()
    shares = torch.rand(2, 5, dtype=torch.float64) + 0.1
    shares[:, 3] = shares[:, 1]
    found = regression_mean(weights, grams, shares=shares)
    for row in range(5):
        alone = regression_mean([w[row : row + 1] for w in weights], grams, shares=shares[:, row])
        assert_close(found[row : row + 1], alone)


def test_equal_models_are_kept():
    weights, _, grams = layer(models=1)
    found = regression_mean(weights * 3, [grams[0], torch.eye(8, dtype=torch.float64), 5 * grams[0]])
    assert_close(found, weights[0], rtol=1e-10, atol=1e-10)
    half = regression_mean([weights[0].bfloat16()] * 2, grams * 2)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, weights[0].bfloat16())


def test_equal_diagonal_metrics_give_the_mean():
    weights, _, _ = layer()
    found = regression_mean(weights, [torch.eye(8), 7 * torch.eye(8)])
    assert_close(found, (weights[0] + weights[1]) / 2)


def test_commutes_with_permutations_of_inputs_and_outputs():
    weights, _, grams = layer()
    rows, columns = torch.randperm(5), torch.randperm(8)
    moved = regression_mean([w[rows][:, columns] for w in weights], [g[columns][:, columns] for g in grams])
    assert_close(moved, regression_mean(weights, grams)[rows][:, columns])


def test_inputs_that_only_one_model_sees_take_its_columns():
    weights, _, _ = layer()
    only_a = torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64))
    found = regression_mean(weights, [only_a, torch.eye(8, dtype=torch.float64) - only_a], ridge=1e-12)
    assert_close(found, torch.cat([weights[0][:, :4], weights[1][:, 4:]], 1), rtol=1e-8, atol=1e-8)


def test_bad_requests():
    weights, _, grams = layer()
    with pytest.raises(ShapeError, match="expected as many"):
        regression_mean(weights, grams[:1])
    with pytest.raises(ShapeError, match=r"misfits: \[\(3, 8\)\]"):
        regression_mean([weights[0], weights[1][:3]], grams)
    with pytest.raises(ConfigError, match="zero or not finite"):
        regression_mean(weights, [grams[0], torch.zeros(8, 8)])
    with pytest.raises(ConfigError, match="zero or not finite"):
        regression_mean(weights, [grams[0], grams[1] * float("nan")])
    with pytest.raises(ConfigError, match="not all zero in a row"):
        regression_mean(weights, grams, shares=torch.zeros(2))
    with pytest.raises(ConfigError, match="expected \\[0, 1\\]"):
        regression_mean(weights, grams, shrinkage=1.5)


def test_row_shares_do_not_depend_on_a_models_scale_and_bins_share_their_mean():
    fishers = [torch.rand(32, dtype=torch.float64) + 0.01 for _ in range(2)]
    shares = row_shares(fishers, ensembles=4)
    assert_close(shares, row_shares([1e6 * fishers[0], fishers[1]], ensembles=4))
    assert_close(shares.sum(0), torch.ones(32, dtype=torch.float64))
    assert len(shares[0].unique()) == 4
    exact = [f / f.mean() for f in fishers]
    ratio = exact[0] / (exact[0] + exact[1])
    ratio = ratio.clamp(0.05, 0.95) / (ratio.clamp(0.05, 0.95) + (1 - ratio).clamp(0.05, 0.95))
    lowest = ratio.sort().values[:8].mean()
    assert_close(shares[0].min(), lowest)
    assert_close(row_shares(fishers, ensembles=1)[0], ratio.mean().expand(32))
    with pytest.raises(ConfigError, match="at least one ensemble"):
        row_shares(fishers, ensembles=0)


def test_responsibilities():
    losses = torch.tensor([[1.0, 3.0], [2.0, 1.0]])
    found = responsibilities(losses)
    assert_close(found.sum(0), torch.ones(2, dtype=torch.float64))
    assert float(found[0, 0]) == pytest.approx(1 / (1 + torch.e**-1))
    with pytest.raises(ConfigError, match="positive number of nats"):
        responsibilities(losses, 0.0)
