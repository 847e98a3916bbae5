"""Documents of the tasks beside this file, from news that an installed package carries."""

from typing import Any

import pyarrow as pa
from datasets import Dataset

from tether.demo.corpora import documents, news

__all__ = ["continuations", "items"]

CONTEXT, CHOICE = 40, 8
"""Words read before a choice, and words of each choice."""


def items(**_: Any) -> dict[str, Dataset]:
    """Give news items to be scored as they are.

    Returns:
        One split, `test`, with the field `text`.
    """
    return _split("items", [{"text": text[:1200]} for text in documents(news)[:100]])


def continuations(**_: Any) -> dict[str, Dataset]:
    """Give beginnings of news items, each with how it goes on and how three others do at that place.

    Returns:
        One split, `test`, with the fields `text`, `choices` and `answer`, its number among them.
    """
    words = [text.split() for text in documents(news)]
    starts = [" ".join(item[:CONTEXT]) for item in words]
    ends = [" ".join(item[CONTEXT : CONTEXT + CHOICE]) for item in words]
    rows = []
    for number in range(100):
        answer = number % 4
        choices = [ends[(number + 7 * step) % len(ends)] for step in range(1, 4)]
        choices.insert(answer, ends[number])
        rows.append({"text": starts[number], "choices": choices, "answer": answer})
    return _split("continuations", rows)


def _split(name: str, rows: list[dict[str, Any]]) -> dict[str, Dataset]:
    # Named here: left to itself datasets pickles the table to hash it, which fails (5.2.0 with pyarrow 26).
    return {"test": Dataset(pa.Table.from_pylist(rows), fingerprint=name)}
