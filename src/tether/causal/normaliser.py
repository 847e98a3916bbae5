"""log sum exp of all class scores, without holding tokens x vocabulary."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["log_normaliser"]


def log_normaliser(
    latent_loc: Float[Tensor, "tokens latent"],
    weight: Float[Tensor, "vocab latent"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    chunk: int = 8192,
) -> Float[Tensor, "tokens 1"]:
    """Compute log sum_k exp(weight_k . latent_loc + bias_k), differentiable; scores are recomputed backward.

    Args:
        latent_loc: loc of U, shape (N, C).
        weight: action weight, shape (V, C).
        bias: shape (V,), or None.
        chunk: classes held at a time, >= 1.

    Returns:
        The log normaliser of softmax(loc_S), shape (N, 1), float32.

    Example:
        >>> import torch
        >>> log_normaliser(torch.zeros(1, 2), torch.ones(4, 2))  # log 4
        tensor([[1.3863]])
    """

    def part(loc: Tensor, rows: Tensor, shift: Tensor | None) -> Tensor:
        scores = torch.nn.functional.linear(loc, rows, shift).float()
        # torch's logsumexp is several times slower than log_softmax on CPU (docs/log.md).
        return scores[:, 0] - torch.log_softmax(scores, dim=-1)[:, 0]

    shifts = [None] * -(-len(weight) // chunk) if bias is None else bias.split(chunk)
    loc = latent_loc.to(weight.dtype)
    parts = [
        checkpoint(part, loc, rows, shift, use_reentrant=False)
        if torch.is_grad_enabled()
        else part(loc, rows, shift)
        for rows, shift in zip(weight.split(chunk), shifts, strict=True)
    ]
    return torch.stack(parts).logsumexp(dim=0).unsqueeze(-1)
