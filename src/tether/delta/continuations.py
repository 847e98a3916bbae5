"""Texts that a fused model writes itself, so that drift is measured where it would be used, not on prompts alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tether.causal.losses import IGNORE
from tether.causal.noise import Noise
from tether.delta.measure import Measurement
from tether.delta.windows import Windows
from tether.errors import ConfigError

__all__ = ["PROMPT", "continue_texts", "generated_part", "not_drawn", "prompts", "text_windows"]

PROMPT = 32
"""Tokens of a document that are given."""
CLOSE = {torch.float32: 1e-2, torch.float64: 1e-6}
"""How far a score may lie below the best and the token still count as drawn: rounding differs with the cut of a
text into calls; half precision takes 0.5."""


def prompts(documents: Sequence[str], tokenizer: Any, count: int, *, name: str = "the text") -> Tensor:
    """Take the beginnings of the first documents that are long enough.

    Args:
        documents: the text.
        tokenizer: of the base.
        count: how many, >= 1.
        name: what to call the text in an error.

    Returns:
        Token ids, shape (at most count, PROMPT).

    Raises:
        ConfigError: no document has `PROMPT` tokens.
    """
    found: list[list[int]] = []
    for document in documents:
        ids = tokenizer(document[: 20 * PROMPT], verbose=False)["input_ids"][:PROMPT]
        found += [ids] if len(ids) == PROMPT else []
        if len(found) == count:
            break
    if not found:
        raise ConfigError(
            f"{name}: no document of {PROMPT} tokens or more, so nothing to continue; ask for no continuations"
        )
    return torch.tensor(found)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise, so that the largest score is a draw from the softmax, the same on every run."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = torch.full((len(input_ids), 1), input_ids.shape[1])
        return scores + _gumbel(self.noise, place)[:, 0].to(scores)


def _gumbel(noise: Noise, places: Tensor) -> Tensor:
    return -(-noise.at(places).double().log()).log()


def continue_texts(model: Any, prompt_ids: Tensor, length: int, seed: int = 0) -> Tensor:
    """Let a model write on by softmax sampling at temperature 1, in noise that can be drawn again.

    Args:
        model: a CausalQwenForCausalLM.
        prompt_ids: shape (B, P).
        length: tokens to write, >= 1; an end of text does not end it.
        seed: of the noise.

    Returns:
        Token ids, shape (B, P + length).
    """
    noise = Noise.draw(len(prompt_ids), model.vocab_size, seed=seed)
    device = model.action.weight.device
    written: Tensor = model.generate(
        prompt_ids.to(device),
        attention_mask=torch.ones_like(prompt_ids, device=device),
        logits_processor=LogitsProcessorList([_Draw(noise)]),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=None,
        pad_token_id=0,
    )
    return written.cpu()


@torch.no_grad()
def not_drawn(model: Any, ids: Tensor, seed: int = 0) -> int:
    """Count tokens that a model, given the text before them, would not have drawn.

    Args:
        model: the model said to have written them.
        ids: from `continue_texts`, shape (B, P + length).
        seed: of the noise.

    Returns:
        How many; 0 for texts that this model wrote with this seed.
    """
    noise = Noise.draw(len(ids), model.vocab_size, seed=seed)
    places = torch.arange(PROMPT, ids.shape[1]).expand(len(ids), -1)
    wrong = 0
    for row in range(len(ids)):
        scores = model(input_ids=ids[row : row + 1].to(model.action.weight.device)).logits[0, PROMPT - 1 : -1]
        own = noise.rows([row])
        for part, place, token in zip(
            scores.split(32), places[row].split(32), ids[row, PROMPT:].split(32), strict=True
        ):
            noisy = part.cpu().double() + _gumbel(own, place.unsqueeze(0))[0]
            gap = noisy.amax(-1) - noisy.gather(-1, token.unsqueeze(-1))[..., 0]
            wrong += int((gap > CLOSE.get(scores.dtype, 0.5)).sum())
    return wrong


def text_windows(ids: Tensor) -> Windows:
    """Lay texts of one length out as windows, one each.

    Args:
        ids: shape (B, L).

    Returns:
        The windows, each its own document.
    """
    targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), IGNORE)], dim=1)
    documents = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    starts = torch.arange(len(ids) + 1) * ids.shape[1]
    return Windows(ids.flatten(), targets.flatten(), documents, starts)


def generated_part(result: Measurement, length: int) -> Measurement:
    """Keep the contexts in which generated tokens were drawn.

    Args:
        result: measured on `text_windows`.
        length: tokens generated in each text.

    Returns:
        The measurement of those contexts.
    """
    count = len(result.documents) // int(result.documents.max() + 1)
    place = torch.arange(len(result.documents)) % count
    kept = (place >= count - 1 - length) & (place < count - 1)
    of_scored = kept[result.scored]
    return Measurement(
        documents=result.documents[kept],
        scored=result.scored[kept],
        base_nll=result.base_nll[of_scored],
        nll=result.nll[:, of_scored],
        **{
            name: getattr(result, name)[:, kept]
            for name in ("softmax_kl", "latent_drift", "bound", "gates", "leash")
        },
    )
