"""Fusion by evidence inside the model: hidden state -> who is awake -> their laws -> weights by the text so far."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tether.cauchy.charts import read_move
from tether.causal import evidence
from tether.causal.choice import choice, choice_gain, spread
from tether.causal.evidence import Rule
from tether.causal.experts import Experts, Scores
from tether.causal.fused import Fusion
from tether.causal.gates import gate_density, gate_distance, gate_open
from tether.causal.memory import Memory
from tether.causal.sleeping import recent_mean
from tether.causal.walk import Reading, Walk
from tether.errors import ConfigError

__all__ = ["Block", "Mixture"]

BLOCK_BYTES = 24_000_000
"""Size of the scores of the base that are held at once: below the 32 MB from which allocators ask the system for
fresh pages each time, which costs more than the arithmetic."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Block:
    """Some neighbouring positions of all texts of a batch, M = B x n contexts, row by row.

    Attributes:
        first: position of the first, counted from the first of this call.
        size: positions n.
        experts: who is awake, and their laws of U.
        scores: their scores of all classes.
        log_weights: weights with which they are served, shape (M, K), -inf where asleep.
        density: log density that the gate of each domain gives to the context, shape (M, N).
        gain: by how much each expert predicted the next token better than the base, shape (M, K), float64.
        scored: whether the next token counts as evidence, shape (M,).
    """

    first: int
    size: int
    experts: Experts
    scores: Scores
    log_weights: Tensor
    density: Tensor
    gain: Tensor
    scored: Tensor


class Mixture(Fusion):
    """The base and each delta alone, at one or several strengths, weighted by how well they predicted the text so far.

    A delta sleeps where its gate has been closed for a while: it takes no row in any product, and its weights stay.
    Where gates tell several domains apart, their choice is one more expert, which says nothing of its own: the laws of
    those awake, mixed by the density that their gates give to the context. So it costs no product, and what it weighs
    is handed to those that it consists of.

    Args:
        hidden_size: width H of the hidden state.
        latent_size: dimensions C of U.
        description: `CausalQwenConfig.fusion` with `by` = `evidence`: domains, native, strengths (of each domain), the
            rule (prior, restarts, floor, choice, hold), gated (whether gates let domains sleep), location_only, layers,
            and for gated ones gate_window, gate_rank, gate_stages.

    Raises:
        ConfigError: strengths that are missing, zero or not finite, or settings out of range.
    """

    remembers: type[Memory] = Memory

    def __init__(self, hidden_size: int, latent_size: int, description: dict[str, Any]) -> None:
        super().__init__(hidden_size, latent_size, {**description, "chart": "symmetric", "leash": None})
        self.description = description
        strengths = description["strengths"]
        finite = all(each and all(0 < abs(float(s)) < float("inf") for s in each) for each in strengths)
        if len(strengths) != len(self.domains) or not finite:
            raise ConfigError(
                f"strengths {strengths} of {len(self.domains)} domains: expected one or more finite numbers other than "
                "0 for each"
            )
        self.strengths = tuple(
            tuple(weight * float(s) for s in each)
            for weight, each in zip(self.weights, strengths, strict=True)
        )
        self.rule = Rule.of(description)
        # Domain of each expert, the base is of none; and the experts of each domain.
        self.domain = (-1, *(row for row, each in enumerate(self.strengths) for _ in each))
        first = [1 + sum(map(len, self.strengths[:row])) for row in range(len(self.strengths))]
        self.rows = tuple(slice(at, at + len(each)) for at, each in zip(first, self.strengths, strict=True))
        # How many positions before its own a gate looks at.
        self.reach = max(self.window - 1, 1) if self.gated else 1
        # Where nobody sleeps, gates are open wherever there is a token.
        self.hold = self.rule.hold if self.gated else 0
        # Of one domain the gates' choice would say what the domain says.
        self.chooses = self.gated and self.rule.choice and len(self.domains) > 1

    @cached_property
    def log_prior(self) -> Tensor:
        """Log weights at the start of a text, shape (K,), or (K + 1,) with that of the gates' choice last, float64."""
        return evidence.prior(self.rule.prior, [len(each) for each in self.strengths], choice=self.chooses)

    @property
    def experts(self) -> int:
        """How many experts there are, the base counted."""
        return len(self.domain)

    def look(
        self, states: Tensor, mask: Tensor, places: Tensor, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Look at contexts through the gates.

        Args:
            states: z, shape (B, T, H), alone or followed by what experts read beside it.
            mask: which positions carry a token, shape (B, T), bool.
            places: place of each token in its text, shape (B, T).
            before: states of the positions before, shape (B, P, H), of which `reach` are of use.

        Returns:
            Whose gates open, and whose stay open if they are, shape (B, T, N) each, bool; and the log density that each
            gives to the context, shape (B, T, N), float32. All are open, at no density, where nobody sleeps.
        """
        if not self.gated:
            opened = mask.unsqueeze(-1).expand(*mask.shape, len(self.domains))
            return opened, opened, opened.new_zeros(opened.shape, dtype=torch.float32)
        width = self.hidden_size
        earlier = None if before is None else before[..., :width].to(states)
        mean = recent_mean(states[..., :width], places, self.window, earlier)
        count = (places + 1).clamp(max=self.window).float() * mask
        statistics = self.gate_statistics()
        distance = gate_distance(mean, count, self.window, statistics)
        opened, staying = (
            gate_open(distance, count, far * self.gate_threshold.float()).movedim(0, -1).bool()
            for far in (1.0, self.rule.stay)
        )
        if not self.chooses:
            return opened, staying, opened.new_zeros(opened.shape, dtype=torch.float32)
        return opened, staying, gate_density(distance, count, self.window, statistics).movedim(0, -1)

    def awake(self, since: Tensor, mask: Tensor) -> Tensor:
        """Tell which domains take part: those whose gate is open, or was a short while ago in the same text.

        Args:
            since: tokens since each gate was open, from `since_open`, shape (B, T, N).
            mask: which positions carry a token, shape (B, T), bool.

        Returns:
            Shape (B, T, N), bool.
        """
        return (since <= self.hold) & mask.unsqueeze(-1)

    def _choice(self, awake: Tensor, density: Tensor) -> Tensor:
        # Strengths of one domain share what its gate says of it.
        domain = torch.tensor([0, *self.domain[1:]], device=awake.device)
        alike = torch.tensor(
            [1.0, *(len(self.strengths[row]) for row in self.domain[1:])], device=awake.device
        )
        return choice(density[:, domain].double() - alike.double().log(), awake)

    def heard(self, gain: Tensor, awake: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
        """Complete what a token says of the experts by what it says of the gates' choice.

        Args:
            gain: by how much each expert predicted the token better than the base, shape (M, K).
            awake: who predicted it, shape (M, K), bool.
            density: of the domains in the contexts that it was predicted from, shape (M, N).

        Returns:
            The same two, shape (M, K + 1) where the gates' choice is an expert.
        """
        if not self.chooses:
            return gain, awake
        chosen = choice_gain(gain, self._choice(awake, density))
        some = awake[:, 1:].any(-1)
        return torch.cat([gain, chosen.unsqueeze(-1)], -1), torch.cat([awake, some.unsqueeze(-1)], -1)

    def weigh(self, state: Tensor, awake: Tensor, density: Tensor) -> Tensor:
        """Give the weights with which experts are served.

        Args:
            state: log weights before the next token, shape (M, J, K), or (M, J, K + 1) with the gates' choice.
            awake: who takes part, shape (M, K), bool.
            density: of the domains, shape (M, N).

        Returns:
            Log weights, shape (M, K), -inf where asleep.
        """
        if not bool(awake[:, 1:].any()):
            alone = torch.full(awake.shape, -torch.inf, dtype=state.dtype, device=state.device)
            alone[:, 0] = 0.0
            return alone
        if not self.chooses:
            return evidence.serve(state, awake, self.rule.floor)
        some = awake[:, 1:].any(-1, keepdim=True)
        log_weights = evidence.serve(state, torch.cat([awake, some], -1), self.rule.floor)
        return spread(log_weights, self._choice(awake, density))

    def moves(self, domain: int, features: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate one domain's experts.

        Args:
            domain: its number.
            features: what experts read at some contexts, shape (R, F).
            loc: base loc of U there, shape (R, C).
            log_scale: base log scale of U there, shape (R, C).

        Returns:
            loc and log scale of U under the domain at each of its S strengths, shape (S, R, C) each.
        """
        second = features.float() @ self.second[domain].float().T
        first = (
            torch.zeros_like(second)
            if self.location_only
            else features.float() @ self.first[domain].float().T
        )
        native = self.native[domain]
        pairs = [read_move(s * first, s * second, native, log_scale) for s in self.strengths[domain]]
        return (
            torch.stack([loc + log_scale.exp() * y for _, y in pairs]),
            torch.stack([log_scale + x for x, _ in pairs]),
        )

    def at(self, features: Tensor, loc: Tensor, log_scale: Tensor, awake: Tensor) -> Experts:
        """Evaluate the experts that are awake in some contexts.

        Args:
            features: shape (M, F).
            loc: base loc of U, shape (M, C).
            log_scale: base log scale of U, shape (M, C).
            awake: which domains take part, shape (M, N), bool.

        Returns:
            The experts; one whose law is not finite sleeps.
        """
        count, device = len(loc), loc.device
        entry = torch.full((count, self.experts), -1, dtype=torch.long, device=device)
        entry[:, 0] = torch.arange(count, device=device)
        rows, numbers = [entry[:, 0]], [torch.zeros_like(entry[:, 0])]
        locs, log_scales, total = [loc], [log_scale], count
        for domain in awake.any(0).nonzero().squeeze(-1).tolist():
            here = awake[:, domain].nonzero().squeeze(-1)
            moved = self.moves(domain, features[here], loc[here], log_scale[here])
            numbered = range(self.rows[domain].start, self.rows[domain].stop)
            for number, new_loc, new_log_scale in zip(numbered, *moved, strict=True):
                fine = (new_loc.isfinite() & new_log_scale.isfinite()).all(-1)
                at = here if bool(fine.all()) else here[fine]
                entry[at, number] = torch.arange(total, total + len(at), device=device)
                total += len(at)
                rows.append(at)
                numbers.append(torch.full_like(at, number))
                locs.append(new_loc[fine] if len(at) < len(here) else new_loc)
                log_scales.append(new_log_scale[fine] if len(at) < len(here) else new_log_scale)
        return Experts(
            row=torch.cat(rows),
            expert=torch.cat(numbers),
            loc=torch.cat(locs),
            log_scale=torch.cat(log_scales),
            entry=entry,
        )

    def read(self, reading: Reading, awake: Tensor, memory: Memory | None) -> Reading:
        """Complete what experts read, once it is known who is awake; deltas have it all from the backbone's one pass.

        Args:
            reading: of a call.
            awake: which domains take part, shape (B, T, N), bool.
            memory: of the positions before.

        Returns:
            The reading, with all features of those awake.
        """
        return reading

    def read_last(self, features: Tensor, awake: Tensor, memory: Memory) -> Tensor:
        """Complete what experts read at the last position that is remembered, of whose law nobody had asked.

        Args:
            features: what is remembered of it, shape (B, F).
            awake: which domains take part there, shape (B, N), bool.
            memory: with that position at its end.

        Returns:
            Shape (B, F).
        """
        return features

    def beside(self, reading: Reading, memory: Memory) -> dict[str, Tensor]:
        """Give what is remembered of a call beside what every mixture remembers.

        Args:
            reading: of the call.
            memory: of the positions before.

        Returns:
            Tensors of shape (B, T, ...) by name.
        """
        return {}

    @torch.no_grad()
    def serve(
        self,
        abduction: Any,
        action: Any,
        reading: Reading,
        memory: Memory | None = None,
        *,
        kept: int = 0,
    ) -> Iterator[Block]:
        """Go through a text and give the experts, their laws and weights at each position.

        This is the one place where evidence is taken: the model serves, and whatever measures it measures, these
        blocks. What lies before the wanted positions is left out as far as no evidence is taken there.

        Cost: for each position that is kept or scored one row in a product with the output head for the base and
        for each expert awake; T steps on K numbers for the weights.

        Args:
            abduction: of the model.
            action: of the model.
            reading: the text.
            memory: what is known of the positions before; these are appended to it when all blocks are read.
            kept: first position, counted from the first of this call, whose law is wanted.

        Yields:
            Blocks of the positions from `kept` on, in order.
        """
        batch, length = reading.mask.shape
        walk = Walk(self, abduction, action, reading, memory, kept)
        reading = walk.reading = self.read(reading, walk.domains, memory)
        size = max(1, BLOCK_BYTES // (4 * len(action.weight) * max(batch, 1)))
        for first, last in _pieces(walk.begin_at, max(kept, walk.begin_at), length, size):
            part = slice(first, last)
            features = reading.features[:, part].flatten(0, 1)
            loc, log_scale = abduction(features[:, : self.hidden_size].to(abduction.loc.weight.dtype))
            experts = self.at(features, loc, log_scale, walk.domains[:, part].flatten(0, 1))
            scores = experts.score(action)
            gain, scored = walk.listen(scores, first, last)
            if first >= kept:
                state, density = (each[:, part].flatten(0, 1) for each in (walk.states, walk.density))
                log_weights = self.weigh(state, scores.experts.awake, density)
                yield Block(
                    first=first,
                    size=last - first,
                    experts=scores.experts,
                    scores=scores,
                    log_weights=log_weights,
                    density=density,
                    gain=gain,
                    scored=scored,
                )
        if memory is not None:
            memory.append(**walk.remembered(), **self.beside(reading, memory))
            memory.written = reading.written


def _pieces(first: int, kept: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    # None has positions on both sides of the first one that is kept.
    for low, high in ((first, min(kept, length)), (max(first, kept), length)):
        for start in range(low, high, size):
            yield start, min(start + size, high)
