"""Fused deltas inside the model: hidden state -> deltas -> gates -> chart -> moved law of U."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.cauchy.charts import CHARTS, from_chart, fuse
from tether.causal.gates import gate_distance, gate_open, window_mean
from tether.errors import ConfigError

__all__ = ["FusedLatent", "Fusion"]


class FusedLatent(NamedTuple):
    """What a fusion did to one batch.

    Attributes:
        loc: moved loc of U, shape (..., C).
        log_scale: moved log scale of U, shape (..., C).
        x: fused change of log scale, shape (..., C).
        y: fused change of loc in units of the base scale, shape (..., C).
        gates: weight factor of each domain per context, shape (N, ...), in [0, 1].
        gate_state: what the gates must remember for the next call, or None when ungated.
    """

    loc: Tensor
    log_scale: Tensor
    x: Tensor
    y: Tensor
    gates: Tensor
    gate_state: Tensor | None


class Fusion(nn.Module):
    """N deltas of the abduction head, added in one chart, each behind its gate if gated.

    A delta is linear in the hidden state in its own chart (`native`): it outputs the two coordinates of
    that chart. All deltas are converted per context to the chart in which they are added, so a single
    delta with weight 1 is reproduced whatever the chart (research: "three repaired fusions").

    Args:
        hidden_size: width H of the hidden state.
        latent_size: dimensions C of U.
        description: `CausalQwenConfig.fusion`: domains, native, weights, chart, gated, location_only,
            and for gated fusions gate_window and gate_rank.

    Raises:
        ConfigError: the description names an unknown chart or its lists differ in length.
    """

    def __init__(self, hidden_size: int, latent_size: int, description: dict[str, Any]) -> None:
        super().__init__()
        self.description = description
        self.chart: str = description["chart"]
        self.domains: list[str] = list(description["domains"])
        self.native: list[str] = list(description["native"])
        weights = [float(weight) for weight in description["weights"]]
        for chart in [self.chart, *self.native]:
            if chart not in CHARTS:
                raise ConfigError(f"chart={chart!r}: expected one of {', '.join(CHARTS)}")
        if not len(self.domains) == len(self.native) == len(weights) > 0:
            raise ConfigError(
                f"{len(self.domains)} domains, {len(self.native)} charts, {len(weights)} weights: expected one "
                "of each for every delta, and at least one delta"
            )
        self.gated: bool = bool(description["gated"])
        self.location_only: bool = bool(description["location_only"])
        count = len(weights)
        # Plain numbers from the config: a buffer outside the checkpoint would be left unset on loading.
        self.weights = tuple(weights)
        self.second = nn.Parameter(torch.zeros(count, latent_size, hidden_size), requires_grad=False)
        if not self.location_only:
            self.first = nn.Parameter(torch.zeros(count, latent_size, hidden_size), requires_grad=False)
        if self.gated:
            self.window: int = int(description["gate_window"])
            rank = int(description["gate_rank"])
            self.gate_center = nn.Parameter(torch.zeros(count, hidden_size), requires_grad=False)
            self.gate_whitening = nn.Parameter(torch.zeros(count, rank, hidden_size), requires_grad=False)
            self.gate_threshold = nn.Parameter(torch.zeros(count, self.window), requires_grad=False)

    def deltas(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate every delta alone, with weight 1 and its gate open.

        Args:
            hidden_states: z, shape (..., H).

        Returns:
            x and y, shape (N, ..., C) each, float32.
        """
        features = hidden_states.float()
        second = torch.einsum("nch,...h->n...c", self.second.float(), features)
        if self.location_only:
            first = torch.zeros_like(second)
        else:
            first = torch.einsum("nch,...h->n...c", self.first.float(), features)
        pairs = [from_chart(a, b, chart) for a, b, chart in zip(first, second, self.native, strict=True)]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])

    def gates(
        self, hidden_states: Tensor, mask: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Decide per context which deltas act.

        Args:
            hidden_states: z, shape (B, T, H).
            mask: which positions carry a token, shape (B, T), bool.
            state: returned by the call for the text before.

        Returns:
            Factors of the weights, shape (N, B, T), and the state for the next call (None when ungated).
        """
        if not self.gated:
            return hidden_states.new_ones(len(self.domains), *mask.shape, dtype=torch.float32), None
        mean, count, state = window_mean(hidden_states, mask, self.window, state)
        distance = gate_distance(mean, self.gate_center.float(), self.gate_whitening.float())
        return gate_open(distance, count, self.gate_threshold.float()), state

    def add(self, x: Tensor, y: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Add the deltas in the fusion's chart with weights times gates.

        Args:
            x: changes of log scale, shape (N, ..., C).
            y: changes of loc in units of the base scale, shape (N, ..., C).
            gates: factors in [0, 1], shape (N, ...).

        Returns:
            The fused x and y, shape (..., C) each.
        """
        weights = torch.tensor(self.weights, dtype=x.dtype, device=x.device)
        return fuse(x, y, weights.reshape(-1, *[1] * (gates.dim() - 1)) * gates.to(x.dtype), chart=self.chart)

    def forward(
        self, hidden_states: Tensor, loc: Tensor, log_scale: Tensor, mask: Tensor, state: Tensor | None = None
    ) -> FusedLatent:
        """Move the law of U.

        Args:
            hidden_states: z, shape (B, T, H).
            loc: base loc of U, shape (B, T, C), float32.
            log_scale: base log scale of U, shape (B, T, C), float32.
            mask: which positions carry a token, shape (B, T), bool.
            state: gate state of the text before.

        Returns:
            The moved law with what moved it. Where every gate is closed the law is the base's bit for bit.
        """
        gates, state = self.gates(hidden_states, mask, state)
        x, y = self.add(*self.deltas(hidden_states), gates)
        return FusedLatent(loc + log_scale.exp() * y, log_scale + x, x, y, gates, state)
