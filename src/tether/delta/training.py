"""The loop of a fit: Adam on the heads, dual ascent on the multiplier of the drift constraint, early stop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tether.cauchy.charts import NATIVE
from tether.cauchy.divergence import drift
from tether.delta.anchor import Anchor
from tether.delta.budget import Budget
from tether.delta.head import Head, Reference, ray_share, token_drift
from tether.delta.held_out import HELD_OUT, check_share
from tether.delta.objective import CandidateSoftmax, full_cross_entropy
from tether.delta.source import Source
from tether.delta.values import ValueHead
from tether.errors import ConfigError
from tether.scale import DualAscent

__all__ = ["FEATURES", "Aside", "Fit", "Step", "Training"]

PACE = 6
"""Steps between two steps of the dual."""
STEPS, SMALLEST = 32, 32
"""Steps an epoch at least, of at least so many tokens: in a few steps a small text is not learnt."""
CHECKS = 4
"""Looks at the domain documents set aside, in an epoch."""
GAIN = 0.75
"""Of a first delta: domain nats for the root of a nat of base drift, from which the dual starts (docs/log.md)."""

FEATURES = ("last", "multi")
"""What a delta reads: the last hidden state alone, or with states of three middle layers."""

Step = Callable[[dict[str, float]], None]
"""Called with step, steps, nll, drift and multiplier, and held_out where documents are set aside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Options of a fit.

    Attributes:
        budget: the constraint, or the plain penalty.
        chart: chart in which the head is linear, or `matrix`, where it is added to the base's own two heads.
        features: one of `FEATURES`; read by `learn_delta`, which caches them.
        location_only: leave the scale of U alone, in chart `linear` or `symmetric`. These two are then one
            chart, its constant is 1, and the delta can be folded into an output head.
        keep_values: leave the law of numbers Y exactly as it is, in any context and whatever the scale of U: what is
            learnt moves loc of U only across the value head. For chart `matrix` with `location_only`.
        gate: fit a one-class gate too.
        epochs: passes over the domain text at most.
        full_epochs: of these, the last ones take the loss over the whole vocabulary.
        batch: base tokens a step, and domain tokens too unless that makes fewer than `STEPS` steps an epoch.
        lr: peak learning rate of Adam, in units of the hidden state.
        candidates: classes kept exactly in the training loss.
        sampled: other classes drawn each step.
        probe: tokens for the Fisher and for each full-softmax measurement.
        held_out: share of the domain's tokens that the fit never sees, in [0, 0.5]; the delta's strength is
            chosen there (`tether.delta.held_out`). 0 learns from everything and takes the budget's strength.
        rank: of the heads at most, >= 1, or None for whole ones: the file then holds thin factors, and what is
            measured, served and certified is their product (`tether.delta.low_rank`).
        aside: share of the documents that are left on which the fit is watched, in [0, 1); 0 turns early
            stopping off.
        patience: looks without a better loss after which the fit stops.
        seed: of the shuffles and draws.
    """

    budget: Budget = field(default_factory=Budget)
    chart: str = "symmetric"
    features: str = "last"
    location_only: bool = False
    keep_values: bool = False
    gate: bool = True
    epochs: int = 2
    full_epochs: int = 0
    batch: int = 256
    lr: float = 1e-3
    candidates: int = 2048
    sampled: int = 512
    probe: int = 1536
    held_out: float = HELD_OUT
    rank: int | None = None
    aside: float = 0.0
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.chart not in NATIVE:
            raise ConfigError(f"chart={self.chart!r}: expected one of {', '.join(NATIVE)}")
        if self.location_only and self.chart in ("geodesic", "rootkl"):
            raise ConfigError(
                f"location_only in chart {self.chart}: its second coordinate moves the scale too; take symmetric or "
                "linear"
            )
        if self.keep_values and (self.chart != "matrix" or not self.location_only):
            raise ConfigError(
                f"keep_values in chart {self.chart}, location_only={self.location_only}: values can be left alone "
                "exactly by a change of the location's matrix alone; take chart='matrix' with location_only"
            )
        if self.features not in FEATURES:
            raise ConfigError(f"features={self.features!r}: expected one of {', '.join(FEATURES)}")
        if (
            min(self.epochs, self.batch, self.candidates, self.probe, self.patience) < 1
            or min(self.sampled, self.full_epochs) < 0
            or not self.lr > 0
        ):
            raise ConfigError(
                f"epochs={self.epochs}, batch={self.batch}, candidates={self.candidates}, probe={self.probe}, "
                f"patience={self.patience}, sampled={self.sampled}, full_epochs={self.full_epochs}, lr={self.lr}: "
                "expected positive numbers"
            )
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank={self.rank}: expected at least 1, or none for whole heads")
        if not 0 <= self.aside < 1:
            raise ConfigError(f"aside={self.aside}: expected a share of the documents in [0, 1)")
        check_share(self.held_out)


class Aside(NamedTuple):
    """Domain text that the fit is watched on.

    Attributes:
        at: base quantities, shape (n, ...).
        targets: next tokens, shape (n,).
    """

    at: Reference
    targets: Tensor


class Training:
    """The loop: Adam on the heads, dual ascent on the multiplier.

    Args:
        fit: options.
        source: the domain's tokens to learn from.
        anchor: base text, in the basis of the source.
        loss: the domain loss.
        generator: of shuffles and draws.
        aside: other domain text for early stopping, or None.
        values: of a model with numbers: their gated loss is then a part of the domain's, as in training.

    Attributes:
        dual: the multiplier of the constraint; well below its start at the end means the budget does not bind.
        drift: on base text at the last step of the dual, in the budget's metric, or None.
        curve: figures at every step of the dual and every look at the documents set aside.
        stopped: step of the heads that are returned.
    """

    def __init__(
        self,
        fit: Fit,
        source: Source,
        anchor: Anchor,
        loss: CandidateSoftmax,
        generator: torch.Generator,
        aside: Aside | None = None,
        values: ValueHead | None = None,
    ) -> None:
        self.values = values
        # Of the domain's tokens, those that a number follows.
        self.numbers = float((~source.values.isnan()).double().mean())
        self.fit, self.source, self.anchor, self.aside = fit, source, anchor.fitted, aside
        # The multiplier answers to base text that the heads do not see: on what they see, drift is less, and a fit
        # held to that much ends above its budget (docs/log.md, 2026-11-28).
        self.watched = anchor.probe.some(fit.probe // 2)
        if fit.budget.hard:
            # The constraint is on every context of the fit, the domain's own as well.
            self.watched = anchor.fitted.some(fit.probe // 2).join(source.some(fit.probe // 2))
        self.loss, self.fisher, self.generator = loss, anchor.fisher, generator
        # A step in the head is then a step of the hidden state, whatever the scale of U.
        scale = source.some(4096).scale
        self.unit = scale.log().mean(0).exp().unsqueeze(-1)
        if fit.chart == "matrix":
            self.unit = torch.ones_like(self.unit)
        shape = (scale.shape[1], self.anchor.states.shape[1])
        device = scale.device
        self.second = torch.zeros(shape, device=device, requires_grad=True)
        self.first = None if fit.location_only else torch.zeros(shape, device=device, requires_grad=True)
        value = fit.budget.value or 1.0
        # A penalty is a multiplier that stays as it is.
        start = 0.05 / value if fit.budget.penalty is None else fit.budget.penalty
        self.dual = DualAscent(start, budget=value)
        # The Fisher form stands in for the softmax KL inside the fit; `ratio` is what one is of the other.
        self.inner = "latent" if fit.budget.metric == "latent" else "fisher"
        self.ratio = 1.0
        self.drift: float | None = None
        self.curve: list[dict[str, float]] = []
        self.stopped = 0
        self._best: tuple[float, list[Tensor]] | None = None
        self._waited = 0

    @property
    def multiplier(self) -> float:
        """Of the constraint, now."""
        return self.dual.multiplier

    @property
    def parameters(self) -> list[Tensor]:
        """The heads in units of the hidden state."""
        return [self.second] if self.first is None else [self.second, self.first]

    def head(self) -> Head:
        """Give the delta as it is now.

        Returns:
            The heads, with gradients.
        """
        return Head(self.first, self.off_values(self.second / self.unit), self.fit.chart)

    def off_values(self, second: Tensor) -> Tensor:
        """Take from a head what would move the law of numbers, where that is to stay as it is.

        Args:
            second: head of the location, shape (C, F).

        Returns:
            The head, of the same rank at most.
        """
        if self.values is None or not self.fit.keep_values:
            return second
        across = self.values.weight / self.values.weight.norm()
        return second - torch.outer(across, across @ second)

    @torch.enable_grad()
    def run(self, measured: Callable[[Head], float], on_step: Step | None) -> Head:
        """Fit the heads.

        Args:
            measured: the drift of a head in softmax KL on some held-out base text, as the budget's statistic,
                to calibrate the Fisher form.
            on_step: progress.

        Returns:
            The fitted delta, without gradients, before the budget is met exactly.
        """
        fit = self.fit
        optimizer = torch.optim.Adam(self.parameters, lr=fit.lr, betas=(0.9, 0.99), fused=True)
        size = min(fit.batch, max(SMALLEST, len(self.source) // STEPS))
        each = math.ceil(len(self.source) / size)
        steps = fit.epochs * each
        # Adam's first steps have full size whatever the gradient: without a warm-up they leave the budget far
        # behind, and the multiplier then holds the fit back for the rest of its steps.
        warm = max(1, steps // 8)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min((n + 1) / warm, 0.5 * (1 + math.cos(math.pi * n / steps)))
        )
        step = 0
        for epoch in range(fit.epochs):
            whole = epoch >= fit.epochs - fit.full_epochs
            for rows in self.source.batches(size, self.generator):
                step += 1
                nll, moved = self._step(optimizer, rows, whole)
                schedule.step()
                if fit.budget.value is not None and step % PACE == 0:
                    self._ascend(measured if step // PACE == steps // PACE // 2 else None)
                entry = {
                    "step": step,
                    "steps": steps,
                    "nll": nll,
                    "drift": moved * self.ratio if self.drift is None else self.drift,
                    "multiplier": self.multiplier,
                }
                looked = self.aside is not None and (step % max(1, each // CHECKS) == 0 or step == steps)
                if looked:
                    entry["held_out"] = self._look(step)
                if step % PACE == 0 or step == steps or looked:
                    self.curve.append(entry)
                if on_step:
                    on_step(entry)
                if self._waited >= fit.patience:
                    return self._finished()
        if self.aside is None:
            self.stopped = step
        return self._finished()

    def _step(self, optimizer: torch.optim.Optimizer, rows: Tensor, whole: bool) -> tuple[float, float]:
        fit, budget = self.fit, self.fit.budget
        at, targets = self.source.take(rows), self.source.next_tokens(rows)
        head = self.head()
        x, y = head.displacement(at.states, scale=at.scale)
        own = drift(x, y).sum(-1) if budget.penalty is not None else None
        if budget.hard and budget.value is not None:
            share = ray_share(head, at, self.inner, budget.value / self.ratio, fisher=self.fisher)
            x, y = head.displacement(at.states, share, scale=at.scale)
        loc = at.loc + at.scale * y
        loss = self.loss
        nll = full_cross_entropy(loc, targets, loss.head) if whole else loss(loc, targets, self.generator)
        total = nll + self._value_loss(at, x, loc, self.source.values[rows])
        if own is not None:
            moved = own.mean()
        else:
            drawn = torch.randint(len(self.anchor.states), (fit.batch,), generator=self.generator)
            anchor = Reference(*(values[drawn] for values in self.anchor))
            if budget.hard:
                anchor = anchor.join(at)
            values = token_drift(self.inner, head, anchor, fisher=self.fisher)
            moved = budget.pressed(values * self.ratio if budget.hard else values)
        optimizer.zero_grad()
        (total + self.multiplier * moved).backward()
        optimizer.step()
        return nll.item(), moved.item()

    # lambda times the mean loss of numbers, as far as this batch has some.
    def _value_loss(self, at: Reference, x: Tensor, loc: Tensor, values: Tensor) -> Tensor | float:
        here = ~values.isnan()
        if self.values is None or not bool(here.any()):
            return 0.0
        losses = self.values.nll(loc[here], at.scale[here] * x[here].exp(), values[here])
        return self.values.share * losses.sum() / (len(values) * self.numbers)

    # One step of the dual: the drift is taken on the same base tokens each time, since a batch's is too noisy.
    # In metric softmax it is the Fisher form times what a measured KL was of it, asked for once on the way.
    @torch.no_grad()
    def _ascend(self, measured: Callable[[Head], float] | None) -> None:
        budget = self.fit.budget
        if budget.value is None:
            return
        head = self.head()
        inner = float(budget.statistic(token_drift(self.inner, head, self.watched, fisher=self.fisher)))
        if measured is not None and budget.metric == "softmax":
            self.ratio = measured(head) / max(inner, 1e-12)
        first, self.drift = self.drift is None, inner * self.ratio
        if first and budget.metric == "latent":
            # How many latent nats a nat of the served softmax is depends on the scale of U.
            served = token_drift("fisher", head, self.watched, fisher=self.fisher).mean()
            rate = float(served) / max(inner, 1e-30)
            self.dual = DualAscent(GAIN * math.sqrt(max(rate, 1e-30) / budget.value), budget=budget.value)
        self.dual.step(self.drift)

    # Loss on the documents set aside, of the delta as its budget would leave it: a delta that is over its
    # budget now is no better for it. The same draws every time, so that looks can be compared.
    @torch.no_grad()
    def _look(self, step: int) -> float:
        if self.aside is None:
            return math.nan
        value, head = self.fit.budget.value, self.head()
        if value is not None:
            inner = token_drift(self.inner, head, self.watched, fisher=self.fisher)
            now = float(self.fit.budget.statistic(inner)) * self.ratio
            head = head.scaled(min(1.0, math.sqrt(value / max(now, 1e-30))))
        draws = torch.Generator().manual_seed(self.fit.seed)
        found = float(self.loss(self.aside.at.moved(head)[0], self.aside.targets, draws))
        if self._best is None or found < self._best[0]:
            self._best = found, [parameter.detach().clone() for parameter in self.parameters]
            self.stopped, self._waited = step, 0
        else:
            self._waited += 1
        return found

    @torch.no_grad()
    def _finished(self) -> Head:
        if self._best is not None:
            for parameter, kept in zip(self.parameters, self._best[1], strict=True):
                parameter.copy_(kept)
        head = self.head()
        return Head(None if head.first is None else head.first.detach(), head.second.detach(), head.chart)
