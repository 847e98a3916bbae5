"""Who may speak: the experts of a fusion by evidence as cells of the number that decides between them."""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import linear

from tether.causal.experts import Experts
from tether.causal.losses import IGNORE
from tether.causal.observation import Observation
from tether.errors import ConfigError, ShapeError

__all__ = ["Speakers"]

SHORTEST = 2.0**-50
"""Cells that are no longer are left out: experts with less weight do not speak."""
CLEAR = 1e-4
"""Distance that the number keeps from the ends of its cell (a quarter of a shorter one): weights differ by rounding
between a text read at once and token by token, and the same expert must speak in both."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Speakers:
    """Who may speak in the rows of N chains, as cells of the number that decides.

    Attributes:
        loc: of U under each expert, shape (R, K, C); anything finite where it sleeps.
        scale: likewise, > 0.
        expert: who speaks in each row in each of L cells, shape (R, L).
        low: lower ends of the cells, shape (N, L), in [0, 1].
        high: upper ends.
    """

    loc: Tensor
    scale: Tensor
    expert: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, loc: Tensor, scale: Tensor, log_weights: Tensor, chains: int) -> "Speakers":
        """Cut the interval where the served rule, `Experts.speaker`, passes from one expert to another.

        Args:
            loc: shape (R, K, C).
            scale: shape (R, K, C), > 0.
            log_weights: with which they are served, shape (R, K), -inf where asleep.
            chains: N; row r belongs to chain ``r * N // R``.

        Returns:
            The speakers.

        Raises:
            ConfigError: weights that do not add up to 1, or laws that are not finite.
            ShapeError: shapes that do not fit together.
        """
        if loc.ndim != 3 or scale.shape != loc.shape or log_weights.shape != loc.shape[:2]:
            raise ShapeError(
                f"loc {tuple(loc.shape)}, scale {tuple(scale.shape)}, log_weights {tuple(log_weights.shape)}: expected "
                "(R, K, C) twice and (R, K), K experts at R positions"
            )
        loc, scale, log_weights = loc.detach(), scale.detach(), log_weights.detach().double()
        if not bool((log_weights.logsumexp(-1).abs() < 1e-6).all()):
            raise ConfigError("log_weights: expected weights that add up to 1 at each position, base first")
        if not bool((loc.isfinite() & scale.isfinite() & (scale > 0)).all()):
            raise ConfigError("laws of experts with nan, infinity or a scale of 0: put such experts to sleep")
        rows, count = log_weights.shape
        number = torch.arange(rows * count, device=loc.device)
        entry = number.view(rows, count).masked_fill(log_weights == -torch.inf, -1)
        laws = loc.flatten(0, 1), scale.flatten(0, 1).log()
        rule = Experts(
            row=number // count, expert=number % count, loc=laws[0], log_scale=laws[1], entry=entry
        )
        edges = log_weights.exp().cumsum(-1).clamp(max=1).reshape(chains, -1).sort(-1).values
        ends = torch.cat([torch.zeros_like(edges[:, :1]), edges, torch.ones_like(edges[:, :1])], dim=-1)
        low, high = ends[:, :-1], ends[:, 1:]
        used = (high - low > SHORTEST).any(0)
        low, high = low[:, used], high[:, used]
        middle = ((low + high) / 2).repeat_interleave(rows // chains, 0)
        spoken = [rule.speaker(log_weights, each) % count for each in middle.unbind(-1)]
        return cls(loc=loc, scale=scale, expert=torch.stack(spoken, -1), low=low, high=high)

    @property
    def each(self) -> int:
        """Rows of a chain."""
        return len(self.expert) // len(self.low)

    @property
    def log_share(self) -> Tensor:
        """Log lengths of the cells, shape (N, L), -inf where there is none."""
        length = self.high - self.low
        return length.log().masked_fill(length <= SHORTEST, -torch.inf)

    def spoken(self, cell: Tensor) -> Tensor:
        """Tell who speaks.

        Args:
            cell: of each chain, shape (N,).

        Returns:
            The expert of each row, shape (R,).
        """
        return self.expert.gather(1, cell.repeat_interleave(self.each).unsqueeze(-1)).squeeze(-1)

    def order(self, given: Observation, rows: Tensor) -> Tensor:
        """Order the cells by length times the softmax's probability of the tokens that were observed.

        Args:
            given: what was observed.
            rows: which positions the rows are, shape (R,).

        Returns:
            Cells of each chain, the likeliest first, shape (N, L).
        """
        likely = torch.zeros(self.loc.shape[:2], dtype=torch.float64, device=self.loc.device)
        tokens = None if given.tokens is None else given.tokens[rows]
        if tokens is not None:
            head = given.head()
            bias = None if given.bias is None else given.bias.to(head.dtype)
            for expert in range(likely.shape[1]):
                law = linear(self.loc[:, expert].to(head.dtype), head, bias).log_softmax(-1)
                likely[:, expert] = law.gather(1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1).double()
            likely = likely.masked_fill((tokens == IGNORE).unsqueeze(-1), 0.0)
        said = likely.gather(1, self.expert).view(len(self.low), self.each, -1).sum(1)
        return (self.log_share + said).argsort(-1, descending=True)

    def inside(self, cell: Tensor, uniform: Tensor) -> Tensor:
        """Draw the number that decides who speaks.

        Args:
            cell: of each chain, shape (N,).
            uniform: in (0, 1), shape (N,).

        Returns:
            A number in the cell, clear of its ends, shape (N,), float64.
        """
        at = torch.arange(len(cell), device=cell.device), cell
        low, length = self.low[at], self.high[at] - self.low[at]
        clear = (length / 4).clamp(max=CLEAR)
        return low + clear + uniform * (length - 2 * clear)
