"""What a fusion by evidence does in each mode: the served law of tokens, who speaks, the law of values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.cauchy.functional import from_noise
from tether.causal.experts import fired
from tether.causal.memory import Memory
from tether.causal.mixture import Block
from tether.causal.noise import Noise, truncate
from tether.causal.walk import Reading

__all__ = ["Acted", "act"]


class Acted(NamedTuple):
    """What was done at the K kept positions of B texts.

    Attributes:
        logits: in mode `softmax` log q + log Z of the base, in mode `deterministic` the log of the mixed P_k, in mode
            `causal` the scores of the U that was drawn; shape (B, K, V), float32.
        loc: loc of U of who speaks in mode `causal`, of the base else, shape (B, K, C).
        log_scale: log scale of U, likewise.
        latent: the U that was drawn in mode `causal`, shape (B, K, C), or None.
        value: Y of that U, or the median of Y under the mixture, shape (B, K).
        value_loc: median of Y under the mixture, shape (B, K).
        value_scale: half the distance of its quartiles, which is the scale where one law has all the weight, (B, K).
        log_weights: of the experts, shape (B, K, experts), float64, -inf where asleep.
        awake: which domains take part, shape (N, B, K), float32.
    """

    logits: Tensor
    loc: Tensor
    log_scale: Tensor
    latent: Tensor | None
    value: Tensor
    value_loc: Tensor
    value_scale: Tensor
    log_weights: Tensor
    awake: Tensor


def act(
    model: Any,
    reading: Reading,
    memory: Memory | None,
    *,
    kept: int,
    mode: str,
    noise: Noise | None = None,
    truncation: float = 0.0,
    warp: Callable[[Tensor], Tensor] | None = None,
) -> Acted:
    """Serve a text.

    Args:
        model: a CausalQwenForCausalLM with a `Mixture`.
        reading: the text.
        memory: of the positions before; these are appended.
        kept: first position whose law is wanted.
        mode: `softmax`, `deterministic` or `causal`.
        noise: who acts, mode `causal` only.
        truncation: of the noise.
        warp: made to each expert's scores before they are mixed, mode `softmax` only.

    Returns:
        What was done at the positions from `kept` on.
    """
    batch = len(reading.mask)
    blocks = []
    for block in model.fusion.serve(model.abduction, model.action, reading, memory, kept=kept):
        places = reading.places[:, block.first : block.first + block.size]
        found = _softmax(model, block, warp) if mode == "softmax" else None
        if mode == "deterministic":
            found = _law(model, block, fired(block.experts, model.action, block.log_weights))
        elif noise is not None:
            found = _speak(model, block, noise, places, truncation)
        assert found is not None
        awake = torch.stack([block.experts.awake[:, rows].any(-1) for rows in model.fusion.rows], dim=-1)
        parts = (*found, block.log_weights, awake.float())
        blocks.append([None if part is None else part.unflatten(0, (batch, block.size)) for part in parts])
    joined: list[Any] = [None if parts[0] is None else _joined(parts) for parts in zip(*blocks, strict=True)]
    logits, loc, log_scale, latent, value, value_loc, value_scale, log_weights, awake = joined
    return Acted(
        logits, loc, log_scale, latent, value, value_loc, value_scale, log_weights, awake.movedim(-1, 0)
    )


# A single block is not copied.
def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _law(model: Any, block: Block, logits: Tensor) -> list[Tensor | None]:
    experts, count = block.experts, len(block.experts.entry)
    loc, log_scale = experts.loc[:count], experts.log_scale[:count]
    if model.config.num_token_id is None or experts.alone:
        value_loc, value_scale = model.action.values(loc, log_scale.exp())
    else:
        low, value_loc, high = experts.value_quantiles(model.action, block.log_weights, (0.25, 0.5, 0.75))
        value_scale = (high - low) / 2
    return [logits, loc, log_scale, None, value_loc, value_loc, value_scale]


def _softmax(model: Any, block: Block, warp: Callable[[Tensor], Tensor] | None) -> list[Tensor | None]:
    scores = block.scores
    logits = scores.served(block.log_weights) if warp is None else scores.warped(block.log_weights, warp)
    return _law(model, block, logits)


def _speak(model: Any, block: Block, noise: Noise, places: Tensor, truncation: float) -> list[Tensor | None]:
    experts = block.experts
    entry = experts.speaker(block.log_weights, noise.speaker(places).flatten())
    loc, log_scale = experts.loc[entry], experts.log_scale[entry]
    drawn = truncate(noise.at(places), truncation).flatten(0, 1)
    latent = from_noise(drawn, loc, log_scale.exp()).float()
    logits = model.action.linear_scores(latent)
    if model.config.threshold_form == "class":
        # A threshold that all classes share does not change who wins.
        logits = logits - model.action.threshold
    law = _law(model, block, logits.float())
    law[1:5] = [loc, log_scale, latent, model.action.values(latent, log_scale.exp())[0]]
    return law
