"""The Fisher-aligned latent: axes and scales of U chosen so that its drift is the softmax KL to second order."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tether.causal.fingerprint import served_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.objective import output_fisher
from tether.delta.output_head import OutputHead, chunk_rows
from tether.errors import ConfigError

__all__ = ["Axes", "align_latent", "fisher_axes"]

CAP = 1e3
"""Largest ratio of two scales: directions that no output depends on would have an infinite one."""


class Axes(NamedTuple):
    """A basis of the hidden state in which the output Fisher is diagonal.

    Attributes:
        basis: columns q_i, orthonormal, shape (H, H).
        scale: 1 / sqrt(2 F_i), capped, shape (H,).
        slope: change of log scale with the hidden state, shape (H, H), or None where scales are constant.
    """

    basis: Tensor
    scale: Tensor
    slope: Tensor | None


@torch.no_grad()
def fisher_axes(
    head: OutputHead,
    states: Tensor,
    *,
    cap: float = CAP,
    context: bool = False,
    ridge: float = 1.0,
) -> Axes:
    """Find the axes of the output Fisher on some text, and scales that make latent drift the Fisher form.

    With F = Q diag(F_i) Q^T and a move d of loc, the drift in the new axes is
    `sum log(1 + (q_i . d)^2 F_i / 2) = 1/2 d^T F d` to second order. With `context`, the scale of each axis
    follows the context: log(2 F_i(h)) is regressed on h, since abduction's log scale is linear in h.

    Args:
        head: the output head.
        states: z at n tokens of general text, shape (n, H).
        cap: largest ratio of two scales.
        context: let scales depend on the hidden state.
        ridge: of the regression, in units of the mean variance of the hidden state.

    Returns:
        The axes.
    """
    fisher = output_fisher(head, states)
    values, basis = torch.linalg.eigh(fisher.double())
    values, basis = values.clamp(min=values.max() / cap**2).float(), basis.float()
    scale = (2 * values).rsqrt()
    if not context:
        return Axes(basis, scale, None)
    rotated = head.weight.float() @ basis
    squares = rotated.square()
    logs = []
    for part in states.split(chunk_rows(head.weight)):
        logits = head.logits(part)
        prob, slope = logits.softmax(-1), head.slope(logits)
        sloped = prob if slope is None else prob * slope
        own = (prob if slope is None else sloped * slope) @ squares - (sloped @ rotated).square()
        logs.append(own.clamp(min=values.max() * 1e-12).log())
    target = torch.cat(logs)
    z = states.double()
    centred, wanted = z - z.mean(0), (target - target.mean(0)).double()
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    slope = torch.linalg.solve(gram, centred.T @ wanted).T.float()  # (H, H): change of log F_i with h
    # log scale(h) = log scale - (slope . (h - mean)) / 2, and the mean of F_i(h) is F_i.
    fitted = centred.float() @ slope.T
    offset = torch.logsumexp(fitted, 0) - torch.log(torch.tensor(float(len(z))))
    level = scale.log() + offset / 2 + (slope @ z.mean(0).float()) / 2
    return Axes(basis, level.exp(), -slope / 2)


@torch.no_grad()
def align_latent(model: CausalQwenForCausalLM, axes: Axes, factor: float = 1.0) -> CausalQwenForCausalLM:
    """Give a model the latent of these axes; its logits stay equal up to rounding.

    `loc = Q^T z`, `W' = W Q`, scales `factor` times those of the axes. The output head is then a matrix of
    its own, V x H more parameters where it was tied.

    Args:
        model: a model with the identity abduction of `from_backbone`, not fused.
        axes: from `fisher_axes`.
        factor: s: latent drift is 1/s^2 of the Fisher form to second order; larger samples are more diverse.

    Returns:
        A new model that shares the backbone; deltas learnt on either fit only their own.

    Raises:
        ConfigError: a fused model, or one whose abduction is no identity any more.
    """
    head = model.abduction
    size = head.loc.in_features
    plain = torch.equal(head.loc.weight, torch.eye(size).to(head.loc.weight)) and not bool(
        head.loc.bias.any()
    )
    if model.fusion is not None or not plain or bool(head.log_scale.weight.any()) or head.mlp is not None:
        raise ConfigError(
            "expected a model as from_backbone makes it (identity abduction, no deltas): align first, then learn"
        )
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config.preset = "aligned"
    with torch.device("meta"):
        aligned = CausalQwenForCausalLM(config)
    for name in ("backbone", "numeric"):
        setattr(aligned, name, getattr(model, name))
    for name in ("abduction", "action"):
        setattr(aligned, name, copy.deepcopy(getattr(model, name)))
    dtype = model.action.weight.dtype
    aligned.abduction.loc.weight.copy_(axes.basis.T)
    aligned.abduction.log_scale.bias.copy_((factor * axes.scale).log())
    if axes.slope is not None:
        aligned.abduction.log_scale.weight.copy_(axes.slope)
    rotated = (model.action.weight.float() @ axes.basis).to(dtype)
    aligned.action.weight = nn.Parameter(rotated, requires_grad=False)
    aligned.action.value_weight.copy_((model.action.value_weight.float() @ axes.basis).to(dtype))
    if config.noise_form == "fill":
        aligned.action.fill_noise(factor * axes.scale, config.class_noise)
    aligned.generation_config = copy.deepcopy(model.generation_config)
    aligned.name_or_path = config._name_or_path = ""
    aligned.eval()
    config.base_fingerprint = served_fingerprint(aligned)
    return aligned
