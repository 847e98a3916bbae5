"""Domain deltas: learnt under a drift budget, gated, fused, measured and certified.

Modules are loaded when they are first used: some of them need transformers.
"""

from importlib import import_module
from types import ModuleType

__all__ = [  # noqa: F822 - resolved below
    "adapter",
    "adapter_backbone",
    "adapter_config",
    "adapter_drift",
    "adapter_learning",
    "adapter_serving",
    "adapter_training",
    "anchor",
    "background",
    "budget",
    "cache",
    "certificate",
    "delta",
    "export",
    "fisher",
    "fusion",
    "gate",
    "head",
    "learning",
    "ledger",
    "measure",
    "objective",
    "planned",
    "record",
    "shards",
    "shares",
    "source",
    "summary",
    "token_law",
    "training",
    "windows",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
