"""Tokens of cached texts with what a router over deltas reads at each."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.gates import window_mean
from tether.causal.routed import RoutedFusion, router_features
from tether.delta.cache import BATCH, StateCache
from tether.delta.head import Reference
from tether.delta.source import reference, spread

__all__ = ["Tokens", "token_features"]


class Tokens(NamedTuple):
    """Some tokens of a text, ready for a router.

    Attributes:
        features: what the router reads, shape (n, 2 H).
        at: states that deltas read, with the base's law, shape (n, ...).
        targets: next tokens, shape (n,).
        opened: the deltas' own gates, shape (N, n); ones where they do not act.
    """

    features: Tensor
    at: Reference
    targets: Tensor
    opened: Tensor

    def take(self, rows: Tensor) -> "Tokens":
        """Pick tokens.

        Args:
            rows: which, shape (m,).

        Returns:
            Them.
        """
        return Tokens(
            self.features[rows],
            Reference(*(values[rows] for values in self.at)),
            self.targets[rows],
            self.opened[:, rows],
        )


@torch.no_grad()
def token_features(model: Any, fusion: RoutedFusion, cache: StateCache, count: int) -> Tokens:
    """Prepare tokens spread evenly over a text.

    Args:
        model: the base.
        fusion: the deltas.
        cache: states of the text.
        count: tokens at most.

    Returns:
        Tokens that have a next one, on the model's device.
    """
    windows, device = cache.windows, model.action.weight.device
    scored = (windows.targets >= 0).nonzero().squeeze(1)
    rows = scored[spread(len(scored), count)]
    wanted = torch.zeros(len(windows.targets), dtype=torch.bool)
    wanted[rows] = True
    found: dict[str, list[Tensor]] = {"features": [], "opened": [], "rows": []}
    for batch in windows.batches(BATCH):
        where = windows.positions(batch)
        kept = wanted[where]
        if not bool(kept.any()):
            continue
        states = torch.zeros(*batch.mask.shape, cache.states.shape[1])
        states[batch.mask] = cache.states[where].float()
        states, mask = states.to(device), batch.mask.to(device)
        last = states[..., : fusion.hidden_size]
        mean = window_mean(last, mask, fusion.window)[0]
        features = router_features(last[mask][kept], mean[mask][kept])
        if fusion.own_gates:
            opened = super(RoutedFusion, fusion).gates(states, mask)[0][:, mask][:, kept]
        else:
            opened = features.new_ones(len(fusion.domains), len(features))
        for name, value in (("features", features), ("opened", opened.T), ("rows", where[kept])):
            found[name].append(value)
    features, opened, index = (torch.cat(found[name]) for name in ("features", "opened", "rows"))
    at = reference(model, cache.states[index].float())
    return Tokens(features, at, windows.targets[index].to(device), opened.T.contiguous())
