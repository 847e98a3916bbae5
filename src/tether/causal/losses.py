"""Losses on the scores: one-vs-rest on Cauchy decisions, and softmax on their locations."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.cauchy.functional import log_cdf, log_sf, push_linear
from tether.errors import ConfigError, ShapeError

__all__ = ["IGNORE", "ovr_log_prob", "ovr_loss", "softmax_loss"]

IGNORE = -100
"""Label of positions that carry no loss, as everywhere in transformers."""


def ovr_log_prob(
    score_loc: Float[Tensor, "*batch vocab"], score_scale: Float[Tensor, "*batch vocab"], threshold: float
) -> Float[Tensor, "*batch vocab"]:
    """Log probability that each class fires: log P(S_k > C).

    Args:
        score_loc: loc_S, shape (..., V), in logits.
        score_scale: scale_S, shape (..., V), > 0.
        threshold: C, in logits.

    Returns:
        log P_k, shape (..., V), <= 0; softmax over it gives P_k / sum P.

    Reference: spec document 5, section 2.5.
    """
    return log_sf(
        torch.full((), threshold, dtype=score_loc.dtype, device=score_loc.device), score_loc, score_scale
    )


def _dense_ovr(
    latent_loc: Tensor,
    latent_scale: Tensor,
    weight: Tensor,
    targets: Tensor,
    threshold: float,
    class_noise: float,
) -> Tensor:
    loc, scale = push_linear(latent_loc.float(), latent_scale.float(), weight.float())
    scale = scale + class_noise
    level = torch.full((), threshold, dtype=loc.dtype, device=loc.device)
    miss = log_cdf(level, loc, scale)
    chosen = targets.unsqueeze(-1)
    hit = log_sf(level, loc.gather(-1, chosen), scale.gather(-1, chosen))
    return -(miss.sum(-1) - miss.gather(-1, chosen).squeeze(-1) + hit.squeeze(-1)).mean()


_FORMS = {"dense": _dense_ovr}


def ovr_loss(
    latent_loc: Float[Tensor, "tokens latent"],
    latent_scale: Float[Tensor, "tokens latent"],
    weight: Float[Tensor, "vocab latent"],
    targets: Int[Tensor, " tokens"],
    *,
    threshold: float,
    class_noise: float = 0.0,
    impl: str = "dense",
) -> Float[Tensor, ""]:
    """One-vs-rest loss: the binary cross-entropies of all classes, summed, and averaged over targets.

    For each token, -log P(S_target > C) - sum over other k of log P(S_k <= C). Positions with target
    `IGNORE` are left out; with none left the loss is 0 and still differentiable.

    Args:
        latent_loc: loc of U, shape (N, C).
        latent_scale: scale of U, shape (N, C), > 0.
        weight: action weight, shape (V, C).
        targets: class of each token, shape (N,), in [0, V) or `IGNORE`.
        threshold: C, in logits.
        class_noise: scale of the exogenous noise on each score, >= 0.
        impl: `dense` holds tokens x vocabulary.

    Returns:
        The mean loss in nats, a float32 scalar.

    Raises:
        ConfigError: unknown `impl`.
        ShapeError: the numbers of tokens differ.

    Reference: spec document 5, section 2.5.
    """
    if impl not in _FORMS:
        raise ConfigError(f"impl={impl!r}: expected one of {', '.join(_FORMS)}")
    if latent_loc.shape != latent_scale.shape or len(targets) != len(latent_loc):
        raise ShapeError(
            f"latent_loc {tuple(latent_loc.shape)}, latent_scale {tuple(latent_scale.shape)}, targets "
            f"{tuple(targets.shape)}: expected (N, C), (N, C), (N,); flatten batch and time first"
        )
    kept = targets != IGNORE
    if not bool(kept.any()):
        return (latent_loc.sum() + latent_scale.sum() + weight.sum()).float() * 0.0
    return _FORMS[impl](latent_loc[kept], latent_scale[kept], weight, targets[kept], threshold, class_noise)


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
