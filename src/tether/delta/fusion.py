"""Fuse deltas into a model that shares its base's weights, and write models as checkpoints."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tether.cauchy.charts import CHARTS
from tether.causal.fused import Fusion
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.gate import WINDOW
from tether.errors import CheckpointError, ConfigError
from tether.store.manifest import Input, Manifest, write_manifest
from tether.store.publish import publish_folder
from tether.store.reader import sha256_file

__all__ = ["check_free", "fuse", "save_checkpoint"]


def fuse(
    model: CausalQwenForCausalLM,
    deltas: Mapping[Delta, float],
    *,
    chart: str = "symmetric",
    gated: bool | None = None,
) -> CausalQwenForCausalLM:
    """Add weighted deltas to a model.

    The result shares backbone, abduction and action with `model`: nothing is copied but the deltas.

    Args:
        model: the base, without a fusion.
        deltas: each delta's weight, finite, any sign.
        chart: the chart in which they are added: `linear`, `symmetric`, `geodesic` or `rootkl`.
        gated: whether each delta acts only where its gate is open; None gates when every delta has a gate.

    Returns:
        The fused model, in evaluation mode.

    Raises:
        ConfigError: no deltas, an unknown chart, a weight that is not finite, two deltas of one name, a gate
            asked for and missing, or a model that is fused already.
        CheckpointError: a delta was learnt on another base.
    """
    if chart not in CHARTS:
        raise ConfigError(f"chart={chart!r}: expected one of {', '.join(CHARTS)}")
    if not deltas:
        raise ConfigError("no deltas: expected at least one delta to fuse")
    if model.fusion is not None:
        raise ConfigError(
            f"the model is fused already ({', '.join(model.fusion.domains)}): fuse all deltas at once into the base"
        )
    for delta, weight in deltas.items():
        if not math.isfinite(weight):
            raise ConfigError(f"weight of {delta.name!r} is {weight}: expected a finite number")
    names = [delta.name for delta in deltas]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"deltas named {', '.join(names)}: expected distinct names; rename one at 'tether learn'"
        )
    foreign = [delta for delta in deltas if delta.base != model.config.base_fingerprint]
    if foreign:
        raise CheckpointError(
            "\n".join(
                f"delta {delta.name!r} was learnt on base {delta.base[:19]}..., the model given is "
                f"{str(model.config.base_fingerprint)[:19]}...: learn it again on this base, or name the other base"
                for delta in foreign
            )
        )
    ungated = [delta.name for delta in deltas if delta.gate is None]
    if gated and ungated:
        raise ConfigError(
            f"{', '.join(ungated)}: no gate in the delta; learn it with a gate, or fuse without gates"
        )
    gated = not ungated if gated is None else gated
    config = copy.deepcopy(model.config)
    config.fusion = _describe(deltas, chart, gated)
    with torch.device("meta"):
        fused = CausalQwenForCausalLM(config)
    for name in ("backbone", "numeric", "abduction", "action"):
        setattr(fused, name, getattr(model, name))
    head = model.abduction.loc
    fused.fusion = _stack(list(deltas), Fusion(head.in_features, head.out_features, config.fusion)).to(
        head.weight.device
    )
    fused.generation_config = copy.deepcopy(model.generation_config)
    # It stands in no folder yet: a certificate of it must not name the base's.
    fused.name_or_path = config._name_or_path = ""
    fused.eval()
    return fused


def _describe(deltas: Mapping[Delta, float], chart: str, gated: bool) -> dict[str, Any]:
    gates = [delta.gate for delta in deltas if delta.gate is not None]
    return {
        "chart": chart,
        "gated": gated,
        "domains": [delta.name for delta in deltas],
        "native": [delta.chart for delta in deltas],
        "weights": [float(weight) for weight in deltas.values()],
        "location_only": all(delta.first is None for delta in deltas),
        "gate_window": max((len(gate.threshold) for gate in gates), default=WINDOW),
        "gate_rank": max((len(gate.whitening) for gate in gates), default=1),
        "budgets": [{key: delta.record.get(key) for key in ("metric", "budget")} for delta in deltas],
    }


@torch.no_grad()
def _stack(deltas: list[Delta], fusion: Fusion) -> Fusion:
    # A gate of lower rank is padded with zero directions, which measure nothing.
    for row, delta in enumerate(deltas):
        if delta.second.shape != fusion.second.shape[1:]:
            raise CheckpointError(
                f"delta {delta.name!r} is {tuple(delta.second.shape)}, the base takes {tuple(fusion.second.shape[1:])}"
            )
        fusion.second[row] = delta.second
        if not fusion.location_only and delta.first is not None:
            fusion.first[row] = delta.first
        if fusion.gated and delta.gate is not None:
            if len(delta.gate.threshold) != fusion.window:
                raise ConfigError(
                    f"delta {delta.name!r} has a gate over {len(delta.gate.threshold)} tokens, another one over "
                    f"{fusion.window}: learn them with the same gate window"
                )
            fusion.gate_center[row] = delta.gate.center
            fusion.gate_whitening[row, : len(delta.gate.whitening)] = delta.gate.whitening
            fusion.gate_threshold[row] = delta.gate.threshold
    return fusion


def check_free(folder: str | Path) -> None:
    """Refuse an output folder with content before any work is done for it.

    Args:
        folder: where a checkpoint shall go.

    Raises:
        ConfigError: it exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is not empty: expected a new or empty folder; choose another or remove it"
        )


def save_checkpoint(
    model: CausalQwenForCausalLM,
    tokenizer: Any,
    folder: str | Path,
    *,
    inputs: Mapping[str, Path] | None = None,
    replace: bool = False,
) -> Path:
    """Write a model with its tokenizer and manifest, loadable by `AutoModelForCausalLM`.

    Args:
        model: converted or fused.
        tokenizer: the base's tokenizer.
        folder: where to; must be absent or empty.
        inputs: files the model was made from, by role, recorded with their hashes.
        replace: whether a folder with content is replaced.

    Returns:
        The folder, which becomes the model's `name_or_path`.

    Raises:
        ConfigError: no tokenizer, or the folder is not empty.
    """
    if tokenizer is None:
        raise ConfigError("tokenizer=None: expected the base model's tokenizer; tether.load returns both")
    folder = Path(folder)
    listed = [
        Input(role=role, path=str(path), sha256=sha256_file(path)) for role, path in (inputs or {}).items()
    ]
    with publish_folder(folder, replace=replace) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        recipe = {"fusion": model.config.fusion, "preset": model.config.preset}
        write_manifest(target, Manifest(kind="checkpoint", inputs=tuple(listed), recipe=recipe))
    model.name_or_path = str(folder)
    return folder
