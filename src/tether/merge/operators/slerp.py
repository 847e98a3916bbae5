"""``slerp``: between two models along the great circle, tensor by tensor."""

import math
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from tether.merge.operator import Floats, Operator, Settings, TensorInputs

__all__ = ["SLERP"]

_PARALLEL = 0.9995  # beyond this cosine, as in mergekit, a straight line


class Options(Settings):
    """Options of ``slerp``."""

    t: float = Field(ge=0, le=1)
    """0 gives the first model, 1 the second."""


class NoSettings(Settings):
    """A model has none."""


def slerp(inputs: TensorInputs) -> Iterator[Floats]:
    r"""Interpolate two tensors along the arc between their directions.

    .. math:: W = \frac{\sin((1 - t)\theta)}{\sin\theta} W_1 + \frac{\sin(t\theta)}{\sin\theta} W_2,
              \quad \cos\theta = \frac{\langle W_1, W_2 \rangle}{|W_1| |W_2|}

    and (1 - t) W_1 + t W_2 where abs(cos theta) > 0.9995, or where a tensor is zero and has no direction (mergekit
    takes a right angle there). Norms and products are summed in float64.

    Args:
        inputs: of one tensor, two models; a parent, if given, is not used.

    Yields:
        Its merged values.

    Reference:
        Shoemake 1985, Animating rotation with quaternion curves, section 3.3; mergekit 0.1.5, slerp.py.
    """
    assert isinstance(inputs.options, Options)
    t = inputs.options.t
    one = two = both = 0.0
    for block in inputs.blocks():
        first, second = (values.astype(np.float64) for values in block.models)
        one += float(np.square(first).sum())
        two += float(np.square(second).sum())
        both += float((first * second).sum())
    norms = math.sqrt(one) * math.sqrt(two)
    cosine = min(1.0, max(-1.0, both / norms)) if norms else 1.0
    weights = (1 - t, t)
    if abs(cosine) <= _PARALLEL:
        angle = math.acos(cosine)
        weights = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    for block in inputs.blocks():
        merged, other = block.models
        merged *= weights[0]
        other *= weights[1]
        merged += other
        yield merged


SLERP = Operator(
    name="slerp",
    about="between two models along the great circle of each tensor",
    apply=slerp,
    options=Options,
    settings=NoSettings,
    base=False,
    fewest_models=2,
    most_models=2,
)
