"""What the model is trained on: one-vs-rest or softmax on tokens, the gated likelihood on numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tether.causal.losses import IGNORE, gated_cauchy_nll, ovr_log_prob, ovr_loss, softmax_loss
from tether.causal.normaliser import log_normaliser
from tether.errors import ConfigError

__all__ = ["CausalObjective"]


class CausalObjective:
    """The losses of `CausalQwenForCausalLM` (spec document 5, section 2.5)."""

    action: Any
    config: Any
    _check_numbers: Callable[[Tensor, Tensor], None]

    def _losses(
        self,
        mode: str,
        loc: Tensor,
        scale: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        values: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        targets = labels[:, 1:].reshape(-1)
        scored = targets != IGNORE
        action = self.action
        if logits is not None and mode == "softmax":
            class_loss = softmax_loss(logits[:, :-1].flatten(0, 1), targets)
        targets = targets[scored]
        loc, scale = (tensor[:, :-1].flatten(0, 1)[scored] for tensor in (loc, scale))
        if mode != "softmax":
            class_loss = self._ovr(loc, scale, targets)
        elif logits is None:
            # A prompt is not scored, and a product with the weight of all classes is half the cost of a position.
            class_loss = softmax_loss(action.score_loc(loc), targets)
        number = self.config.num_token_id
        if values is not None and (number is None or values.shape != labels.shape):
            self._check_numbers(labels, values)
        if number is None:
            return class_loss, class_loss, None
        here = targets == number
        if values is None:
            if bool(here.any()):
                raise ConfigError(
                    "labels with <NUM> but no numeric_values: expected the numbers they stand for"
                )
            return class_loss, class_loss, None
        wanted = values[:, 1:].reshape(-1).to(loc.device)[scored]
        self._check_numbers(targets[here], wanted[here])
        value_loss = self._value_loss(mode, loc[here], scale[here], wanted[here])
        return class_loss + self.config.value_loss_weight * value_loss, class_loss, value_loss

    def _losses_of_mixture(
        self, mode: str, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if mode != "softmax":
            raise ConfigError(
                f"labels in mode {mode!r} with a fusion by evidence: its loss is that of the tokens served, in mode "
                "'softmax'; train the base"
            )
        number = self.config.num_token_id
        if number is not None and bool((labels == number).any()):
            raise ConfigError(
                "labels with <NUM> with a fusion by evidence: expected text without numbers; train the base"
            )
        loss = softmax_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].reshape(-1))
        return loss, loss, None

    def _threshold(self, loc: Tensor) -> Tensor:
        threshold: Tensor = self.action.threshold
        if self.config.threshold_form == "context":
            return threshold + log_normaliser(loc, self.action.weight, self.action.bias)
        return threshold if self.config.threshold_form == "class" else threshold.squeeze()

    def _ovr(self, loc: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
        return ovr_loss(
            loc,
            scale,
            self.action.weight,
            targets,
            threshold=self._threshold(loc),
            class_noise=self.action.noise_scale
            if len(self.action.class_noise) > 1
            else self.action.noise_scale.squeeze(),
            bias=self.action.bias,
            impl=self.config.ovr_impl,
        )

    def _value_loss(self, mode: str, loc: Tensor, scale: Tensor, values: Tensor) -> Tensor:
        action, number = self.action, self.config.num_token_id
        if mode == "softmax":
            prob = torch.softmax(action.score_loc(loc).float(), dim=-1)[:, number]
        else:
            row = action.weight[number].float()
            score = loc @ row + (0.0 if action.bias is None else action.bias[number].float())
            level = self._threshold(loc)
            noise = action.noise_scale[number if len(action.class_noise) > 1 else 0]
            level = level[number] if self.config.threshold_form == "class" else level.reshape(-1)
            prob = ovr_log_prob(score, scale @ row.abs() + noise, level).exp()
        value_loc, value_scale = action.values(loc, scale)
        return gated_cauchy_nll(
            value_loc,
            value_scale,
            action.transform(values),
            torch.ones_like(value_loc, dtype=torch.bool),
            prob,
            self.config.gate_alpha,
        )
