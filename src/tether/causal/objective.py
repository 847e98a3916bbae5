"""What the model is trained on: one-vs-rest or softmax on tokens, the gated likelihood on numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.losses import IGNORE, gated_cauchy_nll, ovr_log_prob, ovr_loss, softmax_loss
from tether.causal.normaliser import log_normaliser
from tether.causal.positions import Served, next_of
from tether.errors import ConfigError

__all__ = ["CausalObjective", "Wanted"]


class Wanted(NamedTuple):
    """What should come after each served position.

    Attributes:
        targets: the next token, shape (B, K), `IGNORE` where none is scored.
        values: the number that it should have where it is `<NUM>`, shape (B, K), or None.
        items: how many tokens are scored in the whole step that this call is a part of; None where it is the whole.
    """

    targets: Tensor
    values: Tensor | None
    items: Any

    def share(self) -> float | Tensor:
        """Count this call's part of the step.

        Returns:
            The share of the step's scored tokens that this call has, by which its mean losses are multiplied.
        """
        if self.items is None:
            return 1.0
        scored = (self.targets != IGNORE).sum()
        return scored / (self.items.to(scored.device) if isinstance(self.items, Tensor) else self.items)


class CausalObjective:
    """The losses of `CausalQwenForCausalLM` (spec document 5, section 2.5)."""

    action: Any
    config: Any
    _check_numbers: Callable[[Tensor, Tensor], None]

    def _wanted(
        self,
        served: Served,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        numeric_values: Tensor | None,
        target_values: Tensor | None,
        items: Any,
    ) -> Wanted | None:
        if labels is None:
            return None
        number = self.config.num_token_id
        # Numbers lie where `<NUM>` lies in the text or in the labels, one position after the one that predicts them.
        values = numeric_values if target_values is None else target_values
        shifted = shift_labels is not None and target_values is not None
        aligned = labels if shift_labels is None or target_values is None else shift_labels
        if values is not None and (number is None or values.shape != aligned.shape):
            self._check_numbers(aligned, values)
        if values is not None and not shifted:
            values = next_of(values, 0)
        targets = next_of(labels) if shift_labels is None else shift_labels
        return Wanted(served.of(targets), None if values is None else served.of(values), items)

    def _losses(
        self, mode: str, loc: Tensor, scale: Tensor, logits: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        targets, share = wanted.targets.reshape(-1).to(loc.device), wanted.share()
        scored = targets != IGNORE
        action = self.action
        if logits is not None and mode == "softmax":
            class_loss = softmax_loss(logits.flatten(0, 1), targets)
        targets = targets[scored]
        loc, scale = (tensor.flatten(0, 1)[scored] for tensor in (loc, scale))
        if mode != "softmax":
            class_loss = self._ovr(loc, scale, targets)
        elif logits is None:
            # A prompt is not scored, and a product with the weight of all classes is half the cost of a position.
            class_loss = softmax_loss(action.score_loc(loc), targets)
        class_loss = class_loss * share
        number, values = self.config.num_token_id, wanted.values
        if number is None:
            return class_loss, class_loss, None
        here = targets == number
        if values is None:
            if bool(here.any()):
                raise ConfigError(
                    "labels with <NUM> but no numeric_values: expected the numbers they stand for"
                )
            return class_loss, class_loss, None
        numbers = values.reshape(-1).to(loc.device)[scored]
        self._check_numbers(targets[here], numbers[here])
        # A mean over this call's numbers: how many the step has in all, transformers' trainers do not tell.
        value_loss = self._value_loss(mode, loc[here], scale[here], numbers[here]) * share
        return class_loss + self.config.value_loss_weight * value_loss, class_loss, value_loss

    def _losses_of_mixture(
        self, mode: str, logits: Tensor, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if mode != "softmax":
            raise ConfigError(
                f"labels in mode {mode!r} with a fusion by evidence: its loss is that of the tokens served, in mode "
                "'softmax'; train the base"
            )
        targets, number = wanted.targets.to(logits.device), self.config.num_token_id
        if number is not None and bool((targets == number).any()):
            raise ConfigError(
                "labels with <NUM> with a fusion by evidence: expected text without numbers; train the base"
            )
        loss = softmax_loss(logits.flatten(0, 1), targets.reshape(-1)) * wanted.share()
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
