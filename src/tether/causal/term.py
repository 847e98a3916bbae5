"""What a training may be given beside the losses of the model: a term made of what happens inside it."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Term"]


class Term(Protocol):
    """A term of the loss that watches a training, as `tether.router.RoutingCourse` does.

    Attributes:
        settings: what its values depend on, as JSON: a training that is resumed has the same.
    """

    settings: dict[str, Any]

    def check(self, model: nn.Module) -> None:
        """Refuse a model to which the term cannot be added, before anything takes long."""

    def begin(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Attach to model and optimizer; `close` undoes it."""

    def loss(self, mask: Tensor | None = None, task_loss: Tensor | None = None) -> Tensor:
        """Give the term of the last forward pass, its mean over the tokens of all processes."""
        ...

    def after_step(self, step: int, last: bool = False) -> None:
        """Note that the optimizer has taken a step, from 1; every process calls it."""

    def report(self) -> dict[str, Any]:
        """Say what came of the training, as JSON."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Give what is needed to go on, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved, once begun."""

    def close(self) -> None:
        """Detach."""
