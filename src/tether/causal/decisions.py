"""What the one-vs-rest loss is a function of, once its options are checked and turned into tensors."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.errors import ConfigError, ShapeError

__all__ = ["IGNORE", "Decisions", "decisions"]

IGNORE = -100
"""Label of positions that carry no loss, as everywhere in transformers."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decisions:
    """What the loss is a function of, after options were turned into tensors and ignored tokens dropped.

    Attributes:
        loc: loc of U, shape (N, C).
        scale: scale of U, shape (N, C), or (1, C) where all tokens share it, > 0.
        weight: action weight, shape (V, C).
        level: threshold less bias of each class, shape (V,), in logits; like the next two in `dtype`.
        noise: scale of the exogenous noise of each score, shape (V,), >= 0.
        shift: what each token adds to the level, shape (N, 1), in logits, or None.
        targets: class of each token, shape (N,), in [0, V).
    """

    loc: Tensor
    scale: Tensor
    weight: Tensor
    level: Tensor
    noise: Tensor
    shift: Tensor | None
    targets: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The type of all computations: that of the inputs, but at least float32."""
        return _dtype(self.loc, self.scale, self.weight)

    def inputs(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that gradients are taken of, in the order of the attributes."""
        return self.loc, self.scale, self.weight, self.level, self.noise, self.shift

    def empty_loss(self) -> Tensor:
        """Return the loss of no token: 0, differentiable in all that there is."""
        parts = [tensor[:0].sum().to(self.dtype) for tensor in self.inputs() if tensor is not None]
        return torch.stack(parts).sum()


def decisions(
    loc: Tensor,
    scale: Tensor,
    weight: Tensor,
    targets: Tensor,
    threshold: float | Tensor,
    class_noise: float | Tensor,
    bias: Tensor | None,
) -> Decisions:
    """Check the arguments of `ovr_loss`, turn options into tensors, and drop ignored tokens.

    Args:
        loc: shape (N, C).
        scale: shape (N, C) or (1, C), > 0.
        weight: shape (V, C).
        targets: shape (N,), in [0, V) or `IGNORE`.
        threshold: a number or scalar, (V,) or (N, 1), in logits.
        class_noise: a number or scalar, or (V,), >= 0.
        bias: shape (V,), in logits, or None.

    Returns:
        The decisions of the kept tokens; there may be none.

    Raises:
        ConfigError: a target outside [0, V), or a negative class noise.
        ShapeError: numbers of tokens, classes or latent dimensions differ.
    """
    tokens, classes, latent = len(targets), len(weight), loc.shape[1]
    if loc.shape[0] != tokens or scale.shape not in {loc.shape, (1, latent)} or weight.shape[1] != latent:
        raise ShapeError(
            f"latent_loc {tuple(loc.shape)}, latent_scale {tuple(scale.shape)}, weight {tuple(weight.shape)}, "
            f"targets {tuple(targets.shape)}: expected (N, C), (N, C) or (1, C), (V, C), (N,); flatten batch and "
            "time first"
        )
    kept = targets != IGNORE
    foreign = targets[kept & ((targets < 0) | (targets >= classes))]
    if len(foreign):
        raise ConfigError(
            f"target {int(foreign[0])} with {classes} classes: expected 0 to {classes - 1}, or {IGNORE} to leave "
            "the token out"
        )
    dtype = _dtype(loc, scale, weight)
    level, noise = (
        torch.as_tensor(option, dtype=dtype, device=weight.device) for option in (threshold, class_noise)
    )
    for name, given, allowed in (
        ("threshold", level, [(), (classes,), (tokens, 1)]),
        ("class_noise", noise, [(), (classes,)]),
        ("bias", bias, [(classes,)]),
    ):
        if given is not None and given.shape not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ShapeError(
                f"{name} has shape {tuple(given.shape)} with {tokens} tokens: expected {expected}"
            )
    if bool((noise < 0).any()):
        raise ConfigError(f"class_noise={float(noise.min())}: a scale is at least 0")
    # A stride of 0 says that all rows are one row in memory.
    shared = len(scale) == 1 or (scale.stride(0) == 0 and not scale.requires_grad)
    shift = level if level.dim() == 2 else None
    level = level.new_zeros(()) if level.dim() == 2 else level
    if bias is not None:
        level = level - bias.to(dtype)
    if not bool(kept.all()):
        loc, targets = loc[kept], targets[kept]
        scale = scale if shared else scale[kept]
        shift = None if shift is None else shift[kept]
    return Decisions(
        loc=loc,
        scale=scale[:1] if shared else scale,
        weight=weight,
        level=level.expand(classes),
        noise=noise.expand(classes),
        shift=shift,
        targets=targets,
    )


def _dtype(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
