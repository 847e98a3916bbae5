"""Documents -> windows of tokens, each inside one document."""

import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.encoded import Encoded, encode, encode_blocks
from tether.causal.losses import IGNORE
from tether.causal.numbers import NumericTokenizer
from tether.errors import ConfigError
from tether.store.documents import beginning
from tether.store.marked import Controlled, Marked
from tether.store.opened import Text

__all__ = ["Batch", "Windows", "reader", "window_text"]

logger = logging.getLogger(__name__)

SHORTEST = 32
"""Windows of fewer tokens are left out, documents of fewer with a warning: they carry little loss and cost a row."""
LETTERS = 8
"""Characters a token that are read of a long document at first, when only so many tokens of it are wanted."""
SEAM = 64
"""Tokens before the end of a beginning that are not used: there it may be cut otherwise than within the document."""


class Batch(NamedTuple):
    """Some windows side by side, padded on the right.

    Attributes:
        rows: which windows these are, shape (B,).
        input_ids: shape (B, T), 0 where padded.
        mask: which positions carry a token, shape (B, T), bool.
        numeric_values: the number at each position, 0 elsewhere, shape (B, T), float64; None without numbers.
    """

    rows: Tensor
    input_ids: Tensor
    mask: Tensor
    numeric_values: Tensor | None = None


class Windows(NamedTuple):
    """A tokenised text: windows laid end to end.

    Attributes:
        input_ids: all tokens, shape (n,), int64.
        targets: the next token within the same window, `IGNORE` at each window's end and where the next token is not
            learnt (`tether.store.marked`), shape (n,), int64.
        documents: which document each token is from, shape (n,), int64, from 0.
        starts: offset of each window, and n at the end, shape (W + 1,), int64.
        numeric_values: the number that each `<NUM>` stands for, 0 elsewhere, shape (n,), float64; None for a text
            that is read without numbers.
    """

    input_ids: Tensor
    targets: Tensor
    documents: Tensor
    starts: Tensor
    numeric_values: Tensor | None = None

    def batches(self, size: int) -> Iterator[Batch]:
        """Group windows of similar length, longest first, so that little is padded.

        Args:
            size: windows a batch, >= 1.

        Yields:
            Every window exactly once.
        """
        lengths = self.starts.diff()
        order = lengths.argsort(descending=True, stable=True)
        for rows in order.split(size):
            yield self.batch(rows)

    def batch(self, rows: Tensor) -> Batch:
        """Put some windows side by side.

        Args:
            rows: which windows, shape (B,).

        Returns:
            The batch, padded on the right.
        """
        lengths = self.starts.diff()[rows]
        time = torch.arange(int(lengths.max()))
        mask = time < lengths.unsqueeze(-1)
        index = (self.starts[rows].unsqueeze(-1) + time).clamp(max=len(self.input_ids) - 1)
        values = None if self.numeric_values is None else torch.where(mask, self.numeric_values[index], 0)
        return Batch(rows, torch.where(mask, self.input_ids[index], 0), mask, values)

    def some(self, rows: Tensor) -> "Windows":
        """Take some windows.

        Args:
            rows: which, ascending, shape (W',).

        Returns:
            The text of those windows; documents keep their numbers.
        """
        lengths = self.starts.diff()
        chosen = torch.zeros(len(lengths), dtype=torch.bool)
        chosen[rows] = True
        kept = chosen.repeat_interleave(lengths)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[chosen].cumsum(0)])
        values = None if self.numeric_values is None else self.numeric_values[kept]
        return Windows(self.input_ids[kept], self.targets[kept], self.documents[kept], starts, values)

    def positions(self, batch: Batch) -> Tensor:
        """Give the offsets of a batch's tokens in the flat layout.

        Args:
            batch: from `batches`.

        Returns:
            Offsets in the order of `batch.mask.nonzero()`, shape (tokens in the batch,).
        """
        time = torch.arange(batch.mask.shape[1])
        return (self.starts[batch.rows].unsqueeze(-1) + time)[batch.mask]


def window_text(
    documents: Sequence[str],
    tokenizer: Any,
    *,
    length: int = 256,
    tokens: int | None = None,
    per_document: int | None = None,
    name: str = "the text",
    whole: bool = False,
    short: bool = False,
) -> Windows:
    """Tokenise documents and cut them into windows that never cross a document.

    Of a document that is longer than what `tokens` or `per_document` leaves to take, only a beginning is read.

    Args:
        documents: the documents in order.
        tokenizer: any transformers tokenizer, or the numeric one of a model that reads numbers (`reader`).
        length: tokens a window, >= 2.
        tokens: stop after the window that brings the total to this many; None takes all.
        per_document: windows taken of one document at most; None takes all.
        name: what to call the text in an error.
        whole: keep the document that reaches `tokens` whole, as certificates of schema 3 and below did.
        short: take a text that is shorter than one window too, of at least one document of the shortest length.

    Returns:
        The windows.

    Raises:
        ConfigError: a tokenizer is missing, or the text is shorter than one window.
    """
    if length < 2 or (tokens is not None and tokens < 1):
        raise ConfigError(f"window of {length}, tokens={tokens}: expected at least 2 and at least 1")
    if tokenizer is None:
        raise ConfigError("tokenizer=None: expected the base model's tokenizer; tether.load returns both")
    # Compact arrays: a Python list of ids would take ten times their room.
    ids, values, marks = array("i"), array("d"), array("b")
    lengths, numbers = array("i"), array("q")
    numeric, marked = isinstance(tokenizer, NumericTokenizer), False
    skipped = read = 0
    for number in range(len(documents)):
        wanted = [per_document * length] if per_document is not None else []
        wanted += [tokens - len(ids) + length] if tokens is not None and not whole else []
        pieces = _pieces(tokenizer, documents, number, min(wanted, default=None))
        kept = 0
        for cut in _windows(pieces, length):
            if per_document is not None and kept == per_document:
                break
            if not _worth(cut, min(SHORTEST, length)):
                continue
            ids.extend(cut.ids)
            values.extend(cut.values)
            marks.extend(cut.learnt or [True] * len(cut.ids))
            marked = marked or bool(cut.learnt)
            lengths.append(len(cut.ids))
            numbers.append(number)
            kept += 1
            if tokens is not None and len(ids) >= tokens and not whole:
                break
        read, skipped = read + 1, skipped + (not kept)
        if tokens is not None and len(ids) >= tokens:
            break
    total = len(ids)
    if total < (min(SHORTEST, length) if short else length):
        raise ConfigError(
            f"{name} gives {total} tokens in windows of at least {min(SHORTEST, length)}: expected at least one "
            f"context of {length}; give more text"
        )
    if skipped:
        logger.warning(
            "%s: %d of %d documents are shorter than %d tokens and left out",
            name,
            skipped,
            read,
            min(SHORTEST, length),
        )
    sizes = torch.frombuffer(lengths, dtype=torch.int32).long()
    input_ids = torch.frombuffer(ids, dtype=torch.int32).long()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    targets = torch.cat([input_ids[1:], torch.tensor([IGNORE])])
    if marked:
        targets[:-1][torch.frombuffer(marks, dtype=torch.int8)[1:] == 0] = IGNORE
    targets[starts[1:] - 1] = IGNORE
    of_token = torch.frombuffer(numbers, dtype=torch.int64).repeat_interleave(sizes)
    numeric_values = torch.frombuffer(values, dtype=torch.float64).clone() if numeric else None
    return Windows(input_ids, targets, of_token, starts, numeric_values)


def reader(model: Any, tokenizer: Any) -> Any:
    """Give the tokenizer that a model's text is to be read with.

    Args:
        model: a CausalQwenForCausalLM.
        tokenizer: its plain tokenizer, or its numeric one.

    Returns:
        The numeric tokenizer where the model reads numbers (`--numbers`), else the one given.
    """
    known = getattr(model.config, "num_token_id", None)
    return tokenizer if known is None or tokenizer is None else model.add_numbers(tokenizer)


# Of a conversation every window counts in which something is learnt, however short.
def _worth(cut: Encoded, shortest: int) -> bool:
    return any(cut.learnt[1:]) if cut.learnt else len(cut.ids) >= shortest


# A document's tokens some at a time; where so many are wanted, at least as many as that, as they are in the whole.
def _pieces(tokenizer: Any, documents: Sequence[str], number: int, wanted: int | None) -> Iterator[Encoded]:
    if wanted is None:
        if isinstance(documents, Text) and documents.kind == "text":
            yield from encode_blocks(tokenizer, documents.blocks(number), control=documents.seen.control)
        else:
            yield encode(tokenizer, documents[number])
        return
    characters = LETTERS * (wanted + SEAM)
    while True:
        text = beginning(documents, number, characters + 1)
        if isinstance(text, Marked) or len(text) <= characters:
            yield encode(tokenizer, text)
            return
        # Where a word ends, the tokens before it know nothing of what follows.
        space = max(text.rfind(" "), text.rfind("\n"))
        part = text[:space] if 2 * space > characters else text
        encoded = encode(tokenizer, Controlled(part) if isinstance(text, Controlled) else part)
        if len(encoded.ids) - SEAM >= wanted:
            yield encoded.cut(0, len(encoded.ids) - SEAM)
            return
        characters *= 2


# The windows of a document, the last one as short as it is.
def _windows(pieces: Iterable[Encoded], length: int) -> Iterator[Encoded]:
    rest = Encoded([], [], [])
    for piece in pieces:
        rest = rest.join(piece)
        full = len(rest.ids) // length * length
        for begin in range(0, full, length):
            yield rest.cut(begin, begin + length)
        rest = rest.cut(full)
    if rest.ids:
        yield rest
