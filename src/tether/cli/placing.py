"""`--device`, `--dtype` and their like: where and in what a command computes, the same for all that load a model."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tether.cli.added import Option, with_options
from tether.cli.several import connect
from tether.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["load", "load_backbone", "place", "placed", "refuse_quantise", "refuse_spread", "spread"]

Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: auto (an accelerator if there is one), cpu, cuda, cuda:1, mps, xpu."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Number format of the weights: auto (the checkpoint's own), float32, bfloat16, float16."
    ),
]

Quantise = Annotated[
    str | None,
    typer.Option(
        help="Pack the base's linear layers: 4bit or 8bit. Adapters are learnt, fused and served on such a base."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="auto: keep layers that have no room on the device in memory or on disk. For deltas, not for adapters."
    ),
]
OffloadFolder = Annotated[
    Path | None, typer.Option(help="Where such layers are written that no file of the checkpoint holds.")
]
FORMS = ("4bit", "8bit")


class Given(NamedTuple):
    """What a command was given of its place."""

    device: str = "auto"
    dtype: str = "auto"
    quantise: str | None = None
    device_map: str | None = None
    offload_folder: Path | None = None


_NOTHING = Given()
_GIVEN: ContextVar[Given] = ContextVar("_GIVEN", default=_NOTHING)
"""Of the command that runs."""


def placed(
    command: Callable[..., Any], *, dtype: bool = True, quantise: bool = False, spread: bool = False
) -> Callable[..., Any]:
    """Give a command the options of its place.

    Args:
        command: loads its models by `load` or `load_backbone` of this module.
        dtype: whether it takes a number format too.
        quantise: whether its base may be packed.
        spread: whether layers of its backbone may lie elsewhere.

    Returns:
        The command with `--device`, and `--dtype`, `--quantise`, `--device-map` and `--offload-folder` if asked for.
    """
    more: dict[str, Any] = {"device": Device, **({"dtype": Dtype} if dtype else {})}
    more |= {"quantise": Quantise} if quantise else {}
    more |= {"device_map": DeviceMap, "offload_folder": OffloadFolder} if spread else {}

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        given = Given(**{name: options.pop(name) for name in more if name in options})
        if given.quantise not in (None, *FORMS):
            raise ConfigError(f"--quantise {given.quantise}: expected {' or '.join(FORMS)}")
        if given.device_map not in (None, "auto"):
            raise ConfigError(
                f"--device-map {given.device_map}: expected auto; places by name are given in Python"
            )
        if given.offload_folder is not None and given.device_map is None:
            raise ConfigError("--offload-folder without --device-map: add --device-map auto, or leave it out")
        if given.offload_folder is not None:
            from tether.store.place import check_place

            check_place(given.offload_folder)
        before = _GIVEN.set(given)
        try:
            connect(given.device)
            return command(*args, **options)
        finally:
            _GIVEN.reset(before)

    defaults = Given._field_defaults
    return with_options(command, run, {name: Option(kind, defaults[name]) for name, kind in more.items()})


def place() -> "tuple[torch.device, torch.dtype | None]":
    """Find the place that the command was given.

    Returns:
        The device, and the number format or None for the checkpoint's own.

    Raises:
        ConfigError: there is no such device, or it cannot do the format.
    """
    from tether.causal.placement import find_device, find_dtype

    given = _GIVEN.get()
    device = find_device(given.device)
    return device, find_dtype(given.dtype, device)


def spread() -> dict[str, Any]:
    """Tell where the command's layers shall lie.

    Returns:
        Keyword arguments of `tether.load`.
    """
    given = _GIVEN.get()
    return (
        {}
        if given.device_map is None
        else {"device_map": given.device_map, "offload_folder": given.offload_folder}
    )


def refuse_quantise(doing: str) -> None:
    """Refuse `--quantise` where a command does what needs a base in full precision, before anything is loaded.

    Args:
        doing: what needs it.

    Raises:
        ConfigError: it was given.
    """
    if (form := _GIVEN.get().quantise) is not None:
        raise ConfigError(
            f"--quantise {form}: {doing} needs the base in full precision; leave it out, or learn an adapter "
            "(--adapter lora), which a quantised base takes"
        )


def refuse_spread(doing: str) -> None:
    """Refuse `--device-map` where a command needs the whole backbone on the device, before anything is loaded.

    Args:
        doing: what needs it.

    Raises:
        ConfigError: it was given.
    """
    if _GIVEN.get().device_map is not None:
        raise ConfigError(
            f"--device-map: {doing} runs through every layer, which therefore stay on the device; leave it out, or "
            "quantise the base (--quantise 4bit)"
        )


def load(name: str, dtype: "torch.dtype | None" = None, packing: Any = None) -> Any:
    """Load a model and its tokenizer where the command computes; see `tether.load`.

    Args:
        name: alias, path or hub id.
        dtype: taken where the command was given none.
        packing: of the base, taken where the command was given none.

    Returns:
        Both.
    """
    from tether.causal.loading import load as load_anywhere

    device, asked = place()
    return load_anywhere(
        name, asked or dtype, device, quantization_config=_GIVEN.get().quantise or packing, **spread()
    )  # fmt: skip


def load_backbone(name: str) -> Any:
    """Load a plain causal LM and its tokenizer where the command computes; see `tether.load_backbone`.

    Args:
        name: alias, path or hub id.

    Returns:
        Both.
    """
    from tether.causal.loading import load_backbone as load_anywhere

    device, dtype = place()
    return load_anywhere(name, dtype, device)
