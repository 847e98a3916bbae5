"""The output head as fits and measurements use it: logits of softmax mode from the location of U, and their slope."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["OutputHead", "chunk_rows", "output_head"]

CHUNK_BYTES = 24_000_000
"""Size of a float32 tensor over the vocabulary: below the 32 MB from which allocators ask the system for fresh
pages each time, which costs more than the arithmetic."""


class OutputHead(NamedTuple):
    """What turns the location of U into logits.

    Attributes:
        weight: W, shape (V, C).
        bias: of the classes, shape (V,), or None.
        cap: logits are cap tanh(score / cap), or the scores where it is None.
    """

    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None

    def capped(self, scores: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Turn scores into logits.

        Args:
            scores: W loc + b of any classes, any shape.

        Returns:
            Logits, in that shape.
        """
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap

    def logits(self, latent_loc: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch vocab"]:
        """Compute the logits as the model does: product and cap in the dtype of the weight.

        Args:
            latent_loc: loc of U, shape (..., C).

        Returns:
            Logits, shape (..., V), float32.
        """
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return self.capped(
            torch.nn.functional.linear(latent_loc.to(self.weight.dtype), self.weight, bias)
        ).float()

    def slope(self, logits: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"] | None:
        """Give the derivative of logits by their scores, 1 - (logit / cap)^2.

        Args:
            logits: any shape.

        Returns:
            The slopes in that shape, in [0, 1]; None where nothing is capped, so that all are 1.
        """
        return None if self.cap is None else 1 - (logits / self.cap).square()

    def log_prob(self, latent_loc: Float[Tensor, "tokens latent"]) -> Iterator[Float[Tensor, "rows vocab"]]:
        """Compute the served softmax, a few tokens at a time.

        Args:
            latent_loc: loc of U, shape (N, C).

        Yields:
            Log probabilities of `chunk_rows` tokens, shape (rows, V), float32.
        """
        for part in latent_loc.split(chunk_rows(self.weight)):
            yield self.logits(part).log_softmax(-1)


def chunk_rows(weight: Float[Tensor, "vocab latent"]) -> int:
    """How many tokens to treat at once where the whole vocabulary is held.

    Args:
        weight: of the output head, shape (V, C).

    Returns:
        Rows, >= 1.
    """
    return max(1, CHUNK_BYTES // (4 * len(weight)))


def output_head(model: Any) -> OutputHead:
    """Give a model's output head, without gradients.

    Args:
        model: a CausalQwenForCausalLM, or what holds its `action`.

    Returns:
        The head.
    """
    action = model.action
    bias = None if action.bias is None else action.bias.detach()
    return OutputHead(action.weight.detach(), bias, action.logit_cap)
