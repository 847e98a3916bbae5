"""Experts in some contexts: the base everywhere, each delta where it is awake, and the mixture of their laws.

An *entry* is one expert in one context. The first M entries are the base in each of the M contexts, the others
follow in any order, so that what sleeps takes no row in any product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tether.cauchy.functional import log_prob
from tether.cauchy.mixture import quantile

__all__ = ["Experts", "Scores"]

FEW = 8
"""Rows up to which a product with the output head is done with columns on the right."""
BELOW = 1e4
"""How far what everybody cuts off lies below what they keep."""
TINY = 1e-30
"""Probabilities below this are added up in logarithms."""
CLIP = 1.0
"""Nats by which one number can move the weight of an expert against the base's: no single value decides alone."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Experts:
    """The laws of U of all who are awake in M contexts.

    Attributes:
        row: context of each entry, shape (E,).
        expert: expert of each entry, 0 for the base, shape (E,).
        loc: loc of U, shape (E, C), float32.
        log_scale: log scale of U, shape (E, C), float32.
        entry: entry of each expert in each context, shape (M, K), -1 where it sleeps.
    """

    row: Tensor
    expert: Tensor
    loc: Tensor
    log_scale: Tensor
    entry: Tensor

    @property
    def awake(self) -> Tensor:
        """Who takes part, shape (M, K), bool."""
        return self.entry >= 0

    @property
    def alone(self) -> bool:
        """Whether the base alone takes part, in all of the contexts."""
        return len(self.row) == len(self.entry)

    def values(self, action: Any) -> tuple[Tensor, Tensor]:
        """Give the law of Y under each expert.

        Args:
            action: of the model.

        Returns:
            loc and scale of Y, shape (M, K) each; those of the base where an expert sleeps.
        """
        loc, scale = action.values(self.loc, self.log_scale.exp())
        at = torch.where(self.awake, self.entry, self.entry[:, :1])
        return loc[at], scale[at]

    def value_gain(self, action: Any, numbers: Tensor) -> Tensor:
        """Say by how much each expert expected a number better than the base did, as far as that counts.

        Args:
            action: of the model.
            numbers: the numbers that came, shape (M,).

        Returns:
            Differences of log densities of Y, clipped to +-`CLIP` nats, shape (M, K); 0 for the base.
        """
        loc, scale = self.values(action)
        found = log_prob(action.transform(numbers).unsqueeze(-1), loc, scale)
        return (found - found[:, :1]).clamp(-CLIP, CLIP).nan_to_num(0.0).double()

    def value_quantiles(self, action: Any, log_weights: Tensor, levels: tuple[float, ...]) -> list[Tensor]:
        """Give quantiles of Y under the mixture of the experts' Cauchy laws.

        Args:
            action: of the model.
            log_weights: shape (M, K), -inf where asleep.
            levels: each in (0, 1).

        Returns:
            One tensor of shape (M,) for each level, float32, in the units of Y.
        """
        loc, scale = self.values(action)
        if self.alone:
            loc, scale, log_weights = loc[:, :1], scale[:, :1], log_weights[:, :1]
        return [quantile(level, loc, scale, log_weights).float() for level in levels]

    def speaker(self, log_weights: Tensor, uniform: Tensor) -> Tensor:
        """Draw who speaks: the base first in the order, then domain by domain.

        Args:
            log_weights: shape (M, K), -inf where asleep.
            uniform: in (0, 1), shape (M,).

        Returns:
            The entry that speaks in each context, shape (M,).
        """
        below = log_weights.exp().cumsum(-1)
        # The last one awake takes what rounding leaves between its sum and 1.
        last = self.awake.shape[1] - 1 - self.awake.flip(-1).int().argmax(-1)
        drawn = (below <= uniform.unsqueeze(-1).to(below)).sum(-1)
        return self.entry.gather(1, torch.minimum(drawn, last).unsqueeze(-1)).squeeze(-1)

    def score(self, action: Any) -> "Scores":
        """Compute all scores: one product with the output head for everyone who is awake.

        Args:
            action: of the model.

        Returns:
            The scores.
        """
        rows, count = self.loc.to(action.weight.dtype), len(self.entry)
        if self.alone:
            return Scores(self, action.score_loc(self.loc), rows.new_zeros(0, 1))
        if len(rows) <= FEW and bool((self.awake.sum(-1) > 1).all()):
            # With columns on the right the weight is read once, with rows on the left once for each (docs/leash.md);
            # not where the base is alone in a context, since its scores are then its own to the last bit.
            scores = (action.weight @ rows.T).T
            scores = action.capped(scores if action.bias is None else scores + action.bias)
            found = Scores(self, scores[:count], scores[count:])
        else:
            found = Scores(self, action.score_loc(self.loc[:count]), action.score_loc(self.loc[count:]))
        if bool(found.broken.any()):
            return self.without(found.broken).score(action)
        return found

    def without(self, entries: Tensor) -> "Experts":
        """Put some entries to sleep.

        Args:
            entries: which, shape (E,), bool; not those of the base.

        Returns:
            The others.
        """
        kept = ~entries
        kept[: len(self.entry)] = True
        number = kept.cumsum(0) - 1
        found = torch.where(kept, number, -1)
        entry = torch.where(self.awake, found[self.entry.clamp(min=0)], -1)
        return Experts(
            row=self.row[kept], expert=self.expert[kept], loc=self.loc[kept], log_scale=self.log_scale[kept],
            entry=entry,
        )  # fmt: skip


class Scores:
    """Scores of all classes of everyone who is awake in some contexts, and the law that is served.

    Args:
        experts: M contexts with E entries.
        base: scores of the base, shape (M, V), in the dtype of the output head.
        moved: of the other entries, shape (E - M, V).

    Attributes:
        log_norm: logarithm of the softmax's normaliser of each entry, shape (E,); 0 for the base where it is alone.
        broken: entries other than the base's whose scores are not finite, shape (E,).
    """

    def __init__(self, experts: Experts, base: Tensor, moved: Tensor) -> None:
        self.experts, self.base, self.moved = experts, base, moved
        count = len(base)
        others = experts.row[count:]
        # Contexts where not the base alone is awake; elsewhere there is nothing to weigh.
        self.mixed = torch.zeros(count, dtype=torch.bool, device=base.device)
        self.log_norm = torch.zeros(len(experts.row), device=base.device)
        self.broken = torch.zeros(len(experts.row), dtype=torch.bool, device=base.device)
        if not experts.alone:
            self.mixed[others] = True
            self.parts = torch.cat([base[self.mixed], moved]).float()
            self.part_rows = torch.cat([self.mixed.nonzero().squeeze(-1), others])
            self.part_entries = torch.cat(
                [self.mixed.nonzero().squeeze(-1), torch.arange(count, len(experts.row), device=base.device)]
            )
            top = self.parts.amax(-1, keepdim=True)
            top = torch.where(top.isfinite(), top, 0.0)
            # torch's logsumexp is several times slower on CPU, and the exponentials serve the mixture too.
            self.mass = (self.parts - top).exp_()
            self.total = self.mass.sum(-1)
            self.log_norm[self.part_entries] = top.squeeze(-1) + self.total.log()
            # An infinite score, or one that is not a number, leaves no law.
            self.broken[self.part_entries] = ~self.total.isfinite() | (self.total <= 0)
            self.broken[:count] = False

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Give the log probability of one token in each context under each expert.

        Args:
            tokens: shape (M,).

        Returns:
            Shape (M, K), float64, -inf where asleep; 0 for the base where it is alone, which nobody is compared with.
        """
        entries = self.experts.entry
        found = torch.full(entries.shape, -torch.inf, dtype=torch.float64, device=entries.device)
        found[:, 0] = 0.0
        if self.experts.alone:
            return found
        own = self.parts.gather(1, tokens[self.part_rows].unsqueeze(-1)).squeeze(-1).double()
        own = own - self.log_norm[self.part_entries].double()
        found[self.part_rows, self.experts.expert[self.part_entries]] = own
        return found

    def excess(self) -> Tensor:
        """Give the log normalisers less the base's.

        Returns:
            Shape (M, K), 0 where asleep.
        """
        entries = self.experts.entry
        norms = self.log_norm[entries.clamp(min=0)]
        return torch.where(entries >= 0, norms - norms[:, :1], 0.0)

    def served(self, log_weights: Tensor) -> Tensor:
        """Mix the softmax laws.

        Args:
            log_weights: shape (M, K), -inf where asleep.

        Returns:
            log q + log Z_0, shape (M, V), float32: logits on the scale of the base's, and the base's own, bit for
            bit, where it alone is awake.
        """
        logits = self.base.float()
        if self.experts.alone:
            return logits
        share = log_weights[self.part_rows, self.experts.expert[self.part_entries]].float()
        weighted = self.mass * (share.exp() / self.total).unsqueeze(-1)
        place = self.mixed.cumsum(0) - 1
        count = int(self.mixed.sum())
        prob = weighted.new_zeros(count, weighted.shape[1]).index_add_(0, place[self.part_rows], weighted)
        found = prob.log()
        low = prob < TINY
        if bool(low.any()):
            columns = low.any(0).nonzero().squeeze(-1)
            found[:, columns] = torch.where(
                low[:, columns], self._in_logs(share, place, count, columns), found[:, columns]
            )
        mixed = found + self.log_norm[: len(self.base)][self.mixed].unsqueeze(-1)
        return logits.index_put((self.mixed.nonzero().squeeze(-1),), mixed)

    # The same sum without leaving logarithms, for classes that nobody expects.
    def _in_logs(self, share: Tensor, place: Tensor, count: int, columns: Tensor) -> Tensor:
        terms = self.parts[:, columns] + (share - self.log_norm[self.part_entries]).unsqueeze(-1)
        rows = place[self.part_rows]
        best = terms.new_full((count, terms.shape[1]), -torch.inf)
        best = best.scatter_reduce_(0, rows.unsqueeze(-1).expand_as(terms), terms, "amax")
        safe = torch.where(best.isfinite(), best, 0.0)
        total = torch.zeros_like(best).index_add_(0, rows, (terms - safe[rows]).exp_())
        found: Tensor = safe + total.log()
        return found

    def warped(self, log_weights: Tensor, warp: Callable[[Tensor], Tensor]) -> Tensor:
        """Mix laws that are each made sharper or cut off first, as temperature and top-p do.

        Args:
            log_weights: shape (M, K), -inf where asleep.
            warp: from scores of n laws, shape (n, V), to scores, shape (n, V), -inf where cut off.

        Returns:
            Logits on the scale of the base's, shape (M, V), float32. What everybody cuts off has no probability in
            single precision, and is still in order below the rest: where the stock loop suppresses all that is left,
            the best of it is taken, as it would be without a mixture.
        """
        logits = self._cut(warp(self.base.float()), self.base.float())
        if self.experts.alone:
            return logits
        place, count = self.mixed.cumsum(0) - 1, int(self.mixed.sum())
        share = log_weights[self.part_rows, self.experts.expert[self.part_entries]].float()
        laws = warp(self.parts).softmax(-1) * share.exp().unsqueeze(-1)
        prob = laws.new_zeros(count, laws.shape[1]).index_add_(0, place[self.part_rows], laws)
        norm = logits[self.mixed].logsumexp(-1, keepdim=True)
        mixed = self._cut(prob.log() + norm, self.served(log_weights)[self.mixed])
        return logits.index_put((self.mixed.nonzero().squeeze(-1),), mixed)

    @staticmethod
    def _cut(warped: Tensor, whole: Tensor) -> Tensor:
        return torch.where(warped == -torch.inf, whole - BELOW, warped)


def fired(experts: Experts, action: Any, log_weights: Tensor) -> Tensor:
    """Mix the one-vs-rest probabilities of mode `deterministic`: P_k = sum of w P_k under each expert.

    Args:
        experts: M contexts.
        action: of the model.
        log_weights: shape (M, K), -inf where asleep.

    Returns:
        log P(S_k > C_k) under the mixture of the laws of U, shape (M, V), float32.
    """
    count = len(experts.entry)
    found: Tensor = action.log_prob(experts.loc[:count], experts.log_scale[:count].exp())
    if experts.alone:
        return found
    found = found + log_weights[:, :1].float()
    others = action.log_prob(experts.loc[count:], experts.log_scale[count:].exp())
    shares = log_weights[experts.row[count:], experts.expert[count:]].float()
    for number in experts.expert[count:].unique().tolist():
        of = experts.expert[count:] == number
        rows = experts.row[count:][of]
        found[rows] = torch.logaddexp(found[rows], others[of] + shares[of].unsqueeze(-1))
    return found
