"""Reduce what linear layers put out, and the gradients that come back, while a model runs."""

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tether.merge.towers import find_linears

__all__ = ["Recorder"]


class Recorder:
    """Hooks on the linear layers of a model for the time of a `with` block.

    Only what the two functions return is kept; outputs live as long as the pass itself needs them.

    Args:
        model: a transformers model, called with one sequence at a time.
        families: ends of module names inside a decoder layer.
        reduce: of a layer's outputs (S, d_out) and inputs (S, d_in), detached, to what is kept.
        reduce_gradient: of outputs, inputs and the gradient of the outputs; None leaves the backward pass alone.

    Attributes:
        forward: full module name to what `reduce` returned.
        backward: full module name to what `reduce_gradient` returned.
    """

    def __init__(
        self,
        model: Any,
        families: Sequence[str],
        reduce: Callable[[Tensor, Tensor], Tensor],
        reduce_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.forward: dict[str, Tensor] = {}
        self.backward: dict[str, Tensor] = {}
        self._modules = {name: m for layer in find_linears(model, families) for name, m in layer.items()}
        self._reduce, self._reduce_gradient = reduce, reduce_gradient
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def seen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            del module
            x, y = args[0][0].detach().float(), output[0].detach().float()
            self.forward[name] = self._reduce(y, x)
            reduce = self._reduce_gradient
            if reduce is not None and output.requires_grad:

                def back(gradient: Tensor) -> None:
                    self.backward[name] = reduce(y, x, gradient[0].float())

                output.register_hook(back)

        return seen
