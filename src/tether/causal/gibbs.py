"""The chain: coordinates of the noise redrawn one by one inside the polytope of what was observed.

One sweep visits the coordinates in a random order, the same for all chains. Given the others, coordinate c
of the standardised noise is a standard Cauchy variable between the bounds that the half spaces set, and is
drawn from exactly that law. Only M half spaces per row, the candidates, take part in these draws. After
each block of coordinates all V are looked at, and the block is undone where one is broken.

Why this is exact. Gibbs steps in a random order are reversible for the law pi_M on the candidates' polytope:
undoing a path takes the same steps in the opposite order, which is as likely. So a block is a proposal q
with ``pi_M(x) q(x, y) = pi_M(y) q(y, x)``, the wanted law is pi_M restricted to fewer points, and the
Metropolis-Hastings ratio is 1 inside these and 0 outside. The candidates must not depend on the chain: they
learn from broken constraints during the burn-in and are frozen then. With M >= V no block is undone.
The same argument lets a whole sweep be undone where the model itself, in its own precision, would not
repeat the observation: the chain's law is the posterior of the model as it is computed.

Moves along random directions of two to four coordinates were measured as well: at equal cost they mix worse.

Observed values are m hyperplanes ``normals @ t = targets``. Then groups of m + 1 coordinates move along the one
direction that keeps them all. On it the law is a product of m + 1 Cauchy factors on an interval; a draw from the
mixture of the truncated factors, an independence proposal, is accepted with the ratio of both densities.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tether.cauchy.functional import cdf, icdf
from tether.cauchy.truncated import interval_mass, sample_truncated
from tether.causal.polytope import Polytope

__all__ = ["Chain", "settle"]

_BLOCK = 64
"""Coordinates moved between two looks at all constraints."""


class Chain:
    """N chains side by side, and their counters.

    Args:
        polytope: the decisions observed, R rows.
        noise: first point of each chain, uniform noise of shape (N, C), feasible.
        normals: normals of the observed values in t, shape (N, m, C); m may be 0.
        targets: what ``normals @ t`` must be, shape (N, m).
        candidates: M, half spaces of each row that the steps know of.
        replays: tells which rows act as observed, from noise (N, C) to (R,), in the model's precision.
        generator: source of randomness.
    """

    def __init__(
        self,
        polytope: Polytope,
        noise: Float[Tensor, "chains latent"],
        *,
        normals: Float[Tensor, "chains m latent"],
        targets: Float[Tensor, "chains m"],
        candidates: int,
        replays: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> None:
        self.noise = noise
        self.accepted = torch.zeros_like(noise[:, 0])
        self.proposed = 0
        self.value_accepted = torch.zeros_like(noise[:, 0])
        self.value_proposed = 0
        self._polytope = polytope
        self._normals, self._targets = normals, targets
        self._replays = replays
        self._generator = generator
        self._t = _standard(noise)
        self._scores = polytope.scores(polytope.latent(self._t))
        vocab = self._scores.shape[-1]
        self._frozen = vocab <= candidates
        if self._frozen:
            self._classes = torch.arange(vocab, device=noise.device).expand(self._scores.shape)
        else:
            self._classes = polytope.tightest(self._scores, candidates)
        self._signs = polytope.signs(self._classes)
        # What is learnt goes round in the less tight half of the candidates.
        self._slot = torch.full_like(self._classes[:, 0], self._classes.shape[1] // 2)

    def freeze(self) -> None:
        """Stop learning candidates and start counting: the end of the burn-in."""
        self._frozen = True
        self.proposed = self.value_proposed = 0
        self.accepted.zero_()
        self.value_accepted.zero_()

    @property
    def t(self) -> Float[Tensor, "chains latent"]:
        """Standardised noise, shape (N, C)."""
        return self._t

    def adopt(
        self,
        polytope: Polytope,
        noise: Float[Tensor, "chains latent"],
        normals: Float[Tensor, "chains m latent"],
        targets: Float[Tensor, "chains m"],
        replays: Callable[[Tensor], Tensor],
    ) -> None:
        """Go on under other laws of U, from another point; the candidates stay, so that they depend on no state.

        Args:
            polytope: the same decisions under other laws.
            noise: a feasible point there, shape (N, C).
            normals: of the observed values there.
            targets: what ``normals @ t`` must be there.
            replays: as of the chain, there.
        """
        self.noise, self._t = noise, _standard(noise)
        self._polytope, self._replays = polytope, replays
        self._normals, self._targets = normals, targets
        self._scores = polytope.scores(polytope.latent(self._t))

    def sweep(self) -> None:
        """Visit all coordinates once and look at the result as the model would."""
        coordinates = self._t.shape[-1]
        size = self._normals.shape[1] + 1
        order = torch.randperm(coordinates, generator=self._generator, device=self._generator.device)
        groups = order[: coordinates // size * size].to(self._t.device).view(-1, size)
        t, scores = self._t.clone(), self._scores
        for block in groups.split(max(1, _BLOCK // size)):
            t, scores = self._block(t, scores, block)
        noise, t = settle(t, self._normals, self._targets)
        latent = self._polytope.latent(t)
        scores = self._polytope.scores(latent)
        clear = self._polytope.worst(scores)[0] > self._polytope.margin * latent.norm(dim=-1)
        keep = self._all_rows(clear & self._replays(noise))
        if not bool(keep.all()):
            noise = torch.where(keep.unsqueeze(-1), noise, self.noise)
            t = torch.where(keep.unsqueeze(-1), t, self._t)
            undone = (~self._each_row(keep)).nonzero().squeeze(-1)
            part = self._polytope.rows(undone)
            scores[undone] = part.scores(self._polytope.latent(t)[undone])
        self.noise, self._t, self._scores = noise, t, scores

    def acceptance(self) -> tuple[Float[Tensor, " chains"], Float[Tensor, " chains"]]:
        """Return what share of the steps since `freeze` was kept.

        Returns:
            Shares of the blocks kept, and of the proposals along the values accepted, shapes (N,); nan where
            there was none.
        """
        return self.accepted / self.proposed, self.value_accepted / (self.value_proposed or torch.nan)

    def _block(self, before: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chains and scores after moving some groups of coordinates, where nothing broke."""
        chains = len(before)
        t = before.clone()
        slack = self._polytope.slack(scores, self._classes).view(chains, -1)
        directions = _kept_directions(self._normals, groups)
        for group, direction in zip(groups.tolist(), directions.unbind(1), strict=True):
            self._move(t, slack, group, direction)
        moved = groups.reshape(-1)
        change = (t - before)[:, moved].repeat_interleave(len(scores) // chains, 0)
        after = torch.addmm(scores, change * self._polytope.scale[:, moved], self._polytope.columns[moved])
        lowest, classes = self._polytope.worst(after)
        holds = lowest > 0
        keep = self._all_rows(holds)
        self.accepted += keep
        self.proposed += 1
        if bool(keep.all()):
            return t, after
        undone = (~self._each_row(keep)).nonzero().squeeze(-1)
        after[undone] = scores[undone]
        if not self._frozen:
            self._learn((~holds).nonzero().squeeze(-1), classes)
        return torch.where(keep.unsqueeze(-1), t, before), after

    def _move(self, t: Tensor, slack: Tensor, group: list[int], direction: Tensor) -> None:
        """Redraw t along one direction of a group of coordinates, and the slacks with it, in place."""
        slopes = [self._polytope.slope(c, self._classes, self._signs).view(slack.shape) for c in group]
        slope = slopes[0]
        if len(group) > 1:
            slope = (torch.stack(slopes, -1) @ direction.unsqueeze(-1)).squeeze(-1)
        reach = slack.div(slope).neg_()
        lower = torch.where(slope > 0, reach, -torch.inf).amax(-1).clamp(max=0)
        upper = torch.where(slope < 0, reach, torch.inf).amin(-1).clamp(min=0)
        here = t[:, group]
        if len(group) == 1:
            point = here.squeeze(-1)
            step = sample_truncated(self._uniform(len(t)), point + lower, point + upper) - point
        else:
            step = self._along(here, direction, lower, upper)
        t[:, group] = here + step.unsqueeze(-1) * direction
        slack += slope.mul_(step.unsqueeze(-1))

    def _along(self, here: Tensor, direction: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Return an independence step for a product of Cauchy factors on an interval, or none (0)."""
        usable = direction.abs() > 1e-8
        first = here + torch.where(usable, direction * lower.unsqueeze(-1), 0.0)
        last = here + torch.where(usable, direction * upper.unsqueeze(-1), 0.0)
        left, right = torch.minimum(first, last), torch.maximum(first, last)
        share = torch.where(
            usable, direction.abs() / interval_mass(left, right), 0.0
        )  # of each proposal's density
        pick = torch.multinomial(usable.double(), 1, generator=self._generator)
        drawn = sample_truncated(
            self._uniform(len(here)).unsqueeze(-1), left.gather(-1, pick), right.gather(-1, pick)
        )
        step = ((drawn - here.gather(-1, pick)) / direction.gather(-1, pick)).squeeze(-1).clamp(lower, upper)

        def log_weight(point: Tensor) -> Tensor:
            tail = torch.log1p(point.square())
            return -tail.sum(-1) - torch.logsumexp(share.log() - tail, -1)

        ratio = log_weight(here + step.unsqueeze(-1) * direction) - log_weight(here)
        accept = self._uniform(len(here)).log() < ratio
        self.value_accepted += accept
        self.value_proposed += 1
        return torch.where(accept, step, 0.0)

    def _learn(self, rows: Tensor, classes: Tensor) -> None:
        """Put broken constraints among the candidates of their rows."""
        self._classes[rows, self._slot[rows]] = classes[rows]
        half = self._classes.shape[1] // 2
        self._slot[rows] = half + (self._slot[rows] + 1 - half) % (self._classes.shape[1] - half)
        self._signs = self._polytope.signs(self._classes)

    def _all_rows(self, rows: Bool[Tensor, " rows"]) -> Bool[Tensor, " chains"]:
        """Return for which chains something holds in all rows."""
        return rows.view(len(self.noise), -1).all(-1)

    def _each_row(self, chains: Bool[Tensor, " chains"]) -> Bool[Tensor, " rows"]:
        """Return for each row what is known of its chain."""
        return chains.repeat_interleave(len(self._scores) // len(chains))

    def _uniform(self, count: int) -> Tensor:
        """Return uniform noise inside the open interval (0, 1)."""
        draw = torch.rand(
            count, dtype=torch.float64, generator=self._generator, device=self._generator.device
        )
        return draw.clamp(min=2.0**-54).to(self._t.device)


def settle(
    t: Float[Tensor, "chains latent"],
    normals: Float[Tensor, "chains m latent"],
    targets: Float[Tensor, "chains m"],
) -> tuple[Float[Tensor, "chains latent"], Float[Tensor, "chains latent"]]:
    """Move a point by rounding only, so that its noise is exact and the observed values hold.

    Near 1 noise has few digits left for a large t; the coordinates with many digits make up for it.

    Args:
        t: standardised noise, shape (N, C).
        normals: normals of the observed values, shape (N, m, C).
        targets: what ``normals @ t`` must be, shape (N, m).

    Returns:
        The noise and the t that belongs to it, shapes (N, C).
    """
    noise = _noise(t)
    t = _standard(noise)
    for _ in range(2 if normals.shape[1] else 0):
        digits = 1 / (1 + t.square())
        stretched = normals * digits.unsqueeze(1)
        missing = targets - (normals @ t.unsqueeze(-1)).squeeze(-1)
        part = torch.linalg.pinv(stretched) @ missing.unsqueeze(-1)
        noise = _noise(t + part.squeeze(-1) * digits)
        t = _standard(noise)
    return noise, t


def _kept_directions(normals: Tensor, groups: Tensor) -> Tensor:
    """Return for each group (G, m + 1) of coordinates the direction that keeps the values: (N, G, m + 1)."""
    chains, count = normals.shape[:2]
    if count == 0:
        return torch.ones(chains, len(groups), 1, dtype=normals.dtype, device=normals.device)
    part = normals[:, :, groups].transpose(1, 2)  # (N, G, m, m + 1)
    if count > 1:
        direction: Tensor = torch.linalg.svd(part, full_matrices=True).Vh[..., -1, :]
    else:
        direction = torch.stack([part[..., 0, 1], -part[..., 0, 0]], -1)
        free = torch.tensor([1.0, 0.0], dtype=normals.dtype, device=normals.device)
        direction = torch.where((direction == 0).all(-1, keepdim=True), free, direction)
    return direction / direction.abs().amax(-1, keepdim=True)


def _noise(t: Tensor) -> Tensor:
    """Return the noise in the open interval (0, 1) of standard Cauchy draws."""
    return cdf(t, torch.zeros_like(t), torch.ones_like(t)).clamp(torch.finfo(t.dtype).tiny, 1 - 2.0**-53)


def _standard(noise: Tensor) -> Tensor:
    """Return the standard Cauchy draws of noise."""
    return icdf(noise, torch.zeros_like(noise), torch.ones_like(noise))
