"""The few lines of code that a checkpoint carries, by which transformers loads it where nobody imported tether."""

import os
from pathlib import Path
from typing import Any

__all__ = ["CODE", "Portable", "auto_map", "tokenizer_map", "write_code"]

CODE = "tether_checkpoint"
"""Name of the module in the checkpoint's folder."""
_TEXT = '''"""By this transformers loads a checkpoint, with trust_remote_code=True; after `import tether` it is idle."""

try:
    from tether.causal.config import CausalQwenConfig
    from tether.causal.modeling import CausalQwenForCausalLM
    from tether.causal.numbers import NumericTokenizer
    from tether.delta.adapter_config import AdaptedConfig
    from tether.delta.adapter_serving import AdaptedForCausalLM
except ImportError as error:
    raise ImportError(
        "this checkpoint was made by the Python package tether, and is loaded by it; it could not be imported "
        f"({error}). Type: pip install tether"
    ) from error

__all__ = [
    "AdaptedConfig",
    "AdaptedForCausalLM",
    "CausalQwenConfig",
    "CausalQwenForCausalLM",
    "NumericTokenizer",
]
'''


class Portable:
    """What transformers finds through the carried code."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Do nothing: transformers would put the file of the class into each folder, where it cannot be imported.

        Args:
            auto_class: as in transformers.
        """


def auto_map(config: str, model: str) -> dict[str, str]:
    """Say which classes transformers' Auto classes find in the carried code.

    Args:
        config: name of the configuration's class.
        model: name of the model's class.

    Returns:
        The field `auto_map` of `config.json`.
    """
    return {"AutoConfig": f"{CODE}.{config}", "AutoModelForCausalLM": f"{CODE}.{model}"}


def tokenizer_map(tokenizer: str) -> dict[str, Any]:
    """Say which class AutoTokenizer finds in the carried code.

    Args:
        tokenizer: name of the class.

    Returns:
        The field `auto_map` of `tokenizer_config.json`: no slow tokenizer, and this fast one.
    """
    return {"AutoTokenizer": [None, f"{CODE}.{tokenizer}"]}


def write_code(folder: str | os.PathLike[str]) -> None:
    """Put the code beside a checkpoint.

    Args:
        folder: of the checkpoint; made if need be.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{CODE}.py").write_text(_TEXT, encoding="utf-8", newline="\n")
