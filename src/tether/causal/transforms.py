"""A scale for values of any size: logarithmic far out, linear around 0."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["signed_log", "signed_log_inverse"]


def signed_log(value: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Compress values of any size: sign(v) ln(1 + |v|), odd and smooth, with slope 1 at 0.

    Args:
        value: any real number, shape (...).

    Returns:
        Transformed values, shape (...), accurate for the smallest and the largest.

    Reference: spec document 5, section 2.1, phi without its direction.

    Example:
        >>> import torch
        >>> signed_log(torch.tensor([-1e30, 0.0, 1e-30]))
        tensor([-6.9078e+01,  0.0000e+00,  1.0000e-30])
    """
    # Two one-sided branches: sign and abs have no slope at 0, where this has 1.
    return torch.where(value < 0, -torch.log1p(-value.clamp(max=0)), torch.log1p(value.clamp(min=0)))


def signed_log_inverse(transformed: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Undo `signed_log`: sign(y) (exp(|y|) - 1).

    Args:
        transformed: any real number, shape (...). Beyond the log of the largest number of the dtype (88.7
            in float32) the value is infinite; nothing is clamped.

    Returns:
        Values, shape (...). A rounding of y moves them by |y| times as much, relative to their size.

    Example:
        >>> import torch
        >>> signed_log_inverse(torch.tensor([-2.0, 0.0, 100.0]))
        tensor([-6.3891,  0.0000,     inf])
    """
    low, high = transformed.clamp(max=0), transformed.clamp(min=0)
    return torch.where(transformed < 0, -torch.expm1(-low), torch.expm1(high))
