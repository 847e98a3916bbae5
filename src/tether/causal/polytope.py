"""What an observation says about U: half spaces for decisions, a hyperplane for a value, a first point."""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.causal.losses import IGNORE
from tether.errors import ConfigError

__all__ = ["Polytope", "Start", "feasible_start"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polytope:
    """The individuals that decide as observed, as half spaces in the standardised noise.

    ``U = loc + scale * t`` acts through the scores ``s = weight @ U + offset``. That class k is the argmax
    means ``s_k - s_j > 0`` for all other j; that a class fired, or did not, means ``s_j > 0`` or ``-s_j > 0``.
    Each is a half space in t with normal ``(W_k - W_j) * scale``, or ``+-W_j * scale``. These normals are
    (R, V, C) numbers and never formed: slacks are read off the scores, and one coordinate of the normals is
    one row of the transposed weight.

    Rows are positions. Chains are groups of rows that share one t: R chains of one row each, or one chain of
    all R rows. A point of N chains is t of shape (N, C), row r belonging to chain ``r * N // R``.

    Attributes:
        loc: locations of U, shape (R, C).
        scale: scales of U, shape (R, C), > 0.
        columns: transposed weight, shape (C, V), contiguous.
        offset: what is added to the scores, bias minus threshold, shape (V,) or (R, V), in logits.
        margin: smallest slack that counts, per unit of ``|U|``, in logits: the rounding of a product.
        tokens: the observed argmax of each row, shape (R,), `IGNORE` where none was; or None.
        fired: the classes that fired in each row, shape (R, V); or None.
    """

    loc: Float[Tensor, "rows latent"]
    scale: Float[Tensor, "rows latent"]
    columns: Float[Tensor, "latent vocab"]
    offset: Float[Tensor, "*rows vocab"]
    margin: float = 0.0
    tokens: Int[Tensor, " rows"] | None = None
    fired: Bool[Tensor, "rows vocab"] | None = None

    def latent(self, t: Float[Tensor, "chains latent"]) -> Float[Tensor, "rows latent"]:
        """Return the individual of each row: ``loc + scale * t``.

        Args:
            t: standardised noise of N chains, shape (N, C).

        Returns:
            U, shape (R, C).
        """
        return self.loc + self.scale * t.repeat_interleave(len(self.loc) // len(t), 0)

    def scores(self, latent: Float[Tensor, "rows latent"]) -> Float[Tensor, "rows vocab"]:
        """Compute all scores; cost R * V * C multiplications.

        Args:
            latent: U, shape (R, C).

        Returns:
            Scores less their thresholds, shape (R, V), in logits.
        """
        return latent @ self.columns + self.offset

    def worst(
        self, scores: Float[Tensor, "rows vocab"]
    ) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Find the smallest slack of each row.

        Args:
            scores: shape (R, V), in logits.

        Returns:
            Slack and the class it belongs to, shapes (R,); positive where the row decides as observed, and
            infinite where nothing was observed.
        """
        if self.fired is not None:
            low = torch.where(self.fired, scores, -scores).min(-1)
            return low.values, low.indices
        if self.tokens is None:
            return torch.full_like(self.loc[:, 0], torch.inf), self._own()
        own = self._own().unsqueeze(-1)
        rival = scores.scatter(-1, own, -torch.inf).max(-1)
        slack = scores.gather(-1, own).squeeze(-1) - rival.values
        return slack.masked_fill(self.tokens == IGNORE, torch.inf), rival.indices

    def observed(self, scores: Float[Tensor, "rows vocab"]) -> Bool[Tensor, " rows"]:
        """Tell which rows decide as observed, by the decision itself.

        Args:
            scores: shape (R, V), in logits, any floating dtype.

        Returns:
            Shape (R,); true where nothing was observed.
        """
        if self.fired is not None:
            return ((scores > 0) == self.fired).all(-1)
        if self.tokens is None:
            return torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        return (scores.argmax(-1) == self.tokens) | (self.tokens == IGNORE)

    def slack(
        self, scores: Float[Tensor, "rows vocab"], classes: Int[Tensor, "rows m"]
    ) -> Float[Tensor, "rows m"]:
        """Read the slacks of some classes off the scores.

        Args:
            scores: shape (R, V), in logits.
            classes: which constraints, shape (R, M).

        Returns:
            Slacks, shape (R, M), in logits; 0 for the observed token itself, whose normal is 0 as well.
        """
        chosen = scores.gather(-1, classes)
        if self.fired is not None:
            return torch.where(self.fired.gather(-1, classes), chosen, -chosen)
        return scores.gather(-1, self._own().unsqueeze(-1)) - chosen

    def slope(
        self, coordinate: int, classes: Int[Tensor, "rows m"], signs: Float[Tensor, "rows m"]
    ) -> Float[Tensor, "rows m"]:
        """Compute one coordinate of the normals: how the slacks of some classes move with t_c.

        Args:
            coordinate: c.
            classes: which constraints, shape (R, M).
            signs: what `signs` returns for these classes.

        Returns:
            Derivatives of the slacks with respect to t_c, shape (R, M).
        """
        column = self.columns[coordinate]
        normal = column.take(classes)
        if self.tokens is not None:
            normal = column.take(self._own()).unsqueeze(-1) - normal
        return normal.mul_(signs).mul_(self.scale[:, coordinate : coordinate + 1])

    def signs(self, classes: Int[Tensor, "rows m"]) -> Float[Tensor, "rows m"]:
        """Tell on which side the constraints hold.

        Args:
            classes: which constraints, shape (R, M).

        Returns:
            1, or -1 for a class that did not fire, or 0 where nothing was observed, shape (R, M).
        """
        if self.fired is not None:
            return torch.where(self.fired.gather(-1, classes), 1.0, -1.0).to(self.loc.dtype)
        seen = (
            torch.zeros_like(self.loc[:, 0]) if self.tokens is None else (self.tokens != IGNORE).to(self.loc)
        )
        return seen.unsqueeze(-1).expand(classes.shape)

    def tightest(self, scores: Float[Tensor, "rows vocab"], count: int) -> Int[Tensor, "rows m"]:
        """List the constraints most likely to be broken by a draw of t around the given scores.

        The slack of class j is a Cauchy variable of scale ``|a_j| @ 1``, here bounded by the sum of the two
        score scales; the probability that it is negative falls with slack / scale.

        Args:
            scores: at a feasible point, shape (R, V), in logits.
            count: M, at most V.

        Returns:
            Classes, shape (R, M).
        """
        slack = self.slack(scores, torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape))
        spread = self.scale @ self.columns.abs()
        if self.tokens is not None:
            spread += spread.gather(-1, self._own().unsqueeze(-1))
        return (slack / spread).topk(count, largest=False, sorted=False).indices

    def normals(self, classes: Int[Tensor, " rows"]) -> Float[Tensor, "rows latent"]:
        """Compute the full normal of one constraint per row.

        Args:
            classes: which constraint, shape (R,).

        Returns:
            Normals in t, shape (R, C).
        """
        normal = self.columns[:, classes].T
        if self.tokens is not None:
            normal = self.columns[:, self._own()].T - normal
        return normal * self.signs(classes.unsqueeze(-1)) * self.scale

    def rows(self, index: Int[Tensor, " some"]) -> "Polytope":
        """Keep some rows.

        Args:
            index: which rows, shape (P,).

        Returns:
            The polytope of these rows; the weight is shared.
        """
        return dataclasses.replace(
            self,
            loc=self.loc[index],
            scale=self.scale[index],
            offset=self.offset if self.offset.ndim == 1 else self.offset[index],
            tokens=None if self.tokens is None else self.tokens[index],
            fired=None if self.fired is None else self.fired[index],
        )

    def _own(self) -> Tensor:
        """Return the observed tokens, with a harmless class where none was observed."""
        return (
            torch.zeros(len(self.loc), dtype=torch.long) if self.tokens is None else self.tokens.clamp(min=0)
        )


@dataclasses.dataclass(frozen=True)
class Start:
    """A first point.

    Attributes:
        t: standardised noise, shape (N, C).
        iterations: projections each chain took, shape (N,).
        failed: row whose constraint was still broken, shape (N,); -1 where the point is feasible.
    """

    t: Float[Tensor, "chains latent"]
    iterations: Int[Tensor, " chains"]
    failed: Int[Tensor, " chains"]


def feasible_start(
    polytope: Polytope,
    t: Float[Tensor, "chains latent"],
    *,
    basis: Float[Tensor, "chains m latent"],
    limit: int,
) -> Start:
    """Find a point of each chain where all its rows decide as observed, near the given one.

    Projections onto the constraint most broken, aiming at a depth inside it that is halved every 20 steps,
    until all hold; each step costs one product with the weight for the chains not done. It converges when
    the set has an inside. In units of the standardised noise, steps are short and the point stays near t,
    where the density is high.

    Args:
        polytope: the constraints, R rows.
        t: where to begin, shape (N, C); on the observed values' hyperplanes, if there are any.
        basis: orthonormal directions that must not change, spanning the normals of these hyperplanes,
            shape (N, m, C); m may be 0.
        limit: largest number of projections.

    Returns:
        The points, with the row that failed where none was found.

    Raises:
        ConfigError: ``limit`` is below 0.

    Reference:
        Agmon 1954, The relaxation method for linear inequalities; Motzkin and Schoenberg 1954.
    """
    if limit < 0:
        raise ConfigError(f"start_limit={limit}: expected a number of projections, at least 0")
    chains, each = len(t), len(polytope.loc) // len(t)
    t = t.clone()
    iterations = torch.full((chains,), limit, dtype=torch.long, device=t.device)
    failed = torch.full((chains,), -1, dtype=torch.long, device=t.device)
    active = torch.arange(chains, device=t.device)
    for step in range(limit + 1):
        index = (active.unsqueeze(-1) * each + torch.arange(each, device=t.device)).reshape(-1)
        part = polytope.rows(index)
        latent = part.latent(t[active])
        slack, classes = part.worst(part.scores(latent))
        floor = part.margin * latent.norm(dim=-1)
        normal = part.normals(classes).view(-1, each, t.shape[-1])
        whole = normal.norm(dim=-1)
        fixed = basis[active]
        normal = normal - (normal @ fixed.mT) @ fixed
        length = normal.norm(dim=-1)
        held = slack.view(-1, each) > 2 * floor.view(-1, each)
        stuck = length <= 1e-12 * whole  # no move along the hyperplanes changes this slack
        # The depth aimed at: a fraction of the unit of the noise, and clear of the rounding of the scores.
        depth = torch.maximum(0.1 * 0.5 ** (step / 20) * length, 4 * floor.view(-1, each))
        needed = (depth - slack.view(-1, each)) / length.masked_fill(stuck, 1.0)
        needed = needed.masked_fill(stuck & held, -torch.inf).masked_fill(stuck & ~held, torch.inf)
        row = needed.argmax(-1, keepdim=True)
        done = held.all(-1)
        iterations[active[done]] = step
        failed[active] = torch.where(done, -1, active * each + row.squeeze(-1))
        more = ~(done | (stuck & ~held).any(-1))
        if step == limit or not bool(more.any()):
            break
        pull = (
            (needed / length).gather(-1, row)
            * normal.gather(1, row.unsqueeze(-1).expand(-1, 1, t.shape[-1])).squeeze(1)
        )[more]
        active = active[more]
        t[active] += pull
    return Start(t, iterations, failed)
