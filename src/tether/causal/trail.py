"""The numbers of texts that are being written, one token at a time."""

import torch
from torch import Tensor

from tether.errors import ConfigError

__all__ = ["Trail"]


class Trail:
    """The numbers of the texts being written: those of the prompt, and each `<NUM>`'s as it is chosen.

    A step predicts the next token and the value it would have; which token it was is known one step later.

    Args:
        prompt: numbers of the prompts, shape (B, L).
        num_token_id: id of `<NUM>`.
        listener: gets the predicted values of each step, shape (B,), before its token is chosen; or None.

    Attributes:
        values: numbers so far, shape (B, L), float64.
        pending: what the last step predicts as the next value, shape (B,), or None.
    """

    def __init__(self, prompt: Tensor, num_token_id: int, listener: list[Tensor] | None = None) -> None:
        self.prompt = self.values = prompt.double()
        self.num_token_id, self.listener = num_token_id, listener
        self.pending: Tensor | None = None

    def expect(self, value: Tensor) -> None:
        """Keep what a step predicts.

        Args:
            value: the next value of each text, should its token be `<NUM>`, shape (B,).
        """
        self.pending = value.double()
        if self.listener is not None:
            self.listener.append(self.pending)

    def follow(self, input_ids: Tensor) -> Tensor:
        """Take in the token chosen since the last call.

        Args:
            input_ids: texts so far, shape (B, L) or (B, L + 1); several times as many rows as prompts where
                each prompt goes on in several ways.

        Returns:
            The numbers of these texts, of the same shape.

        Raises:
            ConfigError: several tokens were added at once.
        """
        new = input_ids.shape[1] - self.values.shape[1]
        if len(input_ids) != len(self.values):
            self.values = self.values.repeat_interleave(len(input_ids) // len(self.values), dim=0)
        if new == 0:
            return self.values
        if new != 1 or self.pending is None:
            raise ConfigError(
                f"{new} tokens came at once: numbers are written one token at a time; generate without an "
                "assistant and without prompt lookup"
            )
        chosen = torch.where(input_ids[:, -1:] == self.num_token_id, self.pending.unsqueeze(-1), 0.0)
        self.values = torch.cat([self.values, chosen.to(self.values.device)], dim=-1)
        return self.values

    def finish(self, sequences: Tensor, beams: int) -> Tensor:
        """Give the numbers of the finished texts.

        Args:
            sequences: shape (B, L + new).
            beams: more than 1 where texts were reordered; these hold no new numbers.

        Returns:
            Their numbers, of the same shape.
        """
        if beams == 1:
            return self.follow(sequences)
        values = torch.zeros(sequences.shape, dtype=torch.float64, device=sequences.device)
        values[:, : self.prompt.shape[1]] = self.prompt.repeat_interleave(len(values) // len(self.prompt), 0)
        return values
