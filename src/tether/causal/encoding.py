"""What a tokenizer with numbers gives: tokens, mask and the value at every token."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from transformers import BatchEncoding

from tether.causal.numerals import Numeral
from tether.errors import ConfigError, ShapeError

__all__ = ["NumericEncoding"]


class NumericEncoding(BatchEncoding):  # type: ignore[misc]
    """Encoded texts: `input_ids`, `attention_mask` and `numeric_values`, ready for `model(**encoding)`.

    Args:
        data: the three keys.
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
        input_ids: list[list[int]],
        attention_mask: list[list[int]],
        numerals: Sequence[list[Numeral]],
        num_token_id: int,
        *,
        cut: str | None = None,
    ) -> Self:
        """Put the values of the numbers at their tokens.

        Args:
            input_ids: B rows of ids, padded or not.
            attention_mask: their masks.
            numerals: for each row, the numbers of its text.
            num_token_id: id of `<NUM>`.
            cut: the side on which rows may have lost tokens, `left` or `right`; None where they have not.

        Returns:
            The encoding, as lists; value 0 where there is no `<NUM>`.

        Raises:
            ConfigError: a row has more or fewer `<NUM>` than numbers.
        """
        values, surfaces = [], []
        for row, found in zip(input_ids, numerals, strict=True):
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
        data = {"input_ids": input_ids, "attention_mask": attention_mask, "numeric_values": values}
        return cls(data, surfaces)

    def as_tensors(self) -> Self:
        """Turn the lists into tensors.

        Returns:
            The same texts; ids and mask of shape (B, T), int64; values of shape (B, T), float64.

        Raises:
            ShapeError: the texts differ in length.
        """
        lengths = sorted({len(row) for row in self["input_ids"]})
        if len(lengths) > 1:
            raise ShapeError(f"texts of {lengths} tokens: expected one length for tensors; set padding=True")
        dtypes = {"numeric_values": torch.float64}
        data = {
            name: torch.tensor(rows, dtype=dtypes.get(name, torch.long)) for name, rows in self.data.items()
        }
        return type(self)(data, self.surfaces)
