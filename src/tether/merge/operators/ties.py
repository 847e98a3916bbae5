"""``ties/mergekit``: trim each difference, elect a sign, average what agrees."""

from collections.abc import Iterator
from math import prod

from pydantic import Field

from tether.merge.operator import Floats, Operator, Settings, TensorInputs
from tether.merge.operators.election import elect
from tether.merge.operators.selection import thresholds, trim

__all__ = ["TIES_MERGEKIT"]


class Options(Settings):
    """Options of ``ties/mergekit``."""

    normalize: bool = True
    """Whether to divide by the weights that agree."""
    scale: float = Field(1.0, alias="lambda")
    """Factor on the mixed difference."""


class WeightAndDensity(Settings):
    """Settings of a model."""

    weight: float = 1.0
    density: float = Field(1.0, ge=0, le=1)
    """Share of elements kept, by magnitude, in each tensor."""


def ties(inputs: TensorInputs) -> Iterator[Floats]:
    r"""Trim, elect, merge, as mergekit 0.1.5 defines them.

    The trim is per tensor (the paper's is over the whole model) and keeps max(1, floor(density n)) elements;
    of equal magnitudes the first are kept, where mergekit leaves the choice to an unstable sort.

    .. math:: W = W_C + \lambda\, \mathrm{elect}(\mathrm{trim}(W_i - W_C), w)

    Args:
        inputs: of one tensor, with a parent.

    Yields:
        Its merged values.

    Reference:
        Yadav et al. 2023, TIES-Merging, algorithm 1; mergekit 0.1.5, generalized_task_arithmetic.py.
    """
    assert isinstance(inputs.options, Options)
    settings = [each for each in inputs.settings.values() if isinstance(each, WeightAndDensity)]
    size = prod(inputs.shape)
    keep = [max(1, int(each.density * size)) if each.density else 0 for each in settings]
    trimmed = [index for index, count in enumerate(keep) if 0 < count < size]

    def chosen() -> Iterator[list[Floats]]:
        for _, deltas in _deltas(inputs):
            yield [deltas[index] for index in trimmed]

    limits = thresholds(chosen, [keep[index] for index in trimmed]) if trimmed else ()
    seen = [0] * len(trimmed)
    for base, deltas in _deltas(inputs):
        for place, (index, limit) in enumerate(zip(trimmed, limits, strict=True)):
            seen[place] = trim(deltas[index], limit, seen[place])
        for delta, count in zip(deltas, keep, strict=True):
            if not count:
                delta[:] = 0
        mixed = elect(deltas, [each.weight for each in settings], normalize=inputs.options.normalize)
        mixed *= inputs.options.scale
        mixed += base
        yield mixed


def _deltas(inputs: TensorInputs) -> Iterator[tuple[Floats, tuple[Floats, ...]]]:
    for block in inputs.blocks():
        assert block.base is not None
        for values in block.models:
            values -= block.base
        yield block.base, block.models


TIES_MERGEKIT = Operator(
    name="ties/mergekit",
    about="differences trimmed per tensor, signs elected, agreeing ones averaged",
    apply=ties,
    options=Options,
    settings=WeightAndDensity,
    base=True,
    scaled=True,
)
