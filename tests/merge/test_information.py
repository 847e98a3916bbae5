import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tether.errors import ShapeError
from tether.merge.information import copula_information


def dependent(count, neurons, correlation, seed=0):
    """Half of the neurons share a Gaussian copula of known correlation with the target, behind a warp."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(count, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, neurons, generator=generator, dtype=torch.float64)
    mixed = correlation * target.unsqueeze(-1) + math.sqrt(1 - correlation**2) * noise
    mixed[:, neurons // 2 :] = noise[:, neurons // 2 :]
    return torch.exp(mixed), target


def test_mean_under_independence_is_zero_at_few_samples():
    for count in (16, 64):
        values, target = dependent(count, 4000, 0.5)
        null = copula_information(values[:, 2000:], target)
        assert abs(float(null.mean())) < 0.005


def test_value_for_a_known_copula():
    values, target = dependent(4000, 40, 0.8)
    found = float(copula_information(values[:, :20], target).mean())
    assert found == pytest.approx(-0.5 * math.log(1 - 0.64), abs=0.02)


def test_tells_dependent_neurons_apart_at_64_samples_where_a_histogram_does_not():
    values, target = dependent(64, 400, 0.5)
    truth = np.r_[np.ones(200), np.zeros(200)]
    ours = roc_auc_score(truth, copula_information(values, target).numpy())
    assert ours > 0.95

    def histogram(column):
        joint = np.histogram2d(column, target.numpy(), bins=32)[0] / 64
        product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        seen = joint > 0
        return float((joint[seen] * np.log(joint[seen] / product[seen])).sum())

    theirs = roc_auc_score(truth, [histogram(values[:, i].numpy()) for i in range(400)])
    assert theirs < 0.75


def test_monotone_maps_change_nothing_and_constants_carry_nothing():
    values, target = dependent(32, 10, 0.7)
    warped = copula_information(values.log() ** 3, torch.atan(target))
    torch.testing.assert_close(copula_information(values, target), warped)
    assert copula_information(torch.ones(32, 2), target).tolist() == [0.0, 0.0]
    assert copula_information(values, torch.ones(32)).tolist() == [0.0] * 10


def test_too_few_samples():
    with pytest.raises(ShapeError, match="at least 4"):
        copula_information(torch.zeros(3, 2), torch.zeros(3))
