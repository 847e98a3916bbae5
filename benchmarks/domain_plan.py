"""Plans of the benchmark of domains: how much text, which arms, how many seeds."""

from dataclasses import dataclass

__all__ = ["CHARTS", "DELTAS", "MERGES", "OTHER", "PIECE", "PLANS", "Plan"]

OTHER = "manual"
"""Python's language reference: general prose for no calibration, near to the domain of code in subject."""
PIECE = 1200
DELTAS = {"delta": ("last", False), "delta-multi": ("multi", False), "delta-free": ("last", True)}
MERGES = {
    "cat": {"combination_type": "cat"},
    "linear": {"combination_type": "linear"},
    "ties": {"combination_type": "ties", "density": 0.5},
    "dare_ties": {"combination_type": "dare_ties", "density": 0.5},
    "average": {"combination_type": "cat"},
}
CHARTS = ("linear", "symmetric", "geodesic", "rootkl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is done; a folder holds the results of one plan.

    Attributes:
        train: domain tokens learnt from.
        test: tokens measured on, each text.
        base: base documents, of both kinds together, of which 40 % are held out to meet budgets on.
        probe: base tokens on which an adapter meets its budget.
        budget: mean softmax KL on base text, nats.
        beta: multiplier of KL replay.
        betas: others tried on the first seed, as a user would tune by hand.
        adapters: of `lora`, `lora-3` (epochs), `replay` and `leashed`, those learnt on every seed.
        once: arms learnt on the first seed only.
        deltas: which of `DELTAS`, `delta` among them.
        seeds: how many.
    """

    train: int = 30_000
    test: int = 5_000
    base: int = 150
    probe: int = 2048
    budget: float = 0.05
    beta: float = 1.0
    betas: tuple[float, ...] = (0.3, 3.0)
    adapters: tuple[str, ...] = ("lora", "replay", "leashed")
    once: tuple[str, ...] = ("lora-3",)
    deltas: tuple[str, ...] = tuple(DELTAS)
    seeds: int = 3


PLANS = {
    "full": Plan(),
    "long": Plan(test=1_500, probe=1024, betas=(0.3,), once=()),
    # Of `long` what a change of the fit of deltas bears on, and KL replay for the figure.
    "deltas": Plan(test=1_500, probe=1024, betas=(), adapters=("lora",), once=("replay-1",)),
    "middle": Plan(train=8_000, test=640, probe=768),
    "fast": Plan(
        train=1_100,
        test=256,
        base=24,
        probe=256,
        betas=(),
        adapters=("lora", "leashed"),
        once=(),
        deltas=("delta",),
        seeds=1,
    ),
}
