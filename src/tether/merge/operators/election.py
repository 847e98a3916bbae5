"""The sign election that TIES and DARE-TIES share."""

from collections.abc import Sequence

import numpy as np

from tether.merge.operator import Floats

__all__ = ["elect"]

_SIGN = np.uint32(0x80000000)


def elect(deltas: Sequence[Floats], weights: Sequence[float], *, normalize: bool) -> Floats:
    r"""Add those weighted differences whose sign is that of their sum.

    .. math:: m = \sum_{i: s_i = s} w_i \delta_i \Big/ \sum_{i: s_i = s} w_i, \quad
              s = \mathrm{sign}^+ \sum_i w_i \delta_i

    with sign+ of 0 being +1, s_i the sign of w_i delta_i, and the divisor only where normalised and not 0.

    Args:
        deltas: Trimmed differences, shape (n,) each; overwritten.
        weights: One a difference.
        normalize: Whether to divide by the weights that agree.

    Returns:
        The mixed difference, shape (n,).

    Reference:
        Yadav et al. 2023, TIES-Merging, section 3 (elect sign, disjoint merge); with weights as mergekit 0.1.5.

    Example:
        >>> one, two = np.array([3, -1, 0], np.float32), np.array([-1, -2, 4], np.float32)
        >>> elect([one, two], [1, 1], normalize=True)
        array([ 3. , -1.5,  4. ], dtype=float32)
    """
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        delta *= weight
        total += delta
    total += 0.0  # -0.0 counts as positive
    sign = total.view(np.uint32)
    divisor = np.zeros_like(total)
    mixed = np.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agree = (delta.view(np.uint32) ^ sign) < _SIGN
        agree &= delta != 0
        delta *= agree
        mixed += delta
        if normalize:
            divisor += np.float32(weight) * agree
    if normalize:
        divisor[divisor == 0] = 1
        mixed /= divisor
    return mixed
