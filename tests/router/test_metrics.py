import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch.testing import assert_close

from tether.errors import ShapeError
from tether.router.metrics import (
    RouteStatistics,
    effective_count,
    maximal_violation,
    route_drift,
    routing_information,
    task_separation,
)


def test_information_is_the_librarys_less_that_of_permuted_tasks():
    rng = np.random.default_rng(0)
    tasks = rng.integers(0, 3, 600)
    experts = np.where(rng.random(600) < 0.4, tasks, rng.integers(0, 5, 600))
    table = np.zeros((3, 5), dtype=np.int64)
    np.add.at(table, (tasks, experts), 1)
    null = np.mean([mutual_info_score(rng.permutation(tasks), experts) for _ in range(300)])
    rmi, share = routing_information(torch.from_numpy(table), draws=300)
    assert rmi == pytest.approx(mutual_info_score(tasks, experts) - null, abs=1e-3)
    counts = np.bincount(tasks) / 600
    assert share == pytest.approx(rmi / -(counts * np.log(counts)).sum())


def test_information_of_routing_by_chance_is_nothing():
    rng = np.random.default_rng(1)
    table = torch.from_numpy(rng.multinomial(40, [0.25] * 4, size=3))
    # Without the null it would be near (K - 1)(E - 1) / 2n = 0.025.
    assert abs(routing_information(table, draws=500)[0]) < 0.02


def test_one_task_has_no_share():
    assert routing_information(torch.tensor([[3, 4]])) == (0.0, None)
    assert task_separation(torch.tensor([[0.5, 0.5]])) is None


def test_one_expert_tells_nothing():
    assert routing_information(torch.tensor([[300, 0], [84, 0]])) == (0.0, 0.0)


def test_separation_over_all_pairs():
    gates = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    # Pairs: 1 - 0.5/1.5, 1 - 0/2, 1 - 0.5/1.5.
    assert task_separation(gates) == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)


def test_effective_count_and_violation():
    assert_close(effective_count(torch.tensor([[1.0, 0.0], [2.0, 2.0]])), torch.tensor([1.0, 2.0]))
    assert maximal_violation(torch.tensor([3.0, 1.0, 0.0, 0.0])) == pytest.approx(2.0)


def test_counts_of_parts_are_counts_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(300, 6, generator=generator)
    weights, chosen = scores.topk(2)
    tasks = torch.randint(3, (300,), generator=generator)
    whole, parts = RouteStatistics(1, 6), RouteStatistics(3, 6)
    whole.add(weights, chosen, tasks)
    for rows in torch.arange(300).split(70):
        parts.add(weights[rows], chosen[rows], tasks[rows])
    one, two = whole.summary(), parts.summary()
    for key, value in one.items():
        assert_close(torch.tensor(value), torch.tensor(two[key]))
    share = weights / weights.sum(-1, keepdim=True)
    assert one["eff_k"] == pytest.approx(float(torch.exp(-(share * share.log()).sum(-1)).mean()), rel=1e-6)
    load = torch.bincount(chosen.flatten(), minlength=6).double()
    assert one["load"] == pytest.approx((load / load.sum()).tolist())


def test_a_dead_expert_is_counted():
    held = RouteStatistics(1, 4)
    chosen = torch.tensor([[0, 1]] * 500 + [[1, 2]])
    held.add(torch.full((501, 2), 0.5), chosen, torch.zeros(501, dtype=torch.int64))
    # Expert 3 never, expert 2 once in 1002 assignments: below a hundredth of a quarter.
    assert held.summary()["dead"] == 2


def test_drift_counts_changed_first_choices():
    assert route_drift(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 0])) == 0.5
    with pytest.raises(ShapeError, match="same tokens twice"):
        route_drift(torch.zeros(3), torch.zeros(4))


def test_bad_counts_are_refused():
    held = RouteStatistics(2, 4)
    with pytest.raises(ShapeError, match=r"expected \(n, k\)"):
        held.add(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ShapeError, match="leave padding out"):
        held.add(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([-100]))
