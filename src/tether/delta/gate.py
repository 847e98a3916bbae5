"""Fit a one-class gate to a domain's own cached states: no base text, no other domain."""

from typing import NamedTuple

import torch
from torch import Tensor

from tether.causal.gates import gate_distance, window_mean
from tether.delta.cache import BATCH, StateCache
from tether.errors import ConfigError

__all__ = ["Gate", "fit_gate"]

WINDOW = 32
RANK = 64
QUANTILE = 0.95
CLOSED = -1.0
"""A threshold that no squared distance is under."""
EARLY = 8
"""Tokens of a text before a gate may open: means of fewer are alike in all domains (docs/log.md)."""


class Gate(NamedTuple):
    """What a gate consists of; see `tether.causal.gates`.

    Attributes:
        center: mean of the domain's window means, shape (H,).
        whitening: principal directions over their standard deviations, shape (P, H).
        threshold: largest accepted squared distance for each count of tokens, shape (window,).
    """

    center: Tensor
    whitening: Tensor
    threshold: Tensor


def fit_gate(
    cache: StateCache,
    *,
    window: int = WINDOW,
    rank: int = RANK,
    quantile: float = QUANTILE,
    early: int = EARLY,
) -> Gate:
    """Learn what a domain's windows look like.

    Center and directions come from three quarters of the documents; the accepted distance is the given
    quantile on the last quarter, so that it is not flattered by the fit. A mean of few tokens scatters
    more than a full window, so each count (in octaves) has its own threshold.

    Args:
        cache: states of the domain's text.
        window: tokens averaged, >= 1.
        rank: principal directions kept, clipped to what the text supports.
        quantile: share of the domain's own contexts to accept, in (0, 1).
        early: tokens of a text before the gate may open, clipped to the window.

    Returns:
        The gate, float32.

    Raises:
        ConfigError: fewer than 4 documents or windows, or a quantile outside (0, 1).
    """
    if not 0 < quantile < 1:
        raise ConfigError(f"quantile={quantile}: expected a share between 0 and 1")
    windows = cache.windows
    first = windows.starts[:-1]
    groups = windows.documents[first]
    if len(torch.unique(groups)) < 4:
        # A text in one document still has windows; they then play the documents' part.
        groups = torch.arange(len(first))
    if len(groups) < 4:
        raise ConfigError(
            f"{len(groups)} windows: a gate needs at least 4 windows of domain text; give more text or no gate"
        )
    held_out = groups % 4 == 3
    means, counts, rows = [], [], []
    for batch in windows.batches(BATCH):
        states = torch.zeros(*batch.mask.shape, cache.states.shape[1])
        states[batch.mask] = cache.states[windows.positions(batch)].float()
        mean, count, _ = window_mean(states, batch.mask, window)
        means.append(mean[batch.mask])
        counts.append(count[batch.mask].long())
        rows.append(batch.rows.unsqueeze(-1).expand_as(batch.mask)[batch.mask])
    mean, count, row = torch.cat(means), torch.cat(counts), torch.cat(rows)
    fitted = mean[~held_out[row] & (count == count.max())].double()
    center = fitted.mean(0)
    variance, direction = torch.linalg.eigh(torch.cov((fitted - center).T))
    kept = min(rank, len(fitted) - 1, len(variance))
    variance, direction = variance[-kept:].clamp(min=1e-12), direction[:, -kept:]
    whitening = (direction / variance.sqrt()).T.float()
    center = center.float()
    distance = gate_distance(mean, center.unsqueeze(0), whitening.unsqueeze(0))[0]
    threshold = torch.full((window,), CLOSED)
    low = min(early, window)
    while low <= window:
        high = min(2 * low - 1, window) if 2 * low <= window else window
        own = distance[held_out[row] & (count >= low) & (count <= high)]
        if len(own):
            threshold[low - 1 : high] = own.quantile(quantile)
        low = high + 1
    return Gate(center, whitening, threshold)
