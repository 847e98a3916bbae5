"""Conversions between stored types and float32, against torch's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tether.merge.floats import finite, narrow, widen

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_number_is_read_exactly(dtype):
    words = np.arange(2**16, dtype=np.uint16)
    out = np.empty(2**16, np.float32)
    widen(words.view(np.uint8), dtype, out)
    expected = torch.from_numpy(words.view(np.int16).copy()).view(TYPES[dtype]).float()
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
@given(bits=arrays(np.uint32, 64, elements=st.integers(0, 0x7F7FFFFF)), negative=st.booleans())
def test_rounding_is_that_of_torch(dtype, bits, negative):
    values = (bits | np.uint32(negative << 31)).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(TYPES[dtype])
    stored = narrow(values.copy(), dtype)
    assert stored.tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", TYPES)
def test_halfway_goes_to_even(dtype):
    step = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}[dtype]
    values = np.float32([1 + 0.5 * step, 1 + 1.5 * step]) if dtype != "F32" else np.float32([1, 1 + step])
    out = np.empty(2, np.float32)
    widen(narrow(values, dtype).view(np.uint8), dtype, out)
    assert out.tolist() == ([1, 1 + 2 * step] if dtype != "F32" else [1, 1 + step])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_found(dtype, bad):
    good = torch.full((1000,), 3.0e4).to(TYPES[dtype])
    assert finite(good.view(torch.uint8).numpy(), dtype)
    good[997] = bad
    assert not finite(good.view(torch.uint8).numpy(), dtype)


def test_a_sum_that_overflows_is_finite():
    assert finite(np.full(8, 3e38, np.float32).view(np.uint8), "F32")
