import torch
from torch.testing import assert_close

from tether.delta.basis import SHARE, Basis, middle_basis
from tether.delta.cache import StateCache
from tether.delta.head import Head, Reference


def some(count, width):
    states = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    return Reference(states, torch.zeros(count, 3), torch.ones(count, 3))


def test_an_expanded_head_moves_whole_states_as_the_reduced_head_moves_reduced_ones():
    generator = torch.Generator().manual_seed(0)
    middle = torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64))[0]
    basis = Basis(4, middle)
    at = Reference(*(values.double() for values in some(20, 16)))
    first, second = (torch.randn(3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    for reduced in (Head(first, second, "symmetric"), Head(None, second, "linear")):
        whole = basis.expand(reduced)
        assert whole.second.shape == (3, 16)
        for one, other in zip(
            whole.displacement(at.states), reduced.displacement(basis.reduce(at).states), strict=True
        ):
            assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_last_state_alone_is_left_as_it_is(caches):
    basis = middle_basis(caches["digits"])
    at, head = some(4, 32), Head(torch.ones(3, 32), torch.ones(3, 32), "symmetric")
    assert basis.middle is None
    assert basis.reduce(at) is at
    assert basis.expand(head) is head


def test_the_directions_are_those_of_the_largest_squares(caches):
    states = torch.randn(400, 96, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, -1, 96)
    basis = middle_basis(StateCache(caches["digits"].windows, states, "base", (1, 2)))
    middle, directions = states[:, 32:].double(), basis.middle.double()
    assert basis.size == 32
    assert directions.shape == (64, round(SHARE * 32))
    assert_close(directions.T @ directions, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
    largest = torch.linalg.svdvals(middle).square()[:16].sum()
    assert_close((middle @ directions).square().sum(), largest, rtol=1e-5, atol=0)


def test_states_of_few_directions_lose_nothing(caches):
    generator = torch.Generator().manual_seed(3)
    inside = torch.randn(400, 10, generator=generator) @ torch.randn(10, 64, generator=generator)
    states = torch.cat([torch.randn(400, 32, generator=generator), inside], -1)
    basis = middle_basis(StateCache(caches["digits"].windows, states, "base", (1, 2)))
    back = basis.reduce(Reference(states, states, states)).states[:, 32:] @ basis.middle.T
    assert_close(back, inside, rtol=1e-4, atol=1e-4)
