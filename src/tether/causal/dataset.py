"""Documents -> tokens, numbers and labels in windows -> batches padded on the right."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.losses import IGNORE
from tether.causal.numbers import NumericTokenizer
from tether.causal.pairs import Document
from tether.errors import ConfigError
from tether.store.marked import Marked

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
    """

    input_ids: Tensor
    numeric_values: Tensor | None
    labels: Tensor
    starts: Tensor
    padding: int

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
            what `model(**batch)` takes.
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
        return batch

    def fingerprint(self) -> str:
        """Hash all that is learnt from.

        Returns:
            `sha256:` and 64 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.numeric_values, self.labels, self.starts):
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
    last is full; attention then sees the documents before, but no document's first token is learnt.

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
        ...     pad_token_id, eos_token_id = 0, 1
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
    pieces: list[_Piece] = []
    total = 0
    for document in documents:
        piece = _encode(document, tokenizer, window, packed)
        pieces.append(piece)
        total += len(piece.input_ids)
        if tokens is not None and total >= tokens:
            break
    if packed:
        pieces = [_Piece(*([each for part in parts for each in part] for parts in zip(*pieces, strict=True)))]
    cuts = [cut for piece in pieces for cut in piece.cut(window)]
    if not cuts:
        raise ConfigError(
            f"{len(documents)} documents of {total} tokens leave nothing to learn: expected at least one of two tokens"
        )
    lengths = torch.tensor([len(cut.input_ids) for cut in cuts])
    flat = [torch.tensor([each for cut in cuts for each in cut[part]]) for part in (0, 2)]
    values = torch.tensor([each for cut in cuts for each in cut.values], dtype=torch.float64)
    return Examples(
        flat[0],
        values if isinstance(tokenizer, NumericTokenizer) else None,
        flat[1],
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        tokenizer.pad_token_id or 0,
    )


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
    """Tokens in a row: ids, numbers, labels."""

    input_ids: list[int]
    values: list[float]
    labels: list[int]

    def cut(self, window: int) -> "list[_Piece]":
        cuts = []
        for start in range(0, len(self.input_ids), window):
            ids, values, labels = (part[start : start + window] for part in self)
            labels = [IGNORE, *labels[1:]]
            if any(label != IGNORE for label in labels):
                cuts.append(_Piece(ids, values, labels))  # type: ignore[arg-type]
        return cuts


def _encode(document: Document, tokenizer: Any, window: int, packed: bool) -> _Piece:
    def tokens(text: str, **options: Any) -> tuple[list[int], list[float]]:
        if isinstance(tokenizer, NumericTokenizer):
            encoded = tokenizer(text, **options)
            return encoded["input_ids"], encoded["numeric_values"]
        ids = tokenizer(text, truncation=False, verbose=False, **options)["input_ids"]
        return ids, [0.0] * len(ids)

    if isinstance(document, Marked):
        return _marked(document, tokenizer, tokens)
    if isinstance(document, str):
        before, (ids, values) = 0, tokens(document)
    else:
        (ids, values), (more, numbers) = (
            tokens(document.prompt),
            tokens(document.completion, add_special_tokens=False),
        )
        before, ids, values = len(ids), ids + more, values + numbers
    end = tokenizer.eos_token_id
    if end is not None and (packed or not isinstance(document, str)) and ids[-1:] != [end]:
        ids, values = [*ids, end], [*values, 0.0]
    labels = [IGNORE] * max(before, 1) + ids[max(before, 1) :]
    cut = min(before, max(len(ids) - window, 0))
    return _Piece(ids[cut:], values[cut:], labels[cut : len(ids)])


# A conversation, of which the assistant's turns are learnt, or a prompt with its completion.
def _marked(document: Marked, tokenizer: Any, tokens: Callable[..., tuple[list[int], list[float]]]) -> _Piece:
    piece, begins = _Piece([], [], []), not document.is_conversation
    for part in document.parts(tokenizer):
        ids, values = tokens(part.text, add_special_tokens=begins, **part.options(tokenizer))
        piece.input_ids.extend(ids)
        piece.values.extend(values)
        piece.labels.extend(ids if part.learnt else [IGNORE] * len(ids))
        begins = False
    return piece
