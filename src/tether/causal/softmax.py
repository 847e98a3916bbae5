"""How far one law over the vocabulary is from another: the one place where this divergence is computed."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["softmax_kl"]

FAR = 60.0
"""Log ratio beyond which e^s is not formed: from 88 on it overflows in single precision."""


def softmax_kl(
    log_p: Float[Tensor, "*batch vocab"], log_q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    r"""Compute KL(p || q) of laws over the vocabulary, from their log probabilities.

    .. math:: D(p \| q) = \sum_v p_v \, (e^{s_v} - 1 - s_v), \qquad s_v = \log q_v - \log p_v

    This is the sum of p (log p - log q), since both laws add up to 1. No term of it is negative, so nothing cancels,
    and the rounding of a normaliser, which shifts all of log p or of log q, enters by its square: in float32 the plain
    sum is off by about 1e-6 nats whatever the laws, this one by about 1e-6 of the mean size of s.

    Args:
        log_p: log probabilities, adding up to 1 up to rounding, shape (..., V); -inf for a class that is impossible.
        log_q: likewise.

    Returns:
        Nats, >= 0, shape (...), exactly 0 where the laws are equal, inf where q excludes a class that p has.
        Differentiable in both.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> softmax_kl(p, q)  # log(4/3) / 2
        tensor(0.1438)
    """
    ratio = log_q - log_p
    with torch.no_grad():
        # Two reductions: aminmax takes five times as long on CPU. What is not a number, as for a class that is
        # impossible under both, counts as far.
        far = ~((ratio.amax(-1) <= FAR) & (ratio.amin(-1) > -torch.inf))
    if not bool(far.any()):
        return (log_p.exp() * (ratio.expm1() - ratio)).sum(-1)
    found = ratio.new_empty(far.shape)
    # These laws differ by so much that nothing small is left to keep: the plain sum, over the classes of p.
    p, q = log_p[far].double(), log_q[far].double()
    plain = torch.where(p == -torch.inf, 0, p.exp() * (p - q)).sum(-1)
    found[far] = plain.clamp(min=0).to(found)
    if not bool(far.all()):
        found[~far] = softmax_kl(log_p[~far], log_q[~far])
    return found
