"""``linear``: the weighted mean of models."""

from collections.abc import Iterator

from tether.errors import ConfigError
from tether.merge.operator import Floats, Operator, Settings, TensorInputs

__all__ = ["LINEAR"]


class Options(Settings):
    """Options of ``linear``."""

    normalize: bool = True
    """Whether to divide by the sum of the weights."""


class Weight(Settings):
    """Settings of a model."""

    weight: float = 1.0


def linear(inputs: TensorInputs) -> Iterator[Floats]:
    r"""Average models.

    .. math:: W = \sum_i w_i W_i / \sum_i w_i

    Products, sums in the recipe's order and the division are float32, as in mergekit: of n models the result is within
    (n + 3) 2^-24 of ``sum |w_i W_i| / |sum w_i|``, so that a model averaged with itself may differ in its last bits.

    Args:
        inputs: of one tensor; a parent, if given, is not used.

    Yields:
        Its merged values.

    Raises:
        ConfigError: If weights that are to be normalised sum to 0.

    Reference:
        Wortsman et al. 2022, Model soups, section 2.
    """
    weights = [setting.weight for setting in inputs.settings.values() if isinstance(setting, Weight)]
    assert isinstance(inputs.options, Options)
    total = sum(weights) if inputs.options.normalize else 1.0
    if total == 0:
        raise ConfigError(
            f"the weights of {inputs.name} are {weights} and sum to 0; expected another sum, or normalize: false"
        )
    for block in inputs.blocks():
        merged = block.models[0]
        merged *= weights[0]
        for values, weight in zip(block.models[1:], weights[1:], strict=True):
            values *= weight
            merged += values
        merged /= total
        yield merged


LINEAR = Operator(
    name="linear",
    about="weighted mean of the models",
    apply=linear,
    options=Options,
    settings=Weight,
    base=False,
)
