"""Positions of a text: which carry a token, where each stands, which are served, and what comes after each."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.decisions import IGNORE
from tether.errors import ConfigError, ShapeError

__all__ = ["Served", "next_of", "served_positions", "text_mask", "text_positions"]


def text_mask(attention_mask: Any, shape: tuple[int, int], past: int, device: Any) -> Tensor:
    """Tell which positions carry a token.

    Args:
        attention_mask: shape (B, past + T); or, as fixed caches have it, what each position may attend to, shape
            (B, 1, T, length), or several of these by kind of layer; or None.
        shape: (B, T).
        past: tokens seen before.
        device: of the result.

    Returns:
        Shape (B, T), bool.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -shape[1] :].bool()
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        # Every token attends to itself, padding to nothing.
        own = attention_mask[:, 0, :, past : past + shape[1]].diagonal(dim1=-2, dim2=-1)
        if own.shape[1] == shape[1]:
            return (own if own.dtype == torch.bool else own == 0).expand(shape)
    return torch.ones(shape, dtype=torch.bool, device=device)


def text_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, shape: tuple[int, int], past: int, device: Any
) -> Tensor:
    """Give the place of each token in its text, padding not counted.

    Args:
        attention_mask: shape (B, past + T), or None.
        position_ids: shape (B, T), or None; taken as they are when given.
        shape: (B, T).
        past: tokens seen before.
        device: of the result.

    Returns:
        Positions from 0, shape (B, T); 0 at padding on the left.
    """
    if position_ids is not None and position_ids.dim() == 2:
        return position_ids.expand(shape)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -shape[1] :]
    return torch.arange(past, past + shape[1], device=device).expand(shape)


class Served(NamedTuple):
    """Which positions of a call are served.

    Attributes:
        first: the first one that is needed.
        chosen: those that are served, counted from `first`, shape (1, K) or (B, K); None for all from `first` on.
    """

    first: int
    chosen: Tensor | None

    @property
    def tail(self) -> slice:
        """The positions from the first one that is needed."""
        return slice(self.first, None)

    def pick(self, values: Any) -> Any:
        """Pick the served positions out of those from `first` on.

        Args:
            values: shape (B, T - first, ...), or None.

        Returns:
            Shape (B, K, ...), or None.
        """
        if values is None or self.chosen is None:
            return values
        rows = torch.arange(len(values), device=values.device).unsqueeze(-1)
        return values[rows, self.chosen.to(values.device)]

    def of(self, values: Tensor) -> Tensor:
        """Pick the served positions of a whole text.

        Args:
            values: shape (B, T, ...).

        Returns:
            Shape (B, K, ...).
        """
        picked: Tensor = self.pick(values[:, self.tail])
        return picked


def served_positions(logits_to_keep: int | Tensor, length: int) -> Served:
    """Read transformers' `logits_to_keep`.

    Args:
        logits_to_keep: how many last positions, 0 for all; or the positions themselves, shape (K,) for all texts or
            (B, K) for each, in [-length, length).
        length: of the call, T.

    Returns:
        The positions.

    Raises:
        ConfigError: positions that are not integers, or lie outside the text.
    """
    if not isinstance(logits_to_keep, Tensor):
        return Served(max(0, length - logits_to_keep) if logits_to_keep else 0, None)
    if logits_to_keep.is_floating_point() or logits_to_keep.dtype == torch.bool or logits_to_keep.dim() > 2:
        raise ConfigError(
            f"logits_to_keep of {logits_to_keep.dtype} and shape {tuple(logits_to_keep.shape)}: expected a number of "
            "last positions, or integers of shape (K,) or (B, K), the positions; turn a mask into them with nonzero"
        )
    if not logits_to_keep.numel():
        return Served(
            length, logits_to_keep.reshape(-1, logits_to_keep.shape[-1]) if logits_to_keep.dim() else None
        )
    if int(logits_to_keep.min()) < -length or int(logits_to_keep.max()) >= length:
        raise ConfigError(
            f"logits_to_keep from {int(logits_to_keep.min())} to {int(logits_to_keep.max())} in a text of {length} "
            f"tokens: expected positions in [{-length}, {length})"
        )
    places = torch.where(logits_to_keep < 0, logits_to_keep + length, logits_to_keep)
    first = int(places.min())
    return Served(first, (places - first).reshape(-1, places.shape[-1] if places.dim() else 1))


def next_of(values: Tensor, fill: float = IGNORE) -> Tensor:
    """Give what comes after each position.

    Args:
        values: shape (B, T).
        fill: stands at the last position, after which nothing comes.

    Returns:
        Shape (B, T).

    Raises:
        ShapeError: another number of dimensions.

    Example:
        >>> next_of(torch.tensor([[1, 2, 3]]))
        tensor([[   2,    3, -100]])
    """
    if values.dim() != 2:
        raise ShapeError(f"shape {tuple(values.shape)}: expected (texts, tokens)")
    return torch.nn.functional.pad(values, (0, 1), value=fill)[:, 1:]
