"""Documents -> windows of tokens, each inside one document."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.losses import IGNORE
from tether.causal.numbers import NumericTokenizer
from tether.errors import ConfigError
from tether.store.documents import beginning
from tether.store.marked import Marked

__all__ = ["Batch", "Encoded", "Windows", "encode", "encode_marked", "reader", "window_text"]

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
    pieces: list[tuple[int, list[int], list[float], list[bool]]] = []
    total = skipped = read = 0
    for number in range(len(documents)):
        wanted = [per_document * length] if per_document is not None else []
        wanted += [tokens - total + length] if tokens is not None and not whole else []
        encoded = _encode_beginning(tokenizer, documents, number, min(wanted, default=None))
        ends = range(0, len(encoded.ids), length)
        cuts = [encoded.cut(at, at + length) for at in ends]
        kept = [cut for cut in cuts if _worth(cut, min(SHORTEST, length))][:per_document]
        read, skipped = read + 1, skipped + (not kept)
        for cut in kept:
            pieces.append((number, *cut))
            total += len(cut.ids)
            if tokens is not None and total >= tokens and not whole:
                break
        if tokens is not None and total >= tokens:
            break
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
    lengths = torch.tensor([len(ids) for _, ids, *_ in pieces])
    input_ids = torch.tensor([token for _, ids, *_ in pieces for token in ids])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    targets = torch.cat([input_ids[1:], torch.tensor([IGNORE])])
    if any(marks for *_, marks in pieces):
        learnt = [each for _, ids, _, marks in pieces for each in marks or [True] * len(ids)]
        targets[:-1][~torch.tensor(learnt)[1:]] = IGNORE
    targets[starts[1:] - 1] = IGNORE
    numbers = torch.tensor([number for number, *_ in pieces]).repeat_interleave(lengths)
    numeric_values = None
    if isinstance(tokenizer, NumericTokenizer):
        values = [value for _, _, found, _ in pieces for value in found]
        numeric_values = torch.tensor(values, dtype=torch.float64)
    return Windows(input_ids, targets, numbers, starts, numeric_values)


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


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[float]]:
    """Tokenise one text.

    Args:
        tokenizer: plain or numeric.
        text: the text.

    Returns:
        Ids and numbers, of one length; without numbers the second list is empty.
    """
    if isinstance(text, Marked):
        return encode_marked(tokenizer, text)[:2]
    if isinstance(tokenizer, NumericTokenizer):
        encoded = tokenizer(text)
        return list(encoded["input_ids"]), list(encoded["numeric_values"])
    return tokenizer(text, truncation=False, verbose=False)["input_ids"], []


class Encoded(NamedTuple):
    """A document, or a window of it.

    Attributes:
        ids: of its tokens.
        values: the numbers at each, or empty without numbers.
        learnt: which tokens are learnt, or empty where all are.
    """

    ids: list[int]
    values: list[float]
    learnt: list[bool]

    def cut(self, begin: int, end: int) -> "Encoded":
        """Cut a window out.

        Args:
            begin: its first token.
            end: the one after its last.

        Returns:
            The window, shorter where the document ends.
        """
        part = slice(begin, end)
        return Encoded(self.ids[part], self.values[part], self.learnt[part])


def encode_marked(tokenizer: Any, document: Marked) -> Encoded:
    """Tokenise a document of which a part is learnt, piece by piece.

    Pieces are tokenised apart, so that what is learnt after a prompt is what follows it when a model goes on from it.

    Args:
        tokenizer: plain or numeric.
        document: the document.

    Returns:
        Its tokens.
    """
    found = Encoded([], [], [])
    begins = not document.is_conversation
    for part in document.parts(tokenizer):
        options = {"add_special_tokens": begins, **part.options(tokenizer)}
        begins = False
        if isinstance(tokenizer, NumericTokenizer):
            encoded = tokenizer(part.text, **options)
            found.values.extend(encoded["numeric_values"])
        else:
            encoded = tokenizer(part.text, truncation=False, verbose=False, **options)
        found.ids.extend(encoded["input_ids"])
        found.learnt.extend([part.learnt] * len(encoded["input_ids"]))
    return found


# Of a conversation every window counts in which something is learnt, however short.
def _worth(cut: Encoded, shortest: int) -> bool:
    return any(cut.learnt[1:]) if cut.learnt else len(cut.ids) >= shortest


# A document's first tokens, at least as many as wanted, as they are in the whole document.
def _encode_beginning(tokenizer: Any, documents: Sequence[str], number: int, wanted: int | None) -> Encoded:
    if wanted is None:
        document = documents[number]
        if isinstance(document, Marked):
            return encode_marked(tokenizer, document)
        return Encoded(*encode(tokenizer, document), [])
    characters = LETTERS * (wanted + SEAM)
    while True:
        text = beginning(documents, number, characters + 1)
        if isinstance(text, Marked):
            return encode_marked(tokenizer, text)
        if len(text) <= characters:
            return Encoded(*encode(tokenizer, text), [])
        # Where a word ends, the tokens before it know nothing of what follows.
        space = max(text.rfind(" "), text.rfind("\n"))
        ids, values = encode(tokenizer, text[:space] if 2 * space > characters else text)
        if len(ids) - SEAM >= wanted:
            return Encoded(ids[:-SEAM], values[:-SEAM], [])
        characters *= 2
