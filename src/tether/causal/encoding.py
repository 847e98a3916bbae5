"""What a tokenizer with numbers gives: tokens, mask and the value at every token."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from transformers import BatchEncoding

from tether.causal.numerals import Numeral
from tether.errors import ConfigError, ShapeError

__all__ = ["VALUES", "NumericEncoding"]

VALUES = "numeric_values"
"""Key of the values, as the model's `forward` names them."""


class NumericEncoding(BatchEncoding):  # type: ignore[misc]
    """Encoded texts: `input_ids`, `attention_mask` and `numeric_values`, ready for `model(**encoding)`.

    Args:
        data: these keys, and whatever else the tokenizer was asked for.
        surfaces: see below.

    Attributes:
        surfaces: for each text, its numbers as they were written, in order; not a key.
    """

    def __init__(self, data: dict[str, Any], surfaces: list[list[str]]) -> None:
        super().__init__(data)
        self.surfaces = surfaces

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "surfaces": self.surfaces}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.surfaces = state["surfaces"]

    @classmethod
    def align(
        cls,
        encoded: Mapping[str, list[list[Any]]],
        numerals: Sequence[list[Numeral]],
        num_token_id: int,
        *,
        cut: str | None = None,
    ) -> Self:
        """Put the values of the numbers at their tokens.

        Args:
            encoded: B rows under each key, `input_ids` among them, padded or not.
            numerals: for each row, the numbers of its text.
            num_token_id: id of `<NUM>`.
            cut: the side on which rows may have lost tokens, `left` or `right`; None where they have not.

        Returns:
            The encoding, as lists; value 0 where there is no `<NUM>`.

        Raises:
            ConfigError: a row has more or fewer `<NUM>` than numbers.
        """
        values, surfaces = [], []
        for row, found in zip(encoded["input_ids"], numerals, strict=True):
            count = row.count(num_token_id)
            if count > len(found) or (count < len(found) and cut is None):
                raise ConfigError(
                    f"{count} <NUM> for {len(found)} numbers: another special token of the vocabulary overlaps it; "
                    "write a space before each number that follows a symbol"
                )
            first = len(found) - count if cut == "left" else 0
            kept = found[first : first + count]
            upcoming = iter(kept)
            values.append([next(upcoming).value if number == num_token_id else 0.0 for number in row])
            surfaces.append([numeral.surface for numeral in kept])
        return cls({**encoded, VALUES: values}, surfaces)

    def only(self) -> Self:
        """Take the first text out of its batch.

        Returns:
            The same text, as lists of T.
        """
        return type(self)({name: rows[0] for name, rows in self.items()}, self.surfaces)

    def as_tensors(self, kind: str = "pt") -> Self:
        """Turn the lists into tensors or arrays.

        Args:
            kind: `pt` for tensors, `np` for arrays.

        Returns:
            The same texts; values of shape (B, T), float64, all else of shape (B, T), int64.

        Raises:
            ShapeError: the texts differ in length.
        """
        lengths = sorted({len(row) for row in self["input_ids"]})
        if len(lengths) > 1:
            raise ShapeError(f"texts of {lengths} tokens: expected one length for tensors; set padding=True")
        arrays = {
            name: np.asarray(rows, dtype=np.float64 if name == VALUES else np.int64)
            for name, rows in self.items()
        }
        if kind == "np":
            return type(self)(arrays, self.surfaces)
        return type(self)({name: torch.from_numpy(each) for name, each in arrays.items()}, self.surfaces)

    def char_to_token(self, *where: Any) -> int | None:
        """Refuse: the tokenizer reads a text in which `<NUM>` stands for each number.

        Args:
            where: as in transformers.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "which token a character belongs to is not known where <NUM> stands for numbers, so there is no mask of "
            "the assistant's tokens either; give tether train pairs of prompt and completion, it learns the latter"
        )
