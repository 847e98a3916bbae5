"""Losses: one-vs-rest on Cauchy decisions, softmax on their locations, the gated likelihood of values."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.cauchy.functional import log_prob, log_sf
from tether.causal import ovr
from tether.causal.config import IMPLS
from tether.causal.decisions import IGNORE, decisions
from tether.causal.ovr import Estimate
from tether.causal.transforms import signed_log, signed_log_inverse
from tether.errors import ConfigError, ShapeError

__all__ = [
    "IGNORE",
    "gated_cauchy_nll",
    "normalised_ovr_nll",
    "ovr_log_prob",
    "ovr_loss",
    "ovr_loss_estimate",
    "signed_log",
    "signed_log_inverse",
    "softmax_loss",
]


def ovr_log_prob(
    score_loc: Float[Tensor, "*#batch vocab"],
    score_scale: Float[Tensor, "*#batch vocab"],
    threshold: float | Float[Tensor, "*#levels"],
) -> Float[Tensor, "*batch vocab"]:
    """Log probability that each class fires: log P(S_k > C_k).

    Args:
        score_loc: loc_S, shape (..., V), in logits.
        score_scale: scale_S, shape (..., V), > 0.
        threshold: C, in logits: a number, (V,) per class, or (..., 1) per context.

    Returns:
        log P_k, shape (..., V), <= 0; softmax over it gives P_k / sum P.

    Reference: spec document 5, section 2.5.

    Example:
        >>> import torch
        >>> ovr_log_prob(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0])).exp()
        tensor([0.5000, 0.2500])
    """
    return log_sf(threshold, score_loc, score_scale)


def ovr_loss(
    latent_loc: Float[Tensor, "tokens latent"],
    latent_scale: Float[Tensor, "#tokens latent"],
    weight: Float[Tensor, "vocab latent"],
    targets: Int[Tensor, " tokens"],
    *,
    threshold: float | Float[Tensor, "..."],
    class_noise: float | Float[Tensor, "..."] = 0.0,
    bias: Float[Tensor, " vocab"] | None = None,
    impl: str = "dense",
    samples: int = 2048,
    generator: torch.Generator | None = None,
    chunk: int = 1024,
) -> Float[Tensor, ""]:
    """One-vs-rest loss: the binary cross-entropies of all classes, summed, and averaged over targets.

    For each token, -log P(S_target > C) - sum over other k of log P(S_k <= C), where
    S_k ~ Cauchy(weight_k . latent_loc + bias_k, |weight_k| . latent_scale + class_noise). Positions with
    target `IGNORE` are left out; with none left the loss is 0 and still differentiable. It is computed in
    float32 whatever the inputs are (float64 if one of the first three is), also under autocast.

    Args:
        latent_loc: loc of U, shape (N, C).
        latent_scale: scale of U, shape (N, C), > 0. Shape (1, C), one for all tokens, makes `chunked` and
            `sampled` cheaper; an expanded tensor that needs no gradient is treated as such.
        weight: action weight, shape (V, C).
        targets: class of each token, shape (N,), in [0, V) or `IGNORE`.
        threshold: C, in logits: a number or scalar, (V,) per class, or (N, 1) per context.
        class_noise: scale of the exogenous noise on each score, >= 0: a number or scalar, or (V,).
        bias: shift of the scores, shape (V,), in logits, or None.
        impl: `dense` holds tokens x vocabulary. `chunked` is exact and holds tokens x `chunk`. `sampled`
            takes all targets and `samples` other classes, unbiased for the loss and its gradients; see
            `ovr_loss_estimate`. The last two compute gradients with the loss: backward works once.
        samples: classes drawn by `sampled`, >= 2.
        generator: source of the draw of `sampled`; None takes the global one.
        chunk: classes that `chunked` and `sampled` hold at a time, >= 1.

    Returns:
        The mean loss in nats, a scalar.

    Raises:
        ConfigError: unknown `impl`; `samples`, `chunk` or `class_noise` below its range; a target outside
            [0, V).
        ShapeError: numbers of tokens, classes or latent dimensions differ.

    Reference: spec document 5, section 2.5.

    Example:
        >>> import torch
        >>> loc, scale, weight = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(3, 2)
        >>> ovr_loss(loc, scale, weight, torch.tensor([0]), threshold=0.0, impl="chunked")  # 3 log 2
        tensor(2.0794)
    """  # noqa: DOC502 - ShapeError is raised by decisions
    if impl not in IMPLS:
        raise ConfigError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")
    _check_counts(samples, chunk)
    case = decisions(latent_loc, latent_scale, weight, targets, threshold, class_noise, bias)
    if not len(case.targets):
        return case.empty_loss()
    with torch.autocast(weight.device.type, enabled=False):
        if impl == "dense":
            return ovr.dense(case)
        return (
            ovr.chunked(case, chunk)
            if impl == "chunked"
            else ovr.sampled(case, chunk, samples, generator).loss
        )


def ovr_loss_estimate(
    latent_loc: Float[Tensor, "tokens latent"],
    latent_scale: Float[Tensor, "#tokens latent"],
    weight: Float[Tensor, "vocab latent"],
    targets: Int[Tensor, " tokens"],
    *,
    threshold: float | Float[Tensor, "..."],
    class_noise: float | Float[Tensor, "..."] = 0.0,
    bias: Float[Tensor, " vocab"] | None = None,
    samples: int = 2048,
    generator: torch.Generator | None = None,
    chunk: int = 1024,
) -> Estimate:
    """Estimate `ovr_loss` from sampled classes, with its standard error.

    Classes that are the target of some token are taken with certainty, for all tokens; of the rest,
    `samples` are drawn without replacement and weighted up.

    Args:
        latent_loc: here and below as in `ovr_loss`.
        latent_scale: shape (N, C) or (1, C).
        weight: shape (V, C). Its gradient is dense, with zeros for the classes not drawn.
        targets: shape (N,).
        threshold: a number or scalar, (V,), or (N, 1).
        class_noise: a number or scalar, or (V,).
        bias: shape (V,), or None.
        samples: classes drawn, >= 2; all of them make the estimate exact.
        generator: source of the draw; None takes the global one.
        chunk: classes held at a time, >= 1.

    Returns:
        Loss and standard error in nats, both scalars.

    Raises:
        ConfigError: as `ovr_loss`.
        ShapeError: as `ovr_loss`.

    Reference: Cochran 1977, Sampling Techniques, theorems 2.2 and 2.4.

    Example:
        >>> import torch
        >>> loc, scale, weight = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(9, 2)
        >>> ovr_loss_estimate(loc, scale, weight, torch.tensor([0]), threshold=0.0, samples=4)  # 9 log 2
        Estimate(loss=tensor(6.2383), standard_error=tensor(0.))
    """  # noqa: DOC502 - raised by decisions
    _check_counts(samples, chunk)
    case = decisions(latent_loc, latent_scale, weight, targets, threshold, class_noise, bias)
    if not len(case.targets):
        return Estimate(case.empty_loss(), torch.zeros((), dtype=case.dtype, device=weight.device))
    with torch.autocast(weight.device.type, enabled=False):
        return ovr.sampled(case, chunk, samples, generator)


def softmax_loss(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Cross-entropy of softmax(loc_S), the base model's own loss.

    Args:
        logits: loc_S, shape (N, V).
        targets: class of each token, shape (N,), in [0, V) or `IGNORE`.

    Returns:
        The mean over kept targets in nats, float32; 0 and differentiable when none is kept.
    """
    if not bool((targets != IGNORE).any()):
        return logits.sum().float() * 0.0
    return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE)


def normalised_ovr_nll(
    ovr_log_probs: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Negative log likelihood of the targets under P_k / sum P, the one law over tokens that OvR implies.

    It is the softmax loss of log P_k, comparable with that of the base in nats per token.

    Args:
        ovr_log_probs: log P_k of `ovr_log_prob`, shape (N, V), <= 0.
        targets: class of each token, shape (N,), in [0, V) or `IGNORE`.

    Returns:
        The mean over kept targets in nats, float32; 0 and differentiable when none is kept.

    Example:
        >>> import torch
        >>> normalised_ovr_nll(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([1])).exp()  # 1 / (1/3)
        tensor(3.)
    """
    return softmax_loss(ovr_log_probs, targets)


def gated_cauchy_nll(
    value_loc: Float[Tensor, "*batch"],
    value_scale: Float[Tensor, "*batch"],
    values: Float[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"],
    num_prob: Float[Tensor, "*batch"],
    alpha: float,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """Cauchy negative log likelihood of the values, gated by the probability of the number token.

    Position i of the mask costs (alpha + (1 - alpha) P_NUM,i) (-log p(value_i)). The document does not say how
    positions combine: the mean is over the masked ones, whatever the amount of text around the numbers.

    Args:
        value_loc: loc_Y, shape (...), in the units of the values, raw or `signed_log`.
        value_scale: scale_Y, shape (...), same units, > 0.
        values: true values, shape (...), same units; not read outside the mask, where nan is allowed.
        mask: where the true label is the number token, shape (...).
        num_prob: P_NUM, shape (...), in [0, 1]. It gets a gradient unless it is passed detached.
        alpha: share of the loss that is not gated, in [0, 1].
        reduction: `mean` over the masked positions, or `sum`.

    Returns:
        The loss in nats, a scalar, in the widest of float32 and the dtypes given; 0 and differentiable when
        the mask is empty.

    Raises:
        ConfigError: `alpha` outside [0, 1], or unknown `reduction`.
        ShapeError: the shapes differ.

    Reference: spec document 5, section 2.5.

    Example:
        >>> import torch
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> gated_cauchy_nll(zero, one, one, one > 0, 0.5 * one, 0.2)  # 0.6 log(2 pi)
        tensor(1.1027)
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha}: expected a number in [0, 1], the share that is not gated")
    if reduction not in {"mean", "sum"}:
        raise ConfigError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    given = {"value_loc": value_loc, "value_scale": value_scale, "values": values, "num_prob": num_prob}
    if any(tensor.shape != mask.shape for tensor in given.values()):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ShapeError(
            f"{shapes}, mask {tuple(mask.shape)}: expected one shape for all; index or expand them"
        )
    dtype = torch.float32
    for tensor in given.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    loc, scale, true, num = (tensor[mask].to(dtype) for tensor in given.values())
    total = ((alpha + (1 - alpha) * num) * -log_prob(true, loc, scale)).sum()
    return total / max(len(true), 1) if reduction == "mean" else total


def _check_counts(samples: int, chunk: int) -> None:
    if samples < 2 or chunk < 1:
        raise ConfigError(
            f"samples={samples}, chunk={chunk}: expected samples >= 2, for a standard error, and chunk >= 1"
        )
