"""What one forward pass of the causal language model gives."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

__all__ = ["CausalOutput"]


@dataclass
class CausalOutput(ModelOutput):  # type: ignore[misc]
    """What one forward pass gives.

    Attributes:
        loss: mean loss in nats, when labels were given: softmax cross-entropy in mode `softmax`,
            one-vs-rest in mode `deterministic`.
        logits: loc_S in mode `softmax`, log P(S_k > C) in mode `deterministic`; shape (B, T, V).
        past_key_values: the backbone's cache.
        latent_loc: loc of U after fusion, shape (B, T, C), float32.
        latent_log_scale: log scale of U after fusion, shape (B, T, C), float32.
        value_loc: median of Y, shape (B, T), float32, in the units of `config.value_transform`.
        value_scale: scale of Y, shape (B, T), float32, same units.
        gates: weight factor of each fused domain, shape (N, B, T), or None; in a fusion by evidence 1 where it is
            awake.
        log_weights: log weight of each expert of a fusion by evidence, shape (B, T, experts), base first; when asked
            for.
        gate_state: what the gates remember for the next call, or None.
        hidden_states: the backbone's, when asked for.
        attentions: the backbone's, when asked for.
    """

    loss: Tensor | None = None
    class_loss: Tensor | None = None
    value_loss: Tensor | None = None
    logits: Tensor | None = None
    value: Tensor | None = None
    latent: Tensor | None = None
    past_key_values: Any = None
    latent_loc: Tensor | None = None
    latent_log_scale: Tensor | None = None
    value_loc: Tensor | None = None
    value_scale: Tensor | None = None
    gates: Tensor | None = None
    gate_state: Tensor | None = None
    log_weights: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
