"""The loop of an adapter's fit: Adam on the LoRA, dual ascent on the multiplier of the drift on base text."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tether.delta.adapter_ascent import Ascent
from tether.delta.adapter_drift import adapter_drift
from tether.delta.adapter_share import StepShare
from tether.delta.attached import Attached, frozen_twin
from tether.delta.budget import Budget
from tether.delta.cache import StateCache, text_inputs
from tether.delta.held_out import HELD_OUT, check_share
from tether.delta.objective import full_cross_entropy, output_fisher
from tether.delta.output_head import output_head
from tether.delta.recomputing import recomputing
from tether.delta.source import reference
from tether.delta.training import Step
from tether.delta.unfinished import State, Unfinished
from tether.delta.values import next_values, value_head
from tether.delta.windows import Batch
from tether.errors import ConfigError
from tether.processes import writes

__all__ = ["AdapterFit", "AdapterTraining"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFit:
    """Options of an adapter's fit.

    Attributes:
        budget: the constraint on base text; None fits without one (plain LoRA).
        replay: a fixed multiplier of the drift on base text in place of dual ascent (plain LoRA with KL replay);
            needs no budget. With one, the factor that meets it is still found.
        rank: r of the LoRA.
        alpha: its update is alpha / r B A.
        epochs: passes over the domain text.
        batch: domain windows a step.
        base_batch: base windows a step.
        lr: peak learning rate of Adam.
        gate: fit a one-class gate too.
        probe: held-out base tokens on which the budget is met.
        held_out: share of the domain's tokens that the fit never sees, in [0, 0.5]; see `tether.delta.held_out`.
        seed: of the start and the shuffles.
        gradient_checkpointing: keep what goes into each layer alone, and compute the rest again in the backward pass:
            less memory, more time, the same adapter.
    """

    budget: Budget | None = field(default_factory=Budget)
    replay: float | None = None
    rank: int = 8
    alpha: int = 16
    epochs: int = 1
    batch: int = 2
    base_batch: int = 1
    lr: float = 1e-3
    gate: bool = True
    probe: int = 2048
    held_out: float = HELD_OUT
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        counts = (self.rank, self.alpha, self.epochs, self.batch, self.base_batch, self.probe)
        if min(counts) < 1 or not self.lr > 0:
            raise ConfigError(
                f"rank={self.rank}, alpha={self.alpha}, epochs={self.epochs}, batch={self.batch}, "
                f"base_batch={self.base_batch}, probe={self.probe}, lr={self.lr}: expected positive numbers"
            )
        check_share(self.held_out)
        if self.replay is not None and not (math.isfinite(self.replay) and self.replay >= 0):
            raise ConfigError(f"replay={self.replay}: expected a multiplier, finite and >= 0")
        if self.budget is not None and self.budget.penalty is not None:
            raise ConfigError(
                "a penalty on the domain's own contexts is a delta's form of learning; give an adapter a budget, or "
                "replay on base text"
            )
        if self.budget is not None and self.budget.hard:
            raise ConfigError(
                "a hard budget limits every training context: an adapter is scaled by one factor and has no move a "
                "context that could be shortened; give a mean or a quantile, and leash the served model"
            )

    @property
    def holds(self) -> bool:
        """Whether base text takes part in the fit."""
        return self.budget is not None or bool(self.replay)

    @property
    def ascends(self) -> bool:
        """Whether the multiplier follows the drift."""
        return self.budget is not None and self.replay is None


class AdapterTraining:
    """The loop: Adam on A and B, dual ascent on the multiplier.

    Args:
        model: the base; nothing of it is changed.
        attached: holds the adapter.
        name: of the adapter.
        domain: states of the domain's text, of which only the tokens are read.
        base: states of base text.
        fit: options.
        generator: of the shuffles.

    Attributes:
        ascent: the multiplier of the drift on base text.
        curve: figures at about thirty of the steps.
        order: of the domain's windows in this epoch.
    """

    def __init__(
        self,
        model: Any,
        attached: Attached,
        name: str,
        domain: StateCache,
        base: StateCache,
        fit: AdapterFit,
        generator: torch.Generator,
    ) -> None:
        # Gradients pass through the heads to the adapter, and must not be left in the model's own weights.
        heads = {part: frozen_twin(getattr(model, part)) for part in ("abduction", "action")}
        frozen = SimpleNamespace(embed=torch.no_grad()(model.embed), **heads)
        self.model, self.attached, self.name = frozen, attached, name
        self.domain, self.base, self.fit, self.generator = domain, base, fit, generator
        self.metric = "softmax" if fit.budget is None else fit.budget.metric
        self.ascent = Ascent(fit.budget, fit.replay)
        self.fisher = None
        if self.metric == "fisher":
            some = reference(model, base.states[:1024].float()).loc
            self.fisher = output_fisher(output_head(model), some)
        self.values, self.next_values = value_head(model), next_values(model, domain.windows)
        scored = domain.windows.targets >= 0
        self.numbers = float((~self.next_values[scored].isnan()).double().mean())
        self.curve: list[dict[str, float]] = []
        self.share = StepShare()
        self.order = torch.zeros(0, dtype=torch.int64)

    @property
    def multiplier(self) -> float:
        """Of the drift on base text, now."""
        return self.ascent.multiplier

    @property
    def steps_an_epoch(self) -> int:
        """Steps that a pass over the domain's windows takes."""
        return math.ceil((len(self.domain.windows.starts) - 1) / self.fit.batch)

    def batches(self, done: int = 0) -> Iterator[Batch]:
        """Shuffle the domain's windows once an epoch.

        Args:
            done: steps that were taken already, the last of them in `order`.

        Yields:
            Windows of a step.
        """
        windows = self.domain.windows
        first, taken = divmod(done, self.steps_an_epoch)
        for epoch in range(first, self.fit.epochs):
            if epoch > first or not taken:
                self.order = torch.randperm(len(windows.starts) - 1, generator=self.generator)
            left = self.order.split(self.fit.batch)[taken if epoch == first else 0 :]
            yield from (windows.batch(rows) for rows in left)

    def run(
        self, on_step: Step | None, *, state: State | None = None, unfinished: Unfinished | None = None
    ) -> None:
        """Fit the adapter.

        Args:
            on_step: called with step, steps, nll, drift and multiplier.
            state: where this fit was stopped; it goes on as if it had not been, bit for bit on a CPU.
            unfinished: where it is kept meanwhile.
        """
        wanted = self.fit.gradient_checkpointing
        with torch.enable_grad(), recomputing(self.attached.backbone, wanted=wanted):
            self._take_steps(on_step, state, unfinished)

    def _take_steps(self, on_step: Step | None, state: State | None, unfinished: Unfinished | None) -> None:
        fit, began = self.fit, time.process_time()
        learnt = {
            name: values for name, values in self.attached.peft.named_parameters() if values.requires_grad
        }
        optimizer = torch.optim.Adam(learnt.values(), lr=fit.lr, betas=(0.9, 0.99))
        steps = fit.epochs * self.steps_an_epoch
        warm = max(1, steps // 8)
        done = 0
        if state is not None:
            done, began = state.step, began - state.cpu_seconds
            self._go_on_from(state, learnt, optimizer)
        for step, batch in enumerate(self.batches(done), start=done + 1):
            for group in optimizer.param_groups:
                group["lr"] = fit.lr * min(step / warm, 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))
            optimizer.zero_grad()
            # Two backward passes, so that the graphs of both texts are never held at once.
            own, part = self.share.of_domain(self.domain.windows, batch)
            nll = torch.zeros(()) if own is None else part * self.domain_loss(own)
            if own is not None:
                nll.backward()
            if fit.holds:
                pressed = self.base_drift()
                if pressed.requires_grad:
                    (self.multiplier * pressed).backward()
                if step > warm and fit.ascends:
                    self.ascent.step()
            nll = self.share.add_up(learnt.values(), nll)
            optimizer.step()
            entry = {"step": step, "steps": steps, "nll": nll.item(), "multiplier": self.multiplier}
            entry["drift"] = 0.0 if self.ascent.drift is None else self.ascent.drift
            if step % max(1, steps // 30) == 0 or step == steps:
                self.curve.append(entry)
            if unfinished is not None and writes() and (step == steps or unfinished.is_due()):
                unfinished.keep(self._state(step, learnt, optimizer, time.process_time() - began))
            if on_step:
                on_step(entry)

    def _state(
        self, step: int, learnt: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, cpu_seconds: float
    ) -> State:
        tensors = {"order": self.order, "generator": self.generator.get_state()}
        for name, values in learnt.items():
            tensors[f"weight.{name}"] = values
            tensors |= {f"{kind}.{name}": kept for kind, kept in optimizer.state[values].items()}
        return State(tensors, step, self.multiplier, self.ascent.drift, self.curve, cpu_seconds)

    @torch.no_grad()
    def _go_on_from(
        self, state: State, learnt: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        held = state.tensors
        for name, values in learnt.items():
            values.copy_(held[f"weight.{name}"])
            # Steps are counted on the CPU, as torch has it.
            optimizer.state[values] = {
                "step": held[f"step.{name}"],
                **{kind: held[f"{kind}.{name}"].to(values.device) for kind in ("exp_avg", "exp_avg_sq")},
            }
        self.order = held["order"]
        self.generator.set_state(held["generator"])
        self.ascent.go_on_from(state.multiplier, state.drift)
        self.curve = list(state.curve)

    def domain_loss(self, batch: Batch) -> Tensor:
        """Compute the loss of the domain, of its numbers too where the model has them.

        Args:
            batch: windows of its text.

        Returns:
            Mean negative log likelihood, nats, and lambda times the mean loss of numbers, as training has it.
        """
        windows, at = self.domain.windows, self.domain.windows.positions(batch)
        targets = windows.targets[at]
        states = self.attached.states(self.name, **text_inputs(self.model, batch)).last_hidden_state
        states, values = states[batch.mask][targets >= 0], self.next_values[at][targets >= 0]
        output = output_head(self.model)
        loc, log_scale = self.model.abduction(states.to(output.weight.dtype))
        values = values.to(loc.device)
        loss = full_cross_entropy(loc, targets[targets >= 0].to(loc.device), output)
        here = ~values.isnan()
        if self.values is None or not bool(here.any()):
            return loss
        of_values = self.values.nll(loc[here], log_scale[here].exp(), values[here])
        return loss + self.values.share * of_values.sum() / (len(values) * self.numbers)

    def base_drift(self) -> Tensor:
        """Compute the drift on base windows drawn at random.

        Returns:
            What the fit is penalised for, nats; of several processes each has its part of it.
        """
        windows = self.base.windows
        rows = torch.randint(len(windows.starts) - 1, (self.fit.base_batch,), generator=self.generator)
        own = self.share.of_base(windows, rows)
        drifts = self._drifts(windows.batch(own)) if len(own) else torch.zeros(0)
        everywhere = self.share.everywhere(drifts)
        budget = self.fit.budget
        self.ascent.see(float(everywhere.mean() if budget is None else budget.statistic(everywhere)))
        return self.share.pressed(drifts, everywhere, torch.mean if budget is None else budget.pressed)

    def _drifts(self, batch: Batch) -> Tensor:
        windows = self.base.windows
        after = self.attached.states(self.name, **text_inputs(self.model, batch)).last_hidden_state[
            batch.mask
        ]
        before = self.base.states[windows.positions(batch)].float().to(after.device)
        return adapter_drift(self.metric, self.model, before, after, self.fisher)
