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

KEPT_BYTES, MIXED_BYTES = 300_000_000, 1_000_000_000
"""Size of a text's features, loc and scale in float32: up to the first it is held in memory, up to the second it is
shuffled as a whole, beyond that part by part."""
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
        values: the next token's number in the units of Y, nan where it is none, shape (n,), on the model's device.
    """

    def __init__(
        self, model: Any, cache: StateCache, documents: Tensor | None = None, basis: Basis | None = None
    ) -> None:
        self.model, self.states, self.basis = model, cache.states, basis
        windows = cache.windows
        kept = windows.targets >= 0
        if documents is not None:
            # A window lies inside one document: asked once for each, and not for every token.
            of_window = torch.isin(windows.documents[windows.starts[:-1]], documents)
            kept &= of_window.repeat_interleave(windows.starts.diff())
        self.rows = kept.nonzero().squeeze(-1)
        device = model.action.weight.device
        self._windows, self._device = windows, device
        self.values = torch.full((1,), torch.nan, device=device).expand(len(self.rows))
        if windows.numeric_values is not None:
            self.values = next_values(model, windows)[self.rows].to(device)
        self._bytes = 4 * (cache.states.shape[1] + 2 * model.abduction.loc.out_features) * len(self.rows)
        self.kept: Reference | None = None
        if self._bytes <= KEPT_BYTES and len(self.rows):
            # In pieces: the whole states are then never held in single precision where they are reduced.
            for at, part in enumerate(self.rows.split(PIECE)):
                piece = self._read(part)
                if self.kept is None:
                    self.kept = Reference(*(v.new_empty(len(self.rows), *v.shape[1:]) for v in piece))
                for whole, values in zip(self.kept, piece, strict=True):
                    whole[at * PIECE : at * PIECE + len(values)] = values

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> Tensor:
        """Next tokens, shape (n,), on the model's device."""
        return self._windows.targets[self.rows].to(self._device)

    def next_tokens(self, index: Tensor) -> Tensor:
        """Give the next tokens of some tokens, without a copy of all.

        Args:
            index: which of them, shape (m,).

        Returns:
            Ids, shape (m,), on the model's device.
        """
        return self._windows.targets[self.rows[index]].to(self._device)

    @property
    def documents(self) -> Tensor:
        """Document of each token, shape (n,), on the CPU."""
        return self._windows.documents[self.rows]

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

        Of a large text on disk, parts are shuffled, and tokens within each: a batch then touches one or two parts.

        Args:
            size: tokens a batch.
            generator: of the shuffle.

        Yields:
            Indices for `take`, every token once.
        """
        if self._bytes <= MIXED_BYTES or not isinstance(self.states, ShardedStates):
            yield from torch.randperm(len(self), generator=generator).split(size)
            return
        # Rows ascend, so those of a part follow each other.
        edges = [0, *torch.searchsorted(self.rows, self.states.ends).tolist()]
        order, done = torch.empty(len(self), dtype=torch.int32), 0
        for part in torch.randperm(len(self.states.parts), generator=generator).tolist():
            begin, end = edges[part : part + 2]
            order[done : done + end - begin] = begin + torch.randperm(end - begin, generator=generator)
            done += end - begin
        yield from (index.long() for index in order.split(size))


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
