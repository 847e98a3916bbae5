"""The problem of choosing weights: domain loss and base drift as functions of them, from stored moves."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from tether.cauchy.charts import from_chart, fuse, to_chart
from tether.cauchy.divergence import drift
from tether.causal.fused import Fusion
from tether.delta.budget import Budget, Met, cvar, meet_budget
from tether.delta.cache import BATCH, StateCache
from tether.delta.head import Reference
from tether.delta.objective import chunk_rows, output_fisher, softmax_shift
from tether.delta.source import reference, spread
from tether.theory.bounds import K_INF

__all__ = ["BASE_TOKENS", "Contexts", "Problem"]

CLASSES = 48
"""Classes at which a token's loss is followed: the likeliest, and a sample that stands for the others."""
SAMPLED = 16
DOMAIN_TOKENS, BASE_TOKENS, FISHER_TOKENS = 2048, 1024, 512


class Contexts(NamedTuple):
    """Some contexts with everything a fused drift or loss is computed from.

    Attributes:
        at: base quantities, shape (n, ...).
        gates: of each delta, shape (N, n).
        targets: next tokens, shape (n,).
    """

    at: Reference
    gates: Tensor
    targets: Tensor


class Problem:
    """Loss and drift as functions of the weights.

    Args:
        model: the base.
        fusion: all deltas with unit weights.
        budget: what the drift is measured in, and its statistic.
    """

    def __init__(self, model: Any, fusion: Fusion, budget: Budget) -> None:
        self.model, self.fusion, self.budget = model, fusion, budget
        self.names = fusion.domains
        bias = model.action.bias
        self.weight, self.bias = model.action.weight.detach(), None if bias is None else bias.detach()
        self.fisher: Tensor | None = None
        self.kept: list[Contexts] = []
        self.followed: list[
            tuple[Tensor, ...]
        ] = []  # classes, log of the mass each stands for, log p of the target

    @torch.no_grad()
    def contexts(self, cache: StateCache, index: Tensor) -> Contexts:
        """Evaluate the base and the gates at some tokens of a text.

        Args:
            cache: the text.
            index: its tokens, shape (n,).

        Returns:
            The contexts in that order.
        """
        gates = torch.ones(len(self.names), len(cache.windows.input_ids))
        if self.fusion.gated:
            size = self.fusion.hidden_size
            for batch in cache.windows.batches(BATCH):
                where = cache.windows.positions(batch)
                states = torch.zeros(*batch.mask.shape, size)
                states[batch.mask] = cache.states[where][:, :size].float()
                gates[:, where] = self.fusion.gates(states, batch.mask)[0][:, batch.mask]
        at = reference(self.model, cache.states[index].float())
        return Contexts(at, gates[:, index], cache.windows.targets[index])

    @torch.no_grad()
    def follow(self, base: StateCache, domains: Sequence[StateCache], generator: torch.Generator) -> None:
        """Choose the contexts that loss and drift are followed at, and the classes of each domain token.

        Args:
            base: base text for the surrogate drift.
            domains: text of each domain.
            generator: of the sampled classes.
        """
        self.base = self.contexts(base, spread(len(base.windows.input_ids), BASE_TOKENS))
        if self.budget.metric != "latent":
            self.fisher = output_fisher(self.weight, self.base.at.some(FISHER_TOKENS).loc, self.bias)
        count = max(16, DOMAIN_TOKENS // max(1, len(domains)))
        for cache in domains:
            scored = (cache.windows.targets >= 0).nonzero().squeeze(-1)
            here = self.contexts(cache, scored[spread(len(scored), count)])
            # What a delta makes likely is what its text has.
            frequent = torch.bincount(cache.windows.targets[scored], minlength=len(self.weight)) / len(scored)
            found = []
            for loc, targets in zip(here.at.loc.split(64), here.targets.split(64), strict=True):
                log_prob = self._base(loc)
                classes, share = _followed(log_prob, frequent, generator)
                own = log_prob.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
                # The target comes last; it is no part of the normaliser, which has it by probability.
                found.append(
                    (
                        torch.cat([classes, targets.unsqueeze(-1)], -1),
                        log_prob.gather(-1, classes) + share,
                        own,
                    )
                )
            self.kept.append(here)
            self.followed.append(tuple(torch.cat(part) for part in zip(*found, strict=True)))

    @torch.no_grad()
    def linearise(self, weights: np.ndarray[Any, Any]) -> None:
        """Expand moves around some weights: from then on `loss` and `surrogate` are convex in the weights.

        Args:
            weights: shape (N,).
        """
        grams = []
        for part, gates in zip(_split(self.base.at), self.base.gates.split(256, dim=1), strict=True):
            if self.budget.metric != "latent" and self.fisher is not None:
                moves = part.scale * self._expanded(part, gates, weights)  # (N + 1, n, C)
                grams.append(0.5 * torch.einsum("knc,lnc->nkl", moves @ self.fisher, moves))
                continue
            coordinates = to_chart(*self.fusion.deltas(part.states), self.fusion.chart)
            first, second = (_with_zero(c * gates.unsqueeze(-1)) for c in coordinates)
            gram = torch.einsum("knc,lnc->nkl", first, first) + torch.einsum("knc,lnc->nkl", second, second)
            # D <= |p|^2 / 4 in the symmetric and geodesic chart, K_INF of that in the linear one, D = |p|^2 in rootkl.
            grams.append(gram * {"rootkl": 1.0, "linear": K_INF / 4}.get(self.fusion.chart, 0.25))
        self.gram = torch.cat(grams).double()
        self.second_moment = self.gram.mean(0)
        shifts = []
        for here, (classes, _, _) in zip(self.kept, self.followed, strict=True):
            for part, gates, of in zip(
                _split(here.at, 64), here.gates.split(64, dim=1), classes.split(64), strict=True
            ):
                moves = part.scale * self._expanded(part, gates, weights)
                shifts.append(torch.einsum("nkc,lnc->nkl", self.weight[of].float(), moves))
        # In float32: sums of a few dozen terms, whose mean over thousands of tokens is what counts.
        self.shifts = torch.cat(shifts) if shifts else torch.zeros(0, 1, len(weights) + 1)

    # y of the fusion around some weights, affine in them: its derivative by each weight, and what is left.
    def _expanded(self, part: Reference, gates: Tensor, weights: np.ndarray[Any, Any]) -> Tensor:
        x, y = self.fusion.deltas(part.states)
        first, second = (c * gates.unsqueeze(-1) for c in to_chart(x, y, self.fusion.chart))
        point = torch.tensor(weights, dtype=torch.float32).reshape(-1, 1, 1)
        along, across = (point * first).sum(0), (point * second).sum(0)
        with torch.enable_grad():
            along.requires_grad_(), across.requires_grad_()
            fused = from_chart(along, across, self.fusion.chart)[1]
            slopes = torch.autograd.grad(fused.sum(), (along, across), allow_unused=True)
        slope, slant = (torch.zeros_like(along) if part is None else part for part in slopes)
        by_weight = slope * first + slant * second
        rest = fused.detach() - (point * by_weight).sum(0)
        return torch.cat([by_weight, rest.unsqueeze(0)])

    def surrogate(self, weights: Tensor) -> Tensor:
        """Give the statistic of the surrogate drift: a quadratic form of Q, or the CVaR of forms of G(h).

        Args:
            weights: shape (N,).

        Returns:
            Nats, a scalar, convex in the weights.
        """
        point = torch.cat([weights.double(), torch.ones(1, dtype=torch.float64)])
        if self.budget.quantile is None:
            return point @ self.second_moment @ point
        return cvar(torch.einsum("k,nkl,l->n", point, self.gram, point), self.budget.quantile)

    def loss(self, weights: Tensor) -> Tensor:
        """Estimate the mean loss over the domains at the followed classes, with shifts affine in the weights.

        Args:
            weights: shape (N,), float64.

        Returns:
            Nats, a scalar, convex in the weights.
        """
        point = torch.cat([weights, torch.ones(1, dtype=torch.float64)]).float()
        moved, found, begin = self.shifts @ point, [], 0
        for _, mass, own in self.followed:
            here = moved[begin : begin + len(own)]
            begin += len(own)
            # The followed mass is 1 up to sampling; dividing by it leaves the base's loss at weights 0.
            normaliser = torch.logsumexp(mass + here[:, :-1], -1) - torch.logsumexp(mass, -1)
            found.append((normaliser - own - here[:, -1]).double().mean())
        return torch.stack(found).mean()

    def scale(self, weights: np.ndarray[Any, Any], here: Contexts, most: float) -> Met:
        """Scale the weights until the measured statistic is the budget's, evaluated at each factor tried.

        Args:
            weights: shape (N,).
            here: base contexts.
            most: largest weight.

        Returns:
            Factor and drift.
        """
        largest = float(np.abs(weights).max())
        if largest == 0:
            return Met(0.0, 0.0, 0)
        return meet_budget(
            lambda factor: float(self.budget.statistic(self.drift(factor * weights, here))),
            float(self.budget.value or 0.0),
            ceiling=most / largest,
            tries=12,
        )

    @torch.no_grad()
    def drift(self, weights: np.ndarray[Any, Any], here: Contexts) -> Tensor:
        """Measure the fused drift at contexts in the budget's metric.

        Args:
            weights: shape (N,).
            here: contexts.

        Returns:
            Nats, shape (n,).
        """
        found = []
        for part, gates in zip(_split(here.at), here.gates.split(256, dim=1), strict=True):
            x, y = self._fused(part, gates, weights)
            if self.budget.metric == "latent":
                found.append(drift(x, y).sum(-1))
                continue
            move = part.scale * y
            if self.fisher is not None and self.budget.metric == "fisher":
                found.append(0.5 * ((move @ self.fisher) * move).sum(-1))
                continue
            for loc, step in zip(
                part.loc.split(chunk_rows(self.weight)), move.split(chunk_rows(self.weight)), strict=True
            ):
                found.append(softmax_shift(self._base(loc), self._shift(step))[0])
        return torch.cat(found)

    @torch.no_grad()
    def losses(self, weights: np.ndarray[Any, Any]) -> list[float]:
        """Measure the loss of each domain over the whole vocabulary.

        Args:
            weights: shape (N,).

        Returns:
            Nats per token, one a domain.
        """
        found = []
        for here in self.kept:
            values = []
            for part, gates, targets in zip(
                _split(here.at, chunk_rows(self.weight)),
                here.gates.split(chunk_rows(self.weight), dim=1),
                here.targets.split(chunk_rows(self.weight)),
                strict=True,
            ):
                move = part.scale * self._fused(part, gates, weights)[1]
                log_prob = torch.log_softmax(self._base(part.loc) + self._shift(move), -1)
                values.append(-log_prob.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
            found.append(float(torch.cat(values).double().mean()))
        return found

    def _fused(self, part: Reference, gates: Tensor, weights: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        factors = torch.tensor(weights, dtype=torch.float32).unsqueeze(-1) * gates
        return fuse(*self.fusion.deltas(part.states), factors, chart=self.fusion.chart)

    def _base(self, loc: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return torch.log_softmax(linear(loc.to(self.weight.dtype), self.weight, bias).float(), -1)

    def _shift(self, move: Tensor) -> Tensor:
        return linear(move.to(self.weight.dtype), self.weight).float()


def _split(at: Reference, size: int = 256) -> list[Reference]:
    return [Reference(*parts) for parts in zip(*(values.split(size) for values in at), strict=True)]


def _followed(log_prob: Tensor, frequent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # Likely and frequent classes and a sample of the others by probability; and the log of what each stands for.
    head = min(CLASSES - SAMPLED, log_prob.shape[-1] - 1)
    top = (log_prob.exp() + frequent).topk(head).indices
    rest = log_prob.exp().scatter(-1, top, 0.0)
    left = rest.sum(-1, keepdim=True)
    # A draw by probability stands for the same mass as any other: left / SAMPLED.
    drawn = torch.multinomial(rest + 1e-30, SAMPLED, replacement=True, generator=generator)
    share = torch.log(left.clamp(min=1e-30) / SAMPLED) - log_prob.gather(-1, drawn)
    return torch.cat([top, drawn], -1), torch.cat([torch.zeros_like(top, dtype=share.dtype), share], -1)


def _with_zero(values: Tensor) -> Tensor:
    return torch.cat([values, torch.zeros_like(values[:1])])
