"""A sum of deltas: moves -> weights times gates -> chart -> leash -> the law of U that is served, and measured."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tether.cauchy.charts import added_in, fuse
from tether.causal.leash import leash_law
from tether.causal.score_leash import leash_scores, location_path
from tether.errors import ConfigError
from tether.theory.bounds import fused_drift_bound

__all__ = ["Served", "Sum", "bound_chart"]


class Served(NamedTuple):
    """The law that a sum of deltas serves in some contexts.

    Attributes:
        loc: loc of U, shape (..., C).
        log_scale: log scale of U, shape (..., C).
        x: change of log scale that the leash left, shape (..., C).
        y: change of loc that the leash left, in units of the base scale, shape (..., C).
        factor: share of the move that the leash left, shape (...), in [0, 1]; 1 where it did not bind.
        scores: scores of all classes that hold to the leash, where it had to compute them and they are wanted, shape
            (..., V); None where the scores of `loc` are served.
    """

    loc: Tensor
    log_scale: Tensor
    x: Tensor
    y: Tensor
    factor: Tensor
    scores: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """One way to add N deltas. The model serves, and whatever measures or certifies it measures, `law`.

    Attributes:
        weights: one weight a delta.
        chart: the chart they are added in.
        leash: largest drift of a context, nats, and its metric; None for no leash. See `tether.causal.leash`.
    """

    weights: tuple[float, ...]
    chart: str
    leash: tuple[float, str] | None = None

    def shares(self, gates: Float[Tensor, "deltas *batch"]) -> Float[Tensor, "deltas *batch"]:
        """Multiply weights with gates.

        Args:
            gates: factors in [0, 1], shape (N, ...).

        Returns:
            How much of each delta is added in each context, shape (N, ...).
        """
        weights = torch.tensor(self.weights, dtype=gates.dtype, device=gates.device)
        return weights.reshape(-1, *[1] * (gates.dim() - 1)) * gates

    def add(
        self,
        x: Float[Tensor, "deltas *batch latent"],
        y: Float[Tensor, "deltas *batch latent"],
        gates: Float[Tensor, "deltas *batch"],
    ) -> tuple[Float[Tensor, "*batch latent"], Float[Tensor, "*batch latent"]]:
        """Add the moves of the deltas in the chart, with weights times gates.

        Args:
            x: changes of log scale, shape (N, ..., C).
            y: changes of loc in units of the base scale, shape (N, ..., C).
            gates: factors in [0, 1], shape (N, ...).

        Returns:
            The fused x and y, shape (..., C) each.
        """
        return fuse(x, y, self.shares(gates.to(x.dtype)), chart=self.chart)

    def law(
        self,
        loc: Float[Tensor, "*batch latent"],
        log_scale: Float[Tensor, "*batch latent"],
        x: Float[Tensor, "deltas *batch latent"],
        y: Float[Tensor, "deltas *batch latent"],
        gates: Float[Tensor, "deltas *batch"],
        head: tuple[Tensor, Tensor | None] | None = None,
        *,
        base_scores: Tensor | None = None,
        keep_scores: bool = False,
    ) -> Served:
        """Move a base law by the deltas, no further than the leash allows.

        Args:
            loc: base loc of U, shape (..., C), float32.
            log_scale: base log scale of U, shape (..., C), float32.
            x: each delta's change of log scale, shape (N, ..., C).
            y: each delta's change of loc in units of the base scale, shape (N, ..., C).
            gates: factors in [0, 1], shape (N, ...).
            head: weight and bias of the model's output head; only used for a leash in `softmax`.
            base_scores: scores of the base's `loc` where they are at hand, shape (..., V); see `leash_scores`.
            keep_scores: whether scores that the leash computes are wanted.

        Returns:
            The law that is served.

        Raises:
            ConfigError: a leash in metric `softmax` without the head.
        """
        x, y = self.add(x, y, gates)
        scale = log_scale.exp()
        if self.leash is None:
            factor = loc.new_ones(loc.shape[:-1])
            return Served(loc + scale * y, log_scale + x, x, y, factor, None)
        nats, metric = self.leash
        if metric == "latent":
            law = leash_law(loc, log_scale, x, y, nats, self.chart)
            pulled = (law.factor < 1).unsqueeze(-1)
            # What is left of a move that was pulled is read off the law as it is stored, where it was checked.
            x = torch.where(pulled, law.log_scale - log_scale, x)
            y = torch.where(pulled, (law.loc - loc) / scale, y)
            return Served(law.loc, law.log_scale, x, y, law.factor, None)
        if head is None:
            raise ConfigError("a leash in metric 'softmax' without head: expected the model's output head")
        moved, moved_log_scale = loc + scale * y, log_scale + x
        with torch.no_grad():
            factor, scores = leash_scores(head, loc, moved, nats, keep=keep_scores, base_scores=base_scores)
        pulled = (factor < 1).unsqueeze(-1)
        if bool(pulled.any()):
            near_x, near_y = location_path(x, y, factor)
            x, y = torch.where(pulled, near_x, x), torch.where(pulled, near_y, y)
            moved = torch.where(pulled, loc + scale * y, moved)
            moved_log_scale = torch.where(pulled, log_scale + x, moved_log_scale)
        return Served(moved, moved_log_scale, x, y, factor, scores)

    def bound(
        self,
        alone: Float[Tensor, "deltas *batch"],
        gates: Float[Tensor, "deltas *batch"],
        *,
        location_only: bool = False,
    ) -> Float[Tensor, "*batch"]:
        """Bound the latent drift of what is served before it is computed.

        Args:
            alone: latent drift of each delta alone, at weight 1, nats, shape (N, ...).
            gates: factors in [0, 1], shape (N, ...).
            location_only: whether no delta changes the scale of U.

        Returns:
            Nats, shape (...), float64.
        """
        allowed = fused_drift_bound(alone, self.shares(gates), bound_chart(self.chart, location_only))
        if self.leash is not None and self.leash[1] == "latent":
            allowed = allowed.clamp(max=self.leash[0])
        return allowed


def bound_chart(chart: str, location_only: bool) -> str:
    """Name the chart whose bound a sum is held to.

    Args:
        chart: the chart in which deltas are added, or `matrix`, whose moves are added in `linear`.
        location_only: whether no delta changes the scale of U.

    Returns:
        The chart, but `symmetric` for `linear` without a change of scale: both then add the same numbers, and the
        constant of the linear chart is not needed.
    """
    chart = added_in(chart)
    return "symmetric" if location_only and chart == "linear" else chart
