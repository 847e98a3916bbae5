"""`--device` and `--dtype`: where a command computes, the same for every command that loads a model."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

__all__ = ["load", "load_backbone", "place", "placed"]

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

_GIVEN: ContextVar[tuple[str, str]] = ContextVar("_GIVEN", default=("auto", "auto"))
"""What the command that runs was given."""


def placed(command: Callable[..., Any], *, dtype: bool = True) -> Callable[..., Any]:
    """Give a command the options of its place.

    Args:
        command: loads its models by `load` or `load_backbone` of this module.
        dtype: whether it takes a number format too.

    Returns:
        The command with `--device`, and `--dtype` if asked for.
    """
    more = {"device": Device, **({"dtype": Dtype} if dtype else {})}

    @functools.wraps(command)
    def run(*args: Any, device: str = "auto", dtype: str = "auto", **options: Any) -> Any:
        before = _GIVEN.set((device, dtype))
        try:
            return command(*args, **options)
        finally:
            _GIVEN.reset(before)

    signature = inspect.signature(command)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default="auto", annotation=kind) for name, kind in more.items()]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, **more}
    return run


def place() -> "tuple[torch.device, torch.dtype | None]":
    """Find the place that the command was given.

    Returns:
        The device, and the number format or None for the checkpoint's own.

    Raises:
        ConfigError: there is no such device, or it cannot do the format.
    """
    from tether.causal.placement import find_device, find_dtype

    named, spelt = _GIVEN.get()
    device = find_device(named)
    return device, find_dtype(spelt, device)


def load(name: str, dtype: "torch.dtype | None" = None) -> Any:
    """Load a model and its tokenizer where the command computes; see `tether.load`.

    Args:
        name: alias, path or hub id.
        dtype: taken where the command was given none.

    Returns:
        Both.
    """
    from tether.causal.loading import load as load_anywhere

    device, asked = place()
    return load_anywhere(name, asked or dtype, device)


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
