"""Who speaks, abducted together with the noise: chains that also move between the experts of a fusion by evidence.

The number e that decides who speaks is uniform in (0, 1) and independent of the noise. Cumulative weights cut that
interval into cells in which the same experts speak, so the state of a chain is a cell and the standardised noise t,
and its law is the cell's length times the Cauchy density of t where the cell's experts act as observed, else 0.
A sweep moves t within the cell, as `tether.causal.gibbs` describes. Then two jumps move the cell:

- with t kept: cells are drawn in proportion to their lengths among those whose experts act as observed with t;
- with U kept, at one row drawn at random: t becomes ``(U - loc) / scale`` of the new expert, which acts as observed
  there by construction, and cells are drawn in proportion to length times density of U, elsewhere checked.

Both are draws from the exact conditional law given what is kept. The second reaches every expert where each position
has its own noise, whose first jump might not: two experts may explain a token by noises that do not meet.

A value that was observed asks ``normals @ t = targets`` with other numbers in each cell. Then m coordinates, drawn
beforehand, are solved for and not kept. Given the others, the law of the cell has the additional factor
``1 / |det normals[:, solved]|``, and ``1 / scale`` for each coordinate that is kept as U: the change of variables
from what is kept to t.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from tether.causal.gibbs import Chain, settle
from tether.causal.observation import Observation
from tether.causal.polytope import Polytope
from tether.causal.speakers import Speakers
from tether.causal.start import first_point, nobody
from tether.errors import ConfigError

__all__ = ["SpeakingChain"]

NEGLIGIBLE = 40.0
"""Cells so many nats less likely than the present one are not looked at."""
FEW = 8
"""Cells looked at in one jump, on average, where several rows share a noise and each cell has a point of its own."""
FIRST_TRIES = 50
"""Projections with which all cells are tried for a start before any is given all that are allowed."""
BLOCK_BYTES = 64_000_000
"""Size of the scores, in float64, that are held at once."""


class SpeakingChain:
    """N chains side by side whose state is who speaks, and the noise.

    Args:
        speakers: who may speak in R rows.
        given: what was observed, at all positions.
        polytope: of these rows, under any laws.
        rows: which positions these are, shape (R,).
        candidates: see `Chain`.
        limit: projections allowed to find the first point.
        generator: source of randomness.

    Attributes:
        chain: the noise, under the laws of those who speak.
        cell: of each chain, shape (N,).
        speaker: the number that decides who speaks, shape (N,), float64.
        iterations: projections it took to find the first point, shape (N,).

    Raises:
        ConfigError: no individual was found, whoever speaks.
    """

    def __init__(
        self,
        speakers: Speakers,
        given: Observation,
        polytope: Polytope,
        rows: Tensor,
        *,
        candidates: int,
        limit: int,
        generator: torch.Generator,
    ) -> None:
        self.speakers, self._given, self._whole, self._rows = speakers, given, polytope, rows
        self._generator = generator
        chains, cells = speakers.low.shape
        self._chains = torch.arange(chains, device=speakers.loc.device)
        # Rows with a value, counted within a chain: the same in each of them.
        self._valued = given.seen()[rows].view(chains, -1)[0].nonzero().squeeze(-1)
        self._normals, self._targets = self._hyperplanes(cells)
        noise, self.iterations = self._start(limit)
        law, replays = self._law(self.cell)
        self.chain = Chain(
            law,
            noise,
            normals=self._normals[self._chains, self.cell],
            targets=self._targets[self._chains, self.cell],
            candidates=candidates,
            replays=replays,
            generator=generator,
        )
        self._decide()

    @property
    def noise(self) -> Tensor:
        """Uniform noise, shape (N, C), float64."""
        return self.chain.noise

    @property
    def expert(self) -> Tensor:
        """Who speaks in each row, shape (R,)."""
        return self.speakers.spoken(self.cell)

    def freeze(self) -> None:
        """End the burn-in."""
        self.chain.freeze()

    def acceptance(self) -> tuple[Tensor, Tensor]:
        """Return `Chain.acceptance`."""
        return self.chain.acceptance()

    def sweep(self) -> None:
        """Visit all coordinates of the noise once, then let others speak: with the noise kept, and with U kept."""
        self.chain.sweep()
        if self.speakers.low.shape[1] > 1:
            self._jump(None)
            self._jump(int(torch.randint(self.speakers.each, (), generator=self._generator)))
        self._decide()

    # What the values ask of t in each cell: (N, L, m, C) and (N, L, m).
    def _hyperplanes(self, cells: int) -> tuple[Tensor, Tensor]:
        speakers, given, count = self.speakers, self._given, len(self._valued)
        size = (len(self._chains), cells, count)
        if not count or given.values is None or given.value_weight is None:
            empty = torch.zeros(
                *size, speakers.loc.shape[-1], dtype=torch.float64, device=speakers.loc.device
            )
            return empty, empty[..., 0]
        row = self._chains.unsqueeze(-1) * speakers.each + self._valued
        who = speakers.expert[row].transpose(1, 2)
        loc, scale = (law[row.unsqueeze(1), who].double() for law in (speakers.loc, speakers.scale))
        flat = given.value_weight.detach().double().reshape(-1)
        values = given.values[self._rows[row]].double().unsqueeze(1)
        return scale * flat, values - given.value_bias - loc @ flat

    def _law(self, cell: Tensor) -> tuple[Polytope, Callable[[Tensor], Tensor]]:
        who = self.speakers.spoken(cell)
        row = torch.arange(len(who), device=who.device)
        loc, scale = self.speakers.loc[row, who], self.speakers.scale[row, who]
        polytope = dataclasses.replace(self._whole, loc=loc.double(), scale=scale.double())
        # Only these positions are looked at.
        everywhere = [law.detach().clone() for law in (self._given.loc, self._given.scale)]
        everywhere[0][self._rows], everywhere[1][self._rows] = loc, scale
        given = dataclasses.replace(self._given, loc=everywhere[0], scale=everywhere[1])
        return polytope, given.replay(polytope, self._rows)

    def _start(self, limit: int) -> tuple[Tensor, Tensor]:
        order = self.speakers.order(self._given, self._rows)
        last = (self.speakers.log_share > -torch.inf).sum(-1) - 1
        rank = torch.zeros_like(self._chains)
        for allowed in dict.fromkeys((min(FIRST_TRIES, limit), limit)):
            rank.zero_()
            while True:
                self.cell = order[self._chains, rank]
                polytope, replays = self._law(self.cell)
                at = self._chains, self.cell
                noise, iterations, failed = first_point(
                    polytope, self._normals[at], self._targets[at], replays=replays, limit=allowed
                )
                lost = failed >= 0
                if not bool(lost.any()):
                    return noise, iterations
                if bool((lost & (rank >= last)).any()):
                    break
                rank = rank + lost.long()
        raise ConfigError(nobody(failed[lost].tolist(), polytope, self._rows.tolist(), limit))

    # Draw who speaks, given the noise (row None) or the U of one row of each chain.
    def _jump(self, row: int | None) -> None:
        points, log_density = self._carried(row)
        likely = log_density + self.speakers.log_share
        likely = likely - likely[self._chains, self.cell].unsqueeze(-1)
        worth = likely > -NEGLIGIBLE
        if self.speakers.each > 1 and (row is not None or len(self._valued)):
            worth &= self._some(worth.shape)
        worth[self._chains, self.cell] = False  # it holds where it is
        if bool(worth.any()) and (row is None or self.speakers.each > 1):
            worth = self._holds(points, worth, row)
        worth[self._chains, self.cell] = True
        likely[self._chains, self.cell] = 0.0
        share = likely.masked_fill(~worth, -torch.inf).softmax(-1).to(self._generator.device)
        chosen = torch.multinomial(share, 1, generator=self._generator).squeeze(-1).to(self.cell.device)
        if not bool((chosen == self.cell).all()):
            self._move(chosen, points[self._chains, chosen])

    # The point that each cell would have, (N, L, C), and the log density of what is kept, (N, L).
    def _carried(self, row: int | None) -> tuple[Tensor, Tensor]:
        own, speakers = (self._chains, self.cell), self.speakers
        points = self.chain.t.unsqueeze(1).repeat(1, speakers.low.shape[1], 1)
        stretch = torch.zeros_like(points)
        if row is not None:
            at = self._chains * speakers.each + row
            who = speakers.expert[at]
            loc, scale = (law[at.unsqueeze(-1), who].double() for law in (speakers.loc, speakers.scale))
            cause = loc[own] + scale[own] * self.chain.t
            points = (cause.unsqueeze(1) - loc) / scale
            stretch = scale.log()
        volume = 0.0
        if count := len(self._valued):
            solved = self._solved(count).unsqueeze(1).expand(-1, points.shape[1], -1)
            square = self._normals.gather(-1, solved.unsqueeze(2).expand(-1, -1, count, -1))
            missing = self._targets - (self._normals @ points.unsqueeze(-1)).squeeze(-1)
            step = torch.linalg.solve_ex(square, missing.unsqueeze(-1))[0].squeeze(-1)
            points = points.scatter_add(-1, solved, step)
            stretch = stretch.scatter(-1, solved, 0.0)
            volume = torch.linalg.slogdet(square).logabsdet
        points[own] = self.chain.t
        density = -points.square().log1p().sum(-1) - stretch.sum(-1) - volume
        return points, torch.where(points.isfinite().all(-1), density, -torch.inf)

    # Coordinates that are solved for: likelier where a value depends on them, whatever the state of the chain is.
    def _solved(self, count: int) -> Tensor:
        share = self._normals.abs().mean((1, 2)).clamp(min=1e-300).to(self._generator.device)
        return torch.multinomial(share, count, generator=self._generator).to(self.cell.device)

    # Cells that are looked at where each has a point of its own: picked in a way that favours none.
    def _some(self, shape: torch.Size) -> Tensor:
        draw = torch.rand(shape, generator=self._generator, device=self._generator.device)
        return draw.to(self.cell.device) < FEW / shape[-1]

    # In which cells all rows act as observed; what several cells have in common is scored once.
    def _holds(self, points: Tensor, worth: Tensor, row: int | None) -> Tensor:
        chains, cells = worth.shape
        each, who = self.speakers.each, self.speakers.expert.view(chains, -1, cells)
        kept = self._valued if row is None else torch.cat([self._valued, self._valued.new_tensor([row])])
        number = torch.arange(chains * each, device=who.device).view(chains, each, 1).expand(who.shape)
        told = [each_row.unsqueeze(1).expand(who.shape) for each_row in who[:, kept].unbind(1)]
        asked = worth.unsqueeze(1).expand(who.shape)
        table = torch.stack([number, who, *told], dim=-1)[asked]
        distinct, inverse = table.unique(dim=0, return_inverse=True)
        some = torch.zeros(len(distinct), dtype=torch.long, device=who.device)
        some = some.scatter(0, inverse, torch.arange(len(inverse), device=who.device))
        chain, _, cell = asked.nonzero()[some].unbind(-1)
        fine = torch.zeros(len(distinct), dtype=torch.bool, device=who.device)
        block = max(1, BLOCK_BYTES // (8 * self._whole.columns.shape[1]))
        for part in torch.arange(len(distinct), device=who.device).split(block):
            at, expert = distinct[part, 0], distinct[part, 1]
            loc, scale = (law[at, expert].double() for law in (self.speakers.loc, self.speakers.scale))
            polytope = dataclasses.replace(self._whole.rows(at), loc=loc, scale=scale)
            latent = polytope.latent(points[chain[part], cell[part]])
            slack = polytope.worst(polytope.scores(latent))[0]
            fine[part] = slack > polytope.margin * latent.norm(dim=-1)
        found = torch.ones(who.shape, dtype=torch.bool, device=who.device)
        found[asked] = fine[inverse]
        return found.all(1) & worth

    # Go over to other cells, where the model itself would still repeat the observation.
    def _move(self, chosen: Tensor, points: Tensor) -> None:
        at = self._chains, chosen
        noise, t = settle(points, self._normals[at], self._targets[at])
        same = (points == self.chain.t).all(-1, keepdim=True)
        noise, t = torch.where(same, self.noise, noise), torch.where(same, points, t)
        polytope, replays = self._law(chosen)
        latent = polytope.latent(t)
        clear = polytope.worst(polytope.scores(latent))[0] > polytope.margin * latent.norm(dim=-1)
        fine = (clear & replays(noise)).view(len(chosen), -1).all(-1)
        self.cell = torch.where(fine, chosen, self.cell)
        noise = torch.where(fine.unsqueeze(-1), noise, self.noise)
        polytope, replays = self._law(self.cell)
        at = self._chains, self.cell
        self.chain.adopt(polytope, noise, self._normals[at], self._targets[at], replays)

    def _decide(self) -> None:
        draw = torch.rand(
            len(self.cell), dtype=torch.float64, generator=self._generator, device=self._generator.device
        )
        self.speaker = self.speakers.inside(self.cell, draw.to(self.cell.device))
