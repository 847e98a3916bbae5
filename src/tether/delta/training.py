"""The loop of a fit: Adam on the heads, dual ascent on the multiplier of the drift constraint."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.cauchy.charts import CHARTS
from tether.cauchy.divergence import drift
from tether.delta.budget import Budget, Head, Reference, token_drift
from tether.delta.objective import CandidateSoftmax
from tether.errors import ConfigError

__all__ = ["Fit", "Step", "Training"]

PACE = 6
"""Steps between two steps of the dual."""

Step = Callable[[dict[str, float]], None]
"""Called with step, steps, nll, drift and multiplier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Options of a fit.

    Attributes:
        budget: the constraint, or the plain penalty.
        chart: chart in which the head is linear.
        location_only: leave the scale of U alone.
        gate: fit a one-class gate too.
        epochs: passes over the domain text.
        batch: domain tokens a step, >= 2; half as many of the base.
        lr: peak learning rate of Adam, in units of the hidden state.
        candidates: classes kept exactly in the training loss.
        sampled: other classes drawn each step.
        probe: tokens for the Fisher and for each full-softmax measurement.
        seed: of the shuffles and draws.
    """

    budget: Budget = field(default_factory=Budget)
    chart: str = "symmetric"
    location_only: bool = False
    gate: bool = True
    epochs: int = 2
    batch: int = 512
    lr: float = 1e-3
    candidates: int = 2048
    sampled: int = 512
    probe: int = 1536
    seed: int = 0

    def __post_init__(self) -> None:
        if self.chart not in CHARTS:
            raise ConfigError(f"chart={self.chart!r}: expected one of {', '.join(CHARTS)}")
        if (
            min(self.epochs, self.batch, self.candidates, self.probe) < 1
            or self.sampled < 0
            or not self.lr > 0
        ):
            raise ConfigError(
                f"epochs={self.epochs}, batch={self.batch}, candidates={self.candidates}, probe={self.probe}, "
                f"sampled={self.sampled}, lr={self.lr}: expected positive numbers"
            )


class Training:
    """The loop: Adam on the heads, dual ascent on the multiplier.

    Args:
        fit: options.
        at: base quantities at the domain's scored tokens.
        targets: their next tokens, shape (n,).
        anchor: base quantities at base text.
        loss: the domain loss.
        fisher: output Fisher on base text, shape (C, C).
        generator: of shuffles and draws.

    Attributes:
        multiplier: of the constraint, now.
        start: of the constraint at first; well below it at the end means the budget does not bind.
        drift: on base text at the last step of the dual, in the budget's metric, or None.
        curve: figures at every step of the dual.
    """

    def __init__(
        self,
        fit: Fit,
        at: Reference,
        targets: Tensor,
        anchor: Reference,
        loss: CandidateSoftmax,
        fisher: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.fit, self.at, self.targets, self.anchor = fit, at, targets, anchor
        self.watched = anchor.some(fit.probe // 2)
        self.loss, self.fisher, self.generator = loss, fisher, generator
        # A step in the head is then a step of the hidden state, whatever the scale of U.
        self.unit = at.scale.log().mean(0).exp().unsqueeze(-1)
        shape = (at.loc.shape[1], at.states.shape[1])
        self.second = torch.zeros(shape, requires_grad=True)
        self.first = None if fit.location_only else torch.zeros(shape, requires_grad=True)
        value = fit.budget.value or 1.0
        self.start = self.multiplier = 0.05 / value if fit.budget.penalty is None else fit.budget.penalty
        # The Fisher form stands in for the softmax KL inside the fit; `ratio` is what one is of the other.
        self.inner = "latent" if fit.budget.metric == "latent" else "fisher"
        self.ratio = 1.0
        self.drift: float | None = None
        self.curve: list[dict[str, float]] = []

    def head(self) -> Head:
        """Give the delta as it is now.

        Returns:
            The heads, with gradients.
        """
        return Head(self.first, self.second / self.unit, self.fit.chart)

    def batches(self) -> Iterator[Tensor]:
        """Shuffle the domain's tokens once an epoch.

        Yields:
            Rows of a batch.
        """
        for _ in range(self.fit.epochs):
            yield from torch.randperm(len(self.targets), generator=self.generator).split(self.fit.batch)

    @torch.enable_grad()
    def run(self, measured: Callable[[Head], float], on_step: Step | None) -> Head:
        """Fit the heads.

        Args:
            measured: mean softmax KL of a head on some held-out base text, to calibrate the Fisher form.
            on_step: progress.

        Returns:
            The fitted delta, without gradients, before the budget is met exactly.
        """
        fit = self.fit
        parameters = [self.second] if self.first is None else [self.second, self.first]
        optimizer = torch.optim.Adam(parameters, lr=fit.lr, betas=(0.9, 0.99))
        steps = fit.epochs * math.ceil(len(self.targets) / fit.batch)
        # Adam's first steps have full size whatever the gradient: without a warm-up they leave the budget far
        # behind, and the multiplier then holds the fit back for the rest of its steps.
        warm = max(1, steps // 8)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min((n + 1) / warm, 0.5 * (1 + math.cos(math.pi * n / steps)))
        )
        for step, rows in enumerate(self.batches(), start=1):
            at = Reference(*(values[rows] for values in self.at))
            head = self.head()
            x, y = head.displacement(at.states)
            nll = self.loss(at.loc + at.scale * y, self.targets[rows], self.generator)
            if fit.budget.penalty is not None:
                moved = drift(x, y).sum(-1).mean()
            else:
                drawn = torch.randint(len(self.anchor.states), (fit.batch // 2,), generator=self.generator)
                anchor = Reference(*(values[drawn] for values in self.anchor))
                moved = token_drift(self.inner, head, anchor, fisher=self.fisher).mean()
            optimizer.zero_grad()
            (nll + self.multiplier * moved).backward()
            optimizer.step()
            schedule.step()
            if fit.budget.value is not None and step % PACE == 0:
                self._ascend(measured if step // PACE == steps // PACE // 2 else None)
            seen = moved.item() * self.ratio if fit.budget.value is None or self.drift is None else self.drift
            entry = {
                "step": step,
                "steps": steps,
                "nll": nll.item(),
                "drift": seen,
                "multiplier": self.multiplier,
            }
            if step % PACE == 0 or step == steps:
                self.curve.append(entry)
            if on_step:
                on_step(entry)
        with torch.no_grad():
            head = self.head()
            return Head(None if head.first is None else head.first.detach(), head.second.detach(), head.chart)

    # One step of the dual: the drift is taken on the same base tokens each time, since a batch's is too noisy.
    # In metric softmax it is the Fisher form times what a measured KL was of it, asked for once on the way.
    @torch.no_grad()
    def _ascend(self, measured: Callable[[Head], float] | None) -> None:
        budget = self.fit.budget
        if budget.value is None:
            return
        inner = float(token_drift(self.inner, self.head(), self.watched, fisher=self.fisher).mean())
        if measured is not None and budget.metric == "softmax":
            self.ratio = measured(self.head()) / max(inner, 1e-12)
        self.drift = inner * self.ratio
        # In logarithms the ascent answers alike to drifts far above and far below the budget.
        excess = math.log(max(self.drift, 1e-12) / budget.value)
        self.multiplier *= math.exp(0.3 * max(-2.0, min(2.0, excess)))
        self.multiplier = min(max(self.multiplier, self.start / 100), self.start * 100)
