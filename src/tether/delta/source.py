"""Tokens of a cached text with the base's law of U at each: held in memory when small, read in pieces else."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tether.delta.basis import Basis
from tether.delta.cache import StateCache
from tether.delta.head import Reference
from tether.delta.sharded import ShardedStates
from tether.delta.values import next_values

__all__ = ["Source", "reference", "set_aside", "spread"]

KEPT_BYTES = 1_000_000_000
"""Texts whose features, loc and scale take less than this in float32 are held in memory."""
PIECE = 4096


def reference(model: Any, features: Tensor) -> Reference:
    """Evaluate the base's abduction at some tokens.

    Args:
        model: a CausalQwenForCausalLM.
        features: z, shape (n, H), or z followed by states of middle layers, shape (n, H (1 + L)); float32.

    Returns:
        Features with loc and scale of U, on the model's device.
    """
    features = features.to(model.action.weight.device)
    last = features[:, : model.abduction.loc.in_features]
    with torch.no_grad():
        loc, log_scale = model.abduction(last.to(model.action.weight.dtype))
    return Reference(features, loc, log_scale.exp())


class Source:
    """The tokens of a text that have a next token.

    Args:
        model: the base.
        cache: the text.
        documents: numbers of the documents to read, shape (D,); None reads all.
        basis: what states are read in; None leaves them as they are.

    Attributes:
        targets: next tokens, shape (n,), on the model's device.
        documents: document of each token, shape (n,), on the CPU.
        values: the next token's number in the units of Y, nan where it is none, shape (n,), on the model's device.
    """

    def __init__(
        self, model: Any, cache: StateCache, documents: Tensor | None = None, basis: Basis | None = None
    ) -> None:
        self.model, self.states, self.basis = model, cache.states, basis
        kept = cache.windows.targets >= 0
        if documents is not None:
            kept &= torch.isin(cache.windows.documents, documents)
        self.rows = kept.nonzero().squeeze(-1)
        device = model.action.weight.device
        self.targets = cache.windows.targets[self.rows].to(device)
        self.documents = cache.windows.documents[self.rows]
        self.values = next_values(model, cache.windows)[self.rows].to(device)
        width = cache.states.shape[1] + 2 * model.abduction.loc.out_features
        self.kept: Reference | None = None
        if 4 * width * len(self.rows) <= KEPT_BYTES and len(self.rows):
            # In pieces: the whole states are then never held in single precision where they are reduced.
            pieces = [self._read(part) for part in self.rows.split(PIECE)]
            self.kept = Reference(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Reference:
        """Read some tokens.

        Args:
            index: which of them, shape (m,).

        Returns:
            Base quantities at those tokens.
        """
        if self.kept is not None:
            return Reference(*(values[index] for values in self.kept))
        return self._read(self.rows[index])

    def _read(self, rows: Tensor) -> Reference:
        at = reference(self.model, self.states[rows].float())
        return at if self.basis is None else self.basis.reduce(at)

    def some(self, count: int) -> Reference:
        """Read tokens spread evenly over the text, so that many documents take part.

        Args:
            count: how many at most.

        Returns:
            Base quantities at those tokens.
        """
        return self.take(spread(len(self), count))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Shuffle the tokens and cut them into batches.

        Where they are read from several parts on disk, parts are shuffled, and tokens within each: a batch
        then touches one or two files.

        Args:
            size: tokens a batch.
            generator: of the shuffle.

        Yields:
            Indices for `take`, every token once.
        """
        if self.kept is not None or not isinstance(self.states, ShardedStates):
            yield from torch.randperm(len(self), generator=generator).split(size)
            return
        of_part = torch.searchsorted(self.states.ends, self.rows, right=True)
        order = []
        for part in torch.randperm(len(self.states.parts), generator=generator).tolist():
            inside = (of_part == part).nonzero().squeeze(-1)
            order.append(inside[torch.randperm(len(inside), generator=generator)])
        yield from torch.cat(order).split(size)


def set_aside(documents: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Set some documents aside, spread evenly over the text.

    Args:
        documents: document of each token, any shape.
        share: of the documents to set aside, in [0, 1).

    Returns:
        Numbers of the documents that stay, and of those set aside (none where there are fewer than four).
    """
    numbers = documents.unique()
    count = round(share * len(numbers)) if len(numbers) >= 4 else 0
    if share > 0 and len(numbers) >= 4:
        count = max(count, 1)
    count = min(count, len(numbers) - 1)
    away = torch.zeros(len(numbers), dtype=torch.bool)
    if count:
        away[((torch.arange(count) + 0.5) * len(numbers) / count).long()] = True
    return numbers[~away], numbers[away]


def spread(length: int, count: int) -> Tensor:
    """Pick positions spread evenly over a range.

    Args:
        length: of the range.
        count: how many at most.

    Returns:
        Positions in [0, length), ascending, shape (min(count, length),).
    """
    return torch.linspace(0, length - 1, min(count, length), dtype=torch.float64).long()
