import torch
from torch.testing import assert_close

from tether.causal.gates import (
    GateStatistics,
    gate_density,
    gate_distance,
    gate_open,
    gate_softmax,
    gate_stage,
    window_mean,
)


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
    full = torch.full((2, 3), 8.0, dtype=torch.float64)
    none = torch.zeros(1, 1, dtype=torch.float64)
    assert_close(
        gate_distance(z, full, 8, GateStatistics.of(center[None, None], whitening[None, None], none))[0],
        expected,
    )


def gaussians(generator):
    """Two domains with two stages each: centers, two principal directions of six, one variance outside."""
    center = torch.randn(2, 2, 6, generator=generator, dtype=torch.float64)
    variance = 1 + 4 * torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)
    rest = 0.1 + torch.rand(2, 2, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(2, 2, 6, 6, generator=generator, dtype=torch.float64))[0]
    whitening = (basis[..., :2] / variance.sqrt().unsqueeze(-2)).mT
    spread = torch.cat([variance, rest.unsqueeze(-1).expand(2, 2, 4)], -1)
    covariance = basis @ torch.diag_embed(spread) @ basis.mT
    return center, whitening, 1 / rest, covariance


def test_outside_the_kept_directions_one_variance_counts_and_each_stage_has_its_own(generator):
    center, whitening, precision, covariance = gaussians(generator)
    z = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    count = torch.tensor([1.0, 3.0, 4.0, 2.0, 4.0], dtype=torch.float64)
    found = gate_distance(z, count, 4, GateStatistics.of(center, whitening, precision))
    for domain in range(2):
        for row in range(5):
            stage = int(count[row] == 4)
            shift = z[row] - center[domain, stage]
            expected = shift @ torch.linalg.solve(covariance[domain, stage], shift)
            assert_close(found[domain, row], expected)


def test_rows_of_zeros_measure_nothing(generator):
    center, whitening, precision, _ = gaussians(generator)
    padded = torch.cat([whitening, torch.zeros(2, 2, 3, 6, dtype=torch.float64)], dim=-2)
    z, count = torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.full((5,), 4.0).double()
    plain = gate_distance(z, count, 4, GateStatistics.of(center, whitening, precision))
    assert_close(gate_distance(z, count, 4, GateStatistics.of(center, padded, precision)), plain)
    opened = torch.ones_like(plain)
    assert_close(
        gate_softmax(gate_density(plain, count, 4, GateStatistics.of(center, padded, precision)), opened),
        gate_softmax(gate_density(plain, count, 4, GateStatistics.of(center, whitening, precision)), opened),
    )


def test_stages():
    assert gate_stage(torch.arange(1.0, 9.0), 8, 5).tolist() == [0, 1, 2, 2, 3, 3, 3, 4]
    assert gate_stage(torch.arange(0.0, 9.0), 8, 1).tolist() == [0] * 9
    assert gate_stage(torch.tensor([1.0, 2.0]), 2, 2).tolist() == [0, 1]


def test_the_softmax_gate_is_the_posterior_of_the_open_domains(generator):
    center, whitening, precision, covariance = gaussians(generator)
    z = center[0, :1] + 0.5 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    count = torch.full((4,), 4.0, dtype=torch.float64)
    distance = gate_distance(z, count, 4, GateStatistics.of(center, whitening, precision))
    opened = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    found = gate_softmax(
        gate_density(distance, count, 4, GateStatistics.of(center, whitening, precision)), opened
    )
    density = [
        torch.distributions.MultivariateNormal(center[k, 1], covariance[k, 1]).log_prob(z[0])
        for k in range(2)
    ]
    assert_close(found[:, 0], torch.softmax(torch.stack(density), 0))
    assert_close(found[:, 1:].T, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64))


def test_directions_that_do_not_count_are_no_part_of_the_density(generator):
    """Precision 0: both domains are Gaussians in their kept directions alone."""
    center, whitening, _, _ = gaussians(generator)
    z, count = torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.full((5,), 4.0).double()
    none = torch.zeros(2, 2, dtype=torch.float64)
    distance = gate_distance(z, count, 4, GateStatistics.of(center, whitening, none))
    found = gate_softmax(
        gate_density(distance, count, 4, GateStatistics.of(center, whitening, none)),
        torch.ones_like(distance),
    )
    density = []
    for domain in range(2):
        basis = torch.nn.functional.normalize(whitening[domain, 1], dim=-1)
        scale = 1 / whitening[domain, 1].norm(dim=-1)
        law = torch.distributions.Normal(basis @ center[domain, 1], scale)
        density.append(law.log_prob(z @ basis.T).sum(-1))
    assert_close(found, torch.softmax(torch.stack(density), 0))


def test_each_count_has_its_own_threshold():
    distance = torch.tensor([[5.0, 5.0, 5.0, 0.0]])
    count = torch.tensor([1.0, 2.0, 3.0, 0.0])
    threshold = torch.tensor([[9.0, 4.0, 5.0]])
    assert torch.equal(gate_open(distance, count, threshold), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
