"""``task_arithmetic``: the parent plus weighted differences."""

from collections.abc import Iterator

from pydantic import Field

from tether.merge.operator import Floats, Operator, Settings, TensorInputs

__all__ = ["TASK_ARITHMETIC"]


class Options(Settings):
    """Options of ``task_arithmetic``."""

    scale: float = Field(1.0, alias="lambda")
    """Factor on the sum of differences."""


class Weight(Settings):
    """Settings of a model."""

    weight: float = 1.0


def task_arithmetic(inputs: TensorInputs) -> Iterator[Floats]:
    r"""Add weighted differences to the parent.

    .. math:: W = W_C + \lambda \sum_i w_i (W_i - W_C)

    Args:
        inputs: of one tensor, with a parent.

    Yields:
        Its merged values.

    Reference:
        Ilharco et al. 2023, Editing models with task arithmetic, section 2.
    """
    weights = [setting.weight for setting in inputs.settings.values() if isinstance(setting, Weight)]
    assert isinstance(inputs.options, Options)
    scale = inputs.options.scale
    for block in inputs.blocks():
        assert block.base is not None
        for values, weight in zip(block.models, weights, strict=True):
            values -= block.base
            values *= weight
        mixed = block.models[0]
        for values in block.models[1:]:
            mixed += values
        mixed *= scale
        mixed += block.base
        yield mixed


TASK_ARITHMETIC = Operator(
    name="task_arithmetic",
    about="parent plus lambda times the weighted sum of differences",
    apply=task_arithmetic,
    options=Options,
    settings=Weight,
    base=True,
    scaled=True,
)
