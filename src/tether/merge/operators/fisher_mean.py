"""``fisher_mean``: every model counts where its own output depends on the weights, by its Fisher information."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from pydantic import Field

from tether.merge.axes import layer_of
from tether.merge.fisher import RIDGE, Inputs
from tether.merge.operator import Extra, Floats, Operator, Request, Settings, TensorInputs

__all__ = ["FISHER_MEAN"]


class Options(Settings):
    """Options of ``fisher_mean``."""

    inputs: Inputs = "diagonal"
    """What of the Gram matrix of a layer's inputs counts: its diagonal, or all of it."""
    ridge: float = Field(RIDGE, gt=0)
    """Share of a model's mean information that every row and every direction of inputs has in any case."""
    signatures: str = "position"
    """Under which weighting of paths the neurons were observed, as ``tether merge observe --signatures`` takes it."""


class Observed(Settings):
    """Settings of a model."""

    observed: str = Field(min_length=1)
    """The folder that ``tether merge observe --signatures`` wrote."""
    weight: float = Field(1.0, gt=0)
    """Factor on its Fisher matrices, relative to the others'."""


def extras(request: Request) -> Mapping[str, Extra]:
    """Ask for the norms of the gradients of a linear layer's rows and the Gram matrix of its inputs, of every model.

    Args:
        request: any tensor.

    Returns:
        Two a model that has the tensor for the weights of linear layers, none for other tensors.

    Raises:
        CheckpointError: If a folder has no such neurons or Gram matrices.
        ConfigError: If `signatures` names no weighting.
    """  # noqa: DOC502 - raised by what it calls
    module, _, kind = request.canonical.rpartition(".")
    if kind != "weight" or not module.endswith("_proj") or layer_of(request.canonical) is None:
        return {}
    from tether.merge.gram import gram_location
    from tether.merge.tefm.observed import locate, parse_encoding

    assert isinstance(request.options, Options)
    encoding = parse_encoding(request.options.signatures)
    wanted = {}
    for name, setting in request.settings.items():
        if name not in request.sources:
            continue
        assert isinstance(setting, Observed)
        canonical, shape = request.sources[name]
        folder = Path(setting.observed)
        found = locate(folder, encoding, canonical.removesuffix(".weight"))
        wanted[f"{name}.norms"] = Extra(
            str(found.file), f"{found.module}.fisher", (found.samples, shape[0]), name, 0, (1,)
        )
        file, tensor = gram_location(folder, layer_of(canonical) or 0, found.module)
        wanted[f"{name}.gram"] = Extra(str(file), tensor, (shape[1], shape[1]), name, 1)
    return wanted


def fisher_mean(inputs: TensorInputs) -> Iterator[Floats]:
    r"""Fuse linear layers by Fisher information and average the rest.

    .. math:: W_i = \Big(\sum_k a_k F_{ki}\Big)^{-1} \sum_k a_k F_{ki} W_{ki}

    for each row i, with F the row's Fisher matrix in each model on its own paths; see `tether.merge.fisher`. A layer
    that not all models have, and every other tensor, is the weighted mean of those that have it.

    Args:
        inputs: of one tensor.

    Yields:
        Its merged values.

    Reference:
        Matena and Raffel 2022, equation 4; spec document 1, sections 2.4 and 6.3.
    """
    settings = {name: each for name, each in inputs.settings.items() if isinstance(each, Observed)}
    if len(inputs.extras) < 2 * len(settings):
        total = sum(each.weight for each in settings.values())
        for block in inputs.blocks():
            merged = np.zeros_like(block.models[0])
            for values, each in zip(block.models, settings.values(), strict=True):
                merged += np.float32(each.weight / total) * values
            yield merged
        return
    import torch

    from tether.merge.fisher import fisher_rows

    options = inputs.options
    assert isinstance(options, Options)
    weights = [torch.from_numpy(inputs.whole(name)) for name in settings]
    norms = [
        each.weight * torch.from_numpy(np.asarray(inputs.extra(f"{name}.norms"), np.float64)).mean(0)
        for name, each in settings.items()
    ]
    grams = [torch.from_numpy(np.asarray(inputs.extra(f"{name}.gram"), np.float32)) for name in settings]
    fused = fisher_rows(weights, norms, grams, inputs=options.inputs, ridge=options.ridge)
    yield fused.float().contiguous().numpy().reshape(-1)


FISHER_MEAN = Operator(
    name="fisher_mean",
    about="each model counts where its own output depends on the weights (Fisher information); the rest is averaged",
    apply=fisher_mean,
    options=Options,
    settings=Observed,
    base=False,
    whole=True,
    held=48,  # float64: weights and Fisher matrices of two models, the result
    extras=extras,
)
