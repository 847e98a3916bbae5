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
MOMENTS: dict[str, tuple[str, ...]] = {
    "exp_avg": ("exp_avg_sq_row", "exp_avg_sq_col", "RMS"),
    "momentum_buffer": ("square_avg",),
}
"""First moments of gradients, and the state beside which the same name is a mean of preconditioned updates."""


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
        groups = self._groups()
        missing = [p for p in experts.parameters() if id(p) not in groups]
        if missing:
            raise ConfigError(
                f"{name}: {len(missing)} of {len(experts.parameters())} trainable expert tensors are not in the "
                "optimizer; expected the optimizer made from the model's parameters as they are now (after "
                "fully_shard or any other wrapping)"
            )
        self.source: str | None = "gradient" if gradients else None
        self.stepped = torch.ones(experts.count, dtype=torch.float64) if any(experts.separate) else None
        # The same at the rate of second moments, from 0 as they are.
        self.squared = None if self.stepped is None else torch.zeros_like(self.stepped)
        self.steps = 0
        self.gradients: dict[int, Tensor] = {}

    def before_step(self) -> None:
        """Note which experts are about to move, and their gradients where those are the source."""
        groups = self._groups()
        if self.stepped is not None:
            moved = [any(p.grad is not None for p in own) for own in self.experts.separate]
            given = torch.tensor(moved, dtype=torch.float64)
            group = groups[id(self.experts.separate[0][0])]
            self.stepped.lerp_(given, 1 - _decay(group))
            if self.squared is not None and "betas" in group:
                self.squared.lerp_(given, 1 - float(group["betas"][1]))
        if self.source == "gradient":
            for parameter in self.experts.parameters():
                self._follow(parameter, _decay(groups[id(parameter)]))

    def after_step(self) -> None:
        """Count the step, and look after the first one for what the optimizer keeps."""
        self.steps += 1
        if self.source is None:
            states = [self.optimizer.state.get(p, {}) for p in self.experts.parameters()]
            # An expert that was not stepped yet has no state; the others tell.
            found = [kind for kind in MOMENTS if any(_has(state, kind) for state in states)]
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
            nothing to read: before the first step, before the second where gradients are the source, and while
            every rate is 0, as where it warms up.

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
        if raw is None:
            return None
        if cost == "paper-log":
            size = sum(p.numel() for p in self.experts.parameters()) // self.experts.count
            return log_information(raw, size)
        if cost == "shuffled":
            return shuffle_cost(raw, generator or torch.Generator().manual_seed(self.steps))
        return raw

    def _groups(self) -> dict[int, dict[str, Any]]:
        # Looked up each time: rates are scheduled, and loading a state puts new groups in place of the old.
        return {id(p): group for group in self.optimizer.param_groups for p in group["params"]}

    def _information(self) -> Tensor | None:
        # One energy for each parameter group: rates differ between groups, not inside one.
        own = {id(p) for p in self.experts.parameters()}
        energies: list[Tensor] = []
        rates: list[float] = []
        for group in self.optimizer.param_groups:
            members = own & {id(p) for p in group["params"]}
            if members:
                # Optimizers that find their rate themselves have none; one for all cancels in a mean of 1.
                rates.append(1.0 if group["lr"] is None else float(group["lr"]))
                decay = _decay(group)
                energies.append(
                    self.experts.total(lambda p, s, m=members, d=decay: self._energy(p, s, m, d))  # type: ignore[misc]
                )
        # A running mean of gradients falls by itself where an expert has none.
        share = None if self.source == "gradient" else self.stepped
        return information_cost(energies, rates, share) if any(rates) else None

    def _energy(self, parameter: nn.Parameter, stacked: bool, members: set[int], decay: float) -> Tensor:
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
            energy = energy * (1 - decay) ** 2
        return energy

    def _second(self, cost: str) -> Tensor:
        sizes = 0
        groups = self._groups()
        row = {id(p): e for e, parameters in enumerate(self.experts.separate) for p in parameters}

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
            group = groups[id(parameter)]
            if not stacked and self.stepped is not None and self.squared is not None:
                # What both moments would be had the steps without a gradient counted, as they do in a stack.
                expert = row[id(parameter)]
                taken = 1 - float(group["betas"][1]) ** float(state.get("step", self.steps))
                square = square * float(self.squared[expert]) / taken
                moment = moment * float(self.stepped[expert]) ** 0.5
            if cost == "snr":
                found = step_snr(moment, square, float(group.get("eps", 1e-8)))
            else:
                found = square.float().sqrt().flatten(1).double().sum(1)
            return found if stacked else found[0]

        total = self.experts.total(value)
        return total.sqrt() if cost == "snr" else total * self.experts.count / max(sizes, 1)

    def _follow(self, parameter: nn.Parameter, decay: float) -> None:
        stacked = any(parameter is p for p in self.experts.stacked)
        grad = parameter.grad
        empty = torch.zeros(self.experts.count if stacked else (), dtype=torch.float64)
        if grad is None:
            # Never seen is told apart from seen and gone: only the second decays to zero.
            if id(parameter) in self.gradients:
                self.gradients[id(parameter)].mul_(decay)
            return
        energy = squared_norms(grad, stacked)
        # A scaler skips the step of an overflow; a fused optimizer is called all the same.
        if not bool(torch.isfinite(energy).all()):
            return
        self.gradients.setdefault(id(parameter), empty).mul_(decay).add_(energy.to(empty), alpha=1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Give what has been followed, to be saved with the optimizer's state.

        Returns:
            Tensors and plain values.
        """
        order = {id(p): str(i) for i, p in enumerate(self.experts.parameters())}
        return {
            "source": self.source, "steps": self.steps, "stepped": self.stepped, "squared": self.squared,
            "gradients": {order[key]: value.clone() for key, value in self.gradients.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was saved.

        Args:
            state: of `state_dict`, of a reader of the same experts.
        """
        self.source, self.steps = state["source"], state["steps"]
        self.stepped, self.squared = (
            None if state[key] is None else state[key].clone() for key in ("stepped", "squared")
        )
        parameters = self.experts.parameters()
        self.gradients = {id(parameters[int(i)]): value.clone() for i, value in state["gradients"].items()}


def _decay(group: dict[str, Any]) -> float:
    if "betas" in group:
        return float(group["betas"][0])
    return float(group.get("momentum") or DECAY)


def _has(state: dict[str, Any], kind: str) -> bool:
    # A mean of updates that are divided by their own size already says nothing of the gradient.
    return _usable(state.get(kind)) and not any(key in state for key in MOMENTS[kind])


def _usable(value: Any) -> bool:
    # Eight-bit states are codes, not moments.
    return isinstance(value, Tensor) and value.is_floating_point()


def _local(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
