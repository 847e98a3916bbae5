"""What one forward pass of the causal language model gives."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

__all__ = ["CausalOutput"]


@dataclass
class CausalOutput(ModelOutput):  # type: ignore[misc]
    """What one forward pass gives; the first five fields are those of other causal LMs, in their order.

    B texts, T tokens, K positions that `logits_to_keep` asks for (all T if it is not given).

    Attributes:
        loss: mean loss in nats, when labels were given: softmax cross-entropy in mode `softmax`,
            one-vs-rest in mode `deterministic`; with the loss of values, and of routing where it was asked for.
        logits: loc_S in mode `softmax`, log P(S_k > C) in mode `deterministic`; shape (B, K, V).
        past_key_values: the backbone's cache.
        hidden_states: the backbone's, when asked for.
        attentions: the backbone's, when asked for.
        aux_loss: how unevenly a mixture-of-experts backbone routes, a scalar, when `output_router_logits` asks for it.
        router_logits: the backbone's, likewise.
        class_loss: the part of the loss for tokens.
        value_loss: the part of the loss for numbers, not weighted.
        value: the number that would be written, shape (B, K), float64.
        latent: the U that was drawn in mode `causal`, shape (B, K, C).
        latent_loc: loc of U after fusion, shape (B, K, C), float32.
        latent_log_scale: log scale of U after fusion, shape (B, K, C), float32.
        value_loc: median of Y, shape (B, K), float32, in the units of `config.value_transform`.
        value_scale: scale of Y, shape (B, K), float32, same units.
        gates: weight factor of each fused domain, shape (N, B, K), or None; in a fusion by evidence 1 where it is
            awake.
        log_weights: log weight of each expert of a fusion by evidence, shape (B, K, experts), base first; when asked
            for.
        gate_state: what the gates remember for the next call, or None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    class_loss: Tensor | None = None
    value_loss: Tensor | None = None
    value: Tensor | None = None
    latent: Tensor | None = None
    latent_loc: Tensor | None = None
    latent_log_scale: Tensor | None = None
    value_loc: Tensor | None = None
    value_scale: Tensor | None = None
    gates: Tensor | None = None
    gate_state: Tensor | None = None
    log_weights: Tensor | None = None
