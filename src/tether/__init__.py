"""tether: teach a language model new domains on a KL leash, fuse them, certify the drift.

Names are loaded when they are first used, so that `import tether` stays light. Importing the package is
enough for transformers' Auto classes to load its checkpoints (model type `causal_qwen`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tether._version import __version__
from tether.registration import register_when_needed

if TYPE_CHECKING:
    from tether import cauchy, merge, router, theory
    from tether.causal.checkpoint import save_checkpoint
    from tether.causal.config import CausalQwenConfig
    from tether.causal.loading import load, load_backbone
    from tether.causal.modeling import CausalQwenForCausalLM
    from tether.causal.noise import Noise
    from tether.causal.numbers import NumericTokenizer
    from tether.delta.adapter import Adapter
    from tether.delta.adapter_learning import learn_adapter
    from tether.delta.adapter_serving import serve
    from tether.delta.certificate import Certificate, certify
    from tether.delta.delta import Delta
    from tether.delta.export import export_plain
    from tether.delta.fusion import fuse
    from tether.delta.learning import learn_delta
    from tether.delta.leashed_trainer import LeashedTrainer
    from tether.delta.leashing import leash_adapter
    from tether.delta.trainer_leash import TrainerLeash
    from tether.delta.verification import verify

_NAMES = {
    "Adapter": "tether.delta.adapter",
    "CausalQwenConfig": "tether.causal.config",
    "CausalQwenForCausalLM": "tether.causal.modeling",
    "Certificate": "tether.delta.certificate",
    "Delta": "tether.delta.delta",
    "LeashedTrainer": "tether.delta.leashed_trainer",
    "Noise": "tether.causal.noise",
    "NumericTokenizer": "tether.causal.numbers",
    "TrainerLeash": "tether.delta.trainer_leash",
    "certify": "tether.delta.certificate",
    "export_plain": "tether.delta.export",
    "fuse": "tether.delta.fusion",
    "learn_adapter": "tether.delta.adapter_learning",
    "learn_delta": "tether.delta.learning",
    "leash_adapter": "tether.delta.leashing",
    "load": "tether.causal.loading",
    "load_backbone": "tether.causal.loading",
    "save_checkpoint": "tether.causal.checkpoint",
    "serve": "tether.delta.adapter_serving",
    "verify": "tether.delta.verification",
}
_PACKAGES = ("causal", "cauchy", "delta", "merge", "router", "theory")

__all__ = [
    "Adapter",
    "CausalQwenConfig",
    "CausalQwenForCausalLM",
    "Certificate",
    "Delta",
    "LeashedTrainer",
    "Noise",
    "NumericTokenizer",
    "TrainerLeash",
    "__version__",
    "cauchy",
    "certify",
    "export_plain",
    "fuse",
    "learn_adapter",
    "learn_delta",
    "leash_adapter",
    "load",
    "load_backbone",
    "merge",
    "router",
    "save_checkpoint",
    "serve",
    "theory",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"tether.{name}")
    raise AttributeError(f"module 'tether' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__


register_when_needed()
