"""The model: text -> backbone -> abduction -> U -> action -> tokens and values.

Modules are loaded when they are first used: some of them need transformers.
"""

from importlib import import_module
from types import ModuleType

__all__ = [  # noqa: F822 - resolved below
    "calibration",
    "checkpoint",
    "config",
    "counterfactual",
    "dataset",
    "evaluation",
    "fused",
    "gates",
    "generation",
    "layers",
    "loading",
    "losses",
    "modeling",
    "noise",
    "numbers",
    "posterior",
    "training",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
