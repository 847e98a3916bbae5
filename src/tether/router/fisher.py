"""Static cost of frozen deltas: half their squared length in the base's empirical Fisher, streamed over text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import ConfigError, ShapeError

__all__ = ["delta_cost", "empirical_fisher"]


def empirical_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    token_losses: Callable[[nn.Module, Any], Tensor],
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    r"""Diagonal of the empirical Fisher of linear layers, per token.

    .. math:: F_{ij} = \frac1n \sum_t g_{ti}^2 x_{tj}^2

    with x the input and g the gradient of the summed loss at the output of the layer at position t. Exact
    per token where positions do not mix above the layer (an output head, an abduction head, a last MLP); below
    attention, g at a position also holds what later tokens lose, the usual approximation. Not the square of the
    mean gradient, which optimizers keep: that one is too small by the tokens of a batch.

    Cost: one forward and backward pass and one product of squares a layer; memory of the layers' weights.

    Args:
        model: any model; its parameters are not changed, and get no gradient.
        batches: whatever `token_losses` takes; read once, one at a time.
        token_losses: gives the loss of each token of a batch, nats, any shape.
        names: of the linear layers; None takes all `nn.Linear`.

    Returns:
        Fisher of the weight of each layer under `NAME.weight`, shape (out, in), float32.

    Raises:
        ConfigError: no batch, a name that is no linear layer, or a layer that no loss depends on.

    Reference:
        Spec document 3, section 2.1; research notes on FARS, section 4.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = list(linear) if names is None else list(names)
    unknown = [name for name in chosen if name not in linear]
    if unknown or not chosen:
        raise ConfigError(
            f"{unknown or 'no layers'}: expected names of linear layers, such as {list(linear)[:3]}"
        )
    totals = {name: torch.zeros_like(linear[name].weight, dtype=torch.float32) for name in chosen}
    touched: set[str] = set()
    tokens = 0

    def watch(name: str) -> Callable[..., None]:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            squares = inputs[0].detach().flatten(0, -2).float().square()

            def backward(gradient: Tensor) -> None:
                touched.add(name)
                totals[name].addmm_(gradient.flatten(0, -2).float().square().T, squares)

            output.register_hook(backward)

        return forward

    handles = [linear[name].register_forward_hook(watch(name)) for name in chosen]
    # A frozen base is the usual case; gradients at its weights are asked for, not kept.
    wanted = {name: linear[name].weight.requires_grad for name in chosen}
    for name in chosen:
        linear[name].weight.requires_grad_(True)
    try:
        for batch in batches:
            losses = token_losses(model, batch)
            # Gradients at the weights themselves are not needed, and the model's .grad is left alone.
            torch.autograd.grad(losses.sum(), [linear[name].weight for name in chosen], allow_unused=True)
            tokens += losses.numel()
    finally:
        for handle in handles:
            handle.remove()
        for name, kept in wanted.items():
            linear[name].weight.requires_grad_(kept)
    if not tokens:
        raise ConfigError("no batch: expected at least one to estimate a Fisher from")
    if missing := [name for name in chosen if name not in touched]:
        raise ConfigError(f"{missing}: the loss does not depend on these layers; leave them out")
    return {f"{name}.weight": total / tokens for name, total in totals.items()}


def delta_cost(fisher: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
    r"""Static cost of frozen deltas.

    .. math:: c_k = \tfrac12 \sum_i F_i \delta_{k,i}^2

    Its order of magnitude is that of the divergence (research: 3 to 5 times low), its ranking among deltas of
    one size was noise: a guard-rail, not a measure of quality.

    Args:
        fisher: of the base by parameter name, as `empirical_fisher` gives it.
        deltas: change of each parameter by name, of K deltas; parameters without a Fisher must not be in it.

    Returns:
        Nats per token, shape (K,), float64.

    Raises:
        ConfigError: a delta of a parameter without a Fisher.
        ShapeError: a change of another shape than its Fisher.

    Reference:
        Spec document 3, section 2.1; research notes on FARS, section 4.

    Example:
        >>> delta_cost({"w": torch.tensor([2.0, 0.5])}, [{"w": torch.tensor([1.0, 2.0])}])
        tensor([2.], dtype=torch.float64)
    """
    costs = torch.zeros(len(deltas), dtype=torch.float64)
    for row, delta in enumerate(deltas):
        if unknown := [name for name in delta if name not in fisher]:
            raise ConfigError(f"delta {row}: no Fisher of {unknown}; estimate it for these layers too")
        for name, change in delta.items():
            if change.shape != fisher[name].shape:
                raise ShapeError(
                    f"delta {row}, {name}: shape {tuple(change.shape)}, its Fisher {tuple(fisher[name].shape)}"
                )
            costs[row] += 0.5 * (fisher[name].double() * change.double().square()).sum()
    return costs
