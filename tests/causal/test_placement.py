"""Devices and number formats by name."""

import pytest
import torch

from tether.causal.placement import DTYPES, find_device, find_dtype
from tether.errors import ConfigError


def test_names_of_devices():
    there = torch.accelerator.current_accelerator(check_available=True)
    assert find_device(None) == find_device("cpu") == torch.device("cpu")
    assert find_device("auto") == (torch.device("cpu") if there is None else there)
    assert find_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "xpu:7", "gpu", "", "cuda:-2", "hpu"])
def test_a_device_that_is_not_there_is_refused_with_what_is(name):
    with pytest.raises(ConfigError, match=r"cannot be used here .*this machine has cpu"):
        find_device(name)


def test_formats():
    cpu = torch.device("cpu")
    assert find_dtype("auto", cpu) is find_dtype(None, cpu) is None
    assert {name: find_dtype(name, cpu) for name in DTYPES} == DTYPES
    assert find_dtype(torch.bfloat16, cpu) is torch.bfloat16
    with pytest.raises(ConfigError, match=r"float64.*expected auto or one of float32, bfloat16, float16"):
        find_dtype("float64", cpu)
    with pytest.raises(ConfigError, match="cannot be used on meta"):
        find_dtype("float32", torch.device("meta"))
