"""``regression_mean``: weights that best keep every model's outputs on the inputs it meets on its own paths."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from tether.errors import CheckpointError, ConfigError
from tether.merge.axes import layer_of
from tether.merge.operator import Extra, Floats, Operator, Request, Settings, TensorInputs
from tether.merge.recipe import BASE

__all__ = ["REGRESSION_MEAN"]

_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")


class Options(Settings):
    """Options of ``regression_mean``."""

    shrinkage: float = Field(0.9, ge=0, le=1)
    """Factor on the off-diagonal entries of the Gram matrices."""
    ridge: float = Field(1e-6, gt=0)
    """Share of the mean diagonal that is added to the diagonal."""
    scale: float = Field(1.0, alias="lambda")
    """Factor on the change from the parent; other than 1 it needs one."""
    head: Literal["lm_head", "embed_tokens"] | None = None
    """What the Gram matrix of the head's inputs is used for: a head of its own, or a tied embedding."""


class Grams(Settings):
    """Settings of a model."""

    grams: str
    """The folder of its Gram matrices, as ``tether.merge.gram.save_grams`` writes it."""
    weight: float = Field(1.0, gt=0)
    """Its share, relative to the others'."""


def extras(request: Request) -> Mapping[str, Extra]:
    """Ask for the Gram matrix of the tensor's inputs, of every model that has the tensor.

    Args:
        request: any tensor.

    Returns:
        One a model for the weights of linear layers, none for other tensors.

    Raises:
        CheckpointError: If a linear layer's matrix is missing.
        ConfigError: If `head` names what is not the head of the models.
    """  # noqa: DOC502 - raised by _located
    module, _, kind = request.canonical.rpartition(".")
    assert isinstance(request.options, Options)
    fits = "embed_tokens" if request.tied else "lm_head"
    if request.canonical == "embed_tokens.weight" and request.options.head not in {None, fits}:
        raise ConfigError(
            f"options.head is {request.options.head}, but the head of these models is {fits}: what multiplies the "
            f"head's inputs; give {fits}, or leave head out"
        )
    head = module == request.options.head
    linear = module.endswith("_proj") and layer_of(request.canonical) is not None
    if kind != "weight" or not (linear or head):
        return {}
    wanted = {}
    for model, setting in request.settings.items():
        if model not in request.sources:
            continue
        assert isinstance(setting, Grams)
        canonical, shape = request.sources[model]
        file, tensor = _located(
            Path(setting.grams), "lm_head" if head else canonical.removesuffix(".weight"), head
        )
        wanted[model] = Extra(str(file), tensor, (shape[1], shape[1]), model, 1)
    return wanted


def _located(folder: Path, module: str, head: bool) -> tuple[Path, str]:
    from tether.merge.gram import gram_location

    # The head's matrix comes after those of the layers.
    layer = len(list(folder.glob("gram-*.safetensors"))) - 1 if head else layer_of(f"{module}.")
    first: CheckpointError | None = None
    for prefix in _PREFIXES:
        try:
            return gram_location(folder, max(0, layer or 0), prefix + module)
        except CheckpointError as error:
            first = first or error
    assert first is not None
    raise first


def regression_mean(inputs: TensorInputs) -> Iterator[Floats]:
    r"""Solve linear layers in closed form and average the rest.

    .. math:: W = \Big(\sum_i w_i W_i S_i\Big) \Big(\sum_i w_i S_i\Big)^{-1}

    with S the shrunken Gram matrix of a model's own inputs; tensors without one are weighted means. With a
    parent C the result is ``W_C + lambda (W - W_C)``.

    Args:
        inputs: of one tensor.

    Yields:
        Its merged values.

    Reference:
        Jin et al. 2023 (RegMean), equation 3, each model on paths that it samples itself.
    """
    assert isinstance(inputs.options, Options)
    settings = {name: each for name, each in inputs.settings.items() if isinstance(each, Grams)}
    needed = inputs.extras
    if len(needed) < len(settings):
        total = sum(each.weight for each in settings.values())
        for block in inputs.blocks():
            merged = np.zeros_like(block.models[0])
            for values, each in zip(block.models, settings.values(), strict=True):
                merged += np.float32(each.weight / total) * values
            yield _scaled(merged, block.base, inputs.options.scale)
        return
    import torch

    from tether.merge.fusion import regression_mean as solve

    weights = [torch.from_numpy(inputs.whole(name)) for name in settings]
    grams = [torch.from_numpy(np.asarray(inputs.extra(name), np.float32)) for name in settings]
    shares = torch.tensor([each.weight for each in settings.values()])
    options = inputs.options
    fused = solve(weights, grams, shares=shares, shrinkage=options.shrinkage, ridge=options.ridge)
    base = None if options.scale == 1 else inputs.whole(BASE).reshape(-1)
    yield _scaled(fused.float().contiguous().numpy().reshape(-1), base, options.scale)


def _scaled(merged: Floats, base: Floats | None, scale: float) -> Floats:
    if base is None or scale == 1:
        return merged
    return base + np.float32(scale) * (merged - base)


REGRESSION_MEAN = Operator(
    name="regression_mean",
    about="keeps every model's outputs on its own paths, by Gram matrices; the rest is averaged",
    apply=regression_mean,
    options=Options,
    settings=Grams,
    base=False,
    may_base=True,
    scaled=True,
    whole=True,
    extras=extras,
)
