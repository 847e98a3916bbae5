"""Documents -> tokens: the one place where what somebody has written is put before a tokenizer.

Control tokens in it are letters unless they were asked for (`tether.store.marked`). A document of any length is read
piece by piece, and gives the tokens of the whole.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tether.causal.numbers import NumericTokenizer
from tether.store.marked import Controlled, Marked, as_letters

__all__ = ["Encoded", "encode", "encode_blocks"]

PIECE = 1 << 18
"""Characters that are tokenised at a time at least: a tokenizer takes some hundred bytes for each."""
NEAR, BEFORE = 1024, 256
"""Characters on each side of a seam that are compared, and those before it that the next piece is read after."""
TRIES = 8
"""Places of each kind for a seam that are tried before a piece is made longer."""
_PLACES = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))
"""Ends of lines, and of words."""


class Encoded(NamedTuple):
    """A document, or a part of it.

    Attributes:
        ids: of its tokens.
        values: the numbers at each, or empty without numbers.
        learnt: which tokens are learnt, or empty where all are.
    """

    ids: list[int]
    values: list[float]
    learnt: list[bool]

    def cut(self, begin: int, end: int | None = None) -> "Encoded":
        """Cut a part out.

        Args:
            begin: its first token.
            end: the one after its last; None for all that follow.

        Returns:
            The part, shorter where the document ends.
        """
        part = slice(begin, end)
        return Encoded(self.ids[part], self.values[part], self.learnt[part])

    def join(self, other: "Encoded") -> "Encoded":
        """Put a part after this one.

        Args:
            other: of the same document.

        Returns:
            Both.
        """
        return Encoded(self.ids + other.ids, self.values + other.values, self.learnt + other.learnt)


def encode(tokenizer: Any, document: str) -> Encoded:
    """Tokenise a document.

    A `Marked` is tokenised piece by piece, so that what is learnt after a prompt is what follows it when a model goes
    on from it.

    Args:
        tokenizer: plain or numeric.
        document: a text, a `Controlled` text or a `Marked`.

    Returns:
        Its tokens.
    """
    if not isinstance(document, Marked):
        options = {} if isinstance(document, Controlled) else as_letters(tokenizer, document)
        return _encode(tokenizer, document, **options)
    found, begins = Encoded([], [], []), not document.is_conversation
    for part in document.parts(tokenizer):
        piece = _encode(tokenizer, part.text, add_special_tokens=begins, **part.options(tokenizer))
        found = found.join(piece._replace(learnt=[part.learnt] * len(piece.ids)))
        begins = False
    return found


def _encode(tokenizer: Any, text: str, **options: bool) -> Encoded:
    if isinstance(tokenizer, NumericTokenizer):
        encoded = tokenizer(str(text), **options)
        return Encoded(list(encoded["input_ids"]), list(encoded["numeric_values"]), [])
    return Encoded(tokenizer(str(text), truncation=False, verbose=False, **options)["input_ids"], [], [])


def encode_blocks(tokenizer: Any, blocks: Iterable[str], *, control: bool = False) -> Iterator[Encoded]:
    """Tokenise a text that may be larger than memory should hold.

    It is cut where tokens on both sides are those of the text around, which is tried before each cut. Where no such
    place is found, as in text without spaces, pieces grow; a tokenizer for which there is none reads the whole.

    Args:
        tokenizer: plain or numeric.
        blocks: the text, block by block.
        control: whether control tokens in it are read as such.

    Yields:
        Tokens of the whole text, in order, some at a time.
    """

    def read(text: str, *, special: bool = False) -> Encoded:
        options = {} if control else as_letters(tokenizer, text)
        return _encode(tokenizer, text, **({} if special else {"add_special_tokens": False}), **options)

    rest, before, skipped = "", "", 0
    around: tuple[Encoded, Encoded] | None = None
    least, begun = PIECE, False
    for block in blocks:
        rest += block
        while len(rest) >= least + NEAR:
            around = around or _around(read, rest[:NEAR])
            at = None if around is None else _seam(read, rest, least)
            if around is None or at is None:
                least *= 2
                continue
            found = read(before + rest[:at]).cut(skipped)
            yield found if begun else around[0].join(found)
            before, rest, least, begun = rest[at - BEFORE : at], rest[at:], PIECE, True
            skipped = len(read(before).ids)
    if begun and around is not None:
        yield read(before + rest).cut(skipped).join(around[1])
    else:
        yield read(rest, special=True)


# What a tokenizer puts around a text, or None where that cannot be told.
def _around(read: Callable[..., Encoded], text: str) -> tuple[Encoded, Encoded] | None:
    bare, dressed = read(text), read(text, special=True)
    size = len(bare.ids)
    for begin in range(len(dressed.ids) - size + 1):
        if dressed.ids[begin : begin + size] == bare.ids:
            return dressed.cut(0, begin), dressed.cut(begin + size)
    return None


# A place near the given one at which a text can be parted: what is read on each side is what the whole reads.
def _seam(read: Callable[..., Encoded], text: str, least: int) -> int | None:
    first = max(least // 2, NEAR)
    for kind in _PLACES:
        places = [first + found.start() for found in kind.finditer(text[first:least])]
        for at in places[-TRIES:]:
            left, right, before = text[at - NEAR : at], text[at : at + NEAR], text[at - BEFORE : at]
            known, after = read(before), read(before + right)
            size = len(known.ids)
            if after.cut(0, size) == known and read(left + right) == read(left).join(after.cut(size)):
                return at
    return None
