"""What each expert gave to each token of a text, and the loss of any mixture of them that follows from it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tether.causal import evidence
from tether.causal.choice import choice, choice_gain
from tether.causal.evidence import Rule

__all__ = ["Heard", "by_evidence", "posterior"]


class Heard(NamedTuple):
    """Experts of N domains, S strengths each, at m scored tokens.

    Attributes:
        documents: document of each token, one window each, shape (m,).
        base_nll: loss of the base, nats, shape (m,).
        gain: log likelihood less the base's, 0 where asleep, shape (m, 1 + N S), base first.
        awake: who took part, shape (m, 1 + N S), bool.
        density: log density that the gate of each domain gives to each context, shape (m, N).
    """

    documents: Tensor
    base_nll: Tensor
    gain: Tensor
    awake: Tensor
    density: Tensor


def by_evidence(
    heard: Heard, domains: Sequence[int], rule: Rule, *, gated: bool = True, order: Tensor | None = None
) -> Tensor:
    """Mix some domains by evidence, each document as a text of its own.

    Args:
        heard: of all twelve domains.
        domains: numbers of those that are fused.
        rule: how experts are weighted.
        gated: whether gates tell domains apart.
        order: log prior of the experts, where another is wanted.

    Returns:
        Loss of each token, nats, shape (m,).
    """
    each = (heard.gain.shape[1] - 1) // heard.density.shape[1]
    experts = [0, *(1 + domain * each + strength for domain in domains for strength in range(each))]
    gain, awake = heard.gain[:, experts].double(), heard.awake[:, experts]
    chooses = gated and rule.choice and len(domains) > 1
    prior = evidence.prior(rule.prior, [each] * len(domains), choice=chooses) if order is None else order
    if chooses:
        of_domain = torch.tensor(list(domains)).repeat_interleave(each)
        density = torch.cat([heard.density[:, :1], heard.density[:, of_domain]], dim=1)
        shares = choice(density, awake)
        gain = torch.cat([gain, choice_gain(gain, shares).unsqueeze(-1)], dim=1)
        awake = torch.cat([awake, awake[:, 1:].any(-1, keepdim=True)], dim=1)
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
    return by_evidence(heard, domains, Rule(restarts=(0.0,)), gated=False, order=prior)
