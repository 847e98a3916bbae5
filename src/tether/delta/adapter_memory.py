"""What a fusion of adapters by evidence remembers of a text: each adapter's own keys and values, as far as it ran.

An adapter that sleeps does not run, so its keys and values end where it fell asleep. The text itself is remembered,
so that an adapter that wakes can run over what it slept through. All of it lies in the base's cache and follows what
is done to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer

from tether.causal.memory import Memory

__all__ = ["AdapterMemory", "Pool", "Seat"]

Seat = tuple[int, int]
"""Number of an adapter, and of a text of the batch that it reads."""


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Keys and values of some adapters on some texts, all read equally far.

    Attributes:
        seats: whose rows of the batch they are, in order.
        cache: of the backbone; every layer keeps all positions, so that it can be cut anywhere.
    """

    seats: list[Seat]
    cache: DynamicCache

    def __len__(self) -> int:
        return int(self.cache.get_seq_length())

    def picked(self, rows: Sequence[int]) -> "Pool":
        """Keep some rows.

        Args:
            rows: which, in their new order.

        Returns:
            The pool of those; this one is given up.
        """
        seats = [self.seats[row] for row in rows]
        if list(rows) != list(range(len(self.seats))):
            self.cache.batch_select_indices(torch.tensor(rows))
        return Pool(seats, self.cache)


class AdapterMemory(Memory):
    """A memory with the pools of a text's adapters beside what every mixture remembers.

    Attributes:
        pools: no seat is in two of them.
        placed: whether the backbone was told the positions of tokens.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.pools: list[Pool] = []
        self.placed = False

    def append(self, **new: Tensor) -> None:
        """Remember some more positions.

        Args:
            new: tensors of shape (B, T, ...); a name that is missing now or was before is 0 there.
        """
        held, given = dict(self.held), dict(new)
        if held:
            past, length = len(self), next(iter(new.values())).shape[1]
            for name in held.keys() - given.keys():
                given[name] = held[name].new_zeros(len(held[name]), length, *held[name].shape[2:])
            for name in given.keys() - held.keys():
                held[name] = given[name].new_zeros(len(given[name]), past, *given[name].shape[2:])
            self.held = held
        super().append(**given)

    def lengths(self) -> dict[Seat, int]:
        """Say how far each adapter has read each text.

        Returns:
            Positions by seat; seats that never ran are left out.
        """
        return {seat: len(pool) for pool in self.pools for seat in pool.seats}

    def settle(self, count: int) -> None:
        """Cut pools that have read more than a number of positions.

        Args:
            count: how many.
        """
        self.pools = self.pools if count else []
        for pool in self.pools:
            if len(pool) > count:
                pool.cache.crop(count - len(pool))

    def take(self, seats: list[Seat], length: int, config: Any) -> DynamicCache:
        """Take the keys and values of some seats out; `put` puts them back when they have read on.

        Nothing is copied where the seats are those of one pool.

        Args:
            seats: in the order that the rows shall have.
            length: positions that are wanted; each seat has read so far, or `length` is 0.
            config: of the backbone.

        Returns:
            A cache of that many rows and positions.
        """
        wanted, parts, left = set(seats), [], []
        for pool in self.pools:
            inside = [row for row, seat in enumerate(pool.seats) if seat in wanted]
            if not inside:
                left.append(pool)
                continue
            outside = [row for row in range(len(pool.seats)) if row not in set(inside)]
            if length:
                parts.append(_copied(pool, inside, config) if outside else pool)
            if outside:
                left.append(pool.picked(outside))
        self.pools = left
        if not parts:
            return _empty(config)
        for pool in parts:
            if len(pool) > length:
                pool.cache.crop(length - len(pool))
        whole = parts[0] if len(parts) == 1 else _joined(parts, config)
        return whole.picked([whole.seats.index(seat) for seat in seats]).cache

    def put(self, seats: list[Seat], cache: DynamicCache) -> None:
        """Put back what was taken.

        Args:
            seats: as of `take`.
            cache: it has read on.
        """
        self.pools.append(Pool(seats, cache))

    def keep(self, count: int) -> None:
        """Forget all positions beyond the first ones.

        Args:
            count: how many are kept.
        """
        super().keep(count)
        self.settle(count)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.pools, self.placed = [], False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text.

        Args:
            repeats: how often.
        """
        super().batch_repeat_interleave(repeats)
        rows = 1 + max((row for pool in self.pools for _, row in pool.seats), default=-1)
        self._follow([row for row in range(rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some texts.

        Args:
            indices: which.
        """
        super().batch_select_indices(indices)
        indices = indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices
        self._follow(indices.tolist())

    # Give each seat to the texts that go on from its own.
    def _follow(self, origin: list[int]) -> None:
        pools = []
        for pool in self.pools:
            row_of = {seat: row for row, seat in enumerate(pool.seats)}
            adapters = sorted({adapter for adapter, _ in pool.seats})
            moved = {
                (adapter, row): row_of[adapter, old]
                for adapter in adapters
                for row, old in enumerate(origin)
                if (adapter, old) in row_of
            }
            if moved:
                pools.append(Pool(list(moved), pool.picked(list(moved.values())).cache))
        self.pools = pools


def _empty(config: Any) -> DynamicCache:
    # Windows that slide are left to the attention mask: what has slid out could not be put back.
    cache = DynamicCache(config=config)
    cache.layers = [layer if isinstance(layer, DummyLayer) else DynamicLayer() for layer in cache.layers]
    return cache


def _filled(config: Any, keys_and_values: list[tuple[Tensor, Tensor] | None]) -> DynamicCache:
    cache = _empty(config)
    for layer, pair in zip(cache.layers, keys_and_values, strict=True):
        if pair is not None:
            layer.lazy_initialization(*pair)
            layer.keys, layer.values = pair
    return cache


def _copied(pool: Pool, rows: list[int], config: Any) -> Pool:
    index = torch.tensor(rows)
    pairs = [
        (layer.keys[index], layer.values[index]) if isinstance(layer, DynamicLayer) else None
        for layer in pool.cache.layers
    ]
    return Pool([pool.seats[row] for row in rows], _filled(config, pairs))


def _joined(pools: list[Pool], config: Any) -> Pool:
    layers = zip(*(pool.cache.layers for pool in pools), strict=True)
    pairs = [
        (torch.cat([layer.keys for layer in same]), torch.cat([layer.values for layer in same]))
        if isinstance(same[0], DynamicLayer)
        else None
        for same in layers
    ]
    return Pool([seat for pool in pools for seat in pool.seats], _filled(config, pairs))
