"""Weights of experts by how well they predicted the text so far: prior, restarts, sleep, floor.

Expert 0 is the base; the others are the base moved by one delta or adapter at one strength, and, where gates tell
how much a context looks like each domain, the *gates' choice*: those awake, mixed by the density that their gates
give to the context. Served is the mixture `q_t = sum_k w_k p_k`. Each token that came multiplies every awake expert's
weight by the probability that the expert gave it, and a small share of the weight restarts. How fast to restart is
not known beforehand, so several rates J run side by side and are weighted by their own success, as the experts are.

Everything is a pure function of log weights, shape (..., J, K), float64, whose exponentials add up to 1.

Reference:
    Vovk 1990, Aggregating strategies; Herbster and Warmuth 1998, Tracking the best expert (restarts);
    Freund, Schapire, Singer and Warmuth 1997, Using and combining predictors that specialize (sleep);
    Volf and Willems 1998, Switching between two universal source coding algorithms (several rates).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tether.errors import ConfigError

__all__ = [
    "Rule",
    "begin",
    "gains",
    "onward",
    "prior",
    "regret_allowed",
    "scan",
    "serve",
    "target",
    "update",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How experts are weighted.

    Attributes:
        prior: weight of the base at the start of a text, in (0, 1).
        restarts: shares of the weight that restart at every token, each in [0, 1); several of them are weighted
            by their success.
        floor: weight that the base has at least in what is served, in [0, 1).
        choice: whether the gates' choice is an expert, where gates tell several domains apart.
        hold: tokens for which a domain stays awake after its gate has closed, >= 0.
        grace: tokens at the beginning of a text at which every domain is awake, >= 0.
        stay: an open gate closes only where the squared distance is beyond so many times what opens it, >= 1; of use
            with a hold.
        whole: whether the model's own text begins with the weights that all of what was given supports; else with those
            at its very end, to which its last tokens alone may have led.
    """

    prior: float = 0.9
    restarts: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1)
    floor: float = 0.0
    choice: bool = True
    hold: int = 32
    grace: int = 8
    stay: float = 2.0
    whole: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ConfigError(f"prior={self.prior}: expected the base's weight at the start, in (0, 1)")
        if not self.restarts or not all(0 <= share < 1 for share in self.restarts):
            raise ConfigError(f"restarts={list(self.restarts)}: expected one or more shares in [0, 1)")
        if not 0 <= self.floor < 1:
            raise ConfigError(f"floor={self.floor}: expected a weight in [0, 1)")
        for name in ("hold", "grace"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number of tokens, 0 or more")
        if not 1 <= self.stay < math.inf:
            raise ConfigError(f"stay={self.stay}: expected a finite multiple of what opens a gate, 1 or more")

    def described(self) -> dict[str, Any]:
        """Write the rule into a description.

        Returns:
            Attributes by name, as JSON has them.
        """
        return {**asdict(self), "restarts": list(self.restarts)}

    @staticmethod
    def of(description: Mapping[str, Any]) -> "Rule":
        """Read the rule of a description.

        Args:
            description: `CausalQwenConfig.fusion` of a fusion by evidence, or the like; one that says nothing of
                choice, hold, grace, stay or whole was written before there were any, and is served without.

        Returns:
            The rule.
        """
        return Rule(
            prior=float(description["prior"]),
            restarts=tuple(float(share) for share in description["restarts"]),
            floor=float(description["floor"]),
            choice=bool(description.get("choice", False)),
            hold=int(description.get("hold", 0)),
            grace=int(description.get("grace", 0)),
            stay=float(description.get("stay", 1.0)),
            whole=bool(description.get("whole", False)),
        )


def prior(base: float, strengths: Sequence[int], *, choice: bool = False) -> Float[Tensor, " experts"]:
    """Divide the weight that the base leaves among the domains, and a domain's among its strengths.

    Args:
        base: weight of the base, in (0, 1).
        strengths: at how many strengths each of the N domains is an expert, each >= 1.
        choice: whether the gates' choice is an expert too; it then has half of what the base leaves.

    Returns:
        Log weights of the K = 1 + sum(strengths) experts, base first, then domain by domain, and of the gates' choice
        where there is one, float64.

    Example:
        >>> prior(0.5, [2, 1]).exp()
        tensor([0.5000, 0.1250, 0.1250, 0.2500], dtype=torch.float64)
    """
    left = (1 - base) / 2 if choice else 1 - base
    shares = [base]
    for count in strengths:
        shares += [left / len(strengths) / count] * count
    return torch.tensor(shares + [left] * choice, dtype=torch.float64).log()


def begin(
    log_prior: Float[Tensor, "*batch experts"], restarts: Sequence[float]
) -> Float[Tensor, "*batch rates experts"]:
    """Give the weights before the first token: the prior, at every rate alike.

    Args:
        log_prior: log weights of the experts, shape (..., K).
        restarts: the J rates.

    Returns:
        Log weights, shape (..., J, K).
    """
    spread = log_prior.unsqueeze(-2) - math.log(len(restarts))
    return spread.expand(*log_prior.shape[:-1], len(restarts), log_prior.shape[-1])


def serve(
    state: Float[Tensor, "*batch rates experts"], awake: Bool[Tensor, "*batch experts"], floor: float = 0.0
) -> Float[Tensor, "*batch experts"]:
    """Give the weights with which the next token is predicted: of those awake, the base with at least the floor.

    Args:
        state: log weights, shape (..., J, K).
        awake: which experts take part, shape (..., K); the base always does.
        floor: least weight of the base, in [0, 1).

    Returns:
        Log weights, shape (..., K), -inf where asleep.
    """
    weights = state.logsumexp(-2).masked_fill(~awake, -torch.inf)
    total = weights.logsumexp(-1, keepdim=True)
    # Where nobody awake has any weight left the base speaks.
    alone = torch.where(torch.arange(weights.shape[-1], device=weights.device) == 0, 0.0, -torch.inf)
    weights = torch.where(total > -torch.inf, weights - total, alone)
    if floor:
        weights = weights + math.log1p(-floor)
        base = torch.logaddexp(weights[..., :1], weights.new_tensor(math.log(floor)))
        weights = torch.cat([base, weights[..., 1:]], dim=-1)
    return weights


def gains(
    log_prob: Float[Tensor, "*batch experts"], awake: Bool[Tensor, "*batch experts"]
) -> Float[Tensor, "*batch experts"]:
    """Say by how much each expert predicted a token better than the base did.

    Differences stay exact where sums of log probabilities over a long text would not.

    Args:
        log_prob: log probability that each expert gave to the token that came, shape (..., K), base first; -inf
            where it was impossible.
        awake: which experts took part, shape (..., K).

    Returns:
        Differences to the base, float64, 0 where asleep. Where the base held the token for impossible they are
        differences to the best expert, and where all awake did, all are 0: such a token says nothing.
    """
    log_prob = log_prob.double().masked_fill(~awake, -torch.inf)
    best = log_prob.amax(-1, keepdim=True)
    reference = torch.where(log_prob[..., :1] > -torch.inf, log_prob[..., :1], best)
    impossible = best == -torch.inf
    found = log_prob - torch.where(impossible, 0.0, reference)
    return torch.where(awake & ~impossible, found, 0.0)


def target(state: Float[Tensor, "*batch rates experts"]) -> Float[Tensor, "*batch rates experts"]:
    """Take the weights of now as those towards which the model's own text restarts.

    On text that the model writes itself weights are a martingale, so a restart towards the prior would draw
    every text back to the base; a restart towards the weights at the end of the given text does not.

    Args:
        state: log weights at the end of the given text, shape (..., J, K).

    Returns:
        Log weights that add up to 1 at each rate, shape (..., J, K).
    """
    total = state.logsumexp(-1, keepdim=True)
    # A rate at which everybody held a token for impossible stays without weight.
    return torch.where(total > -torch.inf, state - total, state)


def onward(
    state: Float[Tensor, "*batch rates experts"], restarts: Sequence[float]
) -> Float[Tensor, "*batch rates experts"]:
    """Begin the model's own text with the weights that all of what was given supports.

    These are the weights at the slowest rate, which forgets least; at every rate alike, as a text begins. The mixture
    over rates is about the next token: at a fast rate a few tokens in the manner of another expert decide, and would
    decide for all that is written.

    Args:
        state: log weights at the end of the given text, shape (..., J, K).
        restarts: the J rates.

    Returns:
        Log weights, shape (..., J, K).
    """
    slowest = min(range(len(restarts)), key=lambda rate: restarts[rate])
    own, every = state[..., slowest, :], state.logsumexp(-2)
    # At a rate without any weight somebody held a token for impossible that came; then all rates together say it.
    own = torch.where(own.logsumexp(-1, keepdim=True) > -torch.inf, own, every)
    return begin(own - own.logsumexp(-1, keepdim=True), restarts)


def update(
    state: Float[Tensor, "*batch rates experts"],
    gain: Float[Tensor, "*batch experts"],
    awake: Bool[Tensor, "*batch experts"],
    restarts: Sequence[float],
    towards: Float[Tensor, "#*batch #rates experts"],
) -> Float[Tensor, "*batch rates experts"]:
    """Let the token that came decide, then restart.

    An expert that sleeps keeps its weight: it is as if it had predicted what was served.

    Args:
        state: log weights before the token, shape (..., J, K).
        gain: from `gains`, shape (..., K).
        awake: which experts took part, shape (..., K).
        restarts: the J rates.
        towards: log weights that restarts go to, adding up to 1 at each rate, broadcastable to the state.

    Returns:
        Log weights after it, shape (..., J, K).
    """
    every = awake.unsqueeze(-2)
    heard = state + gain.unsqueeze(-2)
    before = state.masked_fill(~every, -torch.inf).logsumexp((-2, -1), keepdim=True)
    served = heard.masked_fill(~every, -torch.inf).logsumexp((-2, -1), keepdim=True) - before
    # Only experts without any weight held the token for possible: it says nothing about the others.
    told = served > -torch.inf
    heard = torch.where(every, heard - torch.where(told, served, 0.0), state)
    heard = torch.where(told, heard, state)
    rates = torch.tensor(restarts, dtype=state.dtype, device=state.device).unsqueeze(-1)
    total = heard.logsumexp(-1, keepdim=True)
    return torch.logaddexp(heard + torch.log1p(-rates), total + rates.log() + towards)


def scan(
    state: Float[Tensor, "batch rates experts"],
    gain: Float[Tensor, "batch time experts"],
    awake: Bool[Tensor, "batch time experts"],
    scored: Bool[Tensor, "batch time"],
    fresh: Bool[Tensor, "batch time"],
    restarts: Sequence[float],
    log_prior: Float[Tensor, " experts"],
    towards: Float[Tensor, "batch rates experts"] | None = None,
    written: int | None = None,
    *,
    whole: bool = True,
) -> tuple[Float[Tensor, "batch time rates experts"], Float[Tensor, "batch rates experts"] | None]:
    """Go through the tokens of some texts.

    Cost: T steps of elementwise work on B x J x K numbers, whatever the vocabulary and the model.

    Args:
        state: log weights before the first of these tokens, shape (B, J, K).
        gain: of each token, shape (B, T, K).
        awake: who predicted each token, shape (B, T, K).
        scored: which tokens count as evidence, shape (B, T); others leave the weights as they are.
        fresh: which tokens begin a text, or are padding, shape (B, T): there weights are the prior.
        restarts: the J rates.
        log_prior: the prior, shape (K,).
        towards: target of restarts on the model's own tokens, shape (B, J, K), where the given text ended before.
        written: the first token here that the model wrote itself, T where it writes the next one; None where all are
            given.
        whole: whether it then begins with the weights that all of what was given supports, see `onward`.

    Returns:
        Log weights after each token, shape (B, T, J, K), and the target of the model's own tokens.
    """
    start = begin(log_prior, restarts).to(state)
    after = []
    for step in range(gain.shape[1]):
        if written is not None and step == written and towards is None:
            towards = target(state)
        own = written is not None and step >= written and towards is not None
        known = towards if own and towards is not None else log_prior.to(state)
        moved = update(state, gain[:, step], awake[:, step], restarts, known)
        state = torch.where(scored[:, step, None, None], moved, state)
        state = torch.where(fresh[:, step, None, None], start, state)
        if whole and written is not None and step == written - 1:
            state = onward(state, restarts)
        after.append(state)
    return torch.stack(after, 1) if after else state.new_zeros(len(state), 0, *state.shape[1:]), towards


def regret_allowed(rule: Rule, share: float, tokens: int, *, floored: bool = False) -> float:
    """Bound how much more a whole text costs than under one expert, whatever the text and the experts are.

    At each rate s the loss exceeds the expert's by at most log 1/share + (T - 1) log 1/(1 - s + s share), and the
    mixture over rates is at least their mean likelihood. A floor adds log 1/(1 - floor) a token, not against the base.

    Args:
        rule: how experts are weighted.
        share: weight of the expert where restarts go to, in (0, 1]: at the start, or for text that the model writes
            itself at the end of the given text.
        tokens: T, tokens that were served and came, >= 0.
        floored: whether the floor of the base is paid for: by every expert but the base.

    Returns:
        Nats for the whole text.

    Example:
        >>> round(regret_allowed(Rule(restarts=(0.0,)), 0.9, 1000), 4)
        0.1054
    """
    if tokens == 0:
        return 0.0
    costs = [-math.log(share) - (tokens - 1) * math.log1p(-rate + rate * share) for rate in rule.restarts]
    least = min(costs)
    mixed = least - math.log(sum(math.exp(least - cost) for cost in costs) / len(costs))
    return mixed - (tokens * math.log1p(-rule.floor) if floored else 0.0)
