"""The layer after U: scores of all classes, and a value; what the base does to its logits after its head."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tether.cauchy.functional import push_linear
from tether.causal.losses import ovr_log_prob, signed_log, signed_log_inverse

__all__ = ["LARGEST", "Action"]

LARGEST = 1e30
"""Numbers beyond this size are refused on the way in and cut on the way out."""


class Action(nn.Module):
    """Act from U: scores of all classes, and a value, both Cauchy by linear stability.

    S = W U + b + class noise, Y = w U + b_Y. `weight` starts as the backbone's output head, so that
    loc_S are the base's logits (spec document 5, section 4, steps 3 to 5).

    Where the base caps its logits, cap tanh(. / cap) of them, so do the logits of softmax mode (`score_loc`).
    Decisions are taken on the scores before the cap (`linear_scores`, `scores`, `log_prob`), and thresholds are on
    that scale: the cap is one increasing function for all classes, so S_k > C_k and the largest score stay what they
    are, and scores that rounding would make equal under the cap are still told apart.

    Args:
        latent_size: dimensions C of U.
        vocab_size: number of classes V.
        class_noise: start of the scale of the exogenous Cauchy noise on each score, >= 0.
        noise_form: `constant` or `fill`, see `tether.causal.config.NOISES`.
        threshold: start of the decision threshold, in logits.
        threshold_form: `constant`, `class` or `context`, see `tether.causal.config.THRESHOLDS`.
        value_transform: `raw` or `signed-log`, the units of Y.
        class_bias: whether the scores have a bias.
        logit_cap: what the base caps its logits at, > 0; None for no cap.
    """

    def __init__(
        self,
        latent_size: int,
        vocab_size: int,
        class_noise: float,
        noise_form: str,
        threshold: float,
        threshold_form: str,
        value_transform: str,
        class_bias: bool,
        logit_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, latent_size))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if class_bias else None
        self.value_weight = nn.Parameter(torch.empty(1, latent_size))
        self.value_bias = nn.Parameter(torch.empty(1))
        levels = vocab_size if threshold_form == "class" else 1
        self.threshold = nn.Parameter(torch.empty(levels, dtype=torch.float32))
        noises = vocab_size if noise_form == "fill" else 1
        self.class_noise = nn.Parameter(torch.empty(noises, dtype=torch.float32))
        self.noise_start, self.threshold_start = class_noise, threshold
        self.threshold_form = threshold_form
        self.value_transform = value_transform
        self.logit_cap = logit_cap
        self._steady: tuple[Tensor, tuple[int, int], Tensor, Tensor] | None = None

    @torch.no_grad()
    def reset_action(self) -> None:
        """Start all but the class weight: no bias, the given threshold, the same small value head every time."""
        generator = torch.Generator(device=self.value_weight.device).manual_seed(0)
        nn.init.xavier_uniform_(self.value_weight, generator=generator)
        nn.init.zeros_(self.value_bias)
        nn.init.constant_(self.threshold, self.threshold_start)
        nn.init.constant_(self.class_noise, self.noise_start)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def fill_noise(self, latent_scale: Float[Tensor, " latent"], size: float = 0.0) -> float:
        """Choose the noise of each class so that scale_S has one size.

        Args:
            latent_scale: scale of U, shape (C,), > 0.
            size: least scale_S; 0 takes that of the widest class. Classes wider than a given size stay so.

        Returns:
            The size of scale_S filled up to, in logits.
        """
        own = self.weight.float().abs() @ latent_scale.float()
        size = size or float(own.max())
        self.class_noise.copy_((size - own).clamp(min=0))
        return size

    @property
    def noise_scale(self) -> Tensor:
        """Scale of the exogenous noise, shape (1,) or (V,), float32, never negative."""
        return self.class_noise.float().clamp(min=0)

    def linear_scores(self, latent: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch vocab"]:
        """Score the classes from U: W U + b, before a cap; one product with the (V, C) weight.

        Args:
            latent: U, or loc of U, shape (..., C).

        Returns:
            Scores, shape (..., V), in the dtype of the weight.
        """
        return nn.functional.linear(latent.to(self.weight.dtype), self.weight, self.bias)

    def capped(self, scores: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Turn scores into logits of softmax mode: cap tanh(score / cap), or the scores where there is no cap.

        Args:
            scores: W U + b of any classes, any shape.

        Returns:
            Logits, in the shape and dtype of the scores.
        """
        if self.logit_cap is None:
            return scores
        return torch.tanh(scores / self.logit_cap) * self.logit_cap

    def score_loc(self, latent_loc: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch vocab"]:
        """Compute the logits of softmax mode: loc_S, capped where the base caps; one product with the weight.

        Args:
            latent_loc: loc of U, shape (..., C).

        Returns:
            Logits, shape (..., V), in the dtype of the weight.
        """
        return self.capped(self.linear_scores(latent_loc))

    def scores(
        self, latent_loc: Float[Tensor, "*batch latent"], latent_scale: Float[Tensor, "*batch latent"]
    ) -> tuple[Float[Tensor, "*batch vocab"], Float[Tensor, "*#batch vocab"]]:
        """Compute the law of all class scores, before a cap; cost two products with the (V, C) weight.

        Where all positions have the same scale (as at the start) the second product is done once, and kept
        for the next call as long as scale and weight stay the same.

        Args:
            latent_loc: loc of U, shape (..., C).
            latent_scale: scale of U, shape (..., C), > 0.

        Returns:
            loc_S, shape (..., V), and scale_S, of a shape that broadcasts to it, float32.
        """
        weight = self.weight.float()
        loc = nn.functional.linear(latent_loc, weight, None if self.bias is None else self.bias.float())
        learnt = torch.is_grad_enabled() and (latent_scale.requires_grad or self.weight.requires_grad)
        row = latent_scale.reshape(-1, latent_scale.shape[-1])[:1]
        if learnt or not len(row) or not bool((latent_scale == row).all()):
            return loc, nn.functional.linear(latent_scale, weight.abs()) + self.noise_scale
        steady = self._steady_scale(row).reshape(*[1] * (latent_scale.dim() - 1), -1)
        return loc, steady + self.noise_scale

    def _steady_scale(self, row: Tensor) -> Tensor:
        weight, kept = self.weight, self._steady
        # Inference tensors carry no version. The weight is kept too: another could come to lie at its address.
        version = (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        if kept is None or kept[0] is not weight or kept[1] != version or not torch.equal(kept[2], row):
            kept = (weight, version, row.clone(), nn.functional.linear(row, weight.float().abs()))
            self._steady = None if weight.is_inference() else kept
        return kept[3]

    def thresholds(self, score_loc: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*#batch some"]:
        """Compute C_k.

        Args:
            score_loc: loc_S, shape (..., V); only read in the form `context`.

        Returns:
            Thresholds that broadcast to (..., V), float32, in logits.
        """
        threshold = self.threshold.reshape(*[1] * (score_loc.dim() - 1), -1)
        if self.threshold_form != "context":
            return threshold
        # torch's logsumexp is several times slower than log_softmax on CPU (docs/log.md).
        first = score_loc[..., :1].float()
        return threshold + first - torch.log_softmax(score_loc.float(), dim=-1)[..., :1]

    def log_prob(
        self, latent_loc: Float[Tensor, "*batch latent"], latent_scale: Float[Tensor, "*batch latent"]
    ) -> Float[Tensor, "*batch vocab"]:
        """Compute log P_k = log P(S_k > C_k) of all classes.

        Args:
            latent_loc: loc of U, shape (..., C).
            latent_scale: scale of U, shape (..., C), > 0.

        Returns:
            Log probabilities, shape (..., V), <= 0, float32.
        """
        loc, scale = self.scores(latent_loc, latent_scale)
        return ovr_log_prob(loc, scale, self.thresholds(loc))

    def values(
        self, latent_loc: Float[Tensor, "*batch latent"], latent_scale: Float[Tensor, "*batch latent"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """Compute the law of Y.

        Args:
            latent_loc: loc of U, shape (..., C).
            latent_scale: scale of U, shape (..., C), >= 0.

        Returns:
            loc_Y and scale_Y, shape (...) each, float32, in the units of `value_transform`.
        """
        loc, scale = push_linear(
            latent_loc, latent_scale, self.value_weight.float(), bias=self.value_bias.float()
        )
        return loc.squeeze(-1), scale.squeeze(-1)

    def transform(self, numeric_values: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Bring numbers into the units of Y.

        Args:
            numeric_values: numbers, shape (...).

        Returns:
            What Y should be, float32.
        """
        if self.value_transform == "raw":
            return numeric_values.float()
        return signed_log(numeric_values).float()

    def number(self, value: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Bring Y back into numbers; a monotone map, so a median stays a median.

        Args:
            value: Y or its median, shape (...).

        Returns:
            Numbers, float64, cut at +-1e30, the largest the embedding takes.
        """
        value = value.double()
        if self.value_transform != "raw":
            value = signed_log_inverse(value.clamp(-100, 100))
        return value.clamp(-LARGEST, LARGEST)
