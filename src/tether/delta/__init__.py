"""Domain deltas: learnt under a drift budget, gated, fused, measured and certified.

Modules are loaded when they are first used: some of them need transformers.
"""

from importlib import import_module
from types import ModuleType

__all__ = [  # noqa: F822 - resolved below
    "account",
    "adapter",
    "adapter_backbone",
    "adapter_config",
    "adapter_drift",
    "adapter_learning",
    "adapter_memory",
    "adapter_mixture",
    "adapter_passes",
    "adapter_serving",
    "adapter_training",
    "anchor",
    "background",
    "budget",
    "cache",
    "carried",
    "certificate",
    "delta",
    "export",
    "fare",
    "fisher",
    "fusion",
    "gate",
    "head",
    "held_out",
    "learning",
    "ledger",
    "measure",
    "objective",
    "outcome",
    "planned",
    "ray",
    "record",
    "regret",
    "shards",
    "shares",
    "source",
    "strength",
    "summary",
    "token_law",
    "training",
    "windows",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
