"""Options of a shaper, checked before anything is touched."""

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from tether.errors import ConfigError
from tether.router.cost import CAP, COSTS

__all__ = ["COSTLY", "EVERY", "FORMS", "STRONG", "Shaping", "check_options", "inner_optimizer"]

FORMS = {
    "tax": "lam * sum p c: mean probability times normalised cost",
    "balance": "lam * k * sum p sqrt(c f): the tax with costs tempered by the load of the batch, as strong as switch",
    "prior": "lam * KL(p || q), q towards cheap experts; with cost='uniform' plain balancing by entropy",
    "goodness": "lam * entropy of logits plus goodness; experimental: an entropy minimiser",
    "entropy": "the same with goodness 0, its control",
    "switch": "lam * E sum f P, the load balancing of the Switch Transformer",
    "bias": "no loss: a bias on the choice that follows the load",
    "z": "lam * squared log-sum-exp of the logits",
    "none": "nothing: measure only",
}
COSTLY = ("tax", "balance", "prior", "goodness")
"""Forms that need to know what experts cost."""
STRONG = 0.05
"""A tax or balance from here on tends to undo specialisation."""
EVERY = 10
"""Steps between two readings of the cost: at every step they would take about 2 % of its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shaping:
    """How a training shapes the routers of the model that it trains.

    Attributes:
        form: one of `FORMS` but `bias`.
        cost: one of `tether.router.cost.COSTS`.
        lam: strength, finite, >= 0.

    Raises:
        ConfigError: unknown, out of range or without effect, see `check_options`, or form `bias`.

    Example:
        >>> Shaping(form="prior", lam=0.05).cost
        'information'
    """

    form: str = "balance"
    cost: str = "information"
    lam: float = 0.01

    def __post_init__(self) -> None:
        check_options(self.form, self.cost, self.lam, EVERY, 0.0, 0.0, CAP)
        if self.form == "bias":
            raise ConfigError(
                "form='bias': its bias on the choice is no weight of the model, and what a training saves would choose "
                "without it; use balance, prior or switch, or RoutingShaper in a loop of your own"
            )


def check_options(form: str, cost: str, lam: float, every: int, z: float, rate: float, cap: float) -> None:
    """Refuse options that are unknown, out of range or without effect.

    Args:
        form: one of `FORMS`.
        cost: one of `tether.router.cost.COSTS`.
        lam: strength, finite, >= 0.
        every: steps between two readings, >= 1.
        z: strength of the z-loss, finite, >= 0.
        rate: step of the bias, finite, >= 0.
        cap: largest normalised cost, > 1.

    Raises:
        ConfigError: any of these.
    """
    if form not in FORMS:
        raise ConfigError(f"form={form!r}: expected one of {', '.join(FORMS)}")
    if cost not in COSTS:
        raise ConfigError(f"cost={cost!r}: expected one of {', '.join(COSTS)}")
    for name, value in {"lam": lam, "z": z, "rate": rate}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}={value}: expected a finite number >= 0")
    if every != int(every) or every < 1 or not cap > 1:
        raise ConfigError(f"every={every}, cap={cap}: expected a whole number >= 1 and cap > 1")
    if form == "tax" and cost == "uniform":
        raise ConfigError(
            "form='tax' with cost='uniform' is the constant lam, without a gradient; use form='prior' with it"
        )
    if form in {"balance", "prior"} and cost == "paper-log":
        raise ConfigError(
            f"form={form!r} takes costs >= 0, 'paper-log' is negative; use form='tax' to study it"
        )


def inner_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """Unwrap an optimizer.

    Args:
        optimizer: of torch, or one of accelerate around it.

    Returns:
        The optimizer that steps and holds the state.
    """
    # accelerate wraps an optimizer in another one, whose hooks do not see the steps.
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
