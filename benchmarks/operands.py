"""Run tether's merge operators on tensors in memory, as the streamed merge runs them on files."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from tether.merge.operator import Block, Floats
from tether.merge.operators import OPERATORS

__all__ = ["merge_tensor"]


@dataclass(frozen=True)
class _Inputs:
    name: str
    shape: tuple[int, ...]
    options: BaseModel
    settings: Mapping[str, BaseModel]
    tensors: tuple[Floats, ...]
    base: Floats

    def blocks(self) -> Iterator[Block]:
        yield Block(0, self.base.copy(), tuple(tensor.copy() for tensor in self.tensors))

    def whole(self, model: str) -> Floats:
        return self.tensors[list(self.settings).index(model)].reshape(self.shape).copy()

    def extra(self, key: str) -> Any:
        raise KeyError(key)

    def key(self, model: str, start: int) -> int:
        digest = hashlib.sha256(f"{self.name} {model} {start}".encode()).digest()
        return int.from_bytes(digest[:16], "little")


def merge_tensor(
    operator: str,
    name: str,
    base: Tensor,
    models: list[Tensor],
    options: dict[str, Any],
    settings: dict[str, Any],
) -> Tensor:
    """Merge one tensor.

    Args:
        operator: name of the operator.
        name: of the tensor; randomness depends on it.
        base: of the parent.
        models: of the fine-tunes.
        options: of the operator.
        settings: of every model alike.

    Returns:
        The merged tensor.
    """
    known = OPERATORS[operator]
    inputs = _Inputs(
        name=name,
        shape=tuple(base.shape),
        options=known.options(**options),
        settings={f"m{i}": known.settings(**settings) for i in range(len(models))},
        tensors=tuple(model.float().reshape(-1).numpy() for model in models),
        base=base.float().reshape(-1).numpy(),
    )
    merged = np.concatenate([part.reshape(-1).copy() for part in known.apply(inputs)])
    return torch.from_numpy(merged).reshape(base.shape).to(base.dtype)
