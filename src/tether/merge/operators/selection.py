"""The k-th largest magnitude among elements that are seen block by block: exact, in fixed memory."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tether.merge.operator import Floats

__all__ = ["Threshold", "magnitude_bits", "thresholds", "trim"]

_BINS = 1 << 16


class Threshold(NamedTuple):
    """What is kept of one sequence: magnitudes above ``bits``, and the first ``ties`` that equal it.

    Attributes:
        bits: the threshold as the bits of a float32; they are ordered as the magnitudes are.
        ties: how many elements equal to the threshold are kept.
        equal: how many there are.
    """

    bits: int
    ties: int
    equal: int


def magnitude_bits(values: Floats) -> npt.NDArray[np.uint32]:
    """Give the bits of the magnitudes, which are ordered as the magnitudes.

    Args:
        values: finite, shape (n,).

    Returns:
        Shape (n,).
    """
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def thresholds(read: Callable[[], Iterable[Sequence[Floats]]], keep: Sequence[int]) -> tuple[Threshold, ...]:
    """Find, for several sequences at once, the magnitude from which on their ``keep`` largest start.

    Two passes: a histogram over the upper half of the bits names a bin, one over the lower half the element.

    Args:
        read: starts a pass over the blocks; each holds one part of every sequence.
        keep: how many elements to keep of each sequence, from 1 to its length.

    Returns:
        One threshold a sequence.

    Example:
        >>> values = np.array([3, -7, 1, 5, -5], np.float32)
        >>> thresholds(lambda: [[values[:2]], [values[2:]]], [2])[0]._replace(bits=0)
        Threshold(bits=0, ties=1, equal=2)
    """
    coarse = np.zeros((len(keep), _BINS), np.int64)
    for block in read():
        for counts, values in zip(coarse, block, strict=True):
            counts += np.bincount(magnitude_bits(values) >> 16, minlength=_BINS)
    upper, left = zip(
        *(_bin(counts, wanted) for counts, wanted in zip(coarse, keep, strict=True)), strict=True
    )
    fine = np.zeros((len(keep), _BINS), np.int64)
    for block in read():
        for counts, values, high in zip(fine, block, upper, strict=True):
            bits = magnitude_bits(values)
            counts += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=_BINS)
    found = []
    for counts, high, wanted in zip(fine, upper, left, strict=True):
        low, ties = _bin(counts, wanted)
        found.append(Threshold(high << 16 | low, ties, int(counts[low])))
    return tuple(found)


# The bin in which the wanted-th largest lies, and how many of that bin are wanted.
def _bin(counts: npt.NDArray[np.int64], wanted: int) -> tuple[int, int]:
    above = counts[::-1].cumsum()
    place = int(np.searchsorted(above, wanted))
    return len(counts) - 1 - place, wanted - int(above[place] - counts[::-1][place])


def trim(values: Floats, threshold: Threshold, seen: int) -> int:
    """Set to 0 what is not kept.

    Args:
        values: the next block of the sequence; overwritten.
        threshold: from ``thresholds``.
        seen: how many elements equal to the threshold came in earlier blocks.

    Returns:
        The same, after this block.
    """
    bits = magnitude_bits(values)
    if threshold.ties == threshold.equal:
        values *= bits >= threshold.bits
        return seen
    keep = bits > threshold.bits
    equal = np.flatnonzero(bits == threshold.bits)
    keep[equal[: max(0, threshold.ties - seen)]] = True
    values *= keep
    return seen + len(equal)
