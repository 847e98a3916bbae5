"""From the drift of U to the law of tokens: bounds under causal sampling, and a check of them by sampling.

A token is a function of U alone, and that function is frozen: argmax of W U + b. So by data processing the KL
divergence between the token laws of base and fused model in a context is at most the latent drift there, and
the total variation between them follows from it. Nothing of this holds for softmax sampling.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.cauchy.divergence import kl_divergence
from tether.cauchy.functional import from_noise
from tether.errors import ConfigError

__all__ = ["TokenCheck", "check_token_law", "token_law_figures", "total_variation_bound"]

ERRORS = 4.0
"""Standard errors beyond which an estimate above its bound counts as a violation."""


def total_variation_bound(kl: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Bound total variation by a KL divergence: the smaller of sqrt(kl / 2) and sqrt(1 - e^{-kl}).

    Args:
        kl: divergence or an upper bound on it, nats, >= 0.

    Returns:
        Upper bound on total variation, in [0, 1].

    Reference:
        Pinsker's inequality; Bretagnolle and Huber 1979, which is below 1 for any divergence.

    Example:
        >>> import torch
        >>> total_variation_bound(torch.tensor([0.02, 1.0, 100.0]))
        tensor([0.1000, 0.7071, 1.0000])
    """
    return torch.minimum((kl / 2).sqrt(), (-torch.expm1(-kl)).sqrt())


def token_law_figures(
    latent_drift: Float[Tensor, " tokens"], documents: Int[Tensor, " tokens"]
) -> dict[str, Any]:
    """Say what the drift of a text's contexts allows the law of tokens, under causal sampling.

    Over a text the divergences of its steps add up when each position has noise of its own: the KL between the
    laws of whole texts is the expectation, over texts that the base writes, of the sum of the steps'
    divergences, hence at most that of the drifts. The sums here are those of the documents at hand.

    Args:
        latent_drift: Cauchy drift of U in each context, nats, >= 0.
        documents: document of each context, from 0.

    Returns:
        JSON-able upper bounds: `kl_at_most` and `total_variation_at_most` of one token (mean, p99 and max over
        contexts), and `text_kl_at_most` of a document (mean and max, and mean tokens a document).
    """
    drift = latent_drift.double()
    moved = total_variation_bound(drift)
    totals = np.bincount(documents.numpy(), weights=drift.numpy())
    counts = np.bincount(documents.numpy())
    totals = totals[counts > 0]
    return {
        "kl_at_most": _spread(drift),
        "total_variation_at_most": _spread(moved),
        "text_kl_at_most": {
            "mean": float(totals.mean()),
            "max": float(totals.max()),
            "tokens": float(counts[counts > 0].mean()),
        },
    }


def _spread(values: Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "p99": float(np.quantile(values.numpy(), 0.99)),
        "max": float(values.max()),
    }


class TokenCheck(NamedTuple):
    """Token laws by sampling beside their bounds, one entry a context.

    Attributes:
        kl: estimated lower bound on the KL divergence of the token laws, nats, shape (n,).
        kl_error: its standard error, shape (n,).
        total_variation: estimated lower bound on their total variation, shape (n,).
        total_variation_error: its standard error, shape (n,).
        drift: latent drift, the bound on `kl`, nats, shape (n,).
    """

    kl: Tensor
    kl_error: Tensor
    total_variation: Tensor
    total_variation_error: Tensor
    drift: Tensor

    def violations(self) -> int:
        """Count contexts whose estimates lie above their bounds beyond four standard errors.

        Returns:
            How many.
        """
        kl = self.kl - ERRORS * self.kl_error > self.drift
        moved = self.total_variation - ERRORS * self.total_variation_error
        return int((kl | (moved > total_variation_bound(self.drift))).sum())


@torch.no_grad()
def check_token_law(
    act: Callable[[Tensor], Tensor],
    base: tuple[Float[Tensor, "n latent"], Float[Tensor, "n latent"]],
    fused: tuple[Float[Tensor, "n latent"], Float[Tensor, "n latent"]],
    *,
    draws: int,
    generator: torch.Generator,
) -> TokenCheck:
    """Estimate how far apart the token laws of two laws of U are, by drawing tokens from both.

    Half the draws split the tokens in two: those drawn more often from the moved law, and the others. The other
    half estimate how likely each law makes that event. KL and total variation between its two laws are at most
    those between the token laws (data processing once more), so nothing is overestimated but by chance.

    Cost: 2 x draws actions for each context.

    Args:
        act: tokens, shape (m,), that U, shape (m, C), leads to.
        base: loc and scale of U under the base, shape (n, C) each.
        fused: the same under the fused model.
        draws: of each law in each context, even, >= 4.
        generator: source of the draws.

    Returns:
        The estimates and their bounds.

    Raises:
        ConfigError: draws are odd or fewer than 4.
    """
    if draws < 4 or draws % 2:
        raise ConfigError(
            f"draws={draws}: expected an even number of at least 4, half of them for each purpose"
        )
    drift = kl_divergence(*(part.double() for part in (*base, *fused))).sum(-1)
    found = []
    for context in range(len(base[0])):
        tokens = []
        for loc, scale in (base, fused):
            uniform = torch.rand(draws, loc.shape[-1], generator=generator).clamp(2**-24, 1 - 2**-24)
            tokens.append(act(from_noise(uniform, loc[context], scale[context]).float()))
        found.append(_estimates(*tokens))
    kl, kl_error, moved, moved_error = torch.tensor(found, dtype=torch.float64).reshape(-1, 4).T
    return TokenCheck(kl, kl_error, moved, moved_error, drift)


def _estimates(base: Tensor, moved: Tensor) -> tuple[float, float, float, float]:
    """Return KL and total variation of an event with their standard errors, from draws of tokens."""
    half = len(base) // 2
    kinds, place = torch.unique(torch.cat([base, moved]), return_inverse=True)
    base, moved = place[: len(base)], place[len(base) :]
    counts = [torch.bincount(part[:half], minlength=len(kinds)) for part in (base, moved)]
    event = counts[1] > counts[0]
    # Half a count on either side keeps an event that was never drawn from having an infinite ratio.
    p, q = ((float(event[part[half:]].sum()) + 0.5) / (half + 1) for part in (base, moved))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    by_p = math.log(p / q) - math.log((1 - p) / (1 - q))
    by_q = (1 - p) / (1 - q) - p / q
    spread_p, spread_q = (share * (1 - share) / half for share in (p, q))
    error = math.sqrt(by_p**2 * spread_p + by_q**2 * spread_q)
    return kl, error, abs(p - q), math.sqrt(spread_p + spread_q)
