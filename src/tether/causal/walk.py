"""One walk through a text: who is awake at each position, what each token says of the experts, the weights after it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal import evidence
from tether.causal.experts import Experts, Scores
from tether.causal.memory import Memory
from tether.causal.sleeping import since_open

__all__ = ["PROMPT", "Reading", "Walk"]

PROMPT = 128
"""Of the text before what the model writes, so many last tokens are scored: a prompt is not served, so any weights may
stand at its end. With half as many the domain was undecided at the end of twice as many prompts (docs/log.md)."""


class Reading(NamedTuple):
    """What a call of the model reads.

    Attributes:
        features: z, shape (B, T, H), followed by what experts read beside it.
        mask: which positions carry a token, shape (B, T), bool.
        places: place of each token in its text, from 0, shape (B, T); 0 begins a text anew.
        ids: token ids, shape (B, T), or None where only embeddings are known: these are no evidence.
        values: the number at each `<NUM>`, shape (B, T), or None.
        number: id of `<NUM>`, or None.
        written: first position of the whole text (cached ones counted) that the model wrote itself; None where all
            is given.
        given: how the backbone was called, inputs_embeds, attention_mask and position_ids, for experts that run it
            again; None where it read the ids alone.
    """

    features: Tensor
    mask: Tensor
    places: Tensor
    ids: Tensor | None
    values: Tensor | None = None
    number: int | None = None
    written: int | None = None
    given: Mapping[str, Any] | None = None


class Walk:
    """The running state of one call.

    Args:
        mixture: the module, `tether.causal.mixture.Mixture`.
        abduction: of the model.
        action: of the model.
        reading: the text.
        memory: of the positions before, or None.
        kept: first position of this call whose law is wanted.

    Attributes:
        begin_at: first position of this call whose law is needed, for itself or for the token after it.
        since: tokens since each domain's gate was open, shape (B, T, N).
        density: log density that each gate gives to the context, shape (B, T, N).
        domains: which domains take part, shape (B, T, N), bool; none before `begin_at`.
        states: log weights after each token, shape (B, T, J, K), as far as they are known.
    """

    def __init__(
        self, mixture: Any, abduction: Any, action: Any, reading: Reading, memory: Memory | None, kept: int
    ) -> None:
        self.mixture, self.action, self.reading = mixture, action, reading
        self.memory = memory
        self.held = memory.held if memory is not None and len(memory) else {}
        self.past = 0 if memory is None else len(memory)
        batch, length = reading.mask.shape
        device = reading.mask.device
        self.log_prior = mixture.log_prior.to(device)
        restarts, experts = len(mixture.rule.restarts), mixture.experts
        self.fresh = reading.places == 0
        self.scored = self._scored()
        first = int(self.scored.any(0).int().argmax()) if bool(self.scored.any()) else length
        self.begin_at = min(kept, max(first - 1, 0) if first < length else length)
        before = self.held["features"][:, -mixture.reach :] if self.held else None
        opened, staying, self.density = mixture.look(reading.features, reading.mask, reading.places, before)
        self.written = None if reading.written is None else max(reading.written - self.past, 0)
        self.since = since_open(
            opened,
            reading.mask,
            reading.places,
            self.held.get("since"),
            staying=staying,
            hold=mixture.hold,
            grace=mixture.rule.grace,
            written=self.written,
        )
        self.domains = mixture.awake(self.since, reading.mask)
        # Nobody asks for the law of the positions before.
        self.domains[:, : self.begin_at] = False
        voters = len(self.log_prior)
        self.gain = torch.zeros(batch, length, voters, dtype=torch.float64, device=device)
        self.told = torch.zeros(batch, length, voters, dtype=torch.bool, device=device)
        self.told[..., 0] = True
        self.awake = self.told[..., :experts].clone()
        self.excess = torch.zeros(batch, length, experts, device=device)
        self.states = torch.zeros(batch, length, restarts, voters, dtype=torch.float64, device=device)
        self.towards: Tensor | None = None
        if self.held:
            self.last = self.held["state"][:, -1]
            if reading.written is not None and 0 < reading.written <= self.past:
                ended = self.held["state"][:, reading.written - 1]
                if mixture.rule.whole:
                    # The call that ended with the given text may not have known that it did.
                    ended = evidence.onward(ended, mixture.rule.restarts)
                    self.last = ended if reading.written == self.past else self.last
                self.towards = evidence.target(ended)
            elif reading.written == 0:
                self.towards = evidence.begin(self.log_prior, mixture.rule.restarts).expand(batch, -1, -1)
                self.towards = evidence.target(self.towards)
            if bool(self.scored[:, 0].any()):
                self._listen_back(abduction)
        else:
            self.last = evidence.begin(self.log_prior, mixture.rule.restarts).expand(batch, -1, -1)
        self.done = 0
        self._scan(min(self.begin_at + 1, length))

    # Which tokens count as evidence: those that follow another token of their text, not what padding predicted.
    def _scored(self) -> Tensor:
        reading = self.reading
        if reading.ids is None:
            return torch.zeros_like(self.fresh)
        before = self.held["mask"][:, -1:] if self.held else torch.zeros_like(reading.mask[:, :1])
        scored = reading.mask & torch.cat([before, reading.mask[:, :-1]], dim=1) & ~self.fresh
        if reading.written is not None:
            scored[:, : max(0, reading.written - PROMPT - self.past)] = False
        return scored

    # What the first token of this call says of those who predicted it in the call before.
    def _listen_back(self, abduction: Any) -> None:
        mixture, action = self.mixture, self.action
        held = {name: value[:, -1] for name, value in self.held.items()}
        known = bool(held["known"].all())
        if known and not bool(held["awake"][:, 1:].any()):
            return  # the base alone has nobody to be compared with
        features = held["features"].to(self.reading.features)
        law = abduction(features[:, : mixture.hidden_size].to(abduction.loc.weight.dtype))
        domains = torch.stack([held["awake"][:, rows].any(-1) for rows in mixture.rows], dim=-1)
        if not known:
            # Nobody asked for that law then.
            domains = mixture.awake(self.held["since"][:, -1:], self.held["mask"][:, -1:])[:, 0]
            features = mixture.read_last(features, domains, self.memory)
        experts: Experts = mixture.at(features, *law, domains)
        ids = self._tokens(0, 1)[:, 0]
        if known:
            served = held["awake"][experts.row, experts.expert]
            experts = experts if bool(served.all()) else experts.without(~served)
            log_prob = self._one_score(experts, ids) - held["excess"].double()
        else:
            scores = experts.score(action)
            experts, log_prob = scores.experts, scores.log_prob(ids)
        gain = evidence.gains(log_prob, experts.awake) + self._of_values(experts, 0, 1)
        self.gain[:, 0], self.told[:, 0] = mixture.heard(gain, experts.awake, held["density"])

    # The score of one class in each context under each expert, rounded as the product with the head rounds it.
    def _one_score(self, experts: Experts, ids: Tensor) -> Tensor:
        action, of = self.action, ids[experts.row]
        rows = (experts.loc.to(action.weight.dtype).float() * action.weight[of].float()).sum(-1)
        rows = rows if action.bias is None else rows + action.bias[of].float()
        rows = action.capped(rows.to(action.weight.dtype)).double()
        found: Tensor = torch.where(experts.awake, rows[experts.entry.clamp(min=0)], 0.0)
        return found

    def _tokens(self, first: int, last: int) -> Tensor:
        ids = self.reading.ids
        return torch.zeros_like(self.reading.places[:, first:last]) if ids is None else ids[:, first:last]

    # Evidence of the numbers that came, where they came.
    def _of_values(self, experts: Experts, first: int, last: int) -> Tensor:
        reading = self.reading
        zero = torch.zeros(experts.entry.shape, dtype=torch.float64, device=experts.entry.device)
        if reading.values is None or reading.number is None or experts.alone:
            return zero
        here = (self._tokens(first, last) == reading.number).flatten()
        if not bool(here.any()):
            return zero
        found = experts.value_gain(self.action, reading.values[:, first:last].flatten())
        return torch.where(here.unsqueeze(-1) & experts.awake, found, zero)

    def listen(self, scores: Scores, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Take the tokens after some neighbouring positions as evidence.

        Args:
            scores: at these positions of all texts.
            first: the first of them.
            last: the one after the last.

        Returns:
            By how much each expert predicted the next token better than the base, shape (B n, K), and whether
            it counts, shape (B n,).
        """
        experts, size = scores.experts, last - first
        batch, length = self.reading.mask.shape
        end = min(last + 1, length)
        scored = torch.zeros(batch, size, dtype=torch.bool, device=self.gain.device)
        if end > first + 1:
            scored[:, : end - first - 1] = self.scored[:, first + 1 : end]
        if experts.alone:
            # Nobody is compared with anybody, so all that is kept stays as it begins.
            self._scan(end)
            return self.gain.new_zeros(batch * size, self.mixture.experts), scored.flatten()
        self.awake[:, first:last] = experts.awake.unflatten(0, (batch, size))
        density = self.density[:, first:last].flatten(0, 1)
        self.excess[:, first:last] = scores.excess().unflatten(0, (batch, size))
        gain = self.gain.new_zeros(batch, size, self.mixture.experts)
        if bool(scored.any()):
            ids = torch.zeros(batch, size, dtype=torch.long, device=gain.device)
            ids[:, : end - first - 1] = self._tokens(first + 1, end)
            found = evidence.gains(scores.log_prob(ids.flatten()), experts.awake).unflatten(0, (batch, size))
            if self.reading.values is not None:
                found = found + self._next_values(experts, first, last, end)
            gain = torch.where(scored.unsqueeze(-1), found, 0.0)
            heard, told = self.mixture.heard(gain.flatten(0, 1), experts.awake, density)
            self.gain[:, first + 1 : end] = heard.unflatten(0, (batch, size))[:, : end - first - 1]
            self.told[:, first + 1 : end] = told.unflatten(0, (batch, size))[:, : end - first - 1]
        self._scan(end)
        return gain.flatten(0, 1), scored.flatten()

    def _next_values(self, experts: Experts, first: int, last: int, end: int) -> Tensor:
        batch, size = self.reading.mask.shape[0], last - first
        values = self.reading.values
        if values is None or self.reading.number is None or experts.alone:
            return self.gain.new_zeros(())
        numbers = values.new_zeros(batch, size)
        numbers[:, : end - first - 1] = values[:, first + 1 : end]
        here = torch.zeros(batch, size, dtype=torch.bool, device=numbers.device)
        here[:, : end - first - 1] = self._tokens(first + 1, end) == self.reading.number
        found = experts.value_gain(self.action, numbers.flatten())
        counted: Tensor = torch.where(here.flatten().unsqueeze(-1) & experts.awake, found, 0.0)
        return counted.reshape(batch, size, -1)

    # Weights after the tokens up to a position, once what they say is known.
    def _scan(self, end: int) -> None:
        start = self.done
        if end <= start:
            return
        part = slice(start, end)
        written = None
        if self.written is not None and self.written <= end:
            written = max(self.written - start, 0)
        state = self.last if start == 0 else self.states[:, start - 1]
        if not bool(self.scored[:, part].any()) and not bool(self.fresh[:, part].any()) and written is None:
            # Nothing is said here, so nothing moves.
            self.states[:, part] = state.unsqueeze(1)
        else:
            rule = self.mixture.rule
            self.states[:, part], self.towards = evidence.scan(
                state, self.gain[:, part], self.told[:, part], self.scored[:, part], self.fresh[:, part],
                rule.restarts, self.log_prior, self.towards, written, whole=rule.whole,
            )  # fmt: skip
        self.done = end

    def remembered(self) -> dict[str, Tensor]:
        """Give what the next call must know of these positions.

        Returns:
            Tensors of shape (B, T, ...) by name.
        """
        known = torch.zeros_like(self.reading.mask)
        known[:, self.begin_at :] = True
        return {
            "features": self.reading.features.detach(),
            "mask": self.reading.mask,
            "since": self.since,
            "density": self.density,
            "awake": self.awake,
            "known": known,
            "excess": self.excess,
            "state": self.states,
        }
