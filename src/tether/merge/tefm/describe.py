"""What stages 1 to 3 find in each layer, as figures: ensembles, TOS, importance, masks; no weights are read."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from tether.errors import ConfigError
from tether.merge.ensembles import importance, split_half_agreement
from tether.merge.files import Files, Seen, hash_array, read_extra
from tether.merge.information import copula_information
from tether.merge.inputs import Inputs, Scratch
from tether.merge.operators.lape_tefm import read_neurons
from tether.merge.plan import Plan
from tether.merge.planner import TensorPlan
from tether.merge.recipe import BASE
from tether.merge.tefm.layer import row_masks
from tether.merge.tefm.neurons import Neurons
from tether.merge.tefm.partners import Pair, find_partners
from tether.merge.tefm.switches import Options, Switches

__all__ = ["LayerFigures", "describe_layer", "describe_neurons"]

_FEWEST: Final = 4
"""Samples below which nothing can be said of mutual information."""


class LayerFigures(NamedTuple):
    """Figures of one linear layer.

    Attributes:
        neurons: rows of A, and of B.
        ensembles: sizes of A's ensembles, and of B's.
        pairs: ensemble of A, its partner in B, TOS.
        agreement: adjusted Rand index of A's ensembles from either half of the samples; None for one sample.
        mask: mean of M over rows with a partner, and the smallest.
        information: mean mutual information of A's activations with the loss, nats; None for fewer than 4 samples.
        importance: share of the whole TFI of A that the first hundredth of its neurons has; None likewise, or where
            nothing is important.
        foremost: A's neurons of the largest TFI, at most 8.
    """

    neurons: tuple[int, int]
    ensembles: tuple[tuple[int, ...], tuple[int, ...]]
    pairs: tuple[tuple[int, int, float], ...]
    agreement: float | None
    mask: tuple[float, float]
    information: float | None
    importance: float | None
    foremost: tuple[int, ...]


def describe_layer(a: Neurons, b: Neurons, switches: Switches) -> LayerFigures:
    """Work out the figures of one layer.

    Args:
        a: neurons of A.
        b: of B, in A's coordinates.
        switches: the choices.

    Returns:
        The figures.

    Reference:
        TEFM, stages 1 to 3: TFI, R, TOS, Int and M'.
    """
    pair = Pair.of(a, b, switches)
    partners = find_partners(pair, switches)
    masks = row_masks(pair, partners, switches)[partners.ensemble >= 0]
    count = min(switches.ensembles, a.activation.shape[1])
    samples = len(a.loss)
    information = share = None
    foremost: tuple[int, ...] = ()
    if samples >= _FEWEST:
        found = copula_information(a.activation, a.loss)
        information = float(found.mean())
        scores = importance(pair.mean_a[:, 1], found, pair.curvature_a)
        order = scores.argsort(descending=True, stable=True)
        foremost = tuple(order[:8].tolist())
        if float(scores.sum()) > 0:
            share = float(scores[order[: max(1, len(scores) // 100)]].sum() / scores.sum())
    return LayerFigures(
        neurons=(len(pair.mean_a), len(pair.mean_b)),
        ensembles=(_sizes(partners.labels_a), _sizes(partners.labels_b)),
        pairs=tuple(zip(*(each.tolist() for each in partners.match), strict=True)),
        agreement=split_half_agreement(a.phi, count) if samples > 1 else None,
        mask=(float(masks.mean()), float(masks.min())) if len(masks) else (1.0, 1.0),
        information=information,
        importance=share,
        foremost=foremost,
    )


def _sizes(labels: torch.Tensor) -> tuple[int, ...]:
    return tuple(torch.bincount(labels).tolist())


def describe_neurons(
    plan: Plan, on_step: Callable[[dict[str, float]], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Describe every layer of a planned merge.

    Args:
        plan: of the operator ``lape_tefm``.
        on_step: called with `done` and `total` layers.

    Returns:
        JSON: name of the tensor to `LayerFigures`.

    Raises:
        ConfigError: It is a plan of another operator.
    """
    if not plan.operator.refined:
        raise ConfigError(
            f"operator {plan.operator.name} observes no neurons; expected a recipe of lape_tefm"
        )
    # A layer that only one model has is no pair.
    layers = [
        tensor
        for tensor in plan.tensors
        if len({each.model for each in (tensor.extras or {}).values() if each.model}) == 2
    ]
    found = {}
    for number, tensor in enumerate(layers):
        inputs = _inputs(plan, tensor)
        options = tensor.options
        assert isinstance(options, Options)
        switches = options.chosen(parent=BASE in plan.opened)
        one, other = (read_neurons(inputs, name, switches) for name in inputs.settings)
        found[tensor.name] = dict(describe_layer(one, other, switches)._asdict())
        inputs.files.close()
        if on_step:
            on_step({"done": number + 1.0, "total": float(len(layers))})
    return found


# The inputs of a tensor as a merge gives them to the operator, for what lies beside the weights.
def _inputs(plan: Plan, tensor: TensorPlan) -> Inputs:
    extras = tensor.extras or {}
    places = {(extra.file, extra.tensor) for extra in extras.values()}
    seen = {place: hash_array(read_extra(*place)) for place in places}
    return Inputs(
        name=tensor.name,
        canonical=tensor.canonical,
        shape=tensor.shape,
        options=tensor.options or plan.operator.options.model_construct(),
        settings=tensor.settings or {},
        base=tensor.base,
        models=tensor.models,
        fill=tensor.own,
        coordinates=plan.coordinates,
        extras=extras,
        seed=plan.recipe.seed,
        files=Files(Seen({}, seen)),
        scratch=Scratch(0),
    )
