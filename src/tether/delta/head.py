"""A delta while it is learnt, what the base infers where it acts, and how far it moves each token."""

from typing import NamedTuple

import torch
from torch import Tensor

from tether.cauchy.charts import NATIVE, read_move
from tether.cauchy.divergence import drift
from tether.causal.softmax import softmax_kl
from tether.delta.output_head import OutputHead
from tether.errors import ConfigError

__all__ = ["METRICS", "Head", "Reference", "ray_share", "token_drift"]

METRICS = {
    "softmax": "measured KL(base || tuned) of the served softmax",
    "fisher": "its second-order form in the base's output Fisher",
    "latent": "Cauchy drift of U, the metric of the theorems",
}


class Head(NamedTuple):
    """A delta while it is learnt.

    Attributes:
        first: head of the chart's first coordinate, shape (C, F), or None.
        second: head of the second coordinate, shape (C, F).
        chart: the chart.
    """

    first: Tensor | None
    second: Tensor
    chart: str

    def displacement(
        self, states: Tensor, share: Tensor | None = None, *, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Move of the law of U.

        Args:
            states: what the delta reads: z, or z and states of middle layers, shape (n, F).
            share: how far to go along the chart's ray in each context, shape (n,); None goes all the way.
            scale: base scale of U there, shape (n, C); only read in chart `matrix`.

        Returns:
            x and y, shape (n, C) each.

        Raises:
            ConfigError: unknown chart.
        """
        if self.chart not in NATIVE:
            raise ConfigError(f"chart={self.chart!r}: expected one of {', '.join(NATIVE)}")
        second = states @ self.second.T
        first = torch.zeros_like(second) if self.first is None else states @ self.first.T
        if share is not None:
            first, second = first * share.unsqueeze(-1), second * share.unsqueeze(-1)
        return read_move(first, second, self.chart, None if scale is None else scale.log())

    def scaled(self, factor: float) -> "Head":
        """Shrink or stretch along the ray through the base.

        Args:
            factor: applied to both heads.

        Returns:
            The scaled head.
        """
        first = None if self.first is None else self.first * factor
        return Head(first, self.second * factor, self.chart)


class Reference(NamedTuple):
    """Base quantities at some tokens.

    Attributes:
        states: what deltas read: z, or z and states of middle layers, shape (n, F), float32.
        loc: base loc of U, shape (n, C), float32.
        scale: base scale of U, shape (n, C), float32.
    """

    states: Tensor
    loc: Tensor
    scale: Tensor

    def some(self, count: int) -> "Reference":
        """Pick tokens spread evenly over the text, so that many documents take part.

        Args:
            count: how many at most.

        Returns:
            The selection.
        """
        index = torch.linspace(
            0, len(self.states) - 1, min(count, len(self.states)), dtype=torch.float64
        ).long()
        return Reference(*(values[index] for values in self))

    def moved(self, head: Head | None) -> tuple[Tensor, Tensor]:
        """Move the law of U.

        Args:
            head: a delta that acts everywhere, or None for the base.

        Returns:
            loc and scale of U, shape (n, C) each.
        """
        if head is None:
            return self.loc, self.scale
        x, y = head.displacement(self.states, scale=self.scale)
        return self.loc + self.scale * y, self.scale * x.exp()

    def join(self, other: "Reference") -> "Reference":
        """Put the tokens of two texts together.

        Args:
            other: the second text.

        Returns:
            All tokens.
        """
        return Reference(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


def token_drift(
    metric: str,
    head: Head,
    at: Reference,
    *,
    output: OutputHead | None = None,
    fisher: Tensor | None = None,
) -> Tensor:
    """Drift of each token in a metric.

    Args:
        metric: one of `METRICS`.
        head: the delta.
        at: base quantities at n tokens.
        output: the output head, for `softmax`: two products with it a token.
        fisher: output Fisher, shape (C, C), for `fisher`.

    Returns:
        Nats, shape (n,).

    Raises:
        ConfigError: unknown metric, or what it needs is missing.
    """
    x, y = head.displacement(at.states, scale=at.scale)
    if metric == "latent":
        return drift(x, y).sum(-1)
    move = at.scale * y
    if metric == "fisher" and fisher is not None:
        return 0.5 * ((move @ fisher) * move).sum(-1)
    if metric == "softmax" and output is not None:
        laws = (output.log_prob(loc) for loc in (at.loc, at.loc + move))
        return torch.cat([softmax_kl(*pair) for pair in zip(*laws, strict=True)])
    raise ConfigError(f"metric={metric!r}: expected one of {', '.join(METRICS)} with what it needs")


@torch.no_grad()
def ray_share(
    head: Head, at: Reference, metric: str, value: float, *, fisher: Tensor | None = None, rounds: int = 12
) -> Tensor:
    """Find how far each context may go along its ray before its drift reaches a limit.

    Drift grows at most like the square of the share, so `share * sqrt(value / drift)` comes down to the limit
    from above; the last round is taken with a margin of 2 %.

    Args:
        head: the delta.
        at: base quantities at n tokens.
        metric: `latent` or `fisher`.
        value: the limit, nats, > 0.
        fisher: output Fisher, shape (C, C), for `fisher`.
        rounds: how often to step.

    Returns:
        Shares, shape (n,), in (0, 1]; 1 where the whole delta is within the limit.
    """
    share = torch.ones(len(at.states), device=at.states.device)
    for _ in range(rounds):
        x, y = head.displacement(at.states, share, scale=at.scale)
        move = at.scale * y
        found = (
            drift(x, y).sum(-1)
            if metric == "latent" or fisher is None
            else 0.5 * ((move @ fisher) * move).sum(-1)
        )
        share = torch.where(found > value, share * (0.98 * value / found.clamp(min=1e-30)).sqrt(), share)
    return share
