"""``lape_tefm``: fuse what neurons of two models do, as the LAPE-TEFM document writes it or corrected."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from tether.errors import ConfigError
from tether.merge.axes import layer_of
from tether.merge.operator import Extra, Floats, Operator, Request, Settings, TensorInputs
from tether.merge.recipe import BASE
from tether.merge.tefm.switches import ETA, Options, Switches

if TYPE_CHECKING:
    from tether.merge.tefm.neurons import Neurons

__all__ = ["LAPE_TEFM", "STEP", "read_neurons"]

STEP = "step"
"""Key of a tensor's last step among the extras."""
_OF_SAMPLES = ("loss", "log_mass")


class Observed(Settings):
    """Settings of a model."""

    observed: str = Field(min_length=1)
    """The folder that ``tether merge observe --signatures`` wrote."""


def extras(request: Request) -> Mapping[str, Extra]:
    """Ask for what was observed of a linear layer's neurons in both models, and for its last step.

    Args:
        request: any tensor.

    Returns:
        For the weights of linear layers the fields that the switches need; else none.

    Raises:
        CheckpointError: If a folder has no such neurons, or no Gram matrices where directions of inputs are asked for.
        ConfigError: If the symmetric update is asked for without a parent, or the probes differ in number.
    """  # noqa: DOC502 - raised by what it calls
    options = request.options
    assert isinstance(options, Options)
    module, _, kind = request.canonical.rpartition(".")
    if kind != "weight" or not module.endswith("_proj") or layer_of(request.canonical) is None:
        return {}
    if find_spec("sklearn") is None:
        raise ConfigError(
            "lape_tefm clusters neurons with scikit-learn, which is missing; install 'tether[merge]'"
        )
    from tether.merge.gram import gram_location
    from tether.merge.tefm.observed import locate, parse_encoding
    from tether.store.reader import CheckpointReader

    switches = options.chosen(parent=BASE in request.sources)
    encoding = parse_encoding(switches.weighting)
    if switches.gamma is not None:
        encoding = encoding._replace(gamma=switches.gamma)
    wanted: dict[str, Extra] = {}
    samples = {}
    present = [name for name in request.settings if name in request.sources]
    for name in present:
        setting = request.settings[name]
        assert isinstance(setting, Observed)
        canonical, shape = request.sources[name]
        folder = Path(setting.observed)
        found = locate(folder, encoding, canonical.removesuffix(".weight"))
        samples[name] = found.samples
        for field in _OF_SAMPLES:
            wanted[f"{name}.{field}"] = Extra(str(found.file), field, (found.samples,), name, 0, ())
        # Of a layer that only one model has nothing more is needed: its weights stay.
        if len(present) == 1:
            return wanted
        for field, stored in _fields(switches).items():
            wanted[f"{name}.{field}"] = Extra(
                str(found.file), f"{found.module}.{stored}", (found.samples, shape[0]), name, 0, (1,)
            )
        if switches.direction == "inputs":
            file, tensor = gram_location(folder, layer_of(canonical) or 0, found.module)
            wanted[f"{name}.gram"] = Extra(str(file), tensor, (shape[1], shape[1]), name, 1)
    if switches.features == "samples" and len({*samples.values()}) > 1:
        raise ConfigError(
            f"observed on {samples} probes: expected the same probes for both models, since neurons are compared "
            "sample by sample; observe one of them again"
        )
    if options.step is not None:
        reader = CheckpointReader(options.step)
        if request.canonical in reader.names:
            wanted[STEP] = Extra(options.step, request.canonical, reader.shape(request.canonical))
    return wanted


# Fields of `Neurons` to those that are stored.
def _fields(switches: Switches) -> dict[str, str]:
    gradient = "gradient" if switches.gradient == "true" else "paper_gradient"
    fisher = {"fisher": "fisher"} if switches.hessian == "fisher" else {}
    return {"activation": "activation", "gradient": gradient} | fisher


def read_neurons(inputs: TensorInputs, model: str, switches: Switches) -> "Neurons":
    """Read what was observed of the neurons of a tensor's rows.

    Args:
        inputs: of the tensor.
        model: a name of the recipe.
        switches: the choices.

    Returns:
        The neurons, in the coordinates of the result.
    """
    import torch

    from tether.merge.tefm.neurons import Neurons

    fields = [*_fields(switches), *_OF_SAMPLES]
    return Neurons(
        **{
            field: torch.from_numpy(np.ascontiguousarray(inputs.extra(f"{model}.{field}")))
            for field in fields
        }
    )


def lape_tefm(inputs: TensorInputs) -> Iterator[Floats]:
    r"""Fuse the neurons of a linear layer, and average the rest.

    .. math:: W^* = W_0 + \lambda_{proj} M s + \lambda_{ortho} (\tau - [M] s), \quad W^{opt} = W^* - \mathrm{step}

    with tau the task vectors, s their projection, M the mask, and W_0 rows of A, their means, or the parent's.

    The first model of the recipe is A, whose rows are kept where B has nothing to say; the second is B.

    Args:
        inputs: of one tensor.

    Yields:
        Its merged values.

    Reference:
        The LAPE-TEFM document, stages 1 to 4; docs/lape-tefm.md, "the operator".
    """
    if not inputs.extras:
        for block in inputs.blocks():
            merged, other = block.models
            merged += other
            merged *= np.float32(0.5)
            yield merged
        return
    only = [name for name in inputs.settings if f"{name}.loss" in inputs.extras]
    if len(only) == 1:
        yield inputs.whole(only[0]).reshape(-1)
        return
    import torch

    from tether.merge.flat import paper_flat_step
    from tether.merge.tefm.layer import Side, directions_of, fuse_layer

    options = inputs.options
    assert isinstance(options, Options)
    parent = torch.from_numpy(inputs.whole(BASE)).double() if inputs.has_base else None
    switches = options.chosen(parent=parent is not None)
    a, b = (
        Side(torch.from_numpy(inputs.whole(name)).double(), read_neurons(inputs, name, switches))
        for name in inputs.settings
    )
    directions = None
    if switches.direction == "inputs":
        grams = [np.asarray(inputs.extra(f"{name}.gram"), np.float32) for name in inputs.settings]
        directions = directions_of([torch.from_numpy(gram) for gram in grams], switches.rank)
    fused = fuse_layer(a, b, parent, directions, switches).weight
    if STEP in inputs.extras:
        step = torch.from_numpy(np.ascontiguousarray(inputs.extra(STEP))).double()
        eta = ETA["paper"] if options.eta is None else options.eta
        fused = paper_flat_step(fused, step, eta) if step.dim() == 1 else fused - step
    yield fused.float().contiguous().numpy().reshape(-1)


LAPE_TEFM = Operator(
    name="lape_tefm",
    about="neurons of two models fused by what they do, as in the document or corrected; the rest is averaged",
    apply=lape_tefm,
    options=Options,
    settings=Observed,
    base=False,
    may_base=True,
    fewest_models=2,
    most_models=2,
    whole=True,
    held=80,  # float64: weights of both models and the parent, task vectors, projection, rest, result
    extras=extras,
    refined=True,
)
