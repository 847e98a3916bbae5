"""Make transformers know the model types of tether without importing transformers now.

`import tether` must be enough for `AutoModelForCausalLM.from_pretrained(converted)`, and must stay light
for the command line. So the import of transformers' Auto modules is awaited, and the model registers
itself right after it.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["register_when_needed"]

_AWAITED = {
    "transformers.models.auto.configuration_auto": "tether.causal.config",
    "transformers.models.auto.modeling_auto": "tether.causal.modeling",
    "tether.causal.modeling": "tether.delta.adapter_serving",
}


class _ThenImport(Loader):
    """Run a module as usual, then import another."""

    def __init__(self, loader: Loader, then: str) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module(self.then)


class _Await(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _AWAITED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenImport(spec.loader, _AWAITED[name])
        return spec


def register_when_needed() -> None:
    """Register with what transformers has loaded already, and await the rest; safe to call twice."""
    for awaited, ours in _AWAITED.items():
        if awaited in sys.modules:
            import_module(ours)
    if not any(isinstance(finder, _Await) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Await())
