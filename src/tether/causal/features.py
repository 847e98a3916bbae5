"""What a delta reads: the backbone's last hidden state, and states of layers in the middle beside it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tether.errors import ConfigError

__all__ = ["check_layers", "default_layers", "join_features"]

SHARES = (1 / 3, 2 / 3, 13 / 15)
"""How deep the layers of `--features multi` lie: 10, 20 and 26 of 30."""


def default_layers(depth: int) -> tuple[int, ...]:
    """Choose the layers of `--features multi`.

    Args:
        depth: layers of the backbone, >= 2.

    Returns:
        Distinct layer numbers in [1, depth - 1], ascending.

    Example:
        >>> default_layers(30)
        (10, 20, 26)
    """
    return tuple(sorted({min(max(round(share * depth), 1), depth - 1) for share in SHARES}))


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Refuse layers that a backbone does not have.

    Args:
        layers: layer numbers; 1 is the first layer's output.
        depth: layers of the backbone.

    Raises:
        ConfigError: a number outside [1, depth - 1], or one that comes twice.
    """
    if any(not 1 <= layer < depth for layer in layers) or len(set(layers)) < len(layers):
        raise ConfigError(
            f"layers {list(layers)}: expected distinct numbers in [1, {depth - 1}]; the last of {depth} layers is "
            "always read"
        )


def join_features(
    hidden_states: Float[Tensor, "*batch hidden"],
    states: Sequence[Float[Tensor, "*batch hidden"]] | None,
    layers: Sequence[int],
) -> Float[Tensor, "*batch features"]:
    """Put states of middle layers beside the last hidden state.

    Each middle state is divided by its root mean square: the residual stream grows from layer to layer, and
    with it the size of a step of a head that reads it.

    Args:
        hidden_states: z, shape (..., H).
        states: what the backbone returns as `hidden_states`: embeddings, then each layer's output; not read
            where `layers` is empty.
        layers: layer numbers; 1 is the first layer's output.

    Returns:
        Features, shape (..., H (1 + L)), float32; z itself, as it is, where `layers` is empty.

    Example:
        >>> z, middle = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -3.0])
        >>> join_features(z, [z, middle], [1])
        tensor([ 1.,  2.,  1., -1.])
    """
    if not layers or states is None:
        return hidden_states
    middle = (states[layer].float() for layer in layers)
    scaled = [m * m.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt() for m in middle]
    return torch.cat([hidden_states.float(), *scaled], dim=-1)
