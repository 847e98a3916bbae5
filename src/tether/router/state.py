"""Reads what the cost is made of from an optimizer: first moments, momentum, or a running mean of gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tether.errors import ConfigError
from tether.router.cost import information_cost, log_information, shuffle_cost, step_snr
from tether.router.experts import Experts, squared_norms

__all__ = ["StateReader"]

DECAY = 0.9
"""Of running means, where the optimizer has no first-moment decay of its own."""


class StateReader:
    """Follows one layer's experts in an optimizer.

    Call `before_step` before and `after_step` after each step of the optimizer.

    Args:
        optimizer: any torch optimizer that holds the experts' parameters.
        experts: the layer's experts.
        name: of the layer, for errors.
        gradients: follow gradients even where the optimizer has first moments.

    Attributes:
        source: `exp_avg`, `momentum_buffer` or `gradient`; None before the first step.
        stepped: running share of steps that moved each expert, shape (E,), or None when all are stacked.

    Raises:
        ConfigError: parameters of the experts that the optimizer does not have.
    """

    def __init__(
        self, optimizer: Optimizer, experts: Experts, name: str = "experts", *, gradients: bool = False
    ) -> None:
        self.optimizer, self.experts, self.name = optimizer, experts, name
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in experts.parameters() if id(p) not in groups]
        if missing:
            raise ConfigError(
                f"{name}: {len(missing)} of {len(experts.parameters())} trainable expert tensors are not in the "
                "optimizer; expected the optimizer made from the model's parameters as they are now (after "
                "fully_shard or any other wrapping)"
            )
        # A rate that is scheduled changes inside the group, so the group is kept, not the rate.
        self.groups: dict[int, dict[str, Any]] = {id(p): groups[id(p)] for p in experts.parameters()}
        self.source: str | None = "gradient" if gradients else None
        self.stepped = torch.ones(experts.count, dtype=torch.float64) if any(experts.separate) else None
        self.steps = 0
        self.gradients: dict[int, Tensor] = {}

    def before_step(self) -> None:
        """Note which experts are about to move, and their gradients where those are the source."""
        if self.stepped is not None:
            given = [any(p.grad is not None for p in own) for own in self.experts.separate]
            decay = self._decay(self.experts.separate[0][0])
            self.stepped.lerp_(torch.tensor(given, dtype=torch.float64), 1 - decay)
        if self.source == "gradient":
            for parameter in self.experts.parameters():
                self._follow(parameter)

    def after_step(self) -> None:
        """Count the step, and look after the first one for what the optimizer keeps."""
        self.steps += 1
        if self.source is None:
            states = [self.optimizer.state.get(p, {}) for p in self.experts.parameters()]
            # An expert that was not stepped yet has no state; the others tell.
            kinds = ("exp_avg", "momentum_buffer")
            found = [kind for kind in kinds if any(_usable(state.get(kind)) for state in states)]
            if found:
                self.source = found[0]
            elif any(p.grad is not None for p in self.experts.parameters()):
                # Seen from the next step on.
                self.source = "gradient"

    @torch.no_grad()
    def read(self, cost: str, generator: torch.Generator | None = None) -> Tensor | None:
        """Compute a cost from the state as it is now.

        Args:
            cost: one of `tether.router.cost.COSTS`.
            generator: of the permutation, for `shuffled`.

        Returns:
            Costs before normalisation, shape (E,), float64, replicated over processes; None while there is
            nothing to read: before the first step, and before the second where gradients are the source.

        Raises:
            ConfigError: steps were taken and neither state nor gradients were seen, or the cost needs moments
                that the optimizer does not keep.
        """
        if cost == "uniform":
            return torch.ones(self.experts.count, dtype=torch.float64)
        if self.steps == 0:
            return None
        if cost in {"snr", "fisher"}:
            return self._second(cost)
        if self.source is None or (self.source == "gradient" and not self.gradients and self.steps > 1):
            raise ConfigError(
                f"{self.name}: after {self.steps} steps {type(self.optimizer).__name__} holds no first moments "
                "(exp_avg, momentum_buffer) of the experts and they had no gradient before a step: no usable source of "
                "their cost. Expected an optimizer of the Adam family, SGD with momentum, or gradients in .grad when "
                "step() is called; sharded optimizers that move gradients elsewhere do not give them"
            )
        if self.source == "gradient" and not self.gradients:
            return None
        raw = self._information()
        if cost == "paper-log":
            size = sum(p.numel() for p in self.experts.parameters()) // self.experts.count
            return log_information(raw, size)
        if cost == "shuffled":
            return shuffle_cost(raw, generator or torch.Generator().manual_seed(self.steps))
        return raw

    def _information(self) -> Tensor:
        # One energy for each parameter group: rates differ between groups, not inside one.
        energies: dict[int, Tensor] = {}
        rates: dict[int, float] = {}
        for group in self.groups.values():
            key = id(group)
            if key not in rates:
                rates[key] = float(group["lr"])
                members = {id(p) for p in group["params"]}
                energies[key] = self.experts.total(lambda p, s, m=members: self._energy(p, s, m))  # type: ignore[misc]
        return information_cost([energies[key] for key in rates], [rates[key] for key in rates], self.stepped)

    def _energy(self, parameter: nn.Parameter, stacked: bool, members: set[int]) -> Tensor:
        empty = torch.zeros(self.experts.count if stacked else (), dtype=torch.float64)
        if id(parameter) not in members:
            return empty
        if self.source == "gradient":
            return self.gradients.get(id(parameter), empty)
        moment = self.optimizer.state.get(parameter, {}).get(self.source)
        if moment is None:
            return empty
        energy = squared_norms(moment, stacked)
        if self.source == "momentum_buffer":
            # SGD's buffer is a sum, not a mean, of past gradients.
            energy = energy * (1 - self._decay(parameter)) ** 2
        return energy

    def _second(self, cost: str) -> Tensor:
        sizes = 0

        def value(parameter: nn.Parameter, stacked: bool) -> Tensor:
            nonlocal sizes
            sizes += parameter.numel()
            state = self.optimizer.state.get(parameter, {})
            moment, square = state.get("exp_avg"), state.get("exp_avg_sq")
            if not _usable(moment) or not _usable(square):
                if state:
                    raise ConfigError(
                        f"cost={cost!r} needs exp_avg and exp_avg_sq, {type(self.optimizer).__name__} keeps "
                        f"{', '.join(state)}; use cost='information'"
                    )
                return torch.zeros(self.experts.count if stacked else (), dtype=torch.float64)
            moment, square = (_local(t if stacked else t.unsqueeze(0)) for t in (moment, square))
            if cost == "snr":
                found = step_snr(moment, square, float(self.groups[id(parameter)].get("eps", 1e-8)))
            else:
                found = square.float().sqrt().flatten(1).double().sum(1)
            return found if stacked else found[0]

        total = self.experts.total(value)
        return total.sqrt() if cost == "snr" else total * self.experts.count / max(sizes, 1)

    def _follow(self, parameter: nn.Parameter) -> None:
        stacked = any(parameter is p for p in self.experts.stacked)
        grad = parameter.grad
        empty = torch.zeros(self.experts.count if stacked else (), dtype=torch.float64)
        if grad is None:
            # Never seen is told apart from seen and gone: only the second decays to zero.
            if id(parameter) in self.gradients:
                self.gradients[id(parameter)].mul_(self._decay(parameter))
            return
        energy = squared_norms(grad, stacked)
        decay = self._decay(parameter)
        self.gradients.setdefault(id(parameter), empty).mul_(decay).add_(energy.to(empty), alpha=1 - decay)

    def _decay(self, parameter: nn.Parameter) -> float:
        group = self.groups[id(parameter)]
        if "betas" in group:
            return float(group["betas"][0])
        return float(group.get("momentum") or DECAY)


def _usable(value: Any) -> bool:
    # Eight-bit states are codes, not moments.
    return isinstance(value, Tensor) and value.is_floating_point()


def _local(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
