"""What decides who sleeps: means over the last tokens of a text, and gates that were open a short while ago.

Both look back within a text alone, at what is kept of the positions before, so they do not depend on how a text is cut
into calls.
"""

import torch
from torch import Tensor

__all__ = ["recent_mean", "still_open"]


def recent_mean(states: Tensor, places: Tensor, window: int, before: Tensor | None = None) -> Tensor:
    """Average the hidden states of the last tokens of each text, this one included.

    Args:
        states: z, shape (B, T, H).
        places: place of each token in its text, from 0, shape (B, T): no mean reaches back beyond its beginning.
        window: tokens to average, >= 1.
        before: states of the positions before, shape (B, P, H).

    Returns:
        The means, shape (B, T, H), float32; up to rounding they do not depend on how a text was cut.
    """
    past = 0 if before is None else min(before.shape[1], window - 1)
    if before is not None and past:
        states = torch.cat([before[:, -past:], states], dim=1)
    states = states.float()
    length = places.shape[1]
    count = (places + 1).clamp(1, window).unsqueeze(-1)
    if length == 1:
        # One token goes on: rows whose text began later have no token that far back.
        far = torch.arange(past, -1, -1, device=states.device)
        return (states * (places >= far).unsqueeze(-1)).sum(1, keepdim=True) / count
    total = torch.zeros_like(states[:, past:])
    for back in range(min(window, past + length)):
        # Rows whose text began later have no token that far back.
        first = max(0, back - past)
        seen = (places[:, first:] >= back).unsqueeze(-1)
        total[:, first:] += states[:, past + first - back : past + length - back] * seen
    return total / count


def still_open(opened: Tensor, places: Tensor, hold: int, before: Tensor | None = None) -> Tensor:
    """Tell which gates are open, or were a short while ago in the same text.

    A gate that closes for a few tokens in the middle of its domain would put the expert to sleep that has just earned
    its weight (docs/log.md).

    Args:
        opened: which gates are open, shape (B, T, N), bool.
        places: place of each token in its text, from 0, shape (B, T).
        hold: for how many tokens more a gate counts as open, >= 0.
        before: the same as `opened` of the positions before, shape (B, P, N), of which `hold` are of use.

    Returns:
        Shape (B, T, N), bool.
    """
    if not hold:
        return opened
    past = 0 if before is None else min(before.shape[1], hold)
    if before is not None and past:
        opened = torch.cat([before[:, -past:], opened], dim=1)
    at = torch.arange(opened.shape[1], device=opened.device).view(1, -1, 1)
    last = torch.where(opened, at, -opened.shape[1] - hold).cummax(1).values
    since: Tensor = (at - last)[:, past:]
    return since <= places.clamp(0, hold).unsqueeze(-1)
