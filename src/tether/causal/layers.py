"""The new layers before U, in the order the data flows: numbers are embedded, abduction infers the law of U."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tether.causal.losses import signed_log

__all__ = ["Abduction", "NumericEmbedding"]


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

    Starts as the identity: loc = z, scale = `latent_scale` (spec document 5, section 4, step 2). Where the base
    multiplies its logits by s, loc = s z: the scores W U are then the base's logits, and W stays the base's own.

    Args:
        hidden_size: width H of the backbone's last hidden state.
        latent_size: dimensions C of U.
        latent_scale: initial scale of U, > 0.
        mlp_size: width of a hidden layer whose output is added to both, 0 at the start; 0 for linear heads.
        logit_scale: s, what the base multiplies its logits by; not 0.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        latent_scale: float,
        mlp_size: int = 0,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.loc = nn.Linear(hidden_size, latent_size)
        self.log_scale = nn.Linear(hidden_size, latent_size)
        self.latent_scale = latent_scale
        self.logit_scale = logit_scale
        self.mlp: nn.Sequential | None = None
        if mlp_size:
            wide, out = nn.Linear(hidden_size, mlp_size), nn.Linear(mlp_size, 2 * latent_size)
            self.mlp = nn.Sequential(wide, nn.SiLU(), out)

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Set loc = s z and scale = latent_scale exactly."""
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
        # A number in float32, not part of the weight: 1/6 in half precision would be another base.
        loc = self.loc(hidden_states).float() * self.logit_scale
        log_scale = self.log_scale(hidden_states).float()
        if self.mlp is None:
            return loc, log_scale
        more_loc, more_scale = self.mlp(hidden_states).float().chunk(2, dim=-1)
        return loc + more_loc, log_scale + more_scale
