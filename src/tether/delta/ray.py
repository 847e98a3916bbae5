"""A learnt delta along its ray: how far each factor moves base text, and the factor that meets the budget."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tether.delta.anchor import Anchor
from tether.delta.budget import Budget
from tether.delta.head import Head, Reference, token_drift
from tether.delta.output_head import OutputHead
from tether.delta.source import PIECE, Source, spread
from tether.delta.strength import Change, Strength, find_strength, served_change, token_nll
from tether.delta.values import ValueHead
from tether.scale import AIM, Met, meet_budget

__all__ = ["MEASURED", "Needs", "Ray"]

MEASURED = 1024
"""Tokens of the documents kept aside on which losses are measured at most, spread over these documents."""
KEPT_BYTES = 400_000_000
"""The base's law at the tokens of a measurement is held in memory, for the next one, if it takes less than this."""


class Needs(NamedTuple):
    """What drifts and losses are computed from.

    Attributes:
        output: the output head.
        fisher: output Fisher on base text, shape (C, C).
        values: of a model with numbers, or None.
    """

    output: OutputHead
    fisher: Tensor
    values: ValueHead | None = None

    def drift(self, metric: str, head: Head, at: Reference) -> Tensor:
        """Compute the drift of each token.

        Args:
            metric: one of `tether.delta.head.METRICS`.
            head: the delta.
            at: base quantities at n tokens.

        Returns:
            Nats, shape (n,).
        """
        return token_drift(metric, head, at, output=self.output, fisher=self.fisher)


class Ray:
    """A learnt delta at every factor.

    Args:
        head: the delta as it was learnt, at factor 1.
        source: the domain's tokens that it was learnt from.
        anchor: base text; the budget is met on its probe.
        budget: the constraint.
        probe: tokens for each measurement over the whole vocabulary.
        needs: what drifts are computed from.
    """

    def __init__(
        self, head: Head, source: Source, anchor: Anchor, budget: Budget, probe: int, needs: Needs
    ) -> None:
        self.head, self.source, self.anchor, self.budget = head, source, anchor, budget
        self.probe, self.needs = probe, needs
        index = spread(len(anchor.probe.states), probe)
        self.some = anchor.probe.some(probe)
        self.targets = None if anchor.targets is None else anchor.targets[index]
        self._changes: dict[float, Change] = {}
        self._limited: dict[float, float] = {}
        self._law: list[Tensor] = []

    def change(self, factor: float) -> Change:
        """Measure the served softmax on held-out base text.

        Args:
            factor: along the ray, >= 0.

        Returns:
            Drift and losses at `probe` tokens; measured once for each factor.
        """
        if factor not in self._changes:
            at, output = self.some, self.needs.output
            loc, _ = at.moved(self.head.scaled(factor))
            law: Iterable[Tensor] = output.log_prob(at.loc)
            # Beside a text that is too large to be held, this is not held either.
            held = self.source.kept is not None
            if held and 4 * len(at.loc) * len(output.weight) <= KEPT_BYTES:
                law = self._law = self._law or list(law)
            self._changes[factor] = served_change(law, loc, self.targets, output)
        return self._changes[factor]

    def limited(self, factor: float) -> float:
        """Measure what the budget limits.

        Args:
            factor: along the ray, >= 0.

        Returns:
            The budget's statistic of the drift in its metric, nats: on held-out base text, or for a hard
            budget on every context of the fit. Measured once for each factor.
        """
        if factor not in self._limited:
            if self.budget.metric == "softmax" and not self.budget.hard:
                drift = float(self.budget.statistic(self.change(factor).kl))
            else:
                drift = self._drift(self.budget.metric, factor, self._contexts())
            self._limited[factor] = drift
        return self._limited[factor]

    @property
    def tokens(self) -> int:
        """Contexts that `limited` looks at."""
        if self.budget.hard:
            return len(self.source) + len(self.anchor.fitted.states)
        return len(self.some.states if self.budget.metric == "softmax" else self.anchor.probe.states)

    def meet(self) -> Met:
        """Find the factor at which the measured drift is below the budget, within 5 % if there is one.

        Returns:
            The factor and the drift there; see `tether.scale.meet_budget`.
        """
        budget, metric, value = self.budget, self.budget.metric, self.budget.value or 0.0
        # Each full measurement is dear. How fast drift grows along the ray is learnt from a cheap form of it, and
        # where to begin from a third of the tokens, corrected by what that form says those are of the whole.
        inner = "latent" if metric == "latent" else "fisher"
        full, less = (self._drift(inner, factor, self._contexts()) for factor in (1.0, 0.9))
        power = math.log(full / less) / math.log(1 / 0.9) if min(full, less) > 0 else 2.0
        some = self.some if metric == "softmax" else self.anchor.probe
        if budget.hard:
            some = self.source.some(len(self.source) * self.probe // self.tokens + 1)
        third = [some.some(max(1, min(self.probe, len(some.states)) // 3))]
        rough = self._drift(metric, 1.0, third) * full / max(self._drift(inner, 1.0, third), 1e-30)
        start = (AIM * value / rough) ** (1 / max(power, 0.5)) if 0 < rough < math.inf else 1.0
        tries = 40 if metric == "latent" else 8
        return meet_budget(self.limited, value, start=start, power=power, ceiling=budget.stretch, tries=tries)

    def strength(self, at: Reference, targets: Tensor, values: Tensor, largest: float) -> Strength:
        """Find the share of the largest factor allowed that the domain's own held-out text is best with.

        Args:
            at: base quantities at n tokens of documents kept aside.
            targets: next tokens, shape (n,).
            values: the next token's number in the units of Y, nan where it is none, shape (n,).
            largest: the factor that meets the budget, > 0.

        Returns:
            The share; see `tether.delta.strength.find_strength`.
        """
        here = ~values.isnan()

        def nll(share: float) -> tuple[Tensor, float]:
            head = self.head.scaled(share * largest) if share else None
            of_values, some = self.needs.values, Reference(*(part[here] for part in at))
            if of_values is None or not bool(here.any()):
                return token_nll(head, at, targets, self.needs.output), 0.0
            numbers = of_values.nll(*some.moved(head), values[here]).double().mean()
            return token_nll(head, at, targets, self.needs.output), float(of_values.share * numbers)

        return find_strength(nll)

    def _contexts(self) -> Iterable[Reference]:
        if not self.budget.hard:
            return [self.some if self.budget.metric == "softmax" else self.anchor.probe]
        # Every training context, a piece at a time: of a large text they are on disk.
        pieces = torch.arange(len(self.source)).split(PIECE)
        return itertools.chain((self.source.take(piece) for piece in pieces), [self.anchor.fitted])

    def _drift(self, metric: str, factor: float, at: Iterable[Reference]) -> float:
        scaled = self.head.scaled(factor)
        return float(self.budget.statistic(torch.cat([self.needs.drift(metric, scaled, one) for one in at])))
