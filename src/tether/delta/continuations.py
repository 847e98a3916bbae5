"""Texts that a fused model writes itself, so that drift is measured where it would be used, not on prompts alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tether.causal.encoded import encode
from tether.causal.losses import IGNORE
from tether.causal.mixture import Mixture
from tether.causal.noise import Noise
from tether.delta.account import Account
from tether.delta.measure import Measurement
from tether.delta.windows import Windows
from tether.errors import ConfigError
from tether.store.documents import beginning

__all__ = [
    "PROMPT",
    "Written",
    "continue_texts",
    "generated_account",
    "generated_part",
    "not_drawn",
    "prompts",
    "text_windows",
]

PROMPT = 32
"""Tokens of a document that are given."""
CLOSE = {torch.float32: 1e-2, torch.float64: 1e-6}
"""How far a score may lie below the best and the token still count as drawn: rounding differs with the cut of a
text into calls; half precision takes 0.5."""


class Written(NamedTuple):
    """Texts of one length.

    Attributes:
        ids: token ids, shape (B, L).
        values: the number at each `<NUM>`, 0 elsewhere, shape (B, L), float64; None without numbers.
    """

    ids: Tensor
    values: Tensor | None = None


def prompts(documents: Sequence[str], tokenizer: Any, count: int, *, name: str = "the text") -> Written:
    """Take the beginnings of the first documents that are long enough.

    Args:
        documents: the text.
        tokenizer: of the base, see `tether.delta.windows.reader`.
        count: how many, >= 1.
        name: what to call the text in an error.

    Returns:
        At most `count` texts of PROMPT tokens.

    Raises:
        ConfigError: no document has `PROMPT` tokens.
    """
    found: list[tuple[list[int], list[float]]] = []
    for number in range(len(documents)):
        ids, values, _ = encode(tokenizer, beginning(documents, number, 20 * PROMPT))
        found += [(ids[:PROMPT], values[:PROMPT])] if len(ids) >= PROMPT else []
        if len(found) == count:
            break
    if not found:
        raise ConfigError(
            f"{name}: no document of {PROMPT} tokens or more, so nothing to continue; ask for no continuations"
        )
    numbers = torch.tensor([values for _, values in found], dtype=torch.float64)
    return Written(torch.tensor([ids for ids, _ in found]), numbers if numbers.numel() else None)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise, so that the largest score is a draw from the softmax, the same on every run."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = torch.full((len(input_ids), 1), input_ids.shape[1])
        return scores + _gumbel(self.noise, place)[:, 0].to(scores)


def _gumbel(noise: Noise, places: Tensor) -> Tensor:
    return -(-noise.at(places).double().log()).log()


def continue_texts(model: Any, begun: Written, length: int, seed: int = 0) -> Written:
    """Let a model write on by softmax sampling at temperature 1, in noise that can be drawn again.

    Args:
        model: a CausalQwenForCausalLM.
        begun: texts of P tokens.
        length: tokens to write, >= 1; an end of text does not end it.
        seed: of the noise.

    Returns:
        The texts, of P + length tokens.
    """
    noise = Noise.draw(len(begun.ids), model.vocab_size, seed=seed)
    device = model.action.weight.device
    numbers = {} if begun.values is None else {"numeric_values": begun.values.to(device)}
    written = model.generate(
        begun.ids.to(device),
        mode="softmax",
        attention_mask=torch.ones_like(begun.ids, device=device),
        logits_processor=LogitsProcessorList([_Draw(noise)]),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **numbers,
    )
    values = None if begun.values is None else written["numeric_values"].cpu()
    return Written(written["sequences"].cpu(), values)


@torch.no_grad()
def not_drawn(model: Any, written: Written, seed: int = 0) -> int:
    """Count tokens that a model, given the text before them, would not have drawn.

    Args:
        model: the model said to have written them.
        written: from `continue_texts`.
        seed: of the noise.

    Returns:
        How many; 0 for texts that this model wrote with this seed. A token counts too if its number is not the model's.
    """
    ids, values = written
    noise = Noise.draw(len(ids), model.vocab_size, seed=seed)
    places = torch.arange(PROMPT, ids.shape[1]).expand(len(ids), -1)
    wrong = 0
    for row in range(len(ids)):
        device = model.action.weight.device
        numbers: dict[str, Any] = (
            {} if values is None else {"numeric_values": values[row : row + 1].to(device)}
        )
        if isinstance(model.fusion, Mixture):
            numbers["written_from"] = PROMPT
        output = model(input_ids=ids[row : row + 1].to(device), mode="softmax", **numbers)
        scores = output.logits[0, PROMPT - 1 : -1]
        if values is not None:
            own = torch.where(
                ids[row, PROMPT:] == model.config.num_token_id,
                output.value[0, PROMPT - 1 : -1].cpu().double(),
                0,
            )
            away = (values[row, PROMPT:] - own).abs()
            wrong += int((away > CLOSE.get(scores.dtype, 0.5) * (1 + own.abs())).sum())
        drawn = noise.rows([row])
        for part, place, token in zip(
            scores.split(32), places[row].split(32), ids[row, PROMPT:].split(32), strict=True
        ):
            noisy = part.cpu().double() + _gumbel(drawn, place.unsqueeze(0))[0]
            gap = noisy.amax(-1) - noisy.gather(-1, token.unsqueeze(-1))[..., 0]
            wrong += int((gap > CLOSE.get(scores.dtype, 0.5)).sum())
    return wrong


def text_windows(written: Written) -> Windows:
    """Lay texts of one length out as windows, one each.

    Args:
        written: the texts.

    Returns:
        The windows, each its own document.
    """
    ids, values = written
    targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), IGNORE)], dim=1)
    documents = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    starts = torch.arange(len(ids) + 1) * ids.shape[1]
    flat = None if values is None else values.flatten()
    return Windows(ids.flatten(), targets.flatten(), documents, starts, flat)


def _generated(result: Measurement | Account, length: int) -> Tensor:
    count = len(result.documents) // int(result.documents.max() + 1)
    place = torch.arange(len(result.documents)) % count
    return (place >= count - 1 - length) & (place < count - 1)


def generated_account(result: Account, length: int) -> Account:
    """Keep the contexts in which generated tokens were drawn.

    Args:
        result: accounted on `text_windows`.
        length: tokens generated in each text.

    Returns:
        The account of those contexts.
    """
    kept = _generated(result, length)
    of_scored = {"base_nll", "nll", "gain"}
    return Account(
        **{
            name: values[kept[result.scored]] if name in of_scored else values[kept]
            for name, values in result._asdict().items()
        }
    )


def generated_part(result: Measurement, length: int) -> Measurement:
    """Keep the contexts in which generated tokens were drawn.

    Args:
        result: measured on `text_windows`.
        length: tokens generated in each text.

    Returns:
        The measurement of those contexts.
    """
    kept = _generated(result, length)
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
