import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tether.errors import ConfigError, ShapeError
from tether.merge.matching import EnsembleMatch
from tether.merge.paper import ensemble_means, fuse_paper
from tether.merge.task_vectors import (
    fuse_projected,
    fuse_shared,
    input_directions,
    interference,
    interference_mask,
    project,
    task_vector,
)


@pytest.fixture
def rows():
    return [torch.randn(6, 9, dtype=torch.float64) for _ in range(3)]


@pytest.fixture
def directions():
    x = torch.randn(30, 9, dtype=torch.float64) * torch.arange(1, 10)
    return input_directions(x.T @ x, rank=3)


def test_directions_are_the_leading_singular_vectors_of_the_inputs():
    x = torch.randn(50, 9, dtype=torch.float64)
    ours = input_directions(x.T @ x, rank=4)
    theirs = np.linalg.svd(x.numpy())[2][:4]
    assert_close(ours @ ours.T, torch.from_numpy(theirs.T @ theirs))
    assert input_directions(x.T @ x, rank=99).shape == (9, 9)
    with pytest.raises(ConfigError, match="at least one direction"):
        input_directions(x.T @ x, rank=0)


def test_projection_and_rest_are_orthogonal_and_add_up(rows, directions):
    shared = project(rows[0], directions)
    rest = rows[0] - shared
    assert float((shared * rest).sum(1).abs().max()) < 1e-12
    assert_close(project(shared, directions), shared)


def test_update_is_the_documents_equation_a_row_at_a_time(rows, directions):
    a, b, c = rows
    mask = torch.rand(6, dtype=torch.float64)
    found = fuse_projected(a, task_vector(b, c), directions, mask, lambda_proj=0.3, lambda_ortho=0.8)
    for i in range(6):
        tau = b[i] - c[i]
        shared = sum((tau @ d) * d for d in directions.T)
        assert_close(found[i], a[i] + 0.3 * mask[i] * shared + 0.8 * (tau - shared))


def test_the_mask_does_not_cancel_where_lambdas_are_equal(rows, directions):
    tau = rows[1] - rows[2]
    masked = fuse_projected(rows[0], tau, directions, torch.full((6,), 0.1))
    open_ = fuse_projected(rows[0], tau, directions, torch.ones(6))
    assert float((masked - open_).abs().max()) > 0.01
    # As the document writes it, masked and open projections give the same weights at equal lambdas.
    labels, pairs = torch.arange(6), EnsembleMatch(torch.arange(6), torch.arange(6), torch.ones(6))
    phi = torch.rand(6, 3, dtype=torch.float64)
    literal = [
        fuse_paper(*rows, phi, phi + 5, labels, labels, pairs, beta=beta, sigma=0.0) for beta in (0.0, 3.0)
    ]
    assert_close(literal[0], literal[1])


def test_symmetric_form(rows, directions):
    a, b, c = rows
    tau_a, tau_b = a - c, b - c
    share = torch.rand(6, dtype=torch.float64)
    found = fuse_shared(c, tau_a, tau_b, directions, share, lambda_ortho=0.7)
    swapped = fuse_shared(c, tau_b, tau_a, directions, 1 - share, lambda_ortho=0.7)
    assert_close(found, swapped)
    full = torch.eye(9, dtype=torch.float64)
    assert_close(fuse_shared(c, tau_a, tau_b, full, torch.full((6,), 0.5)), (a + b) / 2)


def test_interference_and_masks():
    phi_a, phi_b = torch.tensor([[1.0, 2, 3], [0, 0, 0]]), torch.tensor([[1.0, 5, 7], [0, 0, 0]])
    score = interference(phi_a, phi_b, torch.tensor([2.0, 0.0]))
    assert_close(score, torch.tensor([2.5, 0.0]))
    assert_close(interference_mask(score, 0.2), torch.tensor([np.exp(-0.5), 1.0]).float())
    assert_close(
        interference_mask(score, 0.2, "paper"), torch.tensor([1 - 1 / (1 + np.exp(-0.5)), 0.5]).float()
    )
    with pytest.raises(ConfigError, match="unknown mask 'soft': choose one of exponential, paper"):
        interference_mask(score, 0.2, "soft")


@pytest.mark.parametrize("collapse", [True, False])
@pytest.mark.parametrize("with_parent", [True, False])
def test_paper_form_step_by_step(collapse, with_parent):
    a, b, c = (torch.randn(n, 5, dtype=torch.float64) for n in (6, 7, 7))
    phi_a, phi_b = torch.rand(6, 3, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64)
    labels_a, labels_b = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([1, 0, 1, 0, 1, 0, 0])
    pairs = EnsembleMatch(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.ones(2))
    found = fuse_paper(
        a, b, c if with_parent else None, phi_a, phi_b, labels_a, labels_b, pairs,
        beta=0.4, sigma=0.6, lambda_proj=0.2, lambda_ortho=0.9, collapse=collapse,
    )  # fmt: skip
    for k, p in ((0, 1), (2, 0)):
        mine, theirs = labels_a == k, labels_b == p
        mean_a, mean_b = phi_a[mine].mean(0).numpy(), phi_b[theirs].mean(0).numpy()
        tau = (b - c)[theirs].mean(0).numpy() if with_parent else np.full(5, mean_b[0] - mean_a[0])
        tau = tau + 0.6 * mean_b[1]
        curvature = float((phi_b[theirs, 1] ** 2 + phi_b[theirs, 2]).mean())
        score = np.linalg.norm(mean_b - mean_a) / curvature
        gate = 1 - 1 / (1 + np.exp(-0.4 * score))
        d = np.full(5, mean_a[0])
        shared = gate * (tau @ d) / (d @ d) * d
        update = 0.2 * shared + 0.9 * (tau - shared)
        for i in mine.nonzero().squeeze(-1).tolist():
            base = a[mine].mean(0).numpy() if collapse else a[i].numpy()
            np.testing.assert_allclose(found[i].numpy(), base + update, rtol=1e-6)
    assert torch.equal(found[2:5], a[2:5])


def test_ensemble_means_and_bad_shapes(rows):
    phi = torch.rand(6, 3, dtype=torch.float64)
    found = ensemble_means(phi, torch.tensor([0, 1, 0, 1, 1, 0]))
    assert_close(found.phi[0], phi[[0, 2, 5]].mean(0))
    assert_close(found.curvature[1], (phi[[1, 3, 4], 1] ** 2 + phi[[1, 3, 4], 2] + 1e-8).mean())
    labels, pairs = torch.zeros(6, dtype=torch.int64), EnsembleMatch(*[torch.zeros(1, dtype=torch.int64)] * 3)
    with pytest.raises(ShapeError, match="expected equal numbers"):
        fuse_paper(*rows, phi[:5], phi, labels, labels, pairs)
