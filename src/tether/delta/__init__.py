"""Domain deltas: learnt under a drift budget, gated, fused, measured and certified.

Modules are loaded when they are first used: some of them need transformers.
"""

from importlib import import_module
from types import ModuleType

__all__ = [  # noqa: F822 - resolved below
    "account",
    "adapter",
    "adapter_ascent",
    "adapter_backbone",
    "adapter_config",
    "adapter_domain",
    "adapter_drift",
    "adapter_layers",
    "adapter_learning",
    "adapter_memory",
    "adapter_mixture",
    "adapter_passes",
    "adapter_probe",
    "adapter_scaling",
    "adapter_serving",
    "adapter_share",
    "adapter_source",
    "adapter_training",
    "anchor",
    "background",
    "budget",
    "cache",
    "carried",
    "certificate",
    "dealt",
    "delta",
    "difference",
    "export",
    "fare",
    "fisher",
    "foreign",
    "foreign_config",
    "fusion",
    "gate",
    "head",
    "held_out",
    "learning",
    "leashed_trainer",
    "leashing",
    "ledger",
    "measure",
    "objective",
    "outcome",
    "planned",
    "ray",
    "recomputing",
    "record",
    "regret",
    "shards",
    "shares",
    "source",
    "strength",
    "summary",
    "token_law",
    "trainer_leash",
    "training",
    "unadapted",
    "unfinished",
    "windows",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
