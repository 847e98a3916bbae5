"""The token `<NUM>`: which one it is, how a tokenizer is made to split at it, and which values may stand at it."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, normalizers, pre_tokenizers
from torch import Tensor

from tether.causal.numerals import LIMIT, Numeral, format_number
from tether.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "AFTER",
    "APART",
    "add",
    "check_numeric",
    "choose",
    "make_exact",
    "print_tokens",
    "shortest_floats",
]

_NUM = "<NUM>"
_RECORD = "numeric_tokenizer"
_RESERVED = re.compile(
    r"[<\[]\|?(?:reserved(?:_special)?(?:_token)?|unused|extra|dummy|placeholder|special|control)_?\d+\|?[>\]]",
    re.IGNORECASE,
)

# Noncharacters, which no text holds in this order; they reach the wrapped pipeline and vanish in it.
APART = "\ufdd1\ufdd0"
"""Written into a name that a text spells out, so that it is not taken for the token."""
AFTER = "\ufdd0\ufdd1"
"""Written after `<NUM>` where the tokenizer would put a space there."""


def choose(tokenizer: "PreTrainedTokenizerBase", rows: int | None) -> str:
    """Choose the token that stands for numbers.

    In this order: the one that `add` recorded, a token named `<NUM>`, the reserved token of the lowest id
    that has no role and is not in the chat template, a new token `<NUM>`.

    Args:
        tokenizer: a fast tokenizer.
        rows: embedding rows of the model, which a reserved token must have one of; None where unknown.

    Returns:
        The name, of a token that the vocabulary may not have yet.
    """
    vocabulary = tokenizer.get_vocab()
    recorded = tokenizer.init_kwargs.get(_RECORD)
    if recorded is not None and recorded["num_token"] in vocabulary:
        return str(recorded["num_token"])
    if _NUM in vocabulary:
        return _NUM
    # The values are the tokens with a role (padding, start, end, ...) and, for some tokenizers, lists of them.
    roles = {str(token) for token in tokenizer.special_tokens_map.values() if not isinstance(token, list)}
    template = str(tokenizer.chat_template or "")
    reserved = [
        (number, name)
        for name, number in vocabulary.items()
        if _RESERVED.fullmatch(name) and name not in roles and name not in template
    ]
    number, name = min(reserved, default=(0, _NUM))
    return name if rows is None or number < rows else _NUM


def add(tokenizer: "PreTrainedTokenizerBase", name: str) -> int:
    """Make a token the one for numbers, in place, and record it where `save_pretrained` keeps it.

    Args:
        tokenizer: a fast tokenizer; changed.
        name: what `choose` gave.

    Returns:
        The id of the token.
    """
    # Also for a token that exists: it must not swallow the spaces around it.
    token = AddedToken(name, lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.init_kwargs[_RECORD] = {"num_token": name}
    return int(tokenizer.convert_tokens_to_ids(name))


def make_exact(tokenizer: "PreTrainedTokenizerBase", name: str) -> str:
    """Make a tokenizer, in place, treat the text around `<NUM>` so that it can be decoded to the same text.

    What it does with text that holds neither `APART` nor `AFTER` does not change.

    Args:
        tokenizer: a fast tokenizer with the token; its normalizer and pre-tokenizer are changed.
        name: the token for numbers.

    Returns:
        What to write after each `<NUM>`: `AFTER` or nothing.

    Raises:
        ConfigError: the tokenizer does not split text at its special tokens.
    """
    backend = tokenizer.backend_tokenizer
    normalizer, pieces = backend.normalizer, backend.pre_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(APART, ""), *([normalizer] if normalizer else [])]
    )
    probe = f"a{name}b{name} c"
    number = tokenizer.convert_tokens_to_ids(name)
    ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
    if ids.count(number) != 2:
        raise ConfigError(
            f"tokenizer {type(tokenizer).__name__} does not split text at its special tokens; expected "
            "split_special_tokens=False; load it with that option"
        )
    if print_tokens(backend, ids, number, [name, name]) == probe:
        return ""
    # A space is put before every stretch of text, so that "5kg" would read as "5 kg". After a number it is put
    # before the mark instead, and goes with it.
    mark = normalizer.normalize_str(AFTER) if normalizer else AFTER
    if pieces:
        mark = "".join(piece for piece, _ in pieces.pre_tokenize_str(mark))
    if not mark:  # what was given has been through here
        return AFTER
    last = pre_tokenizers.Split(mark, "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, last] if pieces else [last])
    return AFTER


def substitute(
    text: str, numerals: Sequence[Numeral], name: str, after: str, spelled: Sequence[str] = ()
) -> str:
    """Write the token in the place of each number, and keep it from being read where the text spells it.

    Args:
        text: any text.
        numerals: its numbers.
        name: the token for numbers.
        after: what `make_exact` gave.
        spelled: special tokens that are letters where the text spells them, longest first; `name` always is.

    Returns:
        The text for the wrapped tokenizer.

    Raises:
        ConfigError: the text holds `APART` or `AFTER`.
    """
    if APART in text or AFTER in text:
        raise ConfigError(
            f"text with {APART!r} or {AFTER!r}: expected none of these noncharacters; remove them first"
        )
    parts, done = [], 0
    for numeral in numerals:
        parts.append(text[done : numeral.start])
        done = numeral.end
    parts.append(text[done:])
    for each in spelled or (name,):
        parts = [part.replace(each, each[0] + APART + each[1:]) for part in parts]
    return (name + after).join(parts)


def print_tokens(
    backend: Any, ids: Sequence[int], number: int, printed: Sequence[str], hidden: Collection[int] = ()
) -> str:
    """Decode as the backend does, with numbers put in their places before the bytes are joined.

    Args:
        backend: the `tokenizers.Tokenizer`.
        ids: token ids.
        number: id of `<NUM>`.
        printed: a text for each `<NUM>` among the ids, in order.
        hidden: ids to leave out; `<NUM>` never is.

    Returns:
        The text.
    """
    upcoming = iter(printed)
    tokens: list[str] = []
    for each in ids:
        if each == number:
            tokens.append(next(upcoming))
        elif each not in hidden and (token := backend.id_to_token(each)) is not None:
            tokens.append(token)
    return str(backend.decoder.decode(tokens)) if backend.decoder else " ".join(tokens)


def check_numeric(input_ids: Tensor, numeric_values: Tensor, num_token_id: int) -> None:
    """Check that values stand only where `<NUM>` stands, and are usable numbers.

    Args:
        input_ids: token ids, any shape.
        numeric_values: floating point, the same shape; 0 where the id is not `num_token_id`.
        num_token_id: id of `<NUM>`.

    Raises:
        ShapeError: the shapes differ, or the values are not floating point.
        ConfigError: a value is nan, infinite, beyond `LIMIT`, or not 0 where there is no `<NUM>`.

    Example:
        >>> check_numeric(torch.tensor([[5, 9]]), torch.tensor([[0.0, 2.5]]), num_token_id=9)
    """
    if input_ids.shape != numeric_values.shape or not numeric_values.is_floating_point():
        raise ShapeError(
            f"numeric_values {tuple(numeric_values.shape)} of {numeric_values.dtype} for input_ids "
            f"{tuple(input_ids.shape)}: expected one floating point value for each token, 0 except at <NUM>"
        )
    unusable = ~(numeric_values.abs() <= LIMIT)  # nan compares false
    misplaced = (numeric_values != 0) & (input_ids != num_token_id)
    wrong = unusable | misplaced
    if not bool(wrong.any()):
        return
    where = tuple(wrong.nonzero()[0].tolist())
    given = f"numeric_values at {where} is {numeric_values[where].item()}"
    if bool(unusable[where]):
        raise ConfigError(f"{given}: expected a finite number of at most {LIMIT:g} in size; rescale the data")
    raise ConfigError(
        f"{given}, but the token there is {int(input_ids[where])} and not <NUM> ({num_token_id}): expected 0; "
        "take both from one call of NumericTokenizer"
    )


def shortest_floats(values: Tensor | Iterable[float]) -> list[float]:
    """Turn values into Python floats that print as the values do in their own precision.

    Args:
        values: numbers, or a tensor of any shape.

    Returns:
        All of them in one list; of float32 and below, 0.1 comes as 0.1 and not as 0.10000000149011612.
    """
    if not isinstance(values, Tensor):
        return [float(value) for value in values]
    values = values.detach().cpu().reshape(-1)
    if values.dtype == torch.float64 or not values.is_floating_point():
        return [float(value) for value in values.tolist()]
    return [float(str(value)) if value else 0.0 for value in values.float().numpy()]


def spell(
    ids: Sequence[int],
    values: Sequence[float] | None,
    surfaces: Sequence[str],
    num_token_id: int,
    precision: int | None = None,
) -> list[str]:
    """Say how each number is printed: as it was written where that is known, else by its value.

    Args:
        ids: token ids, T of them.
        values: T values, 0 where there is no `<NUM>`; None where every number has a surface.
        surfaces: how the first numbers were written.
        num_token_id: id of `<NUM>`.
        precision: significant digits of the others; None for all.

    Returns:
        One text for each `<NUM>` among the ids.

    Raises:
        ConfigError: a number has neither value nor surface, or the values are unusable.
        ShapeError: more surfaces than numbers, or not T values.
    """
    places = [place for place, number in enumerate(ids) if number == num_token_id]
    if len(surfaces) > len(places):
        raise ShapeError(
            f"{len(surfaces)} surfaces for {len(places)} <NUM>: expected at most one for each; pass the surfaces of "
            "this row only"
        )
    rest = places[len(surfaces) :]
    if values is None:
        if rest:
            raise ConfigError(
                f"{len(places)} <NUM>, {len(surfaces)} surfaces and no values: expected the value of each number; pass "
                "numeric_values"
            )
        return list(surfaces)
    check_numeric(torch.tensor(ids), torch.tensor(values, dtype=torch.float64), num_token_id)
    return [*surfaces, *(format_number(values[place], precision=precision) for place in rest)]
