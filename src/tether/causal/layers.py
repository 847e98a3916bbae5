"""The new layers in the order the data flows: numbers are embedded, abduction infers U, action acts from it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tether.cauchy.functional import push_linear
from tether.causal.losses import ovr_log_prob, signed_log, signed_log_inverse

__all__ = ["LARGEST", "Abduction", "Action", "NumericEmbedding"]

LARGEST = 1e30
"""Numbers beyond this size are refused on the way in and cut on the way out."""


class NumericEmbedding(nn.Module):
    """Add the size of a number to the embedding of its token: e = embed + sign(v) ln(1 + |v|) direction.

    phi(0) = 0, so other positions are left as they are (spec document 5, section 2.1; the direction is the
    document's: a normal draw scaled to length 1, section 4, step 1).

    Args:
        hidden_size: width H of the embedding.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(hidden_size))

    @torch.no_grad()
    def reset_direction(self) -> None:
        """Draw the direction, the same on every run."""
        generator = torch.Generator(device=self.direction.device).manual_seed(0)
        nn.init.normal_(self.direction, std=0.02, generator=generator)
        self.direction.div_(self.direction.norm())

    def forward(
        self, embeds: Float[Tensor, "*batch hidden"], numeric_values: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Embed numbers.

        Args:
            embeds: token embeddings, shape (..., H).
            numeric_values: the number at each position, 0 elsewhere, shape (...), |v| <= 1e30.

        Returns:
            Embeddings in the dtype of `embeds`, shape (..., H).
        """
        # Logarithms first, in the values' own precision: large numbers do not survive half precision.
        size = signed_log(numeric_values).float()
        return embeds + (size.unsqueeze(-1) * self.direction.float()).to(embeds.dtype)


class Abduction(nn.Module):
    """Infer the law of the individual cause, U ~ Cauchy(loc, scale), from the backbone's state.

    Starts as the identity: loc = z, scale = `latent_scale` (spec document 5, section 4, step 2).

    Args:
        hidden_size: width H of the backbone's last hidden state.
        latent_size: dimensions C of U.
        latent_scale: initial scale of U, > 0.
        mlp_size: width of a hidden layer whose output is added to both, 0 at the start; 0 for linear heads.
    """

    def __init__(self, hidden_size: int, latent_size: int, latent_scale: float, mlp_size: int = 0) -> None:
        super().__init__()
        self.loc = nn.Linear(hidden_size, latent_size)
        self.log_scale = nn.Linear(hidden_size, latent_size)
        self.latent_scale = latent_scale
        self.mlp: nn.Sequential | None = None
        if mlp_size:
            wide, out = nn.Linear(hidden_size, mlp_size), nn.Linear(mlp_size, 2 * latent_size)
            self.mlp = nn.Sequential(wide, nn.SiLU(), out)

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Set loc = z and scale = latent_scale exactly."""
        nn.init.eye_(self.loc.weight)
        nn.init.zeros_(self.loc.bias)
        nn.init.zeros_(self.log_scale.weight)
        nn.init.constant_(self.log_scale.bias, torch.tensor(self.latent_scale).log().item())
        if self.mlp is not None:
            generator = torch.Generator(device=self.loc.weight.device).manual_seed(0)
            nn.init.xavier_uniform_(self.mlp[0].weight, generator=generator)  # type: ignore[arg-type]
            for start in (self.mlp[0].bias, self.mlp[2].weight, self.mlp[2].bias):
                nn.init.zeros_(start)  # type: ignore[arg-type]

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch latent"], Float[Tensor, "*batch latent"]]:
        """Map hidden states to the law of U.

        Args:
            hidden_states: z, shape (..., H), any floating dtype.

        Returns:
            loc and log scale of U, shape (..., C) each, float32 whatever the backbone's dtype: the tails of
            a Cauchy law do not survive half precision.
        """
        loc, log_scale = self.loc(hidden_states).float(), self.log_scale(hidden_states).float()
        if self.mlp is None:
            return loc, log_scale
        more_loc, more_scale = self.mlp(hidden_states).float().chunk(2, dim=-1)
        return loc + more_loc, log_scale + more_scale


class Action(nn.Module):
    """Act from U: scores of all classes, and a value, both Cauchy by linear stability.

    S = W U + b + class noise, Y = w U + b_Y. `weight` starts as the backbone's output head, so that
    loc_S are the base's logits (spec document 5, section 4, steps 3 to 5).

    Args:
        latent_size: dimensions C of U.
        vocab_size: number of classes V.
        class_noise: start of the scale of the exogenous Cauchy noise on each score, >= 0.
        noise_form: `constant` or `fill`, see `tether.causal.config.NOISES`.
        threshold: start of the decision threshold, in logits.
        threshold_form: `constant`, `class` or `context`, see `tether.causal.config.THRESHOLDS`.
        value_transform: `raw` or `signed-log`, the units of Y.
        class_bias: whether the scores have a bias.
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

    def score_loc(self, latent_loc: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch vocab"]:
        """Compute loc_S, the softmax logits, or the scores of a given U; one product with the (V, C) weight.

        Args:
            latent_loc: loc of U, or U itself, shape (..., C).

        Returns:
            loc_S, shape (..., V), in the dtype of the weight.
        """
        return nn.functional.linear(latent_loc.to(self.weight.dtype), self.weight, self.bias)

    def scores(
        self, latent_loc: Float[Tensor, "*batch latent"], latent_scale: Float[Tensor, "*batch latent"]
    ) -> tuple[Float[Tensor, "*batch vocab"], Float[Tensor, "*#batch vocab"]]:
        """Compute the law of all class scores; cost two products with the (V, C) weight.

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
