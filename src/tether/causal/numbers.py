"""Text to tokens and numbers, and back: every number of a text becomes one `<NUM>` with its value."""

import copy
import os
import re
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tether.causal import placeholder
from tether.causal.encoding import NumericEncoding
from tether.causal.numerals import Numeral, find_numbers
from tether.causal.placeholder import check_numeric, shortest_floats
from tether.causal.streaming import NumericStreamer
from tether.errors import CheckpointError, ConfigError, ShapeError
from tether.store.hub import unasked

__all__ = ["NumericEncoding", "NumericStreamer", "NumericTokenizer", "check_numeric"]

# fmt: off
_SHARED = {
    "pad_token", "pad_token_id", "eos_token", "eos_token_id", "bos_token", "bos_token_id", "unk_token",
    "unk_token_id", "all_special_ids", "all_special_tokens", "padding_side", "truncation_side", "chat_template",
    "model_max_length", "vocab_size", "name_or_path", "is_fast", "get_vocab", "convert_ids_to_tokens",
    "convert_tokens_to_ids", "backend_tokenizer", "init_kwargs",
}
# fmt: on


class NumericTokenizer:
    """A fast tokenizer that reads every number of a text as one token `<NUM>` with a value.

    What is a number is said in `tether.causal.numerals`. `<NUM>` is the token of that name where the
    vocabulary has it; else the first reserved token (`<|reserved_special_token_0|>`, `<unused0>`,
    `<|extra_0|>`, ...) that is neither padding, start or end, nor used by the chat template; else a token
    added under that name. An added token takes the first id after the vocabulary, which is a row the model
    already has when `rows` is larger than the vocabulary. A text that spells the token's name holds those
    letters and no number. Text without numbers gets exactly the ids of the wrapped tokenizer. Where that
    one gives back a text exactly, so does this one; spaces that it loses at the start of a text stay lost.

    The names in `_SHARED` (`pad_token_id`, `padding_side`, `chat_template`, ...) are read and set on the
    wrapped tokenizer.

    Args:
        tokenizer: any fast tokenizer; it is copied and stays as it is.
        rows: embedding rows of the model; None where unknown.

    Attributes:
        tokenizer: the copy, with `<NUM>` in its vocabulary.
        num_token: the name of `<NUM>` in the vocabulary.
        num_token_id: its id.
        grows: whether the model lacks a row for it and must be resized to `len(self)` rows; without `rows`,
            whether it had to be added.

    Raises:
        ConfigError: the tokenizer is not a fast one, is wrapped, or does not split at special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, rows: int | None = None) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
            raise ConfigError(
                f"tokenizer {type(tokenizer).__name__}: expected a fast tokenizer of transformers; load it with "
                "AutoTokenizer.from_pretrained (a NumericTokenizer is wrapped already)"
            )
        self.tokenizer = copy.deepcopy(tokenizer)
        self.num_token = placeholder.choose(self.tokenizer, rows)
        added = self.num_token not in self.tokenizer.get_vocab()
        self.num_token_id = placeholder.add(self.tokenizer, self.num_token)
        self.grows = added if rows is None else self.num_token_id >= rows
        backend = self.tokenizer.backend_tokenizer
        self._plain = (backend.normalizer, backend.pre_tokenizer)
        self._after = placeholder.make_exact(self.tokenizer, self.num_token)
        names = backend.get_added_tokens_decoder()
        self._special = {number for number, token in names.items() if token.special}
        with_numbers = [re.escape(token.content) for token in names.values() if find_numbers(token.content)]
        self._kept = re.compile("|".join(with_numbers)) if with_numbers else None

    def __getattr__(self, name: str) -> Any:
        if name in _SHARED:
            return getattr(self.tokenizer, name)
        raise AttributeError(f"NumericTokenizer has no {name!r}; the wrapped one is its .tokenizer")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SHARED:
            setattr(self.tokenizer, name, value)
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def _mark(self, text: str) -> tuple[str, list[Numeral]]:
        if not isinstance(text, str):
            raise ConfigError(f"{type(text).__name__}: expected a text, or a list of texts; convert it first")
        # Numbers inside the names of special tokens belong to the names.
        bare = self._kept.sub(lambda name: " " * len(name[0]), text) if self._kept else text
        numerals = find_numbers(bare)
        return placeholder.substitute(text, numerals, self.num_token, self._after), numerals

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> NumericEncoding:
        """Encode one text or several.

        Args:
            text: a text, or a batch of texts.
            padding: as in transformers; on `padding_side`, with value 0.
            truncation: as in transformers; a number that is cut off loses its value and its surface.
            max_length: largest number of tokens with truncation, or the length to pad to.
            return_tensors: `pt`, or None for lists.
            add_special_tokens: whether to add start and end as the wrapped tokenizer does.

        Returns:
            `input_ids`, `attention_mask` and `numeric_values` (float64), each of shape (B, T) as tensors, with
            a batch of 1 for one text; as lists, one list of T for one text or B lists.

        Raises:
            ConfigError: a text is not a string; padding without a padding token; unknown `return_tensors`; an
                empty batch.
            ShapeError: tensors were asked for, and the texts differ in length.
        """  # noqa: DOC502 - raised by what it calls
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or return_tensors not in (None, "pt"):
            raise ConfigError(
                f"{len(texts)} texts, return_tensors={return_tensors!r}: expected at least one text, and None or 'pt'"
            )
        if padding not in (False, "do_not_pad") and self.pad_token_id is None:
            raise ConfigError("padding: the tokenizer has no padding token; set pad_token = eos_token first")
        marked = [self._mark(each) for each in texts]
        encoded = self.tokenizer(
            [each for each, _ in marked],
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            add_special_tokens=add_special_tokens,
            return_attention_mask=True,
            return_token_type_ids=False,
        )
        encoding = NumericEncoding.align(
            encoded["input_ids"],
            encoded["attention_mask"],
            [numerals for _, numerals in marked],
            self.num_token_id,
            cut=self.truncation_side if truncation else None,
        )
        if return_tensors:
            return encoding.as_tensors()
        if isinstance(text, str):
            return NumericEncoding({name: rows[0] for name, rows in encoding.items()}, encoding.surfaces)
        return encoding

    def decode(
        self,
        ids: int | Sequence[int] | Tensor,
        numeric_values: Sequence[float] | Tensor | None = None,
        *,
        surfaces: Sequence[str] | None = None,
        skip_special_tokens: bool = False,
        precision: int | None = None,
    ) -> str:
        """Print tokens and their numbers.

        Args:
            ids: token ids, shape (T,).
            numeric_values: the value of each token, shape (T,), 0 where it is not `<NUM>`. Values of float32 and
                below are printed by the shortest text that gives back the same value in float32.
            surfaces: how the first numbers were written; the others are printed by `format_number`.
            skip_special_tokens: whether to leave out special tokens; numbers stay.
            precision: significant digits of numbers without a surface; None for all.

        Returns:
            The text.

        Raises:
            ConfigError: a `<NUM>` has neither value nor surface, a value is unusable, or stands elsewhere.
            ShapeError: ids and values differ in length, ids are not one row, or surfaces outnumber numbers.
        """  # noqa: DOC502 - raised by what it calls
        row = torch.as_tensor(ids)
        if row.dim() > 1:
            raise ShapeError(f"ids {tuple(row.shape)}: expected (T,); use batch_decode for several rows")
        numbers: list[int] = row.reshape(-1).long().tolist()
        values = None if numeric_values is None else shortest_floats(numeric_values)
        written = placeholder.spell(numbers, values, surfaces or (), self.num_token_id, precision)
        hidden = self._special if skip_special_tokens else ()
        return placeholder.print_tokens(self.backend_tokenizer, numbers, self.num_token_id, written, hidden)

    def batch_decode(
        self,
        ids: Sequence[Sequence[int]] | Tensor,
        numeric_values: Sequence[Sequence[float]] | Tensor | None = None,
        *,
        surfaces: Sequence[Sequence[str]] | None = None,
        **options: Any,
    ) -> list[str]:
        """Print several rows of tokens and their numbers.

        Args:
            ids: token ids, shape (B, T), or B rows of any length.
            numeric_values: the value of each token, of the same shape.
            surfaces: for each row, how its first numbers were written.
            **options: as in `decode`.

        Returns:
            B texts.

        Raises:
            ShapeError: the numbers of rows differ.
        """
        values = numeric_values if numeric_values is not None else [None] * len(ids)
        written = surfaces if surfaces is not None else [()] * len(ids)
        if not len(ids) == len(values) == len(written):
            raise ShapeError(
                f"{len(ids)} rows of ids, {len(values)} of values, {len(written)} of surfaces: expected as many of each"
            )
        return [
            self.decode(row, value, surfaces=surface, **options)
            for row, value, surface in zip(ids, values, written, strict=True)
        ]

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **template: Any,
    ) -> "NumericEncoding | str | list[str]":
        """Render a conversation, or several, and encode it; numbers anywhere in the rendered text are numbers.

        Args:
            messages: one conversation or a batch of them, as transformers takes them.
            add_generation_prompt: whether to open the answer.
            tokenize: whether to encode; else the rendered text is returned.
            padding: as in `__call__`.
            truncation: as in `__call__`.
            max_length: as in `__call__`.
            return_tensors: as in `__call__`.
            **template: variables of the template, `chat_template`, `tools` and so on.

        Returns:
            The encoding, made without further special tokens, or the text.
        """
        rendered: str | list[str] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **template
        )
        if not tokenize:
            return rendered
        options: dict[str, Any] = {"padding": padding, "truncation": truncation, "max_length": max_length}
        return self(rendered, return_tensors=return_tensors, add_special_tokens=False, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the wrapped tokenizer's files, with `<NUM>` in them and its name in `tokenizer_config.json`.

        `AutoTokenizer` loads them too; `NumericTokenizer(AutoTokenizer.from_pretrained(folder))` is this one.

        Args:
            folder: where to; made if need be.
        """
        plain = copy.deepcopy(self.tokenizer)
        plain.backend_tokenizer.normalizer, plain.backend_tokenizer.pre_tokenizer = self._plain
        plain.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, rows: int | None = None, **options: Any
    ) -> Self:
        """Load what `save_pretrained` wrote, or wrap the fast tokenizer of any checkpoint.

        Args:
            folder: a folder or hub id.
            rows: embedding rows of the model; None where unknown.
            **options: for `AutoTokenizer.from_pretrained`; `trust_remote_code` is False unless it is given.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: there is no tokenizer that can be loaded.
        """
        try:
            name = os.fspath(folder)
            tokenizer = AutoTokenizer.from_pretrained(name, **unasked(name, options))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: no tokenizer could be loaded ({str(error).splitlines()[0]}); expected a folder written by "
                "save_pretrained, or a hub id that can be reached"
            ) from error
        return cls(tokenizer, rows=rows)
