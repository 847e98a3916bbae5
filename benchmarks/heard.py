"""What each expert gave to each token of a text, and the loss of any mixture of them that follows from it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tether.causal import evidence
from tether.causal.evidence import Rule

__all__ = ["Heard", "by_evidence", "posterior"]


class Heard(NamedTuple):
    """Experts of N domains, S strengths each, at m scored tokens.

    Attributes:
        documents: document of each token, one window each, shape (m,).
        base_nll: loss of the base, nats, shape (m,).
        gain: log likelihood less the base's, 0 where asleep, shape (m, 1 + N S), base first.
        awake: who took part, shape (m, 1 + N S), bool.
    """

    documents: Tensor
    base_nll: Tensor
    gain: Tensor
    awake: Tensor


def _columns(heard: Heard, domains: Sequence[int], of: int = 12) -> tuple[Tensor, Tensor, int]:
    each = (heard.gain.shape[1] - 1) // of
    experts = [0, *(1 + domain * each + strength for domain in domains for strength in range(each))]
    return heard.gain[:, experts].double(), heard.awake[:, experts], each


def by_evidence(heard: Heard, domains: Sequence[int], rule: Rule, order: Tensor | None = None) -> Tensor:
    """Mix some domains by evidence, each document as a text of its own.

    Args:
        heard: of all twelve domains.
        domains: numbers of those that are fused.
        rule: prior, restarts and floor.
        order: log prior of the experts, where another is wanted.

    Returns:
        Loss of each token, nats, shape (m,).
    """
    gain, awake, each = _columns(heard, domains)
    prior = evidence.prior(rule.prior, [each] * len(domains)) if order is None else order
    found = torch.zeros(len(gain), dtype=torch.float64)
    for document in heard.documents.unique():
        at = (heard.documents == document).nonzero().squeeze(-1)
        own, here = gain[at].unsqueeze(0), awake[at].unsqueeze(0)
        state = evidence.begin(prior, rule.restarts).unsqueeze(0)
        yes = torch.ones(1, len(at), dtype=torch.bool)
        after, _ = evidence.scan(state, own, here, yes, ~yes, rule.restarts, prior)
        before = torch.cat([state.unsqueeze(1), after[:, :-1]], dim=1)
        log_weights = evidence.serve(before, here, rule.floor)
        found[at] = (log_weights + own).logsumexp(-1)[0]
    return heard.base_nll - found.float()


def posterior(heard: Heard, domains: Sequence[int]) -> Tensor:
    """Mix some domains by the posterior at equal prior, without the base and without restarts.

    Args:
        heard: of all twelve domains, nobody asleep.
        domains: numbers of those that are fused.

    Returns:
        Loss of each token, nats, shape (m,).

    Reference:
        Gururangan et al. 2022, DEMix layers, section 3; Li et al. 2022, Branch-Train-Merge, section 3.
    """
    experts = 1 + len(domains)
    prior = torch.full((experts,), -torch.inf, dtype=torch.float64)
    prior[1:] = -torch.tensor(float(experts - 1)).log()
    return by_evidence(heard, domains, Rule(restarts=(0.0,)), prior)
