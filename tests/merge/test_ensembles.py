import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score
from torch.testing import assert_close

from tether.errors import ConfigError, ShapeError
from tether.merge import ensembles
from tether.merge.ensembles import (
    average_rows,
    importance,
    mean_curvature,
    neuron_features,
    paired_features,
    spectral_labels,
    split_half_agreement,
)
from tether.merge.matching import (
    EnsembleMatch,
    ensemble_similarity,
    match_ensembles,
    match_neurons,
    match_within,
)


def groups(per_group=40, kinds=4, width=12, noise=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, width, generator=generator, dtype=torch.float64)
    truth = torch.arange(kinds).repeat_interleave(per_group)
    rows = centres[truth] + noise * torch.randn(len(truth), width, generator=generator, dtype=torch.float64)
    return rows, truth


def cosines(rows, others=None):
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return unit @ (unit if others is None else torch.nn.functional.normalize(others, dim=-1)).T


def test_low_rank_clustering_agrees_with_the_dense_affinity():
    rows, truth = groups()
    dense = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(
        ((1 + cosines(rows)) / 2).numpy()
    )
    ours = spectral_labels(rows, 4).numpy()
    assert adjusted_rand_score(dense, ours) > 0.99
    assert adjusted_rand_score(truth.numpy(), ours) > 0.95


def test_raw_cosines_that_are_not_negative_are_clustered_as_usual(monkeypatch):
    rows, truth = groups(noise=0.1)
    rows = rows.abs()
    matrix = cosines(rows)
    assert float(matrix.min()) > 0
    dense = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(matrix.numpy())
    monkeypatch.setattr(ensembles, "_PRODUCTS", 7 * len(rows))  # degrees in several parts
    ours = spectral_labels(rows, 4, affinity="cosine").numpy()
    assert adjusted_rand_score(dense, ours) > 0.99
    assert adjusted_rand_score(truth.numpy(), ours) > 0.95


def test_raw_cosines_with_negative_ones_take_the_degrees_of_the_signed_laplacian():
    rows, _ = groups(per_group=30, kinds=2)
    rows = torch.cat([rows, -rows[:10]])  # a small group opposite a large one
    matrix = cosines(rows).numpy()
    # The usual degrees have no root here.
    assert matrix.sum(1).min() < 0
    root = 1 / np.sqrt(np.abs(matrix).sum(1))
    _, vectors = np.linalg.eigh(root[:, None] * matrix * root)
    leading = vectors[:, -3:] / np.linalg.norm(vectors[:, -3:], axis=1, keepdims=True)
    dense = KMeans(3, random_state=0, n_init=4).fit_predict(leading)
    ours = spectral_labels(rows, 3, affinity="cosine").numpy()
    assert adjusted_rand_score(dense, ours) > 0.99
    with pytest.raises(ConfigError, match="unknown affinity 'raw': choose one of shifted, cosine"):
        spectral_labels(rows, 3, affinity="raw")


def test_features_of_two_models_have_the_same_columns_each_standardised_by_itself():
    phi_a, phi_b = (torch.randn(5, n, 3, dtype=torch.float64) for n in (30, 20))
    phi_b = 100 * phi_b + 7
    for phi in (phi_a, phi_b):
        phi[..., 2] = torch.randn(5, 1, dtype=torch.float64)  # the loss
    phi_b[3, :, 1] = 0.0  # nothing was learnt of B's gradients from this sample
    found = paired_features(phi_a, phi_b)
    assert [one.shape for one in found] == [(30, 9), (20, 9)]
    kept = [i for i in range(10) if i != 7]
    assert_close(found[0], neuron_features(phi_a)[:, kept])
    assert_close(found[1].mean(0), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(found[1].square().mean(0), torch.ones(9, dtype=torch.float64))


def test_averages_over_ensembles():
    rows = torch.arange(10.0).reshape(5, 2)
    found = average_rows(rows, torch.tensor([0, 2, 0, 2, 2]))
    assert_close(found, torch.tensor([[2.0, 3.0], [0.0, 0.0], [16 / 3, 19 / 3]]))


def test_labels_are_deterministic_and_numbered_by_first_appearance():
    rows, _ = groups(seed=3)
    first = spectral_labels(rows, 5, seed=1)
    assert torch.equal(first, spectral_labels(rows.clone(), 5, seed=1))
    appearance = [int((first == k).int().argmax()) for k in range(5)]
    assert appearance == sorted(appearance)


def test_equal_rows_and_more_clusters_than_kinds():
    rows = torch.ones(6, 3)
    assert set(spectral_labels(rows, 3).tolist()) == {0}
    with pytest.raises(ConfigError, match="expected 1 to 6"):
        spectral_labels(rows, 7)


def test_features_standardise_each_component_and_drop_what_all_neurons_share():
    phi = torch.randn(5, 30, 3, dtype=torch.float64) * torch.tensor([100.0, 0.01, 1.0])
    phi[..., 2] = torch.randn(5, 1, dtype=torch.float64)  # the loss: one number a sample
    found = neuron_features(phi)
    assert found.shape == (30, 10)
    assert_close(found.mean(0), torch.zeros(10, dtype=torch.float64))
    assert_close(found.square().mean(0), torch.ones(10, dtype=torch.float64))


def test_similarity_is_the_double_sum_of_the_document():
    rows_a, labels_a = groups(per_group=5, kinds=3)
    rows_b, labels_b = groups(per_group=4, kinds=4, seed=1)
    curve_a, curve_b = torch.rand(15, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    found = ensemble_similarity(rows_a, rows_b, labels_a, labels_b, curve_a, curve_b, beta=0.7)
    cos = cosines(rows_a, rows_b)
    for k in range(3):
        for p in range(4):
            inside = cos[labels_a == k][:, labels_b == p].sum() / (5 * 4)
            gap = abs(curve_a[labels_a == k].mean() - curve_b[labels_b == p].mean())
            assert float(found[k, p]) == pytest.approx(float(inside * torch.exp(-0.7 * gap)), rel=1e-12)


def test_matching_is_the_best_of_all_assignments():
    similarity = torch.rand(5, 7, dtype=torch.float64)
    found = match_ensembles(similarity)
    assert found.first.tolist() == [0, 1, 2, 3, 4]
    assert len(set(found.second.tolist())) == 5
    best = linear_sum_assignment(-similarity.numpy())
    assert float(found.similarity.sum()) == pytest.approx(float(similarity.numpy()[best].sum()))


def test_neurons_are_recovered_from_64_tokens_after_scaling_and_permuting():
    values = torch.randn(64, 200)
    order = torch.randperm(200)
    noisy = 3 * values[:, order] + 0.5 * torch.randn(64, 200) + 2
    found = match_neurons(values, noisy)
    assert float((order[found.partner] == torch.arange(200)).double().mean()) == 1.0
    expected = np.corrcoef(values[:, 0], noisy[:, found.partner[0]])[0, 1]
    assert float(found.correlation[0]) == pytest.approx(expected, abs=1e-5)


def test_unequal_numbers_leave_neurons_alone():
    values = torch.randn(32, 10)
    found = match_neurons(values, values[:, [7, 2, 5]])
    assert found.partner.tolist() == [-1, -1, 1, -1, -1, 2, -1, 0, -1, -1]
    with pytest.raises(ShapeError, match="expected equal numbers"):
        match_neurons(values, values[:4])


def test_matching_inside_ensembles_stays_inside():
    values = torch.randn(48, 12)
    labels_a = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    order = torch.randperm(12)
    labels_b = torch.tensor([1, 2, 0])[labels_a[order]]
    pairs = EnsembleMatch(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.ones(2))
    found = match_within(values, values[:, order], labels_a, labels_b, pairs)
    inside = labels_a < 2
    assert torch.equal(order[found.partner[inside]], torch.arange(12)[inside])
    assert found.partner[~inside].tolist() == [-1, -1, -1]


def test_importance_and_curvature():
    gradient = torch.tensor([[1.0, -2.0, 0.1], [3.0, 0.0, 0.1]])
    curvature = mean_curvature(gradient)
    assert_close(curvature, torch.tensor([5.0, 2.0, 2.0]))
    found = importance(gradient.mean(0), torch.tensor([0.5, -1.0, 2.0]), curvature, epsilon=0.0)
    assert_close(found, torch.tensor([2 * 0.5 / 5, 0.0, 0.1 * 2 / 2]))


def test_split_halves_agree_on_real_groups_and_not_on_noise():
    rows, _ = groups(per_group=50, kinds=3)
    stable = torch.stack([rows + 0.3 * torch.randn_like(rows) for _ in range(2)])
    assert split_half_agreement(stable.permute(2, 1, 0).repeat(1, 1, 2)[..., :3], 3) > 0.6
    assert split_half_agreement(torch.randn(8, 150, 3), 3) < 0.3
    with pytest.raises(ShapeError, match="two halves"):
        split_half_agreement(torch.randn(1, 10, 3), 2)
