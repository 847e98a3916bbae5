"""The leash in metric `softmax`: how far scores may move from the base's, by what is served."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tether.causal.leash import largest_factor
from tether.causal.softmax import softmax_kl

__all__ = ["leash_scores", "location_path", "pull_scores"]

CHUNK = 64
"""Contexts whose scores of all classes are held at once."""
PRECISE = 16
"""The same in float64."""
FEW = 8
"""Rows up to which a product with the output head is done with columns on the right."""


def leash_scores(
    head: tuple[Float[Tensor, "vocab latent"], Float[Tensor, " vocab"] | None],
    loc: Float[Tensor, "*batch latent"],
    moved_loc: Float[Tensor, "*batch latent"],
    nats: float,
    *,
    keep: bool,
    base_scores: Float[Tensor, "*batch vocab"] | None = None,
) -> tuple[Float[Tensor, "*batch"], Tensor | None]:
    """Find how far along the line from base to moved loc each context may go, in metric `softmax`.

    Cost: contexts that did not move cost nothing; the others take a second row in the product with the output
    head, which is read once for both, and a reduction over the classes.

    Args:
        head: weight of the output head, shape (V, C), and its bias, shape (V,), or None.
        loc: base loc of U, shape (..., C).
        moved_loc: moved loc of U, shape (..., C).
        nats: the limit, > 0.
        keep: whether the scores that are served are wanted.
        base_scores: scores of the base where they are at hand, shape (..., V): they save the second row.

    Returns:
        Factors in [0, 1], shape (...), and the scores that hold to the limit, shape (..., V), or None.
    """
    shape = loc.shape[:-1]
    base, moved = loc.reshape(-1, loc.shape[-1]), moved_loc.reshape(-1, loc.shape[-1])
    changed = (moved != base).any(-1)
    factor = torch.ones(len(base), dtype=torch.float32, device=loc.device)
    if not bool(changed.any()):
        return factor.reshape(shape), _scores(head, moved_loc) if keep else None
    known = None if base_scores is None else base_scores.reshape(len(base), -1)
    kept = []
    for rows in torch.arange(len(base), device=loc.device).split(CHUNK):
        own = rows[changed[rows]]
        first = rows if keep else own
        if known is None:
            scores = _scores(head, torch.cat([moved[first], base[own]]))
            served, reference = scores[: len(first)], scores[len(first) :]
        else:
            served, reference = _scores(head, moved[first]), known[own]
        place = changed[first]
        factor[own], pulled = pull_scores(reference, served[place], nats)
        if keep:
            served[place] = pulled
            kept.append(served)
    return factor.reshape(shape), torch.cat(kept).reshape(*shape, -1) if keep else None


def _scores(head: tuple[Tensor, Tensor | None], loc: Tensor) -> Tensor:
    """Return the scores of loc of U; for the two rows of one context at hardly more than the cost of one."""
    weight, bias = head
    rows = loc.to(weight.dtype)
    if rows.dim() != 2 or not 1 < len(rows) <= FEW:
        return torch.nn.functional.linear(rows, weight, bias)
    # With columns on the right the weight is read once; with rows on the left, once for each (docs/leash.md).
    scores = (weight @ rows.T).T.contiguous()
    return scores if bias is None else scores + bias


def location_path(
    x: Float[Tensor, "*batch latent"], y: Float[Tensor, "*batch latent"], factor: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch latent"], Float[Tensor, "*batch latent"]]:
    """Walk back along the path of metric `softmax`: y_t = t y, x_t = t x, or x + 2 log t if larger.

    The scores move on a line. A law that has become wider, x > 0, is narrowed no faster than keeps y e^{-x/2}
    from growing, so that the latent drift falls with t as well, which it does not on the ray (t x, t y).

    Args:
        x: change of log scale, shape (..., C).
        y: change of loc in units of the base scale, shape (..., C).
        factor: t, shape (...), in [0, 1].

    Returns:
        x_t and y_t, shape (..., C) each; exactly 0 where t = 0, whatever x and y are.
    """
    t = factor.unsqueeze(-1)
    near_x = torch.where(x > 0, torch.maximum(t * x, x + 2 * t.log()), t * x)
    away = t > 0
    return torch.where(away, near_x, 0), torch.where(away, t * y, 0)


def pull_scores(
    base: Float[Tensor, "contexts vocab"], moved: Float[Tensor, "contexts vocab"], nats: float
) -> tuple[Float[Tensor, " contexts"], Float[Tensor, "contexts vocab"]]:
    """Pull scores back to base + t (moved - base), with KL(softmax(base) || softmax(served)) at most a limit.

    With s the shift centred under the base, KL = log E[e^{t s}], convex in t. Most contexts are passed by the
    range of s alone, KL <= range^2 / 8 (Hoeffding's lemma), most others by the KL in float32; those left are
    solved in float64 and checked as they are served, in the dtype of the scores.

    Args:
        base: scores of the base, shape (n, V).
        moved: scores of the fused model, shape (n, V), same dtype.
        nats: the limit, > 0.

    Returns:
        Factors in [0, 1], shape (n,), float32, and the scores to serve, shape (n, V). Where t = 1 they are
        `moved`, and where t = 0, as for scores that are not finite, `base`, bit for bit.

    Reference:
        Hoeffding 1963, Probability inequalities for sums of bounded random variables, equation 4.16.
    """
    factor = torch.ones(len(base), dtype=torch.float32, device=base.device)
    shift = moved.float() - base.float()
    extent = shift.amax(-1) - shift.amin(-1)
    suspect = (~(extent.square() / 8 <= nats)).nonzero().squeeze(-1)  # nan counts as suspect
    if len(suspect):
        suspect = suspect[_beyond(base[suspect].float(), moved[suspect].float(), nats)]
    if not len(suspect):
        return factor, moved
    served = moved.clone()
    for rows in suspect.split(PRECISE):
        factor[rows], served[rows] = _pull_scores(base[rows], moved[rows], nats)
    return factor, served


def _beyond(base: Tensor, moved: Tensor, nats: float) -> Bool[Tensor, " contexts"]:
    """Return which contexts may be over the limit, by a KL in float32."""
    found = softmax_kl(torch.log_softmax(base, dim=-1), torch.log_softmax(moved, dim=-1))
    return ~(found <= nats * (1 - 1e-3) - 1e-5)


def _pull_scores(base: Tensor, moved: Tensor, nats: float) -> tuple[Tensor, Tensor]:
    log_prob = torch.log_softmax(base.double(), dim=-1)
    shift = moved.double() - base.double()
    usable = shift.isfinite().all(-1) & log_prob.isfinite().all(-1)

    def diverges(rows: Tensor, scores: Tensor) -> Tensor:
        return softmax_kl(log_prob[rows], torch.log_softmax(scores.double(), dim=-1))

    factor, served = torch.zeros_like(shift[:, 0]), base.clone()
    rows = usable.nonzero().squeeze(-1)
    whole = diverges(rows, moved[rows]) <= nats
    factor[rows[whole]], served[rows[whole]] = 1, moved[rows[whole]]
    left = rows[~whole]
    if not len(left):
        return factor.float(), served
    # Solved in single precision where that tells KLs near the limit apart; what comes out is checked below.
    solved = _Tilt.of(log_prob[left], shift[left], torch.float32 if nats >= 1e-2 else torch.float64)
    limit = torch.full_like(solved.centred[:, 0], nats)
    total = solved(torch.zeros_like(limit))[0]
    # Convex and 0 at t = 0: a factor of limit / total surely fits.
    found = largest_factor(solved, limit, (limit / total).log().clamp(max=0), straight=True).exp().double()
    # Rounding to half precision can add more than the limit has room for: then less of the move, then none.
    for share in (1.0, 0.999, 0.97, 0.8, 0.4):
        t = (share * found).nan_to_num(0, 0, 0).clamp(0, 1)
        trial = (base[left].double() + t.unsqueeze(-1) * shift[left]).to(base.dtype)
        fits = diverges(left, trial) <= nats
        factor[left[fits]], served[left[fits]] = t[fits], trial[fits]
        left, found = left[~fits], found[~fits]
        if not len(left):
            break
    return factor.float(), served


@dataclass(frozen=True, slots=True)
class _Tilt:
    """KL(p || p e^{t s} / Z) = log E_p[e^{t s}] of a shift s centred under p.

    `softmax_kl` has no part in it: along a line this form gives the derivative from the same exponentials, and needs
    no normaliser of its own.
    """

    log_prob: Tensor
    centred: Tensor

    @classmethod
    def of(cls, log_prob: Tensor, shift: Tensor, dtype: torch.dtype) -> "_Tilt":
        """Centre a shift.

        Args:
            log_prob: of the base, shape (n, V), float64.
            shift: of the scores, shape (n, V), float64.
            dtype: to compute in.

        Returns:
            The tilt, in that dtype.
        """
        mean = (log_prob.exp() * shift).sum(-1, keepdim=True)
        return cls(log_prob.to(dtype), (shift - mean).to(dtype))

    def __call__(self, log_factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the KL and its derivative by log t."""
        tilted = self.log_prob + log_factor.exp().unsqueeze(-1) * self.centred
        top = tilted.amax(-1, keepdim=True)
        # torch's logsumexp is several times slower than this on CPU, and the exponentials are needed anyway.
        mass = (tilted - top).exp_()
        total = mass.sum(-1)
        value = (top[:, 0] + total.log()).clamp(min=0)
        return value, log_factor.exp() * (mass.mul_(self.centred).sum(-1) / total).clamp(min=0)
