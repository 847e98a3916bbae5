"""How strong a learnt delta should be: the factor along its ray with the least loss on documents kept aside."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tether.causal.softmax import softmax_kl
from tether.delta.head import Head, Reference
from tether.delta.output_head import OutputHead, chunk_rows
from tether.stats import standard_error

__all__ = [
    "STEP",
    "Change",
    "Strength",
    "change_figures",
    "find_strength",
    "served_change",
    "token_nll",
]

STEP = 0.125
"""Distance of the shares that are looked at, and the smallest of them."""


class Strength(NamedTuple):
    """What was found along the ray.

    Attributes:
        share: of the largest factor allowed, a multiple of `STEP` in (0, 1].
        nll: for every share that was looked at, the loss of each token, nats, shape (n,); the base is share 0.
        helps: whether the mean loss at `share`, numbers included, is below the base's.
    """

    share: float
    nll: dict[float, Tensor]
    helps: bool

    @property
    def looked(self) -> dict[float, float]:
        """Mean loss at every share that was looked at, nats, by share."""
        return {share: float(values.double().mean()) for share, values in sorted(self.nll.items())}


def find_strength(nll: Callable[[float], tuple[Tensor, float]]) -> Strength:
    """Find the share of the largest factor allowed that has the least loss.

    The loss along a ray is convex where scores move linearly, and nearly so elsewhere. So the search begins at
    the whole and goes down by quarters as long as the loss falls; then it looks an eighth further, on the side
    where the loss is less. Of equal losses the one of the larger share is taken. No share above 1 is ever
    looked at.

    Where no share is better than the base, the smallest one, `STEP`, is taken: it moves the base least.

    Cost: four to seven evaluations, the base among them.

    Args:
        nll: gives the loss of each token at a share, nats, shape (n,), and what numbers add to its mean; at 0 those of
            the base.

    Returns:
        The share with what was looked at on the way.
    """
    seen: dict[float, tuple[Tensor, float]] = {}

    def loss(share: float) -> float:
        if share not in seen:
            seen[share] = nll(share)
        tokens, more = seen[share]
        mean = float(tokens.double().mean()) + more
        return mean if math.isfinite(mean) else math.inf

    best = 1.0
    while best > 2 * STEP and (loss(best - 2 * STEP) < loss(best) or loss(best) == math.inf):
        best -= 2 * STEP
    above, below = best + 2 * STEP, best - 2 * STEP
    near = best + STEP if best < 1 and loss(above) <= loss(below) else best - STEP
    best = min((near, best), key=lambda share: (loss(share), -share))
    if loss(best) >= loss(0.0):
        best = STEP
    helps = loss(best) < loss(0.0)
    return Strength(best, {share: tokens for share, (tokens, _) in seen.items()}, helps)


@torch.no_grad()
def token_nll(head: Head | None, at: Reference, targets: Tensor, output: OutputHead) -> Tensor:
    """Compute the loss of each token over the whole vocabulary, in the served softmax.

    Cost: one product with the (V, C) head a token.

    Args:
        head: the delta, acting everywhere; None for the base.
        at: base quantities at n tokens.
        targets: next tokens, shape (n,), all >= 0.
        output: the output head.

    Returns:
        Negative log likelihoods, nats, shape (n,), float32.
    """
    loc, _ = at.moved(head)
    parts = zip(output.log_prob(loc), targets.split(chunk_rows(output.weight)), strict=True)
    losses = [-log_prob.gather(-1, target.unsqueeze(-1)).squeeze(-1) for log_prob, target in parts]
    return torch.cat(losses) if losses else torch.zeros(0)


class Change(NamedTuple):
    """What a delta does to the served softmax, token by token.

    Attributes:
        kl: KL(base || moved), nats, shape (n,).
        before: loss of the base, nats, shape (n,); nan where a token has no next one.
        after: loss of the moved model, likewise.
    """

    kl: Tensor
    before: Tensor
    after: Tensor

    def figures(self) -> dict[str, float | int | None]:
        """Condense them.

        Returns:
            Tokens, mean softmax KL, and mean losses over the tokens that have a next one (None without any).
        """
        scored = ~self.before.isnan()
        means = {
            name: float(values[scored].double().mean()) if bool(scored.any()) else None
            for name, values in (("nll_before", self.before), ("nll_after", self.after))
        }
        return {"tokens": len(self.kl), **means, "softmax_kl": float(self.kl.double().mean())}


@torch.no_grad()
def served_change(law: Iterable[Tensor], loc: Tensor, targets: Tensor | None, output: OutputHead) -> Change:
    """Measure drift and losses of the served softmax in one pass.

    Cost: one product with the (V, C) head a token, beside that of `law`.

    Args:
        law: log probabilities of the base at n tokens, from `OutputHead.log_prob`.
        loc: moved location of U, shape (n, C).
        targets: next tokens, shape (n,), negative where there is none; None where they are not known.
        output: the output head.

    Returns:
        The change; losses are nan where there is no next token.
    """
    known = torch.full((len(loc),), -1) if targets is None else targets
    found = []
    parts = zip(law, output.log_prob(loc), known.split(chunk_rows(output.weight)), strict=True)
    for before, after, target in parts:
        index, none = target.clamp(min=0).unsqueeze(-1), torch.where(target < 0, math.nan, 0.0)
        losses = (none - log_prob.gather(-1, index).squeeze(-1) for log_prob in (before, after))
        found.append((softmax_kl(before, after), *losses))
    return Change(*(torch.cat(values) for values in zip(*found, strict=True)))


def change_figures(before: Tensor, after: Tensor, documents: Tensor) -> dict[str, Any]:
    """Condense what a delta does to the loss of documents kept aside.

    Args:
        before: loss of each token under the base, nats, shape (n,).
        after: under the delta, likewise.
        documents: document of each token, shape (n,).

    Returns:
        `documents`, `tokens`, `nll_before`, `nll_after`, their difference `change` (negative where the delta
        helps), and `standard_error` of that difference over documents, None for a single document.
    """
    moved = (after.double() - before.double()).cpu()
    several = len(documents.unique()) > 1 and bool(moved.isfinite().all())
    return {
        "documents": len(documents.unique()),
        "tokens": len(before),
        "nll_before": float(before.double().mean()),
        "nll_after": float(after.double().mean()),
        "change": float(moved.mean()),
        "standard_error": standard_error(np.asarray(moved), np.asarray(documents)) if several else None,
    }
