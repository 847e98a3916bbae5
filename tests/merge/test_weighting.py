import math

import mpmath as mp
import pytest
import torch
from torch.testing import assert_close

from tether.errors import ConfigError, ShapeError
from tether.merge.weighting import WEIGHTINGS, path_weights


def paths(count=6, longest=9, seed=0, low=-4.0):
    generator = torch.Generator().manual_seed(seed)
    log_prob = low * torch.rand(count, longest, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    return log_prob, lengths


def documents_sum(values, log_prob, lengths, gamma):
    """Step 1 of the document, term by term to 60 digits: sum of p(S) gamma^(len - 1) times the mean value."""
    with mp.workdps(60):
        total = mp.mpf(0)
        for row, logs, length in zip(values.tolist(), log_prob.tolist(), lengths.tolist(), strict=True):
            p = mp.fprod(mp.exp(mp.mpf(x)) for x in logs[:length])
            mean = mp.fsum(mp.mpf(x) for x in row[:length]) / length
            total += p * mp.mpf(gamma) ** (length - 1) * mean
        return total


def test_paper_form_is_the_documents_sum():
    log_prob, lengths = paths()
    values = torch.randn(log_prob.shape, dtype=torch.float64)
    found = path_weights(log_prob, lengths, "paper", 0.99)
    ours = float((found.weights * values).sum()) * math.exp(float(found.log_mass))
    assert ours == pytest.approx(float(documents_sum(values, log_prob, lengths, 0.99)), rel=1e-12)


def test_paper_form_is_finite_where_every_weight_underflows():
    log_prob, lengths = paths(low=-400.0)
    found = path_weights(log_prob - 1000, lengths, "paper")
    assert bool(torch.isfinite(found.weights).all())
    assert float(found.log_mass) < -1000
    assert_close(found.weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    ratio = documents_sum(torch.ones_like(log_prob), log_prob - 1000, lengths, 0.99)
    assert float(found.log_mass) == pytest.approx(float(mp.log(ratio)), rel=1e-12)


def test_self_normalised_form_is_paper_without_its_mass():
    log_prob, lengths = paths()
    paper, own = (path_weights(log_prob, lengths, form) for form in ("paper", "self-normalised"))
    assert_close(paper.weights, own.weights)
    assert float(own.log_mass) == 0
    assert float(paper.log_mass) != 0


def test_position_form_divides_by_survivors():
    lengths = torch.tensor([3, 1, 2])
    values = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    found = path_weights(torch.zeros(3, 3), lengths, "position", 0.5)
    means = [(0 + 3 + 6) / 3, (1 + 7) / 2, 2.0]
    expected = sum(m * 0.5**t for t, m in enumerate(means)) / (1 + 0.5 + 0.25)
    assert float((found.weights * values).sum()) == pytest.approx(expected, rel=1e-14)


def test_position_form_estimates_the_same_number_whatever_lengths_are_drawn():
    # Values depend on the position only; the plain mean drifts with the lengths, this form by gamma^len_max.
    time = torch.arange(64, dtype=torch.float64)
    values = 1 - torch.exp(-time / 8)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for form in ("position", "mean"):
        for longest in (32, 64):
            lengths = torch.randint(4, longest + 1, (4000,), generator=generator)
            weights = path_weights(torch.zeros(4000, 64), lengths, form).weights.sum(0)
            found[form, longest] = float(weights @ values)
    assert abs(found["position", 32] - found["position", 64]) < 0.9**32
    assert abs(found["mean", 32] - found["mean", 64]) > 0.1


def test_mean_and_sum_forms():
    log_prob, lengths = paths()
    values = torch.randn(log_prob.shape, dtype=torch.float64)
    exists = torch.arange(9) < lengths.unsqueeze(-1)
    total = torch.where(exists, values, 0).sum(-1)
    for form, expected in (("mean", (total / lengths).mean()), ("sum", total.mean())):
        found = path_weights(log_prob, lengths, form)
        assert_close((found.weights * values).sum() * torch.exp(found.log_mass), expected)


@pytest.mark.parametrize("form", WEIGHTINGS)
def test_weights_sum_to_one_and_samples_are_independent(form):
    log_prob, lengths = (torch.stack(part) for part in zip(paths(), paths(seed=1), strict=True))
    both = path_weights(log_prob, lengths, form)
    assert_close(both.weights.sum((-2, -1)), torch.ones(2, dtype=torch.float64))
    alone = path_weights(log_prob[1], lengths[1], form)
    assert_close(both.weights[1], alone.weights)
    assert_close(both.log_mass[1], alone.log_mass)
    assert 1 <= float(alone.effective) <= 6 + 1e-12


def test_effective_number_of_paths_of_one_dominant_path_is_one():
    log_prob = torch.zeros(5, 4) - 50.0
    log_prob[2] = 0
    found = path_weights(log_prob, torch.full((5,), 4), "paper")
    assert float(found.effective) == pytest.approx(1.0)


def test_bad_requests():
    log_prob, lengths = paths()
    with pytest.raises(ConfigError, match="unknown weighting 'papr': choose one of position, paper"):
        path_weights(log_prob, lengths, "papr")
    with pytest.raises(ConfigError, match=r"gamma=1\.5: expected a discount"):
        path_weights(log_prob, lengths, "paper", 1.5)
    with pytest.raises(ShapeError, match=r"expected \(\.\.\., K, T\)"):
        path_weights(log_prob, lengths + 20, "paper")
