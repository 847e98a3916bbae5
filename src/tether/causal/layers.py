"""The two new layers in the order the data flows: abduction infers U, action acts from it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tether.cauchy.functional import push_linear

__all__ = ["Abduction", "Action"]


class Abduction(nn.Module):
    """Infer the law of the individual cause, U ~ Cauchy(loc, scale), from the backbone's state.

    Starts as the identity: loc = z, scale = `latent_scale` (spec document 5, section 4, step 2).

    Args:
        hidden_size: width H of the backbone's last hidden state.
        latent_size: dimensions C of U.
        latent_scale: initial scale of U, > 0.
    """

    def __init__(self, hidden_size: int, latent_size: int, latent_scale: float) -> None:
        super().__init__()
        self.loc = nn.Linear(hidden_size, latent_size)
        self.log_scale = nn.Linear(hidden_size, latent_size)
        self.latent_scale = latent_scale

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Set loc = z and scale = latent_scale exactly."""
        nn.init.eye_(self.loc.weight)
        nn.init.zeros_(self.loc.bias)
        nn.init.zeros_(self.log_scale.weight)
        nn.init.constant_(self.log_scale.bias, torch.tensor(self.latent_scale).log().item())

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
        return self.loc(hidden_states).float(), self.log_scale(hidden_states).float()


class Action(nn.Module):
    """Act from U: scores of all classes, and a value, both Cauchy by linear stability.

    S = W U + class noise, Y = w U + b. `weight` starts as the backbone's output head, so that
    loc_S are the base's logits (spec document 5, section 4, steps 3 and 4).

    Args:
        latent_size: dimensions C of U.
        vocab_size: number of classes V.
        class_noise: scale of the exogenous Cauchy noise on each score, >= 0.
    """

    def __init__(self, latent_size: int, vocab_size: int, class_noise: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, latent_size))
        self.value_weight = nn.Parameter(torch.empty(1, latent_size))
        self.value_bias = nn.Parameter(torch.empty(1))
        self.class_noise = class_noise

    @torch.no_grad()
    def reset_value(self) -> None:
        """Start the value head small and centred on 0, the same on every run (Xavier, fixed seed)."""
        generator = torch.Generator(device=self.value_weight.device).manual_seed(0)
        nn.init.xavier_uniform_(self.value_weight, generator=generator)
        nn.init.zeros_(self.value_bias)

    def score_loc(self, latent_loc: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch vocab"]:
        """Compute loc_S, the softmax logits; cost one product with the (V, C) weight.

        Args:
            latent_loc: loc of U, shape (..., C).

        Returns:
            loc_S, shape (..., V), in the dtype of the weight.
        """
        return nn.functional.linear(latent_loc.to(self.weight.dtype), self.weight)

    def scores(
        self, latent_loc: Float[Tensor, "*batch latent"], latent_scale: Float[Tensor, "*batch latent"]
    ) -> tuple[Float[Tensor, "*batch vocab"], Float[Tensor, "*batch vocab"]]:
        """Compute the law of all class scores; cost two products with the (V, C) weight.

        Args:
            latent_loc: loc of U, shape (..., C).
            latent_scale: scale of U, shape (..., C), > 0.

        Returns:
            loc_S and scale_S, shape (..., V) each, float32.
        """
        loc, scale = push_linear(latent_loc, latent_scale, self.weight.float())
        return loc, scale + self.class_noise

    def values(
        self, latent_loc: Float[Tensor, "*batch latent"], latent_scale: Float[Tensor, "*batch latent"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """Compute the law of the value Y.

        Args:
            latent_loc: loc of U, shape (..., C).
            latent_scale: scale of U, shape (..., C), > 0.

        Returns:
            loc_Y and scale_Y, shape (...) each, float32, in the units of the value.
        """
        loc, scale = push_linear(
            latent_loc, latent_scale, self.value_weight.float(), bias=self.value_bias.float()
        )
        return loc.squeeze(-1), scale.squeeze(-1)
