"""Make transformers know the model types of tether without importing transformers now.

`import tether` must be enough for `AutoModelForCausalLM.from_pretrained(converted)`, for its `AutoTokenizer` and its
`pipeline`, and must stay light for the command line. So the import of transformers' modules that look such names up
is awaited, and ours register themselves right after it. The models follow with the first config made: their modules
need all of transformers, and while its Auto modules are being imported much of it cannot be had yet.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["register_when_needed"]

_OURS = {
    "transformers.models.auto.configuration_auto": ("tether.causal.config", "tether.delta.adapter_config"),
    "transformers.models.auto.tokenization_auto": ("tether.causal.numbers",),
    "transformers.pipelines": ("tether.causal.pipeline",),
}
"""Which of our modules register themselves with which of transformers'."""
_THERE = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.tokenization_auto": "AutoTokenizer",
    "transformers.pipelines": "pipeline",
}
"""What each of them has once it can be registered with; before, it is still being imported."""


class _ThenImport(Loader):
    """Run a module as usual, then import ours."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _import_ours(module.__name__)


def _import_ours(awaited: str) -> None:
    first = sys.modules.get("tether.causal.config")
    if first is not None and not hasattr(first, "CausalQwenConfig"):
        return  # whoever imports transformers is our own first module; it calls again at its end
    for name in _OURS[awaited]:
        import_module(name)


class _Await(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _OURS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenImport(spec.loader)
        return spec


def register_when_needed() -> None:
    """Register with what transformers has loaded already, and await the rest; safe to call twice."""
    for awaited in _OURS:
        if hasattr(sys.modules.get(awaited), _THERE[awaited]):
            _import_ours(awaited)
    if not any(isinstance(finder, _Await) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Await())
