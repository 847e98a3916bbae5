"""Text to tokens and numbers, and back: every number of a text becomes one `<NUM>` with its value."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import TruncationStrategy

from tether.causal import placeholder
from tether.causal.encoding import VALUES, NumericEncoding
from tether.causal.numerals import Numeral, find_numbers
from tether.causal.placeholder import check_numeric, shortest_floats
from tether.causal.portable import Portable, tokenizer_map, write_code
from tether.causal.streaming import NumericStreamer
from tether.errors import CheckpointError, ConfigError, ShapeError
from tether.store.hub import unasked

__all__ = ["NumericEncoding", "NumericStreamer", "NumericTokenizer", "check_numeric", "without_numbers"]

_UNREAD = (
    "is_split_into_words", "return_offsets_mapping", "return_overflowing_tokens", "sanitize_control_tokens",
    "text_pair",
)  # fmt: skip
"""Options of transformers' tokenizers under which it would not be known which number a `<NUM>` stands for."""
_WHOLE = TruncationStrategy.DO_NOT_TRUNCATE


class NumericTokenizer(Portable, PreTrainedTokenizerFast):  # type: ignore[misc]
    """A fast tokenizer that reads every number of a text as one token `<NUM>` with a value.

    It is one of transformers' tokenizers, with everything they do: what it encodes and pads has
    `numeric_values` beside `input_ids`, and after `import tether`, `AutoTokenizer` loads what it saved.

    What is a number is said in `tether.causal.numerals`. `<NUM>` is the token of that name where the
    vocabulary has it; else the first reserved token (`<|reserved_special_token_0|>`, `<unused0>`,
    `<|extra_0|>`, ...) that is neither padding, start or end, nor used by the chat template; else a token
    added under that name. An added token takes the first id after the vocabulary, which is a row the model
    already has when `rows` is larger than the vocabulary. A text that spells the token's name holds those
    letters and no number. Text without numbers gets exactly the ids of the tokenizer it was made of. Where
    that one gives back a text exactly, so does this one; spaces that it loses at the start of a text stay lost.

    Args:
        tokenizer: any fast tokenizer, plain or numeric; its settings are taken over, and it stays as it is.
        rows: embedding rows of the model; None where unknown.

    Attributes:
        num_token: the name of `<NUM>` in the vocabulary.
        num_token_id: its id.
        grows: whether the model lacks a row for it and must be resized to `len(self)` rows; without `rows`,
            whether it had to be added.

    Raises:
        ConfigError: the tokenizer is not a fast one, or does not split at special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, rows: int | None = None) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
            raise ConfigError(
                f"tokenizer {type(tokenizer).__name__}: expected a fast tokenizer of transformers; load it with "
                "AutoTokenizer.from_pretrained"
            )
        made = tokenizer.plain() if isinstance(tokenizer, NumericTokenizer) else copy.deepcopy(tokenizer)
        backend = made.backend_tokenizer
        name = placeholder.choose(made, rows)
        added = name not in made.get_vocab()
        number = placeholder.add(made, name)
        pipeline = Tokenizer(models.BPE())  # since its parts alone cannot all be copied
        pipeline.normalizer, pipeline.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        after = placeholder.make_exact(made, name)
        # All that a tokenizer of transformers knows is in its attributes. Making it again from options would lose
        # what was set since, and what its own class had for defaults.
        self.__dict__.update(made.__dict__)
        self.vocab_files_names = made.vocab_files_names
        for setting in ("padding_side", "truncation_side"):
            self.init_kwargs[setting] = getattr(self, setting)
        self.model_input_names = [*made.model_input_names, VALUES]
        self.num_token, self.num_token_id = name, number
        self.grows = added if rows is None else number >= rows
        self._pipeline, self._after = pipeline, after
        self._look_at_added_tokens()

    def _look_at_added_tokens(self) -> None:
        names = self.backend_tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in names.items() if token.special}
        special = {token.content for token in names.values() if token.special}
        self._names = tuple(sorted(special, key=len, reverse=True))
        with_numbers = [re.escape(token.content) for token in names.values() if find_numbers(token.content)]
        self._kept = re.compile("|".join(with_numbers)) if with_numbers else None

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        count: int = super()._add_tokens(new_tokens, special_tokens=special_tokens)
        self._look_at_added_tokens()
        return count

    # With the pipeline as it was, since the marks around `<NUM>` are not to be in any file.
    def _unmarked(self, kind: Any) -> PreTrainedTokenizerFast:
        made = kind.__new__(kind)
        made.__dict__.update(copy.deepcopy(self.__dict__))
        backend, pipeline = made.backend_tokenizer, self._pipeline
        backend.normalizer, backend.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
        made.model_input_names = [name for name in self.model_input_names if name != VALUES]
        return made

    def plain(self) -> PreTrainedTokenizerFast:
        """Give the tokenizer that reads digits as text.

        Returns:
            A tokenizer with the same vocabulary, `<NUM>` included, and the same settings.
        """
        return self._unmarked(PreTrainedTokenizerFast)

    def _mark(self, text: str, *, letters: bool) -> tuple[str, list[Numeral]]:
        if not isinstance(text, str):
            raise ConfigError(f"{type(text).__name__}: expected a text, or a list of texts; convert it first")
        # Numbers inside the names of special tokens belong to the names, unless those are letters like any others.
        named = self._kept is not None and not letters
        bare = self._kept.sub(lambda name: " " * len(name[0]), text) if named and self._kept else text
        numerals = find_numbers(bare)
        spelled = self._names if letters else (self.num_token,)
        return placeholder.substitute(text, numerals, self.num_token, self._after, spelled), numerals

    # Where all ways of encoding lead: `__call__`, `encode`, `apply_chat_template`.
    def _encode_plus(self, text: Any, *, return_tensors: Any = None, **options: Any) -> NumericEncoding:
        asked = [name for name in _UNREAD if options.get(name)]
        if asked:
            raise ConfigError(
                f"{', '.join(asked)}: not known to a tokenizer that reads numbers, which takes whole texts one by one; "
                "leave it out, or use tokenizer.plain()"
            )
        texts = [text] if isinstance(text, str) else list(text)
        kind = getattr(return_tensors, "value", return_tensors)
        if not texts or kind not in (None, "pt", "np"):
            raise ConfigError(
                f"{len(texts)} texts, return_tensors={kind!r}: expected at least one text, and None, 'np' or 'pt'"
            )
        options["return_token_type_ids"] = bool(options.get("return_token_type_ids"))
        options["return_attention_mask"] = options.get("return_attention_mask") is not False
        # The names are spelled apart; where the backend itself did not read them, it would not read `<NUM>` either.
        letters = bool(options.pop("split_special_tokens", None))
        marked = [self._mark(each, letters=letters) for each in texts]
        encoding = NumericEncoding.align(
            super()._encode_plus([each for each, _ in marked], **options),
            [numerals for _, numerals in marked],
            self.num_token_id,
            cut=self.truncation_side if options.get("truncation_strategy") != _WHOLE else None,
        )
        if kind is not None:
            return encoding.as_tensors(kind)
        return encoding.only() if isinstance(text, str) else encoding

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """Give the names of a text's tokens.

        Args:
            text: the text.
            pair: not known to a tokenizer that reads numbers.
            add_special_tokens: whether to add start and end.
            options: as in transformers.

        Returns:
            One name for each token, `num_token` for each number.

        Raises:
            ConfigError: a pair.
        """  # noqa: DOC502 - raised by what it calls
        ids = self.encode(text, text_pair=pair, add_special_tokens=add_special_tokens, **options)
        names: list[str] = self.convert_ids_to_tokens(ids)
        return names

    def pad(self, encoded_inputs: Any, *args: Any, **options: Any) -> Any:
        """Pad what was encoded, values included; the collators of transformers call this.

        Args:
            encoded_inputs: one encoding, or several, in any of the forms that transformers takes.
            args: as in transformers.
            options: as in transformers.

        Returns:
            As in transformers; where `numeric_values` were given, they are padded with 0 and, as tensors, float64.

        Raises:
            ConfigError: some encodings have values and others have none.
        """
        if isinstance(encoded_inputs, list | tuple):
            count = sum(isinstance(each, Mapping) and VALUES in each for each in encoded_inputs)
            if 0 < count < len(encoded_inputs):
                raise ConfigError(
                    f"{count} of {len(encoded_inputs)} encodings have numeric_values: expected all or none of them; "
                    "encode all with this tokenizer"
                )
        return super().pad(encoded_inputs, *args, **options)

    def _pad(self, encoded_inputs: Any, *args: Any, **options: Any) -> Any:
        padded = super()._pad(encoded_inputs, *args, **options)
        if VALUES in padded:
            # Numpy's numbers, since torch would make float32 of Python's.
            values = [np.float64(value) for value in padded[VALUES]]
            zeros = [np.float64(0)] * (len(padded["input_ids"]) - len(values))
            left = (options.get("padding_side") or self.padding_side) == "left"
            padded[VALUES] = zeros + values if left else values + zeros
        return padded

    def decode(
        self,
        token_ids: Any,
        numeric_values: Any = None,
        *,
        surfaces: Sequence[Any] | None = None,
        skip_special_tokens: bool = False,
        precision: int | None = None,
        **ignored: Any,
    ) -> Any:
        """Print tokens and their numbers.

        Args:
            token_ids: token ids, shape (T,); or several rows of them, see `batch_decode`.
            numeric_values: the value of each token, shape (T,), 0 where it is not `<NUM>`. Values of float32 and
                below are printed by the shortest text that gives back the same value in float32.
            surfaces: how the first numbers were written; the others are printed by `format_number`.
            skip_special_tokens: whether to leave out special tokens; numbers stay.
            precision: significant digits of numbers without a surface; None for all.
            ignored: other options of transformers' tokenizers; spaces are never cleaned up.

        Returns:
            The text, or a list of texts for rows.

        Raises:
            ConfigError: a `<NUM>` has neither value nor surface, a value is unusable, or stands elsewhere.
            ShapeError: ids and values differ in length, or surfaces outnumber numbers.
        """  # noqa: DOC502 - raised by what it calls
        if _are_rows(token_ids):
            options: dict[str, Any] = {"skip_special_tokens": skip_special_tokens, "precision": precision}
            return self.batch_decode(token_ids, numeric_values, surfaces=surfaces, **options)
        numbers: list[int] = torch.as_tensor(token_ids).reshape(-1).long().tolist()
        values = None if numeric_values is None else shortest_floats(numeric_values)
        written = placeholder.spell(numbers, values, surfaces or (), self.num_token_id, precision)
        hidden = self._special if skip_special_tokens else ()
        return placeholder.print_tokens(self.backend_tokenizer, numbers, self.num_token_id, written, hidden)

    def batch_decode(
        self,
        sequences: Any,
        numeric_values: Any = None,
        *,
        surfaces: Sequence[Sequence[str]] | None = None,
        **options: Any,
    ) -> list[str]:
        """Print several rows of tokens and their numbers.

        Args:
            sequences: token ids, shape (B, T), or B rows of any length.
            numeric_values: the value of each token, of the same shape.
            surfaces: for each row, how its first numbers were written.
            **options: as in `decode`.

        Returns:
            B texts.

        Raises:
            ShapeError: the numbers of rows differ.
        """
        values = numeric_values if numeric_values is not None else [None] * len(sequences)
        written = surfaces if surfaces is not None else [()] * len(sequences)
        if not len(sequences) == len(values) == len(written):
            raise ShapeError(
                f"{len(sequences)} rows of ids, {len(values)} of values, {len(written)} of surfaces: expected as many "
                "of each"
            )
        return [
            self.decode(row, value, surfaces=surface, **options)
            for row, value, surface in zip(sequences, values, written, strict=True)
        ]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Write the tokenizer's files, with `<NUM>` in them and its name in `tokenizer_config.json`.

        `AutoTokenizer` makes this tokenizer of them after `import tether`, or with `trust_remote_code=True` by the few
        lines of code that are written beside.

        Args:
            save_directory: where to; made if need be.
            args: as in transformers.
            options: as in transformers.

        Returns:
            As in transformers.
        """
        unmarked = self._unmarked(type(self))
        unmarked.init_kwargs["auto_map"] = tokenizer_map(type(self).__name__)
        write_code(save_directory)
        return PreTrainedTokenizerFast.save_pretrained(unmarked, save_directory, *args, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        rows: int | None = None,
        **options: Any,
    ) -> Self:
        """Load what `save_pretrained` wrote, or make one of the fast tokenizer of any checkpoint.

        Args:
            pretrained_model_name_or_path: a folder or hub id.
            args: as in transformers.
            rows: embedding rows of the model; None where unknown.
            **options: as in transformers; `trust_remote_code` is False unless it is given.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: there is no tokenizer that can be loaded.
        """
        name = os.fspath(pretrained_model_name_or_path)
        try:
            options = unasked(name, options)
            declared = get_tokenizer_config(name, **options).get("tokenizer_class")
            # AutoTokenizer would come back here for a class of this name.
            loader = PreTrainedTokenizerFast if declared == cls.__name__ else AutoTokenizer
            tokenizer = loader.from_pretrained(name, *args, **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name}: no tokenizer could be loaded ({str(error).splitlines()[0]}); expected a folder written by "
                "save_pretrained, or a hub id that can be reached"
            ) from error
        return cls(tokenizer, rows=rows)


def without_numbers(tokenizer: Any) -> Any:
    """Give the tokenizer that reads digits as text.

    Args:
        tokenizer: any tokenizer.

    Returns:
        `tokenizer.plain()` of a numeric one; any other as it is.
    """
    return tokenizer.plain() if isinstance(tokenizer, NumericTokenizer) else tokenizer


def _are_rows(ids: Any) -> bool:
    if not isinstance(ids, Sequence):
        return getattr(ids, "ndim", 0) > 1
    return any(isinstance(each, Sequence) or getattr(each, "ndim", 0) for each in ids[:1])


class _OfNumbers(PreTrainedConfig):  # type: ignore[misc]
    """Stands for no model: by it AutoTokenizer knows the name of the class above, and takes it where a file says so."""

    model_type = "tether_numbers"


AutoTokenizer.register(_OfNumbers, NumericTokenizer, exist_ok=True)
