"""The state of a training on disk: weights, optimizer and progress, published whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import AllowInfNan, NonNegativeInt
from torch import Tensor, nn

from tether.errors import CheckpointError
from tether.files import read_bytes
from tether.reading import JSON_BYTES, Strict, parse_as
from tether.runs.record import write_record
from tether.store.reader import CheckpointReader
from tether.store.writer import publish_folder, write_safetensors

__all__ = ["load_state", "save_state"]


class _State(Strict):
    """How far a training is: steps, the loss of each, which may be NaN, and the state of what it adds to its loss."""

    step: NonNegativeInt
    curve: list[Annotated[float, AllowInfNan(True)]]
    term: dict[str, Any] | None = None


_MOMENTS: Final = {"step", "exp_avg", "exp_avg_sq"}
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def save_state(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> None:
    """Write what a training needs to go on; an earlier state is replaced.

    Args:
        folder: where to; appears whole or not at all.
        parameters: the trained parameters by name.
        optimizer: AdamW over them.
        state: progress: `step`, `curve` with a loss a step, NaN is kept, and `term`, the state of a term or None.
    """
    moments = {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    with publish_folder(folder, replace=True) as target:
        write_safetensors(target / _WEIGHTS, dict(parameters))
        write_safetensors(target / _OPTIMIZER, moments)
        write_record(target / _STATE, dict(state))


@torch.no_grad()
def load_state(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a saved state back, bit by bit.

    Args:
        folder: what `save_state` wrote.
        parameters: the trained parameters by name; changed in place.
        optimizer: the optimizer over them; its state is replaced.

    Returns:
        The progress.

    Raises:
        CheckpointError: a file is missing or damaged, or holds other parameters.
    """
    weights, moments = CheckpointReader(folder / _WEIGHTS), CheckpointReader(folder / _OPTIMIZER)
    there = {name: weights.shape(name) for name in weights.names}
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if there != here:
        differing = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
        raise CheckpointError(
            f"{folder} holds other parameters than are trained: {', '.join(differing)} differ. Resume with the model "
            "and options of that training, or choose another folder."
        )
    try:
        state = parse_as(_State, read_bytes(folder / _STATE, JSON_BYTES), folder / _STATE, foreign=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or choose another folder to train anew") from error
    saved: dict[str, dict[str, Tensor]] = {}
    for key in moments.names:
        name, _, kind = key.rpartition(".")
        saved.setdefault(name, {})[kind] = moments.tensor(key)
    wrong = [name for name, found in saved.items() if not _fits(found, parameters.get(name))]
    wrong += [name for name, parameter in parameters.items() if weights.tensor(name).dtype != parameter.dtype]
    if wrong or len(state.curve) != state.step:
        raise CheckpointError(
            f"{folder} is damaged: {', '.join(wrong) or _STATE} does not fit the rest; choose another folder to train "
            "anew"
        )
    optimizer.state.clear()
    for name, parameter in parameters.items():
        parameter.copy_(weights.tensor(name))
        if name in saved:
            # Scalars, which count steps, stay on the CPU, as torch has them.
            optimizer.state[parameter] = {
                kind: value.to(parameter.device) if value.dim() else value
                for kind, value in saved[name].items()
            }
    return state.model_dump()


def _fits(moments: Mapping[str, Tensor], parameter: nn.Parameter | None) -> bool:
    return (
        parameter is not None
        and moments.keys() == _MOMENTS
        and all(
            value.shape == (() if kind == "step" else parameter.shape) and value.is_floating_point()
            for kind, value in moments.items()
        )
    )
