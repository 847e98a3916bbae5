"""Parameters of a layer's experts, whichever way they are laid out, and sums over each expert's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tether.errors import ConfigError, ShapeError

__all__ = ["Experts", "find_experts", "squared_norms"]


@dataclass(frozen=True, eq=False)
class Experts:
    """Trainable parameters of E experts.

    Attributes:
        count: E.
        stacked: tensors whose first axis is the expert, shape (E, ...).
        separate: the tensors of each expert alone, E tuples of one length; empty tuples where all is stacked.
    """

    count: int
    stacked: tuple[nn.Parameter, ...]
    separate: tuple[tuple[nn.Parameter, ...], ...]

    def parameters(self) -> list[nn.Parameter]:
        """List all parameters.

        Returns:
            Stacked ones first, then expert by expert.
        """
        return [*self.stacked, *(parameter for own in self.separate for parameter in own)]

    def total(self, values: Callable[[nn.Parameter, bool], Tensor]) -> Tensor:
        """Add up something about each expert over its parameters.

        Args:
            values: gives for a parameter, and whether it is stacked, a value an expert: shape (E,) where it
                is stacked, a scalar otherwise.

        Returns:
            Sums, shape (E,), float64.
        """
        total = torch.zeros(self.count, dtype=torch.float64)
        for parameter in self.stacked:
            total += values(parameter, True).to(total)
        if any(self.separate):
            own = [torch.stack([values(p, False).to(total) for p in ps]).sum() for ps in self.separate]
            total += torch.stack(own)
        return total


def find_experts(module: nn.Module, count: int, name: str = "experts") -> Experts:
    """Find out how the parameters of a module belong to its experts.

    Args:
        module: an `nn.ModuleList` of E experts, or a module that holds stacked tensors.
        count: E, as the router has it.
        name: what to call the module in an error.

    Returns:
        The trainable parameters.

    Raises:
        ShapeError: another number of experts than the router's, experts of unequal shapes, or a tensor whose
            first axis is not the expert.
        ConfigError: no expert is trainable.
    """
    if isinstance(module, nn.ModuleList):
        if len(module) != count:
            raise ShapeError(
                f"{name}: {len(module)} experts, the router has {count} outputs; expected as many"
            )
        shapes = [{key: tuple(p.shape) for key, p in expert.named_parameters()} for expert in module]
        unequal = [i for i, shape in enumerate(shapes) if shape != shapes[0]]
        if unequal:
            raise ShapeError(
                f"{name}: experts {unequal} have other parameters than expert 0 ({shapes[unequal[0]]} against "
                f"{shapes[0]}); costs of unequal experts do not compare, use form='switch' or 'bias' there"
            )
        separate = tuple(tuple(p for p in expert.parameters() if p.requires_grad) for expert in module)
        if len({len(own) for own in separate}) > 1:
            raise ConfigError(f"{name}: some experts are frozen and others not; expected all or none")
        found = Experts(count, (), separate)
    else:
        wrong = {
            key: tuple(p.shape) for key, p in module.named_parameters() if p.dim() == 0 or len(p) != count
        }
        if wrong:
            raise ShapeError(
                f"{name}: {wrong} do not have the {count} experts on their first axis; name the tensors yourself "
                "with register_site(parameters=Experts(...))"
            )
        stacked = tuple(p for p in module.parameters() if p.requires_grad)
        found = Experts(count, stacked, ((),) * count)
    if not found.parameters():
        raise ConfigError(
            f"{name}: no expert is trainable, so that there is no cost of their steps; expected trainable experts, "
            "cost='uniform', or form='switch' or 'bias'"
        )
    return found


def squared_norms(values: Tensor, stacked: bool) -> Tensor:
    """Sum the squares of each expert's entries without a copy of the tensor.

    A tensor sharded over processes is reduced where it lies; only E numbers are gathered.

    Args:
        values: shape (E, ...) if stacked, else any shape; a plain tensor or a DTensor.
        stacked: whether the first axis is the expert.

    Returns:
        Shape (E,) or (), float64: squares of the smallest floats must not vanish.
    """
    axes = tuple(range(1 if stacked else 0, values.dim()))
    wide = torch.promote_types(values.dtype, torch.float32)
    # vector_norm reads the tensor once; a square and a sum would write and read a copy of it (7 times slower).
    if not axes:
        norm = values.to(wide).abs()
    elif isinstance(values, DTensor):
        norm = torch.linalg.vector_norm(values, dim=axes, dtype=wide)
    else:
        flat = values.flatten(1) if stacked else values.flatten()
        norm = torch.linalg.vector_norm(flat, dim=-1, dtype=wide)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.double().square()
