"""A prompt with the completion that is learnt, as Python gives it; in files it is a row (`tether.store.marked`)."""

from typing import NamedTuple

__all__ = ["Document", "Pair"]


class Pair(NamedTuple):
    """A text of which only the end is learnt."""

    prompt: str
    completion: str


Document = str | Pair
"""A text, all of it learnt, a prompt with the completion that is learnt, or a `tether.store.marked.Marked`."""
