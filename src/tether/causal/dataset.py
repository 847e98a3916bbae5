"""Documents -> tokens, numbers and labels in windows -> batches padded on the right."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.encoded import encode, encode_blocks
from tether.causal.losses import IGNORE
from tether.causal.numbers import NumericTokenizer
from tether.causal.pairs import Document, Pair
from tether.errors import ConfigError
from tether.store.marked import Marked, document_of
from tether.store.opened import Text

__all__ = ["Examples", "count_labels", "make_examples", "shuffled"]


class Examples(NamedTuple):
    """Windows of text laid end to end, ready to be learnt.

    Attributes:
        input_ids: all tokens, shape (n,), int64.
        numeric_values: the number at each `<NUM>`, 0 elsewhere, shape (n,), float64; None without numbers.
        labels: the token itself where it is learnt, else `IGNORE`, shape (n,), int64. The first token of a
            window is never learnt: nothing predicts it.
        starts: offset of each window, and n at the end, shape (W + 1,), int64.
        padding: id that stands for no token.
        begins: offset of each document's first token, ascending, int64, where windows may hold several; else None.
    """

    input_ids: Tensor
    numeric_values: Tensor | None
    labels: Tensor
    starts: Tensor
    padding: int
    begins: Tensor | None = None

    @property
    def windows(self) -> int:
        """The number W of windows."""
        return len(self.starts) - 1

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Put windows side by side, padded on the right.

        Args:
            rows: which windows, each in [0, W), at least one.

        Returns:
            `input_ids`, `attention_mask`, `labels` and, with numbers, `numeric_values`, shape (B, T) each:
            what `model(**batch)` takes. Where windows may hold several documents, `position_ids` that begin again with
            each in place of the mask: attention then stays inside a document, as transformers reads such positions.
        """
        chosen = torch.tensor(rows)
        lengths = self.starts.diff()[chosen]
        time = torch.arange(int(lengths.max()))
        mask = time < lengths.unsqueeze(-1)
        index = (self.starts[chosen].unsqueeze(-1) + time).clamp(max=len(self.input_ids) - 1)
        batch = {
            "input_ids": torch.where(mask, self.input_ids[index], self.padding),
            "attention_mask": mask.long(),
            "labels": torch.where(mask, self.labels[index], IGNORE),
        }
        if self.numeric_values is not None:
            batch["numeric_values"] = torch.where(mask, self.numeric_values[index], 0.0)
        if self.begins is not None:
            del batch["attention_mask"]
            first = self.starts[chosen].unsqueeze(-1)
            place = first + time
            # A window may begin within a document: -1 stands for one that begins before all windows.
            known = torch.cat([torch.tensor([-1]), self.begins])
            batch["position_ids"] = place - torch.maximum(
                known[torch.searchsorted(self.begins, place, right=True)], first
            )
        return batch

    def fingerprint(self) -> str:
        """Hash all that is learnt from.

        Returns:
            `sha256:` and 64 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.numeric_values, self.labels, self.starts, self.begins):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {len(tensor)}\n".encode() + tensor.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


def make_examples(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    window: int = 256,
    packed: bool = False,
    tokens: int | None = None,
) -> Examples:
    """Tokenise documents and cut them into windows.

    A window lies inside one document; where a document is longer, windows follow each other without
    overlap. Packed, documents are laid end to end, each closed by the end token, and every window but the
    last is full; the documents of a window do not see each other, and no document's first token is learnt.

    Prompt and completion are tokenised apart, so that generation from the prompt meets what was learnt; the
    completion is closed by the end token where the tokenizer has one. A pair that is longer than a window
    loses the start of its prompt.

    Args:
        documents: texts or pairs, in order.
        tokenizer: any transformers tokenizer; a `NumericTokenizer` reads the numbers.
        window: tokens a window, >= 2.
        packed: whether windows may hold several documents.
        tokens: stop after the document that brings the total to this many; None takes all.

    Returns:
        The windows that have something to learn.

    Raises:
        ConfigError: no tokenizer or document, a window below 2, packing without an end token, or nothing to
            learn.

    Example:
        >>> class Letters:
        ...     pad_token_id, eos_token_id, eos_token = 0, 1, chr(1)
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": [ord(letter) for letter in text]}
        >>> from tether.causal.pairs import Pair
        >>> examples = make_examples([Pair("ab", "c")], Letters())
        >>> examples.collate([0])["labels"]
        tensor([[-100, -100,   99,    1]])
    """
    if tokenizer is None:
        raise ConfigError("tokenizer=None: expected the model's tokenizer; tether.load returns both")
    if window < 2:
        raise ConfigError(
            f"window={window}: expected at least 2 tokens, one to predict from and one to predict"
        )
    if packed and tokenizer.eos_token_id is None:
        raise ConfigError("packed: the tokenizer has no end token to part documents with; leave it out")
    # Compact arrays: a Python list of ids would take ten times their room.
    flat = _Flat(array("i"), array("d"), array("i"), array("i"), array("q"))
    begins, total, rest = array("q"), 0, _Piece([], [], [])
    for number in range(len(documents)):
        begins.append(total)
        for piece in _pieces(documents, number, tokenizer, window, packed):
            total += len(piece.input_ids)
            rest = rest.join(piece)
            rest = flat.take(rest, len(rest.input_ids) // window * window, window, total)
        if not packed:
            rest = flat.take(rest, len(rest.input_ids), window, total)
        if tokens is not None and total >= tokens:
            break
    flat.take(rest, len(rest.input_ids), window, total)
    if not flat.lengths:
        raise ConfigError(
            f"{len(documents)} documents of {total} tokens leave nothing to learn: expected at least one of two tokens"
        )
    sizes = torch.frombuffer(flat.lengths, dtype=torch.int32).long()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return Examples(
        torch.frombuffer(flat.input_ids, dtype=torch.int32).long(),
        torch.frombuffer(flat.values, dtype=torch.float64)
        if isinstance(tokenizer, NumericTokenizer)
        else None,
        torch.frombuffer(flat.labels, dtype=torch.int32).long(),
        starts,
        tokenizer.pad_token_id or 0,
        _within(begins, flat.places, starts) if packed else None,
    )


# Where documents begin, among the windows that were kept.
def _within(begins: "array[int]", places: "array[int]", starts: Tensor) -> Tensor:
    begin, place = (torch.frombuffer(each, dtype=torch.int64) for each in (begins, places))
    row = torch.searchsorted(place, begin, right=True) - 1
    inside = begin - place[row]
    here = (row >= 0) & (inside < starts.diff()[row])
    return (starts[row] + inside)[here]


def shuffled(count: int, seed: int, start: int, stop: int) -> list[int]:
    """Give a stretch of the endless sequence in which windows are learnt: a new order for every pass.

    Args:
        count: windows in the text, >= 1.
        seed: of the orders.
        start: first place in the sequence, >= 0.
        stop: end, >= start.

    Returns:
        Windows, each in [0, count); each pass of `count` places holds every one once.

    Example:
        >>> sorted(shuffled(4, 0, 4, 8)), shuffled(4, 0, 2, 6) == shuffled(4, 0, 0, 8)[2:6]
        ([0, 1, 2, 3], True)
    """
    rows: list[int] = []
    for epoch in range(start // count, -(-stop // count)):
        generator = torch.Generator().manual_seed(seed * 2**20 + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        rows += order[max(start - epoch * count, 0) : stop - epoch * count]
    return rows


def count_labels(labels: Tensor, number: int | None) -> tuple[int, int]:
    """Count what is learnt.

    Args:
        labels: aligned with the tokens; the first of a row is never learnt; shape (B, T) or (n,) if it is
            ignored there.
        number: id of `<NUM>`, or None.

    Returns:
        How many labels there are, and how many of them are `<NUM>`.
    """
    kept = labels[..., 1:]
    return int((kept != IGNORE).sum()), 0 if number is None else int((kept == number).sum())


class _Piece(NamedTuple):
    """Tokens in a row: ids, numbers (none without a tokenizer that reads them), labels."""

    input_ids: list[int]
    values: list[float]
    labels: list[int]

    def cut(self, begin: int, end: int | None = None) -> "_Piece":
        return _Piece(self.input_ids[begin:end], self.values[begin:end], self.labels[begin:end])

    def join(self, other: "_Piece") -> "_Piece":
        return _Piece(
            self.input_ids + other.input_ids, self.values + other.values, self.labels + other.labels
        )


class _Flat(NamedTuple):
    """All windows so far, end to end."""

    input_ids: "array[int]"
    values: "array[float]"
    labels: "array[int]"
    lengths: "array[int]"
    places: "array[int]"  # of each window among all tokens, also those that are not learnt

    # Cut the first tokens of a piece into windows, keep those in which something is learnt, and give the rest back.
    def take(self, piece: _Piece, end: int, window: int, total: int) -> _Piece:
        first = total - len(piece.input_ids)
        for begin in range(0, end, window):
            ids, values, labels = piece.cut(begin, min(begin + window, end))
            labels = [IGNORE, *labels[1:]]
            if any(label != IGNORE for label in labels):
                self.input_ids.extend(ids)
                self.values.extend(values)
                self.labels.extend(labels)
                self.lengths.append(len(ids))
                self.places.append(first + begin)
        return piece.cut(end)


# A document's tokens some at a time. Its first one is never learnt: nothing before it says what it is.
def _pieces(
    documents: Sequence[Document], number: int, tokenizer: Any, window: int, packed: bool
) -> Iterator[_Piece]:
    end = tokenizer.eos_token_id if packed else None
    if isinstance(documents, Text) and documents.kind == "text":
        last: list[int] = []
        for part in encode_blocks(tokenizer, documents.blocks(number), control=documents.seen.control):
            yield _Piece(part.ids, part.values, part.ids if last else [IGNORE, *part.ids[1:]])
            last = part.ids[-1:] or last
        if end is not None and last != [end]:
            yield _closing(tokenizer, end)
        return
    document = documents[number]
    if isinstance(document, Pair):
        document = document_of(document._asdict(), "prompt")
    encoded = encode(tokenizer, document)
    learnt = encoded.learnt or [True] * len(encoded.ids)
    if isinstance(document, Marked) and not document.is_conversation:
        # A prompt loses its start where the pair is longer than a window.
        prompt = learnt.index(True) if True in learnt else 0
        begin = min(prompt, max(len(learnt) - window, 0))
        encoded, learnt = encoded.cut(begin), learnt[begin:]
    labels = [each if own else IGNORE for each, own in zip(encoded.ids, learnt, strict=True)]
    labels[:1] = [IGNORE] if labels else []
    yield _Piece(encoded.ids, encoded.values, labels)
    if end is not None and not isinstance(document, Marked) and encoded.ids[-1:] != [end]:
        yield _closing(tokenizer, end)


def _closing(tokenizer: Any, end: int) -> _Piece:
    return _Piece([end], [0.0] if isinstance(tokenizer, NumericTokenizer) else [], [end])
