"""The part of a domain's text that is kept aside: a fit never sees it, a delta's strength is chosen on it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tether.delta.cache import StateCache
from tether.delta.carried import SAMPLE_BYTES, SAMPLE_DOCUMENTS
from tether.delta.gate import FOLDS
from tether.delta.windows import Windows
from tether.errors import ConfigError
from tether.store.marked import Marked

__all__ = ["HELD_OUT", "HeldOut", "check_share", "hold_out", "leave_out", "sample_texts"]

HELD_OUT = 0.15
"""Share of a domain's tokens that is kept aside, unless another one is asked for."""
LEAST, MOST = 256, 2048
"""Tokens that are kept aside at least and at most, as long as whole documents allow it."""
LARGEST = 0.25
"""Share of the text's tokens that is kept aside at most, unless a larger one was asked for."""
FEWEST_DOCUMENTS, FEWEST_WINDOWS = 4, 8
"""A text of fewer documents is cut at its windows; a text of fewer windows has nothing kept aside."""


class HeldOut(NamedTuple):
    """Which part of a text is kept aside.

    Attributes:
        windows: the text. Where it is cut at its windows, each window has a document's number of its own.
        stay: numbers of the documents that a fit may see, shape (D,).
        away: numbers of those kept aside, shape (A,), ascending; empty where nothing is.
        kind: `documents`, `windows`, or `none`.
        note: a sentence on what was kept aside, or on why nothing was.
    """

    windows: Windows
    stay: Tensor
    away: Tensor
    kind: str
    note: str


def check_share(share: float) -> None:
    """Refuse a share that cannot be kept aside.

    Args:
        share: of a domain's tokens.

    Raises:
        ConfigError: it is outside [0, 0.5].
    """
    if not 0 <= share <= 0.5:
        raise ConfigError(f"held_out={share}: expected a share of the domain's tokens in [0, 0.5]")


def hold_out(windows: Windows, share: float) -> HeldOut:
    """Choose what to keep aside, spread evenly over the text.

    Documents are taken whole, in an order that spreads them over the text, until they hold `share` of its
    tokens (at least `LEAST`, at most `MOST`) and are at least two. A document that would bring the part kept
    aside above `LARGEST` of the text is passed over. Where no two documents do, the text is cut at its
    windows, and windows are taken in the same way: the fit then sees other windows of the same documents. A
    text of fewer than `FEWEST_WINDOWS` windows, or of fewer than `LEAST / LARGEST` tokens, is too short for
    either.

    The choice depends on how many tokens each document has, and on nothing else of it.

    Args:
        windows: the domain's text.
        share: of its tokens to keep aside, in [0, 0.5]; 0 keeps nothing aside.

    Returns:
        The choice.
    """
    # What is counted is counted for each window: a window lies inside one document.
    before = torch.cat([torch.zeros(1, dtype=torch.int64), (windows.targets >= 0).cumsum(0)])
    scored = before[windows.starts].diff()
    total, count = int(scored.sum()), len(scored)
    del before
    of_window = windows.documents[windows.starts[:-1]]
    every, none = of_window.unique(), torch.zeros(0, dtype=torch.int64)
    if share == 0:
        note = "No documents were kept aside, as was asked for."
        return HeldOut(windows, every, none, "none", note)
    target, limit = min(max(share * total, LEAST), MOST), max(LARGEST, 1.25 * share) * total
    pieces = (("documents", of_window),) if len(every) >= FEWEST_DOCUMENTS else ()
    cut = ("windows", torch.arange(count))
    for kind, owner in (*pieces, cut) if target <= limit and count >= FEWEST_WINDOWS else ():
        numbers, place = owner.unique(return_inverse=True)
        sizes = torch.zeros(len(numbers), dtype=torch.int64).index_add_(0, place, scored)
        chosen = _choose(sizes.tolist(), target, limit)
        staying = ~torch.isin(owner, numbers[chosen])
        if len(chosen) >= 2 and int(staying.sum()) >= FOLDS:
            away = torch.zeros(len(numbers), dtype=torch.bool)
            away[chosen] = True
            note = _note(kind, len(chosen), int(sizes[chosen].sum()), count)
            text = windows
            if kind == "windows":
                text = windows._replace(documents=owner.repeat_interleave(windows.starts.diff()))
            return HeldOut(text, numbers[~away], numbers[away], kind, note)
    note = (
        f"The text is too short ({total} tokens in {count} windows) to keep a part of it aside, which takes at least "
        f"{round(LEAST / LARGEST)} tokens in {FEWEST_WINDOWS} windows of similar length. How well this domain was "
        "learnt is not known until it is measured on other documents."
    )
    return HeldOut(windows, every, none, "none", note)


def _choose(sizes: Sequence[int], target: float, limit: float) -> Tensor:
    # Multiples of the golden section, modulo 1, are spread evenly however many of them are taken.
    order = ((torch.arange(len(sizes), dtype=torch.float64) + 1) * 0.6180339887498949).frac().argsort()
    chosen: list[int] = []
    taken = 0
    for number in order.tolist():
        if taken >= target and len(chosen) >= 2:
            break
        if sizes[number] and taken + sizes[number] <= limit:
            chosen.append(number)
            taken += sizes[number]
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def _note(kind: str, chosen: int, tokens: int, windows: int) -> str:
    if kind == "documents":
        return f"{chosen} documents ({tokens} tokens) were kept aside, and nothing was learnt from them."
    return (
        f"{chosen} of {windows} windows ({tokens} tokens) were kept aside, and nothing was learnt from them. The text "
        "has too few documents to keep whole ones aside, so other windows of the same documents were learnt from."
    )


def leave_out(cache: StateCache, held_out: HeldOut) -> StateCache:
    """Restrict a text to what a fit may see; its states stay where they are.

    Args:
        cache: the text.
        held_out: what is kept aside.

    Returns:
        The rest, documents numbered as in `held_out.windows`. Its states can be indexed by positions only.
    """
    if not len(held_out.away):
        return cache
    windows = held_out.windows
    chosen = torch.isin(windows.documents[windows.starts[:-1]], held_out.stay)
    kept = chosen.repeat_interleave(windows.starts.diff())
    rest = windows.some(chosen.nonzero().squeeze(-1))
    states = cast("Any", _Rows(cache.states, kept.nonzero().squeeze(-1)))
    return StateCache(rest, states, cache.base, cache.layers)


class _Rows:
    """Some rows of states, read when they are asked for."""

    def __init__(self, states: Any, rows: Tensor) -> None:
        self.states, self.rows = states, rows
        self.shape = torch.Size((len(rows), states.shape[1]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Any:
        return self.states[self.rows[index]]


def sample_texts(held_out: HeldOut, documents: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """Take a small sample of what was kept aside, for a delta to carry.

    Args:
        held_out: what was kept aside.
        documents: the domain's documents, in the order in which they were cut into windows.
        tokenizer: what they were read with.

    Returns:
        At most `SAMPLE_DOCUMENTS` texts of at most `SAMPLE_BYTES` in all as UTF-8, spread over what was kept
        aside, each cut at a word; none where nothing was kept aside.
    """
    away = held_out.away
    away = away[
        torch.linspace(0, len(away) - 1, min(len(away), SAMPLE_DOCUMENTS), dtype=torch.float64).long()
    ]
    if held_out.kind == "documents":
        chosen = [documents[number] for number in away.tolist()]
        texts = [each.spelt(tokenizer) if isinstance(each, Marked) else each for each in chosen]
    else:
        texts = [_written(held_out.windows, number, tokenizer) for number in away.tolist()]
    return tuple(filter(None, (_cut(text, SAMPLE_BYTES // len(texts)) for text in texts)))


def _written(windows: Windows, number: int, tokenizer: Any) -> str:
    begin, end = windows.starts[number : number + 2].tolist()
    ids = windows.input_ids[begin:end].tolist()
    values = () if windows.numeric_values is None else (windows.numeric_values[begin:end].tolist(),)
    # A window may begin or end within a character.
    return str(tokenizer.decode(ids, *values, skip_special_tokens=True)).strip("\ufffd")


def _cut(text: str, size: int) -> str:
    data = text[: size + 1].encode()
    if len(data) <= size:
        return text.strip()
    short = data[:size].decode(errors="ignore")
    return (short[: max(map(short.rfind, " \n\t"))] if any(map(short.count, " \n\t")) else short).strip()
