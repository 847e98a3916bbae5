"""Routed deltas inside the model: hidden state -> router -> share of every delta and of the base, per token."""

from typing import Any

import torch
from torch import Tensor, nn

from tether.causal.description import check_description
from tether.causal.fused import Fusion
from tether.causal.gates import window_mean
from tether.causal.mixture import Mixture
from tether.errors import ConfigError

__all__ = ["RoutedFusion", "make_fusion", "route_shares", "router_features"]


def router_features(hidden_states: Tensor, mean_state: Tensor) -> Tensor:
    """Put together what a router of deltas reads: the token's state and the mean of the last few.

    Args:
        hidden_states: z, shape (..., H).
        mean_state: causal window means of z, shape (..., H).

    Returns:
        Both with root mean square 1, shape (..., 2 H), float32.
    """
    parts = [part.float() for part in (hidden_states, mean_state)]
    return torch.cat([p * p.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt() for p in parts], dim=-1)


def route_shares(features: Tensor, weight: Tensor, bias: Tensor, *, null: bool, top_k: int = 0) -> Tensor:
    """Turn features into shares of the deltas.

    Args:
        features: from `router_features`, shape (..., 2 H).
        weight: of the router, shape (O, 2 H); O = N options, or N + 1 with the base first.
        bias: shape (O,).
        null: whether the first option is the base, which moves nothing.
        top_k: options kept a token, the others get exactly 0; 0 keeps all.

    Returns:
        Shares of the N deltas, shape (N, ...), in [0, 1], with a sum of at most 1.
    """
    logits = features @ weight.T + bias
    if top_k:
        kept = logits.topk(top_k, dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    shares = logits.softmax(-1).movedim(-1, 0)
    return shares[1:] if null else shares


class RoutedFusion(Fusion):
    """A fusion whose deltas act by the shares that a router gives them, times their gates where it is gated.

    Shares are in [0, 1], so that every bound on gated fusions holds for it as it is.

    Args:
        hidden_size: width H of the hidden state.
        latent_size: dimensions C of U.
        description: as of `Fusion`, with `router`: window (tokens of the mean), null (whether the base is an
            option), top_k.

    Raises:
        ConfigError: top_k out of range, or a window that is not the gates'.
    """

    def __init__(self, hidden_size: int, latent_size: int, description: dict[str, Any]) -> None:
        super().__init__(hidden_size, latent_size, description)
        router = description["router"]
        self.own_gates = self.gated
        self.null, self.top_k = bool(router["null"]), int(router["top_k"])
        options = len(self.domains) + self.null
        if not 0 <= self.top_k <= options:
            raise ConfigError(
                f"top_k={self.top_k}: expected 0 for all of {options} options, or at most as many"
            )
        if self.own_gates and self.window != int(router["window"]):
            raise ConfigError(f"router window {router['window']}: expected the gates' window, {self.window}")
        self.window = int(router["window"])
        # What measures a fusion asks whether shares differ from token to token: here they do.
        self.gated = True
        self.router_weight = nn.Parameter(torch.zeros(options, 2 * hidden_size), requires_grad=False)
        self.router_bias = nn.Parameter(torch.zeros(options), requires_grad=False)

    def gates(
        self, hidden_states: Tensor, mask: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Decide per context how much of each delta acts.

        Args:
            hidden_states: z, shape (B, T, H), alone or followed by the states of `layers`.
            mask: which positions carry a token, shape (B, T), bool.
            state: returned by the call for the text before.

        Returns:
            Shares, shape (N, B, T), and the state for the next call.
        """
        last = hidden_states[..., : self.hidden_size]
        mean, count, after = window_mean(last, mask, self.window, state)
        shares = route_shares(
            router_features(last, mean),
            self.router_weight.float(),
            self.router_bias.float(),
            null=self.null,
            top_k=self.top_k,
        )
        if self.own_gates:
            shares = shares * super().gates(hidden_states, mask, state)[0]
        return shares * (count > 0), after

    def gates_without_largest(self, hidden_states: Tensor, mask: Tensor) -> None:
        """Give nothing: the router is not taught again when a domain leaves, so that the other shares stay.

        Args:
            hidden_states: not used.
            mask: not used.
        """


def make_fusion(hidden_size: int, latent_size: int, description: dict[str, Any]) -> Fusion:
    """Build the fusion that a description asks for.

    Args:
        hidden_size: width H of the hidden state.
        latent_size: dimensions C of U.
        description: `CausalQwenConfig.fusion`; with `by` = `evidence` it is a mixture, with `router` a routed sum.

    Returns:
        The fusion, its tensors zero.

    Raises:
        ConfigError: the description has missing, unknown or wrong fields.
    """  # noqa: DOC502 - raised by check_description
    check_description(description)
    if description.get("by") == "evidence":
        return Mixture(hidden_size, latent_size, description)
    kind = RoutedFusion if description.get("router") else Fusion
    return kind(hidden_size, latent_size, description)
