"""An account of a fusion by evidence -> what its promises allow and what was measured, as figures of a certificate."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tether.causal.evidence import regret_allowed
from tether.causal.experts import CLIP
from tether.causal.mixture import Mixture
from tether.delta.account import Account
from tether.delta.summary import mean_figures, spread_figures

__all__ = ["account_figures", "regrets", "shares", "window_sums"]

ROUNDING = 1e-5
"""Relative; log likelihoods are computed in single precision and added up in double. A KL divergence, a sum over the
whole vocabulary in single precision, is off by up to as many nats."""


def window_sums(values: Tensor, windows: Tensor, count: int) -> Tensor:
    """Add up over windows.

    Args:
        values: shape (m,) or (m, K).
        windows: window of each, shape (m,).
        count: windows W.

    Returns:
        Shape (W,) or (W, K), float64.
    """
    found = torch.zeros(count, *values.shape[1:], dtype=torch.float64)
    return found.index_add_(0, windows, values.double())


def shares(mixture: Mixture, account: Account) -> dict[str, float]:
    """Give the mean weight of the base and of each domain.

    Args:
        mixture: whose account it is.
        account: on one text.

    Returns:
        Shares that add up to 1, base first, by name; the base is called `base`.
    """
    mean = account.log_weights.exp().mean(0)
    parts = {name: float(mean[rows].sum()) for name, rows in zip(mixture.domains, mixture.rows, strict=True)}
    return {"base": float(mean[0])} | parts


def account_figures(
    mixture: Mixture,
    account: Account,
    *,
    quantile: float = 0.95,
    confidence: float = 0.95,
    numbers: Tensor | None = None,
) -> dict[str, Any]:
    """Condense an account of one text.

    Args:
        mixture: whose account it is.
        account: on one text.
        quantile: share of documents that the certified bound must cover.
        confidence: of intervals and of the certified bound.
        numbers: which scored tokens are numbers that count as evidence, shape (m,); None for none.

    Returns:
        JSON-able figures, in nats: loss of base and fusion; softmax KL; the weighted mean of the experts' latent
        drifts; how often the KL exceeded the weighted mean of the experts' KLs, which it never does; for the base
        and each domain the regret of each document with what was allowed; the worst token; shares of the weight.
    """
    documents, scored = account.documents.numpy(), account.scored.numpy()
    kl, parts = account.softmax_kl, account.parts_kl
    positive = parts > 100 * ROUNDING
    return {
        "tokens": len(documents),
        "documents": int(np.unique(documents).size),
        "windows": int(account.windows.max()) + 1,
        "nll_base": float(account.base_nll.double().mean()),
        "nll": float(account.nll.double().mean()),
        "nll_change": mean_figures(account.nll - account.base_nll, documents[scored], confidence),
        "softmax_kl": spread_figures(kl, documents, quantile, confidence),
        "latent_drift": spread_figures(account.latent_drift, documents, quantile, confidence),
        "parts": {
            "contexts": len(documents),
            "violations": int((kl > parts * (1 + ROUNDING) + ROUNDING).sum()),
            "mean_allowed": float(parts.double().mean()),
            "largest_ratio": float((kl[positive] / parts[positive]).max()) if bool(positive.any()) else 0.0,
        },
        "regret": regrets(mixture, account, numbers),
        "worst_token": _worst_token(account),
        "shares": shares(mixture, account),
    }


def _worst_token(account: Account) -> dict[str, float | int]:
    lost = (account.nll - account.base_nll).double()
    allowed = -account.log_weights[account.scored, 0]
    at = int(lost.argmax())
    over = lost > allowed + ROUNDING * (1 + account.nll.double())
    return {"lost": float(lost[at]), "allowed": float(allowed[at]), "violations": int(over.sum())}


def regrets(mixture: Mixture, account: Account, numbers: Tensor | None = None) -> dict[str, Any]:
    """Say by how much a text cost more than under the base, and than under each domain, with what is allowed.

    Args:
        mixture: whose account it is.
        account: on one text, of which at least one token is scored.
        numbers: which scored tokens are numbers that count as evidence, shape (m,); None for none.

    Returns:
        For `base` and each domain, in nats: the largest regret of a window with what was allowed there, how many
        windows exceeded it, and regret and allowance of each document.
    """
    windows = account.windows[account.scored]
    count = int(account.windows.max()) + 1
    served = (account.base_nll - account.nll).double()
    awake = account.log_weights[account.scored] > -torch.inf
    # An expert is compared with where it was awake.
    lost = window_sums(torch.where(awake, account.gain - served.unsqueeze(-1), 0.0), windows, count)
    slack = ROUNDING * window_sums(account.nll + account.base_nll, windows, count)
    tokens = window_sums(torch.ones_like(served), windows, count).long().tolist()
    values = torch.zeros(count) if numbers is None else window_sums(numbers.double(), windows, count)
    of_document = account.documents[torch.searchsorted(account.windows, torch.arange(count))]
    prior = mixture.log_prior.exp().tolist()
    names: Sequence[tuple[str, slice]] = [
        ("base", slice(0, 1)),
        *zip(mixture.domains, mixture.rows, strict=True),
    ]
    found = {}
    for name, rows in names:
        allowed = torch.tensor(
            [
                [
                    regret_allowed(mixture.rule, prior[k], count, floored=k > 0)
                    for k in range(rows.start, rows.stop)
                ]
                for count in tokens
            ],
            dtype=torch.float64,
        )
        # A number can move weights by its clip.
        allowed = allowed + values.unsqueeze(-1) * CLIP
        own = lost[:, rows]
        over = own > allowed + slack.unsqueeze(-1)
        # Of a domain's strengths the one that did best on the window is what the fusion is held to.
        best = own.argmax(-1, keepdim=True)
        best_own, best_allowed = (values.gather(1, best).squeeze(1) for values in (own, allowed))
        found[name] = {
            "largest": float(best_own.max()),
            "allowed": float(best_allowed[int(best_own.argmax())]),
            "violations": int(over.sum()),
            "documents": [
                [float(best_own[of_document == d].sum()), float(best_allowed[of_document == d].sum())]
                for d in of_document.unique().tolist()
            ],
        }
    return found
