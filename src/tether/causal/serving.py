"""What follows the backbone: the law of U, scores and values in each mode, and the losses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tether.cauchy.functional import from_noise
from tether.causal.acting import act
from tether.causal.fused import FusedLatent
from tether.causal.leash import no_step
from tether.causal.memory import Memory
from tether.causal.noise import Noise, truncate
from tether.causal.objective import CausalObjective, Wanted
from tether.causal.positions import Served
from tether.causal.walk import Reading

__all__ = ["CausalServing"]


class CausalServing(CausalObjective):
    """From hidden states to the fields of a `CausalOutput`, but for those of the backbone."""

    abduction: Any
    fusion: Any
    _noise_for: Callable[[Noise | Tensor | None, int], Noise]

    def latent(
        self,
        hidden_states: Tensor,
        mask: Tensor,
        gate_state: Tensor | None = None,
        kept: slice = slice(None),
        *,
        keep_scores: bool = False,
    ) -> FusedLatent | tuple[Tensor, Tensor, None, None, None, None]:
        """Infer the law of U from hidden states, fusion and leash included.

        Args:
            hidden_states: z, shape (B, T, H), followed by what the deltas read of other layers.
            mask: which positions carry a token, shape (B, T), bool.
            gate_state: what the gates remember of the text before.
            kept: positions whose law is wanted.
            keep_scores: whether scores that a leash computes are wanted.

        Returns:
            See `FusedLatent`; without a fusion loc and log scale of U, shape (B, K, C) each, and four None.
        """
        loc, log_scale = self.abduction(hidden_states[..., : self.abduction.loc.in_features])
        if self.fusion is None:
            return loc[:, kept], log_scale[:, kept], None, None, None, None
        head = self.action.weight, self.action.bias
        moved: FusedLatent = self.fusion(
            hidden_states, loc, log_scale, mask, gate_state, kept=kept, head=head, keep_scores=keep_scores
        )
        return moved

    def _serve(
        self,
        reading: Reading,
        served: Served,
        *,
        mode: str,
        noise: Noise | Tensor | None,
        truncation: float,
        gate_state: Tensor | None,
        return_logits: bool,
        wanted: Wanted | None,
    ) -> dict[str, Any]:
        # Scores that hold to a leash are the ones to serve, with and without gradients.
        serve = mode == "softmax" and return_logits
        loc, log_scale, _, scores, gates, gate_state = self.latent(
            reading.features, reading.mask, gate_state, served.tail, keep_scores=serve
        )
        loc, log_scale, scores = (served.pick(each) for each in (loc, log_scale, scores))
        gates = None if gates is None else served.pick(gates.movedim(0, -1)).movedim(-1, 0)
        scale = log_scale.exp()
        value_loc, value_scale = self.action.values(loc, scale)
        latent, number = None, value_loc
        if mode == "causal":
            drawn = self._noise_for(noise, len(reading.mask)).at(served.of(reading.places))
            latent = from_noise(truncate(drawn, truncation), loc, scale).float()
            number = self.action.values(latent, scale)[0]
        logits = scores
        if logits is None and return_logits:
            logits = self._logits(mode, loc, scale, latent)
        elif logits is not None and torch.is_grad_enabled():
            # Gradients go through the scores of the moved law; rounding may part them from those that were checked.
            moved = self._logits(mode, loc, scale, latent)
            logits = logits.detach() + no_step(moved)
        losses = (None,) * 3 if wanted is None else self._losses(mode, loc, scale, logits, wanted)
        return {
            "loss": losses[0],
            "class_loss": losses[1],
            "value_loss": losses[2],
            "logits": logits,
            "value": self.action.number(number),
            "latent": latent,
            "latent_loc": loc,
            "latent_log_scale": log_scale,
            "value_loc": value_loc,
            "value_scale": value_scale,
            "gates": gates,
            "gate_state": gate_state,
        }

    def _serve_mixture(
        self,
        reading: Reading,
        served: Served,
        memory: Memory | None,
        *,
        mode: str,
        noise: Noise | Tensor | None,
        truncation: float,
        warp: Callable[[Tensor], Tensor] | None,
        return_logits: bool,
        output_weights: bool,
        wanted: Wanted | None,
    ) -> dict[str, Any]:
        who = self._noise_for(noise, len(reading.mask)) if mode == "causal" else None
        acted = act(
            self, reading, memory, kept=served.first, mode=mode, noise=who, truncation=truncation, warp=warp
        )
        logits = served.pick(acted.logits)
        losses = (None,) * 3 if wanted is None else self._losses_of_mixture(mode, logits, wanted)
        return {
            "loss": losses[0],
            "class_loss": losses[1],
            "value_loss": losses[2],
            "logits": logits if return_logits else None,
            "value": self.action.number(served.pick(acted.value)),
            "latent": served.pick(acted.latent),
            "latent_loc": served.pick(acted.loc),
            "latent_log_scale": served.pick(acted.log_scale),
            "value_loc": served.pick(acted.value_loc),
            "value_scale": served.pick(acted.value_scale),
            "gates": served.pick(acted.awake.movedim(0, -1)).movedim(-1, 0),
            "log_weights": served.pick(acted.log_weights) if output_weights else None,
        }

    def _logits(self, mode: str, loc: Tensor, scale: Tensor, latent: Tensor | None) -> Tensor:
        if mode == "deterministic":
            logits: Tensor = self.action.log_prob(loc, scale)
            return logits
        if latent is None:
            served: Tensor = self.action.score_loc(loc)
            return served
        scores: Tensor = self.action.linear_scores(latent)
        # A threshold that all classes share does not change who wins.
        if self.config.threshold_form == "class":
            scores = scores - self.action.threshold
        return scores
