"""Printing tokens and numbers while they are generated."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TextStreamer

from tether.causal.placeholder import shortest_floats
from tether.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from tether.causal.numbers import NumericTokenizer

__all__ = ["NumericStreamer"]


class NumericStreamer(TextStreamer):  # type: ignore[misc]
    """Prints tokens as they come, with numbers in place of `<NUM>`.

    The generating model appends the (B,) values of each new token to `values` before it puts the token;
    they count only where the token is `<NUM>`. `end` clears what belongs to the finished text.

    Args:
        tokenizer: a numeric tokenizer.
        skip_prompt: whether to leave out the prompt.
        **decode_kwargs: for `NumericTokenizer.decode`.

    Attributes:
        values: one tensor of shape (B,) for each generated token.
        prompt_values: values of the prompt, shape (B, T); None where it holds no `<NUM>` or is skipped.
        prompt_surfaces: how the numbers of the prompt were written; None to print them by their values.
    """

    def __init__(
        self, tokenizer: "NumericTokenizer", skip_prompt: bool = False, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.next_tokens_are_prompt: bool = True
        self.values: list[Tensor] = []
        self.prompt_values: Tensor | None = None
        self.prompt_surfaces: list[str] | None = None
        self._generated = 0

    def _values_of(self, ids: list[int]) -> list[float]:
        is_number = [number == self.tokenizer.num_token_id for number in ids]
        if self.next_tokens_are_prompt:
            given = [] if self.prompt_values is None else shortest_floats(self.prompt_values)
            needed = any(is_number) and not self.skip_prompt
        else:
            steps = self.values[self._generated : self._generated + len(ids)]
            given = [value for step in steps for value in shortest_floats(step)]
            needed = any(is_number)
            self._generated += len(ids)
        if not needed:
            return [0.0] * len(ids)
        if len(given) != len(ids):
            raise ConfigError(
                f"{len(given)} values for {len(ids)} tokens with <NUM>: expected one for each token; set "
                "prompt_values before the prompt, and append to values before each new token"
            )
        return [value if number else 0.0 for value, number in zip(given, is_number, strict=True)]

    def put(self, value: Tensor) -> None:
        """Print what the new tokens complete.

        Args:
            value: token ids, shape (T,) or (1, T); the first call brings the prompt.

        Raises:
            ConfigError: a `<NUM>` came without its value.
            ShapeError: more than one text.
        """  # noqa: DOC502 - raised by what it calls
        if value.dim() > 1 and len(value) > 1:
            raise ShapeError(
                f"ids {tuple(value.shape)}: expected one text to stream; generate without a streamer"
            )
        # The base decodes `token_cache` as a whole and drops it at line ends; the values go along with it.
        kept = self.decode_kwargs["numeric_values"] if self.token_cache else []
        self.decode_kwargs["numeric_values"] = kept + self._values_of(value.reshape(-1).tolist())
        if not self.token_cache:
            self.decode_kwargs["surfaces"] = self.prompt_surfaces if self.next_tokens_are_prompt else None
        super().put(value)
        self.next_tokens_are_prompt = False

    def end(self) -> None:
        """Print the rest and a line end, and forget the values of the text."""
        super().end()
        self.values.clear()
        self.prompt_values = self.prompt_surfaces = None
        self._generated = 0
