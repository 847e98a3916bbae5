"""What the base writes of itself, starting from nothing: what gates are told apart from, without any text."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Background", "write_background"]

TEXTS, LENGTH = 96, 34
SEED = 0

Background = Tensor
"""Hidden states of texts that the base has sampled, shape (B, T, H), float32."""


@torch.no_grad()
def write_background(
    model: Any, *, texts: int = TEXTS, length: int = LENGTH, seed: int = SEED, at_once: int = TEXTS
) -> Background:
    """Let the base write short texts, and keep its hidden states along them.

    The first token is drawn from what the base expects at the start of a text; from there on each token is
    drawn from its softmax at temperature 1. The start token itself is not part of a text, as it is not of a
    window of domain text.

    Cost: texts x length tokens of generation, about 15 CPU seconds for a 135M model; once for a base.

    Args:
        model: a CausalQwenForCausalLM; its fusion, if any, is not used.
        texts: how many.
        length: tokens each.
        seed: of the draws.
        at_once: texts written side by side.

    Returns:
        Hidden states, shape (texts, length, H), float32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config(decoder=True)
    known = (config.bos_token_id, config.eos_token_id, 0)
    start = next(token for token in known if isinstance(token, int))
    device = model.action.weight.device

    def expected(hidden_states: Tensor) -> Tensor:
        loc = model.abduction(hidden_states.to(model.action.weight.dtype))[0]
        return torch.softmax(model.action.score_loc(loc).float(), dim=-1).cpu()

    first = model.backbone(
        input_ids=torch.tensor([[start]], device=device), use_cache=False
    ).last_hidden_state
    opening = expected(first[:, -1])[0]
    written = []
    for begin in range(0, texts, at_once):
        rows = min(at_once, texts - begin)
        tokens = torch.multinomial(opening, rows, replacement=True, generator=generator).unsqueeze(-1)
        past, states = None, []
        for _ in range(length):
            output = model.backbone(input_ids=tokens.to(device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            states.append(output.last_hidden_state[:, -1].float().cpu())
            tokens = torch.multinomial(expected(output.last_hidden_state[:, -1]), 1, generator=generator)
        written.append(torch.stack(states, dim=1))
    return torch.cat(written)
