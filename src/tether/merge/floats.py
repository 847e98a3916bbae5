"""The float types of checkpoints in NumPy: read as float32, rounded once when written.

NumPy and not torch, because merging weights needs nothing else and torch takes longer to import than a
small merge does to run.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["BYTES", "DTYPES", "finite", "narrow", "widen"]

BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}
"""The types that are merged, as safetensors spells them, and the bytes of one element."""

DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Their names in recipes and in a model's config."""


def widen(raw: npt.NDArray[np.uint8], dtype: str, out: npt.NDArray[np.float32]) -> None:
    """Convert bytes of a stored type to float32, exactly.

    Args:
        raw: Little-endian bytes, shape ``(n * BYTES[dtype],)``.
        dtype: One of ``BYTES``.
        out: Where the values go, shape ``(n,)``.

    Example:
        >>> out = np.empty(2, np.float32)
        >>> widen(np.array([0x3F80, 0xC000], np.uint16).view(np.uint8), "BF16", out)
        >>> out
        array([ 1., -2.], dtype=float32)
    """
    if dtype == "BF16":
        np.left_shift(raw.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        np.copyto(out, raw.view(np.float32 if dtype == "F32" else np.float16))


def narrow(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Round float32 values once, to nearest and ties to even.

    Args:
        values: Finite values, shape ``(n,)``.
        dtype: One of ``BYTES``.

    Returns:
        An array whose bytes are the stored form; beyond the range of the type it holds infinity.

    Example:
        >>> [hex(v) for v in narrow(np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8], np.float32), "BF16")]
        ['0x3f80', '0x3f80', '0x3f82']
    """
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    lowest_kept = (bits >> 16) & 1
    lowest_kept += bits
    lowest_kept += 0x7FFF
    lowest_kept >>= 16
    return lowest_kept.astype(np.uint16)


def finite(raw: npt.NDArray[np.uint8], dtype: str) -> bool:
    """Say whether bytes of a stored type hold finite numbers only.

    Args:
        raw: Little-endian bytes of whole elements.
        dtype: One of ``BYTES``.

    Returns:
        False if there is a NaN or an infinity.
    """
    if dtype == "F32":
        # A sum is not finite if a term is not; only a sum that overflows needs the slower look.
        with np.errstate(over="ignore", invalid="ignore"):
            values = raw.view(np.float32)
            return bool(np.isfinite(values.sum()) or np.isfinite(values).all())
    exponent = np.uint16(0x7F80 if dtype == "BF16" else 0x7C00)
    return not bool(((raw.view(np.uint16) & exponent) == exponent).any())
