"""A frozen backbone larger than a device: which layers lie where, and how those elsewhere are read.

accelerate brings the weights of a layer that lies in memory or on disk to the device when the layer runs, and lets them
go afterwards. The embedding, the output head, abduction, action and all that is fused stay on the device. Deltas are
learnt, served and certified so; what trains through the layers, or writes their weights, wants them whole.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.errors import ConfigError

__all__ = [
    "AUTO",
    "Offloaded",
    "fetched",
    "follow_input",
    "is_offloaded",
    "make_map",
    "refuse_offloaded",
    "weights_of",
]

AUTO = "auto"
"""The map that fills the device first, then memory, then the disk."""
_AWAY = ("cpu", "disk")


class Offloaded(NamedTuple):
    """A weight that lies elsewhere while its layer does not run.

    Attributes:
        shape: of it.
        held: where accelerate finds it, by name.
        name: of it there.
    """

    shape: torch.Size
    held: Mapping[str, Tensor]
    name: str


def fetched(weight: "Tensor | Offloaded") -> Tensor:
    """Read a weight, wherever it lies.

    Args:
        weight: from `weights_of`.

    Returns:
        The tensor, on the CPU if it was offloaded.
    """
    return weight.held[weight.name] if isinstance(weight, Offloaded) else weight


def weights_of(module: nn.Module) -> "dict[str, Tensor | Offloaded]":
    """Name a module's parameters, tied ones once, and say where those are that have been offloaded.

    Args:
        module: any module.

    Returns:
        Each under its name.
    """
    found: dict[str, Tensor | Offloaded] = dict(module.named_parameters())
    for at, part in module.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            whole = f"{at}.{name}" if at else name
            if weight.is_meta and whole in found and (held := _held_by(part)) is not None:
                found[whole] = Offloaded(weight.shape, held, name)
    return found


# The weights of a module that one of its hooks brings.
def _held_by(module: nn.Module) -> Mapping[str, Tensor] | None:
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        held: Mapping[str, Tensor] | None = getattr(each, "weights_map", None)
        if held is not None:
            return held
    return None


def is_offloaded(model: nn.Module) -> bool:
    """Tell whether some of a model's weights lie elsewhere while their layers do not run.

    Args:
        model: any model.

    Returns:
        Whether.
    """
    return any(
        weight.is_meta and _held_by(part) is not None
        for part in model.modules()
        for weight in part.parameters(recurse=False)
    )


def refuse_offloaded(model: Any, doing: str) -> None:
    """Refuse a backbone that is partly offloaded.

    Args:
        model: a CausalQwenForCausalLM or its backbone.
        doing: what needs it whole.

    Raises:
        ConfigError: it is.
    """
    if is_offloaded(getattr(model, "backbone", model)):
        raise ConfigError(
            f"{doing} needs the whole backbone on the device, and parts of this one are offloaded: load it without "
            "device_map; learning a delta, generating and certifying run with it"
        )


def make_map(
    model: nn.Module,
    asked: str | Mapping[str, Any],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    max_memory: Mapping[Any, Any] | None = None,
) -> dict[str, Any]:
    """Say for each layer and each other part where it lies.

    Args:
        model: made on the meta device.
        asked: `auto`, or places of parts by their names in the plain causal LM, such as `{"model.layers.3": "disk"}`;
            what is not named lies on the device.
        device: where everything computes.
        dtype: number format of the weights, for `auto`.
        max_memory: of each device, as accelerate takes it, for `auto`; None asks the machine.

    Returns:
        Places by name, of every part that has weights.

    Raises:
        ConfigError: accelerate is missing, a name that no layer has, or a part that must stay on the device.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("device_map needs the package accelerate: pip install 'tether[train]'")
    layers = _layers(model)
    fixed = [
        name for name, part in model.named_modules()
        if any(True for _ in part.parameters(recurse=False)) and not any(_inside(name, layer) for layer in layers)
    ]  # fmt: skip
    placed = (
        _automatic(model, layers, fixed, device, dtype, max_memory)
        if asked == AUTO
        else _named(asked, layers)
    )
    here = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    return {**dict.fromkeys(fixed, here), **{name: placed.get(name, here) for name in layers}}


def _layers(model: Any) -> list[str]:
    whole = model.base_model
    kinds = set(whole._no_split_modules or ())
    found = [name for name, part in model.named_modules() if type(part).__name__ in kinds]
    if not found:
        raise ConfigError(
            f"device_map: transformers does not say which layers of {type(whole).__name__} stay in one piece; load it "
            "whole, or quantised"
        )
    return found


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _named(asked: Any, layers: list[str]) -> dict[str, Any]:
    if not isinstance(asked, Mapping):
        raise ConfigError(f"device_map={asked!r}: expected {AUTO!r}, or places of layers by their names")
    places: dict[str, Any] = {}
    # In a checkpoint of tether the backbone has another name before its layers.
    short = {name.partition(".")[2]: name for name in layers}
    for key in sorted(asked, key=len):
        inner = key if key in layers else short.get(str(key).partition(".")[2], "")
        meant = [name for name in layers if _inside(name, inner or key) or not key]
        away = str(asked[key]) in _AWAY
        if not meant and away:
            raise ConfigError(
                f"device_map: {key!r} to {asked[key]!r}: only layers are offloaded, such as {layers[0]!r}; embedding "
                "and output head stay on the device"
            )
        places |= dict.fromkeys(meant, asked[key])
    return places


def _automatic(
    model: Any,
    layers: list[str],
    fixed: list[str],
    device: torch.device,
    dtype: torch.dtype | None,
    max_memory: Mapping[Any, Any] | None,
) -> dict[str, Any]:
    from accelerate.utils import get_max_memory, infer_auto_device_map

    main: Any = "cpu" if device.type == "cpu" else (device.index or 0)
    room = get_max_memory(dict(max_memory) if max_memory is not None else None)
    size = torch.empty(0, dtype=dtype or model.dtype).element_size()
    # What stays on the device has its place there before the first layer.
    weights = [each for name in fixed for each in model.get_submodule(name).parameters(recurse=False)]
    numbers = {id(each): each.numel() for each in weights}
    room[main] = max(0, room.get(main, 0) - size * sum(numbers.values()))
    parts = nn.ModuleDict({str(at): model.get_submodule(name) for at, name in enumerate(layers)})
    kinds = list(model.base_model._no_split_modules)
    found = infer_auto_device_map(parts, max_memory=room, no_split_module_classes=kinds, dtype=dtype)
    return {name: found.get(str(at), found.get("", main)) for at, name in enumerate(layers)}


def follow_input(backbone: nn.Module, skip: Any = None) -> None:
    """Let a backbone whose layers lie on several devices give its result where its input was.

    Args:
        backbone: of transformers, dispatched by accelerate.
        skip: names of inputs that stay where they are, as of caches.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(backbone, AlignDevicesHook(io_same_device=True, skip_keys=skip), append=True)
