"""Where a model computes and in which number format, by names that a user types."""

import torch

from tether.errors import ConfigError

__all__ = ["DTYPES", "find_device", "find_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number formats of weights by name."""


def find_device(name: str | torch.device | None) -> torch.device:
    """Find a device.

    Args:
        name: `auto` for an accelerator if there is one, else `cpu`, `cuda`, `cuda:1`, `mps`, `xpu` and so on; None is
            the CPU.

    Returns:
        The device; it has been used once, so that it is known to work.

    Raises:
        ConfigError: there is no such device here.
    """
    there = torch.accelerator.current_accelerator(check_available=True)
    if name is None or name == "auto":
        return there if name == "auto" and there is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError, ImportError) as error:
        found = "cpu" if there is None else f"cpu and {there}"
        raise ConfigError(
            f"device {str(name)!r} cannot be used here ({str(error).splitlines()[0][:200]}); this machine has {found}. "
            "Take one of these, or auto"
        ) from error
    return device


def find_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """Find a number format.

    Args:
        name: `auto` or None for that of the checkpoint, else one of `DTYPES`.
        device: where it will be used.

    Returns:
        The format, or None for that of the checkpoint.

    Raises:
        ConfigError: an unknown name, or a format that the device does not multiply in.
    """
    if name is None or name == "auto":
        return None
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None:
        raise ConfigError(f"dtype {name!r}: expected auto or one of {', '.join(DTYPES)}")
    try:
        values = torch.ones(2, 2, device=device, dtype=dtype)
        (values @ values).cpu()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"dtype {name} cannot be used on {device} ({str(error).splitlines()[0][:200]}); take float32"
        ) from error
    return dtype
