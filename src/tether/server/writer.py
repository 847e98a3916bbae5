"""What a model writes, token by token -> text in pieces, numbers as numbers, up to where it is to stop."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from tether.causal.placeholder import shortest_floats
from tether.causal.streaming import NumericStreamer

__all__ = ["Ended", "Writer"]

PRECISION = 6
"""Significant digits of a number, as `tether generate` prints it."""
HALF = "\ufffd"
"""Stands for a character of which a token brought only a part."""


class Writer(NumericStreamer):
    """A streamer of transformers that hears each token, and gives text as soon as it is sure.

    All pieces together are what `decode` makes of all tokens, cut before the first text to stop at. Cost per token: a
    few tokens are decoded.

    Args:
        tokenizer: plain or numeric.
        number: id of `<NUM>`, or None.
        stops: texts that end the answer.
        give: called with each piece.

    Attributes:
        ids: of the tokens so far.
        text: so far.
        stopped: whether a text to stop at came.
    """

    def __init__(
        self, tokenizer: Any, number: int | None, stops: Sequence[str], give: Callable[[str], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.number, self.stops, self.give = number, stops, give
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._numbers: list[float] = []
        self._given = 0  # characters
        self._seen = self._done = 0  # tokens: where decoding begins, and up to where text is known
        self._gone = threading.Event()

    @property
    def total_tokens(self) -> int:
        """How many tokens were written; transformers' handlers ask by this name."""
        return len(self.ids)

    def gone(self) -> bool:
        """Tell whether to stop since nobody waits for the answer any more.

        Returns:
            Whether `cancel` was called.
        """
        return self._gone.is_set()

    def cancel(self) -> None:
        """Stop at the next token: nobody waits for the answer any more."""
        self._gone.set()

    def put(self, value: Tensor) -> None:
        """Take the next token.

        Args:
            value: its id, shape (1,); the first call brings the prompt, shape (1, P).
        """
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        (token,) = value.reshape(-1).tolist()
        is_number = token == self.number
        self._numbers.append(shortest_floats(self.values[len(self.ids)])[0] if is_number else 0.0)
        self.ids.append(token)
        before, now = self._decoded(self._seen, self._done), self._decoded(self._seen, len(self.ids))
        if len(now) > len(before) and not now.endswith(HALF):
            self._seen, self._done = self._done, len(self.ids)
            self._take(now[len(before) :])

    def end(self) -> None:
        """Give what was held back."""
        if not self.stopped:
            whole = self._decoded(0, len(self.ids))
            if whole.startswith(self.text):
                self._take(whole[len(self.text) :])
        self._give(len(self.text))

    def _decoded(self, first: int, last: int) -> str:
        ids = self.ids[first:last]
        if self.number is None:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        numbers = self._numbers[first:last]
        return str(self.tokenizer.decode(ids, numbers, skip_special_tokens=True, precision=PRECISION))

    def _take(self, new: str) -> None:
        longest = max(map(len, self.stops), default=1)
        from_here = max(0, len(self.text) - longest + 1)
        self.text += new
        found = [place for stop in self.stops if (place := self.text.find(stop, from_here)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        held = max((_begun(self.text, stop) for stop in self.stops), default=0)
        self._give(len(self.text) if self.stopped else len(self.text) - held)

    def _give(self, until: int) -> None:
        if until > self._given:
            piece, self._given = self.text[self._given : until], until
            self.give(piece)


# How much of the text's end may be the beginning of a text to stop at.
def _begun(text: str, stop: str) -> int:
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class Ended(StoppingCriteria):  # type: ignore[misc]
    """Ends the stock loop where the answer has ended, or nobody waits for it.

    Args:
        writer: hears the tokens.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Say whether to end.

        Args:
            input_ids: texts so far, shape (1, L).
            scores: as in transformers.

        Returns:
            Shape (1,), bool.
        """
        ended = self.writer.stopped or self.writer.gone()
        return torch.full((len(input_ids),), ended, dtype=torch.bool, device=input_ids.device)
