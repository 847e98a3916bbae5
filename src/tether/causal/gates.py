"""One-class gates: whether the last few tokens look like a delta's own domain.

A gate reads the causal mean of the hidden state over a short window, projects it on the domain's
leading principal directions and compares the whitened squared distance with the domain's own quantile.
It knows nothing of other domains or of base text, so it defaults to "off" on whatever is unfamiliar.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["gate_distance", "gate_open", "window_mean"]


def window_mean(
    hidden_states: Float[Tensor, "batch time hidden"],
    mask: Bool[Tensor, "batch time"],
    window: int,
    state: Float[Tensor, "batch past extended"] | None = None,
) -> tuple[
    Float[Tensor, "batch time hidden"], Float[Tensor, "batch time"], Float[Tensor, "batch past2 extended"]
]:
    """Average the hidden state over the last `window` positions that carry a token.

    Costs O(window * T * H), with no running sum, so the result at a position does not depend on how the
    text was cut into calls.

    Args:
        hidden_states: z, shape (B, T, H).
        mask: which positions carry a token, shape (B, T).
        window: number of positions to average, >= 1.
        state: what the previous call returned for the text before, shape (B, window - 1, H + 1).

    Returns:
        The means, shape (B, T, H), float32 (0 where no token was seen); how many tokens each mean holds,
        shape (B, T), in [0, window]; and the state for the next call, shape (B, window - 1, H + 1).
    """
    kept = mask.unsqueeze(-1).float()
    extended = torch.cat([hidden_states.float() * kept, kept], dim=-1)
    if state is None:
        state = extended.new_zeros(extended.shape[0], window - 1, extended.shape[-1])
    padded = torch.cat([state.to(extended), extended], dim=1)
    sums = torch.nn.functional.avg_pool1d(padded.transpose(1, 2), window, stride=1).transpose(1, 2) * window
    count = sums[..., -1].round()
    mean = sums[..., :-1] / count.clamp(min=1).unsqueeze(-1)
    return mean, count, padded[:, padded.shape[1] - (window - 1) :]


def gate_distance(
    mean_state: Float[Tensor, "*batch hidden"],
    center: Float[Tensor, "domains hidden"],
    whitening: Float[Tensor, "domains rank hidden"],
) -> Float[Tensor, "domains *batch"]:
    """Whitened squared distance of a mean state from each domain's center.

    Args:
        mean_state: causal means, shape (..., H).
        center: mean of the domain's own window means, shape (N, H).
        whitening: principal directions divided by their standard deviations, shape (N, P, H).

    Returns:
        Squared Mahalanobis distances within the P directions, shape (N, ...).
    """
    projected = torch.einsum("nph,...h->n...p", whitening, mean_state)
    shift = torch.einsum("nph,nh->np", whitening, center)
    return (projected - shift.reshape(len(shift), *[1] * (mean_state.dim() - 1), -1)).square().sum(-1)


def gate_open(
    distance: Float[Tensor, "domains *batch"],
    count: Float[Tensor, "*batch"],
    threshold: Float[Tensor, "domains window"],
) -> Float[Tensor, "domains *batch"]:
    """Decide per context whether each domain's delta acts.

    Args:
        distance: squared distances, shape (N, ...).
        count: tokens in each window mean, shape (...), in [0, window].
        threshold: largest accepted distance for each count of tokens, shape (N, window); the mean of few
            tokens scatters more, so each count has its own.

    Returns:
        1.0 where open, 0.0 where closed (and wherever no token was seen), shape (N, ...).
    """
    index = (count.long() - 1).clamp(min=0)
    limit = threshold[:, index]
    return ((distance <= limit) & (count > 0)).float()
