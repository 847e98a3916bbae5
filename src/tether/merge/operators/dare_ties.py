"""``dare_ties``: drop elements of each difference at random, rescale the rest, elect a sign."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tether.merge.operator import Floats, Operator, Settings, TensorInputs
from tether.merge.operators.election import elect

__all__ = ["DARE_TIES", "kept"]


class Options(Settings):
    """Options of ``dare_ties``."""

    normalize: bool = False
    """Whether to divide by the weights that agree."""
    scale: float = Field(1.0, alias="lambda")
    """Factor on the mixed difference."""


class WeightAndDensity(Settings):
    """Settings of a model."""

    weight: float = 1.0
    density: float = Field(1.0, gt=0, le=1)
    """Probability with which an element is kept; kept ones are divided by it."""


def kept(key: int, count: int, density: float) -> npt.NDArray[np.bool_]:
    """Draw which elements are kept.

    Args:
        key: 128 bits; equal keys draw equally, on any machine.
        count: how many elements.
        density: probability of each, in (0, 1].

    Returns:
        Shape (count,).

    Example:
        >>> kept(7, 8, 0.5)
        array([ True, False, False,  True,  True,  True, False,  True])
    """
    if density == 1:
        return np.ones(count, np.bool_)
    # Raw words of a counter-based generator: the one part of NumPy's randomness that never changes.
    words = np.random.Philox(key=key).random_raw((count + 1) // 2)
    return words.astype("<u8", copy=False).view("<u4")[:count] < np.uint32(
        min(round(density * 2**32), 2**32 - 1)
    )


def dare_ties(inputs: TensorInputs) -> Iterator[Floats]:
    r"""Drop, rescale, elect.

    .. math:: W = W_C + \lambda\, \mathrm{elect}(m_i \odot (W_i - W_C) / p_i, w), \quad m_i \sim B(p_i)

    Args:
        inputs: of one tensor, with a parent.

    Yields:
        Its merged values.

    Reference:
        Yu et al. 2024, Language models are super Mario, equation 3; election as in ``ties/mergekit``.
    """
    assert isinstance(inputs.options, Options)
    settings = {n: each for n, each in inputs.settings.items() if isinstance(each, WeightAndDensity)}
    for block in inputs.blocks():
        assert block.base is not None
        for values, (name, each) in zip(block.models, settings.items(), strict=True):
            values -= block.base
            values *= kept(inputs.key(name, block.start), len(values), each.density)
            values /= each.density
        weights = [each.weight for each in settings.values()]
        mixed = elect(block.models, weights, normalize=inputs.options.normalize)
        mixed *= inputs.options.scale
        mixed += block.base
        yield mixed


DARE_TIES = Operator(
    name="dare_ties",
    about="differences dropped at random and rescaled, signs elected",
    apply=dare_ties,
    options=Options,
    settings=WeightAndDensity,
    base=True,
    scaled=True,
)
