"""What an operator is: a named function from the inputs of one tensor to its merged values."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

__all__ = ["Block", "Extra", "Floats", "Operator", "Request", "Settings", "TensorInputs", "no_extras"]

Floats = npt.NDArray[np.float32]


class Settings(BaseModel):
    """Base of the schemas that operators give for their options and for a model's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=False)


class Block(NamedTuple):
    """Some consecutive elements of one tensor of every input, float32.

    The arrays are buffers: an operator may write into them, and the next block overwrites them.

    Attributes:
        start: index of the first element in the flattened tensor.
        base: of the parent, shape (n,); None where the recipe has none.
        models: of each model in the recipe's order, shape (n,) each.
    """

    start: int
    base: Floats | None
    models: tuple[Floats, ...]


class TensorInputs(Protocol):
    """The inputs of one output tensor, read when asked for. Reading again starts again."""

    @property
    def name(self) -> str:
        """Name of the output tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def options(self) -> BaseModel:
        """The operator's options for this tensor, of the operator's ``options`` schema."""

    @property
    def settings(self) -> Mapping[str, BaseModel]:
        """Model name to its settings for this tensor, in the recipe's order."""

    @property
    def has_base(self) -> bool:
        """Whether there is a parent to read, under the name ``base``."""

    @property
    def extras(self) -> "Mapping[str, Extra]":
        """What the operator asked for beside the weights."""

    def blocks(self) -> Iterator[Block]:
        """Read all inputs side by side, in blocks of a fixed number of elements."""

    def whole(self, model: str) -> Floats:
        """Read one input whole, in the shape of the output tensor."""

    def extra(self, key: str) -> npt.NDArray[np.generic]:
        """Read one of the tensors that the operator named in ``extras``."""

    def key(self, model: str, start: int) -> int:
        """Give a 128-bit key for randomness that depends on seed, tensor, model and block, and nothing else."""


class Extra(NamedTuple):
    """A tensor beside the weights that an operator needs for an output tensor, such as a Gram matrix.

    Attributes:
        file: a safetensors file.
        tensor: its name there.
        shape: the shape that it must have; the plan is refused otherwise.
        model: the model whose units its axes index; empty if they index those of the result.
        axis: which axis of that model's weight has the same units. A model that is aligned has it brought
            along, with zeros where a unit has no counterpart.
        dims: which of its own axes index these units; None for all of them.
    """

    file: str
    tensor: str
    shape: tuple[int, ...]
    model: str = ""
    axis: int = -1
    dims: tuple[int, ...] | None = None


class Request(NamedTuple):
    """An output tensor that an operator is asked about when a merge is planned.

    Attributes:
        name: of the output tensor.
        canonical: the same without the prefix of the language tower: ``layers.0.mlp.up_proj.weight``.
        shape: its shape.
        options: the operator's options for it.
        settings: model name to its settings for it.
        sources: model name to the canonical name and shape of its own tensor; absent where it has none.
        tied: whether the result's head is its embedding.
    """

    name: str
    canonical: str
    shape: tuple[int, ...]
    options: BaseModel
    settings: Mapping[str, BaseModel]
    sources: Mapping[str, tuple[str, tuple[int, ...]]]
    tied: bool = False


def no_extras(request: Request) -> Mapping[str, Extra]:
    """Need nothing beside the weights.

    Args:
        request: any tensor.

    Returns:
        Nothing.
    """
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """An operator under its name.

    Attributes:
        name: what recipes call it.
        about: one line for users.
        apply: yields the merged values of a tensor, flattened and cut anyhow, as float32.
        options: schema of the recipe's ``options``.
        settings: schema of what a model has beside its path.
        base: whether it needs the parent.
        may_base: whether it reads the parent where the recipe has one, without needing it.
        most_models: how many models it can take; None for any number.
        scaled: whether ``options.lambda`` scales the whole change from the parent.
        whole: whether it reads tensors whole; the plan then counts them as memory.
        held: bytes that it holds for each element of a tensor that it reads whole, beside those that are read.
        extras: names the tensors beside the weights that it needs.
        refined: whether it has a lambda and a last step that are found on the merged model (a recipe's ``refine``).
    """

    name: str
    about: str
    apply: Callable[[TensorInputs], Iterator[Floats]]
    options: type[BaseModel]
    settings: type[BaseModel]
    base: bool
    may_base: bool = False
    fewest_models: int = 1
    most_models: int | None = None
    scaled: bool = False
    whole: bool = False
    held: int = 0
    extras: Callable[[Request], Mapping[str, Extra]] = no_extras
    refined: bool = False
