"""What decides who sleeps: means over the last tokens of a text, and gates that were open a short while ago.

Both look back within a text alone, at what is kept of the positions before, so they do not depend on how a text is cut
into calls.
"""

import torch
from torch import Tensor

__all__ = ["recent_mean", "since_open"]

NEVER = 2**30


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


def since_open(
    opened: Tensor,
    mask: Tensor,
    places: Tensor,
    before: Tensor | None = None,
    *,
    staying: Tensor | None = None,
    hold: int = 0,
    grace: int = 0,
    written: int | None = None,
) -> Tensor:
    """Count the tokens since each gate was open in the same text.

    A gate that closes for a few tokens in the middle of its domain would put the expert to sleep that has just earned
    its weight (docs/log.md); so an open gate closes later than it opens, and who is awake is decided by this count. At
    the beginning of a text gates cannot tell, while the first tokens often can; so there everybody counts as awake. On
    text that the model writes itself it is decided by the given text before it: who would be awake at the next token of
    it stays so, and nobody else wakes. Gates judge text that came. On what the model writes they would hand a domain's
    text to the base little by little, and lead text that nobody asked a domain for away from the base.

    Args:
        opened: which gates open, shape (B, T, N), bool.
        mask: which positions carry a token, shape (B, T), bool; others are not counted.
        places: place of each token in its text, from 0, shape (B, T).
        before: what this returned for the positions before, of which the last is of use, shape (B, P, N).
        staying: which gates stay open where they were open at the token before, shape (B, T, N), bool; None lets each
            close where it does not open. Of use with a hold.
        hold: for how many tokens more a gate counts as open, >= 0; with 0 nothing is different in written text.
        grace: for how many tokens of a text everybody counts as awake for the last time, >= 0.
        written: first position here that the model wrote itself, <= 0 where it was before; None where all are given.

    Returns:
        Tokens since, shape (B, T, N), int32: 0 where open, at most `hold` where it counts as open, else `hold` + 1.
    """
    count = mask.int().cumsum(1)
    at = count.unsqueeze(-1)
    last = torch.where(opened, at, -NEVER).cummax(1).values
    before = None if before is None or not before.shape[1] else before[:, -1:].to(last)
    if before is not None:
        last = torch.maximum(last, -before)
    start = torch.where((places == 0) & mask, count, 1 - NEVER).cummax(1).values.unsqueeze(-1)
    if hold and staying is not None:
        closed = torch.where(mask.unsqueeze(-1) & ~staying & ~opened, at, -NEVER).cummax(1).values
        if before is not None:
            closed = torch.where(before > 0, closed.clamp(min=0), closed)
        still = (last > closed) & (last >= start)
        last = torch.maximum(last, torch.where(still, at, -NEVER).cummax(1).values)
    since = torch.where(last >= start, at - last, NEVER)
    since = torch.where((places < grace).unsqueeze(-1), since.clamp(max=hold), since)
    if hold and written is not None and written < since.shape[1]:
        first = max(written, 0)
        held, at_held = (before, 0) if first == 0 else (since[:, :first], at[:, first - 1 : first])
        since[:, first:] = NEVER
        if held is not None:
            counted = torch.where(held[:, -1:] < hold, at_held, -NEVER)
            since[:, first:] = torch.where(counted >= start[:, first:], 0, NEVER)
    return since.clamp(max=hold + 1).int()
