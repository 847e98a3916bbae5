import torch
from torch.testing import assert_close

from tether.causal.gates import gate_distance, gate_open, window_mean


def test_window_mean_against_a_loop_with_padding(generator):
    z = torch.randn(2, 9, 5, generator=generator)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, 7:] = False
    mean, count, _ = window_mean(z, mask, 4)
    for b in range(2):
        for t in range(9):
            rows = [s for s in range(max(0, t - 3), t + 1) if mask[b, s]]
            assert count[b, t] == len(rows)
            expected = z[b, rows].mean(0) if rows else torch.zeros(5)
            assert_close(mean[b, t], expected)


def test_the_text_may_come_in_any_pieces(generator):
    z = torch.randn(3, 20, 5, generator=generator)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, :6] = False
    whole, counts, end = window_mean(z, mask, 6)
    state, means, seen = None, [], []
    for part, kept in zip(z.split([7, 1, 1, 11], dim=1), mask.split([7, 1, 1, 11], dim=1), strict=True):
        mean, count, state = window_mean(part, kept, 6, state)
        means.append(mean)
        seen.append(count)
    assert torch.equal(torch.cat(means, dim=1), whole)
    assert torch.equal(torch.cat(seen, dim=1), counts)
    assert torch.equal(state, end)


def test_a_window_of_one_token_is_the_token(generator):
    z = torch.randn(1, 4, 3, generator=generator)
    mean, count, state = window_mean(z, torch.ones(1, 4, dtype=torch.bool), 1)
    assert_close(mean, z)
    assert bool((count == 1).all())
    assert state.shape == (1, 0, 4)


def test_distance_is_mahalanobis_in_the_kept_directions(generator):
    samples = torch.randn(500, 4, generator=generator, dtype=torch.float64) @ torch.randn(
        4, 4, generator=generator, dtype=torch.float64
    )
    center, covariance = samples.mean(0), torch.cov(samples.T)
    variance, direction = torch.linalg.eigh(covariance)
    whitening = (direction / variance.sqrt()).T
    z = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    shift = z - center
    expected = torch.einsum("bti,ij,btj->bt", shift, torch.linalg.inv(covariance), shift)
    assert_close(gate_distance(z, center[None], whitening[None])[0], expected)


def test_each_count_has_its_own_threshold():
    distance = torch.tensor([[5.0, 5.0, 5.0, 0.0]])
    count = torch.tensor([1.0, 2.0, 3.0, 0.0])
    threshold = torch.tensor([[9.0, 4.0, 5.0]])
    assert torch.equal(gate_open(distance, count, threshold), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
