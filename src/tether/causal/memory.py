"""What a mixture of experts remembers of a text, position by position, beside the cached keys and values.

Weights of experts depend on everything read so far. They are kept for every position as keys and values are, so
that whatever is done to a cache (cropping what an assistant guessed wrong, reordering beams, repeating a prompt,
going on with a conversation, prompts in chunks) is done to them, and is right without a word about it anywhere.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer

from tether.errors import ConfigError

__all__ = ["Memory", "attach", "find"]


class Memory(DummyLayer):  # type: ignore[misc]
    """One more layer of a cache, without keys and values.

    Attributes:
        held: tensors of shape (B, positions, ...) by name; see `tether.causal.mixture`.
        written: first position that the model wrote itself, or None; as the last call was told.
        text: ids of the text that was written with it, shape (B, L), or None; see `CausalGeneration.generate`.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}
        self.written: int | None = None
        self.text: Tensor | None = None

    def __len__(self) -> int:
        return next(iter(self.held.values())).shape[1] if self.held else 0

    def append(self, **new: Tensor) -> None:
        """Remember some more positions.

        Args:
            new: tensors of shape (B, T, ...), of the same names each time.
        """
        if not self.held:
            self.held = new
        else:
            self.held = {name: torch.cat([self.held[name], value], dim=1) for name, value in new.items()}

    def last(self, count: int = 1) -> dict[str, Tensor]:
        """Give the last positions.

        Args:
            count: how many at most.

        Returns:
            Tensors of shape (B, min(count, positions), ...) by name.
        """
        first = max(0, len(self) - count)
        return {name: value[:, first:] for name, value in self.held.items()}

    def keep(self, count: int) -> None:
        """Forget all positions beyond the first ones.

        Args:
            count: how many are kept.
        """
        self.held = {name: value[:, :count] for name, value in self.held.items()} if count else {}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions, as transformers' caches do.

        Args:
            tokens_to_remove: minus how many.
        """
        if tokens_to_remove:
            self.keep(max(0, len(self) - abs(tokens_to_remove)))

    def reset(self) -> None:
        """Forget everything."""
        self.held, self.written, self.text = {}, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let texts go on from other texts.

        Args:
            beam_idx: which text each goes on from, shape (B,).
        """
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text.

        Args:
            repeats: how often.
        """
        self.held = {name: value.repeat_interleave(repeats, dim=0) for name, value in self.held.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some texts.

        Args:
            indices: which.
        """
        self.held = {name: value[indices.to(value.device)] for name, value in self.held.items()}


def find(cache: Any) -> Memory | None:
    """Look for the memory in a cache.

    Args:
        cache: a `transformers.Cache`, or None.

    Returns:
        Its memory, or None.
    """
    layers = getattr(cache, "layers", ())
    return next((layer for layer in layers if isinstance(layer, Memory)), None)


def attach(cache: Any, kind: type[Memory] = Memory) -> Memory:
    """Give a cache its memory; to be called when it has all its other layers.

    Args:
        cache: a `transformers.Cache`.
        kind: of memory that the mixture needs.

    Returns:
        The memory, empty unless the cache has one already.

    Raises:
        ConfigError: the cache is of another kind.
    """
    memory = find(cache)
    if memory is None:
        if not isinstance(getattr(cache, "layers", None), list):
            raise ConfigError(
                f"a cache of type {type(cache).__name__}: a fusion by evidence remembers the text in a cache with "
                "layers, as transformers' DynamicCache and StaticCache have; pass one of these, or use_cache=False"
            )
        memory = kind()
        cache.layers.append(memory)
    return memory
