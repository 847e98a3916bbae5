"""Find the language tower of a loaded model, and the linear layers in it."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from torch import nn

from tether.errors import ConfigError

__all__ = ["FAMILIES", "Tower", "find_linears", "find_tower", "refuse_image_positions"]

FAMILIES: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Module families of the Llama and Qwen architectures, in the order of the forward pass."""


class Tower(NamedTuple):
    """The decoder of a model.

    Attributes:
        prefix: name of the list of layers, for example `model.layers` or `model.language_model.layers`.
        layers: the decoder layers.
    """

    prefix: str
    layers: nn.ModuleList


def find_tower(model: Any) -> Tower:
    """Find the decoder layers of a causal LM or of the language tower of a vision-language model.

    Args:
        model: a transformers model.

    Returns:
        The layers and their name.

    Raises:
        ConfigError: the model has no list of decoder layers.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers):
        return Tower(next(name for name, module in model.named_modules() if module is layers), layers)
    raise ConfigError(
        f"{type(model).__name__}: its decoder {type(decoder).__name__} has no list `layers`; expected a model "
        "of the Llama or Qwen families, or a wrapper with such a language tower"
    )


def find_linears(model: Any, families: Sequence[str] = FAMILIES) -> list[dict[str, nn.Linear]]:
    """List the linear layers of chosen families, decoder layer by decoder layer.

    Args:
        model: a transformers model.
        families: ends of module names inside a decoder layer.

    Returns:
        For each decoder layer, full module name to module, in the order of `families`.

    Raises:
        ConfigError: a family that no layer has; the error lists those there are.
    """
    tower = find_tower(model)
    found: list[dict[str, nn.Linear]] = []
    for number, layer in enumerate(tower.layers):
        inside = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        unknown = [family for family in families if family not in inside]
        if unknown or not families:
            raise ConfigError(
                f"no module {', '.join(unknown) or '(none asked for)'} in {tower.prefix}.{number}; it has "
                f"{', '.join(inside)}"
            )
        found.append({f"{tower.prefix}.{number}.{family}": inside[family] for family in families})
    return found


def refuse_image_positions(model: Any) -> None:
    """Refuse image probes where rotary positions have axes of time, height and width.

    Paths and packs count positions along one axis; on such models (Qwen2-VL and later) an image would be read
    at the wrong places. Text probes are right there, since the three axes agree on text.

    Args:
        model: a vision-language model that image probes are meant for.

    Raises:
        ConfigError: the model has multimodal rotary sections.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope:
        raise ConfigError(
            f"{type(model).__name__} places images on three rotary axes, which image probes do not support yet; "
            "give text probes for this model"
        )
