"""One-class gates: whether the last few tokens look like a delta's own domain.

A gate reads the causal mean of the hidden state over a short window and compares its Mahalanobis distance
from the domain's own means with the domain's own quantile. The means of few tokens, at the start of a text,
scatter in their own way, so each stage of a window has statistics of its own. A gate knows nothing of other
domains or of base text, so it defaults to "off" on whatever is unfamiliar.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "GATES",
    "GateStatistics",
    "gate_density",
    "gate_distance",
    "gate_open",
    "gate_softmax",
    "gate_stage",
    "window_mean",
]

GATES = ("one-class", "softmax")
"""Each delta acts where its own gate is open; or open gates share the context by the density of each."""


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


def gate_stage(count: Float[Tensor, "*batch"], window: int, stages: int) -> Int[Tensor, "*batch"]:
    """Tell which statistics a window is measured by: those of 1, 2, 3-4, 5-8, ... tokens, or of a full window.

    Args:
        count: tokens in each window mean, in [0, window].
        window: tokens of a full window.
        stages: how many stages there are; with one, all counts share it.

    Returns:
        Stage of each context, in [0, stages - 1].

    Example:
        >>> gate_stage(torch.tensor([1.0, 2.0, 4.0, 5.0, 31.0, 32.0]), 32, 7)
        tensor([0, 1, 2, 3, 5, 6])
    """
    stage = torch.log2(count.clamp(min=1)).ceil().long()
    return torch.where(count >= window, stages - 1, stage.clamp(max=max(stages - 2, 0)))


class GateStatistics(NamedTuple):
    """What gates know of their domains, in the form in which every token asks for it; made by `of`.

    Attributes:
        center: mean of the domain's own means at each stage, shape (N, S, H).
        whitening: principal directions divided by their standard deviations, shape (N, S, P, H).
        precision: of the directions outside, shape (N, S).
        shift: the center along each principal direction, shape (N, S, P).
        share: what a principal direction counts once the rest of it is taken off, shape (N, S, P).
        square: squared length of the center, shape (N, S).
        log_det: log determinant of the covariance, shape (N, S).
    """

    center: Tensor
    whitening: Tensor
    precision: Tensor
    shift: Tensor
    share: Tensor
    square: Tensor
    log_det: Tensor

    @classmethod
    def of(
        cls,
        center: Float[Tensor, "domains stages hidden"],
        whitening: Float[Tensor, "domains stages rank hidden"],
        precision: Float[Tensor, "domains stages"],
    ) -> "GateStatistics":
        """Prepare the statistics of some domains.

        Args:
            center: mean of the domain's own means at each stage, shape (N, S, H).
            whitening: principal directions divided by their standard deviations, shape (N, S, P, H); zero rows
                measure nothing.
            precision: of the directions outside, shape (N, S), >= 0; with 0 they do not count.

        Returns:
            The statistics.
        """
        length = whitening.square().sum(-1)
        kept = length > 0
        # What a principal direction measures is taken off the rest.
        share = torch.where(kept, 1 - precision.unsqueeze(-1) / length.clamp(min=1e-30), 0.0)
        outside = whitening.shape[-1] - kept.sum(-1)
        log_det = -torch.where(kept, length, 1.0).log().sum(-1)
        log_det = log_det - outside * torch.where(precision > 0, precision, 1.0).log()
        shift = torch.einsum("nsph,nsh->nsp", whitening, center)
        return cls(center, whitening, precision, shift, share, center.square().sum(-1), log_det)

    def at(self, stage: int) -> "GateStatistics":
        """Take those of one stage.

        Args:
            stage: its number.

        Returns:
            The statistics, without the axis of stages.
        """
        return GateStatistics(*(values[:, stage] for values in self))


def gate_distance(
    mean_state: Float[Tensor, "*batch hidden"],
    count: Float[Tensor, "*batch"],
    window: int,
    statistics: GateStatistics,
) -> Float[Tensor, "domains *batch"]:
    """Squared distance of a mean state from each domain, by the statistics of the stage its window is in.

    Mahalanobis distance under a covariance with P principal directions and one variance, 1 / precision, in
    all others: `sum_p (w_p . d)^2 + precision (|d|^2 - sum_p (u_p . d)^2)`, u_p = w_p / |w_p|, d from the
    center.

    Args:
        mean_state: causal means, shape (..., H).
        count: tokens in each, shape (...), in [0, window].
        window: tokens of a full window.
        statistics: of N domains.

    Returns:
        Squared distances, shape (N, ...).

    Reference:
        Tipping and Bishop 1999, Probabilistic principal component analysis, eq. 5.
    """
    domains, stages = statistics.precision.shape
    flat, stage = mean_state.flatten(0, -2), gate_stage(count, window, stages).flatten()
    numbers = stage.unique().tolist() if len(stage) > 1 else stage.tolist()
    if len(numbers) == 1:
        found = _distance(flat, statistics.at(numbers[0]))
        return found.reshape(domains, *mean_state.shape[:-1])
    found = flat.new_zeros(domains, len(flat))
    for number in numbers:
        rows = stage == number
        found[:, rows] = _distance(flat[rows], statistics.at(number))
    return found.reshape(domains, *mean_state.shape[:-1])


def _distance(mean: Tensor, at: GateStatistics) -> Tensor:
    projected = (torch.einsum("nph,th->ntp", at.whitening, mean) - at.shift.unsqueeze(1)).square()
    inside = (projected @ at.share.unsqueeze(-1)).squeeze(-1)
    whole = mean.square().sum(-1) - 2 * at.center @ mean.T + at.square.unsqueeze(-1)
    total: Tensor = inside + at.precision.unsqueeze(-1) * whole.clamp(min=0)
    return total


def gate_density(
    distance: Float[Tensor, "domains *batch"],
    count: Float[Tensor, "*batch"],
    window: int,
    statistics: GateStatistics,
) -> Float[Tensor, "domains *batch"]:
    """Log density that each domain gives to a context, up to a constant: the gates' own statistics are Gaussians.

    Args:
        distance: squared distances, shape (N, ...).
        count: tokens in each window mean, shape (...).
        window: tokens of a full window.
        statistics: of N domains.

    Returns:
        `-(distance + log det) / 2`, shape (N, ...).
    """
    stage = gate_stage(count, window, statistics.log_det.shape[1])
    return -(distance + statistics.log_det[:, stage]) / 2


def gate_softmax(
    density: Float[Tensor, "domains *batch"], opened: Float[Tensor, "domains *batch"]
) -> Float[Tensor, "domains *batch"]:
    """Share a context among the domains whose gates are open: their posterior at equal prior.

    Nothing has to be trained, and a domain can be added or removed.

    Args:
        density: from `gate_density`, shape (N, ...).
        opened: one-class gates, 0 or 1, shape (N, ...).

    Returns:
        Shares, shape (N, ...): 0 where closed, and adding up to 1 where any gate is open.
    """
    score = density.masked_fill(opened == 0, -torch.inf)
    # Where every gate is closed there is nothing to share, and the softmax is no number.
    return torch.where(opened.sum(0) > 0, torch.softmax(score, dim=0), 0.0)


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
