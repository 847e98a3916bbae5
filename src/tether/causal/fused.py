"""Fused deltas inside the model: hidden state -> deltas -> gates -> chart -> leash -> moved law of U."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.cauchy.charts import NATIVE, added_in, read_move
from tether.causal.gates import (
    GATES,
    GateStatistics,
    gate_density,
    gate_distance,
    gate_open,
    gate_softmax,
    window_mean,
)
from tether.causal.leash import check_leash
from tether.causal.summed import Sum
from tether.errors import ConfigError

__all__ = ["FusedLatent", "Fusion"]


class FusedLatent(NamedTuple):
    """What a fusion did to one batch of T positions, K of them kept.

    Attributes:
        loc: moved loc of U, shape (B, K, C).
        log_scale: moved log scale of U, shape (B, K, C).
        factor: share of the move that the leash left, shape (B, K), in [0, 1]; 1 where it did not bind.
        scores: loc_S of the moved law where the leash had to compute them and they are wanted, shape (B, K, V).
        gates: weight factor of each domain per context, shape (N, B, T), in [0, 1].
        gate_state: what the gates must remember for the next call, or None when ungated.
    """

    loc: Tensor
    log_scale: Tensor
    factor: Tensor
    scores: Tensor | None
    gates: Tensor
    gate_state: Tensor | None


class Fusion(nn.Module):
    """N deltas of the abduction head, added in one chart, each behind its gate if gated, all on one leash.

    A delta is linear in the hidden state in its own chart (`native`): it outputs the two coordinates of
    that chart. All deltas are converted per context to the chart in which they are added, so a single
    delta with weight 1 is reproduced whatever the chart (research: "three repaired fusions").

    Args:
        hidden_size: width H of the hidden state.
        latent_size: dimensions C of U.
        description: `CausalQwenConfig.fusion`: domains, native, weights, chart, gated, location_only,
            layers (middle layers that deltas read), leash (None, or its nats and metric), and for gated
            fusions gate_window, gate_rank, gate_stages and gate.

    Raises:
        ConfigError: the description names an unknown chart or leash, or its lists differ in length.
    """

    def __init__(self, hidden_size: int, latent_size: int, description: dict[str, Any]) -> None:
        super().__init__()
        self.description = description
        self.chart: str = added_in(description["chart"])
        self.domains: list[str] = list(description["domains"])
        self.native: list[str] = list(description["native"])
        weights = [float(weight) for weight in description["weights"]]
        if unknown := [chart for chart in (self.chart, *self.native) if chart not in NATIVE]:
            raise ConfigError(f"chart={unknown[0]!r}: expected one of {', '.join(NATIVE)}")
        if not len(self.domains) == len(self.native) == len(weights) > 0:
            raise ConfigError(
                f"{len(self.domains)} domains, {len(self.native)} charts, {len(weights)} weights: expected one "
                "of each for every delta, and at least one delta"
            )
        self.gated: bool = bool(description["gated"])
        self.location_only: bool = bool(description["location_only"])
        leash = description.get("leash")
        self.leash: tuple[float, str] | None = None
        if leash is not None:
            self.leash = float(leash["nats"]), str(leash["metric"])
            check_leash(*self.leash)
        count = len(weights)
        self.hidden_size = hidden_size
        self.layers: tuple[int, ...] = tuple(description.get("layers", ()))
        width = hidden_size * (1 + len(self.layers))
        # Plain numbers from the config: a buffer outside the checkpoint would be left unset on loading.
        self.weights = tuple(weights)
        self.second = nn.Parameter(torch.zeros(count, latent_size, width), requires_grad=False)
        if not self.location_only:
            self.first = nn.Parameter(torch.zeros(count, latent_size, width), requires_grad=False)
        self._statistics: tuple[Any, Any, GateStatistics] | None = None
        if self.gated:
            self.window: int = int(description["gate_window"])
            rank = int(description["gate_rank"])
            stages = int(description.get("gate_stages", 1))
            self.gate: str = description.get("gate", GATES[0])
            if self.gate not in GATES:
                raise ConfigError(f"gate={self.gate!r}: expected one of {', '.join(GATES)}")
            self.gate_center = nn.Parameter(torch.zeros(count, stages, hidden_size), requires_grad=False)
            self.gate_whitening = nn.Parameter(
                torch.zeros(count, stages, rank, hidden_size), requires_grad=False
            )
            self.gate_precision = nn.Parameter(torch.zeros(count, stages), requires_grad=False)
            self.gate_threshold = nn.Parameter(torch.zeros(count, self.window), requires_grad=False)

    @property
    def sum(self) -> Sum:
        """How the deltas are added, as the fusion is served."""
        return Sum(weights=self.weights, chart=self.chart, leash=self.leash)

    def deltas(self, hidden_states: Tensor, log_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Evaluate every delta alone, with weight 1 and its gate open.

        Args:
            hidden_states: z, shape (..., H), followed by the states of `layers`, shape (..., H (1 + L)), where
                deltas read them; see `tether.causal.features`.
            log_scale: base log scale of U there, shape (..., C); only read where a delta is of chart `matrix`.

        Returns:
            x and y, shape (N, ..., C) each, float32.
        """
        features = hidden_states.float()
        second = torch.einsum("nch,...h->n...c", self.second.float(), features)
        if self.location_only:
            first = torch.zeros_like(second)
        else:
            first = torch.einsum("nch,...h->n...c", self.first.float(), features)
        each = zip(first, second, self.native, strict=True)
        pairs = [read_move(a, b, native, log_scale) for a, b, native in each]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])

    def gates(
        self, hidden_states: Tensor, mask: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Decide per context which deltas act.

        Args:
            hidden_states: z, shape (B, T, H), alone or followed by the states of `layers`; gates read z.
            mask: which positions carry a token, shape (B, T), bool.
            state: returned by the call for the text before.

        Returns:
            Factors of the weights, shape (N, B, T), and the state for the next call (None when ungated).
        """
        if not self.gated:
            return hidden_states.new_ones(len(self.domains), *mask.shape, dtype=torch.float32), None
        distance, opened, count, state = self._distances(hidden_states, mask, state)
        if self.gate != "softmax":
            return opened, state
        return gate_softmax(self._density(distance, count), opened), state

    def gates_without_largest(self, hidden_states: Tensor, mask: Tensor) -> Tensor | None:
        """Give the gates that would act if the domain with the largest gate were taken out, in each context.

        Where another one leaves, the gates of the rest grow in proportion: nothing has to be computed for that.

        Args:
            hidden_states: z, shape (B, T, H), as of `gates`.
            mask: which positions carry a token, shape (B, T), bool.

        Returns:
            Factors of the weights, shape (N, B, T), 0 for the one that left; None where a gate does not depend on
            the others.
        """
        if not self.gated or self.gate != "softmax":
            return None
        distance, opened, count, _ = self._distances(hidden_states, mask, None)
        density = self._density(distance, count)
        largest = gate_softmax(density, opened).argmax(0, keepdim=True)
        return gate_softmax(density, opened.scatter(0, largest, 0.0))

    # Squared distances, which gates are open, shape (N, B, T) each; tokens in each window, shape (B, T); the state.
    def _distances(
        self, hidden_states: Tensor, mask: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        last = hidden_states[..., : self.hidden_size]
        mean, count, state = window_mean(last, mask, self.window, state)
        distance = gate_distance(mean, count, self.window, self.gate_statistics())
        return distance, gate_open(distance, count, self.gate_threshold.float()), count, state

    def _density(self, distance: Tensor, count: Tensor) -> Tensor:
        return gate_density(distance, count, self.window, self.gate_statistics())

    def gate_statistics(self) -> GateStatistics:
        """Give what the gates know, prepared once and again when a parameter has changed, moved or been replaced.

        Returns:
            The statistics of all domains, float32.
        """
        given = self.gate_center, self.gate_whitening, self.gate_precision
        # Inference tensors carry no version. The parameters are kept too: others could come to lie at their addresses.
        versions = [(each.data_ptr(), None if each.is_inference() else each._version) for each in given]
        known = self._statistics
        if (
            known is None
            or any(a is not b for a, b in zip(known[0], given, strict=True))
            or known[1] != versions
        ):
            known = given, versions, GateStatistics.of(*(each.float() for each in given))
            self._statistics = None if any(each.is_inference() for each in given) else known
        return known[2]

    def forward(
        self,
        hidden_states: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        mask: Tensor,
        state: Tensor | None = None,
        *,
        kept: slice = slice(None),
        head: tuple[Tensor, Tensor | None] | None = None,
        keep_scores: bool = False,
    ) -> FusedLatent:
        """Move the law of U.

        Args:
            hidden_states: z, shape (B, T, H), followed by the states of `layers` where deltas read them.
            loc: base loc of U, shape (B, T, C), float32.
            log_scale: base log scale of U, shape (B, T, C), float32.
            mask: which positions carry a token, shape (B, T), bool.
            state: gate state of the text before.
            kept: positions whose law is wanted; gates see all.
            head: weight and bias of the model's output head, for a leash in metric `softmax`.
            keep_scores: whether scores that the leash computes are wanted.

        Returns:
            The moved law at the kept positions. Where every gate is closed it is the base's bit for bit.
        """
        gates, state = self.gates(hidden_states, mask, state)
        base = loc[:, kept], log_scale[:, kept]
        x, y = self.deltas(hidden_states[:, kept], base[1])
        law = self.sum.law(*base, x, y, gates[:, :, kept], head, keep_scores=keep_scores)
        return FusedLatent(law.loc, law.log_scale, law.factor, law.scores, gates, state)
