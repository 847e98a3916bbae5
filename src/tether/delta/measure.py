"""Measure how far fused models have moved from their base, context by context, in one pass over a text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.cauchy.charts import fuse
from tether.cauchy.divergence import drift
from tether.causal.fused import Fusion
from tether.causal.leash import leash_law
from tether.causal.score_leash import location_path, pull_scores
from tether.delta.cache import hidden_states
from tether.delta.objective import chunk_rows, softmax_shift
from tether.delta.windows import Windows
from tether.theory.bounds import fused_drift_bound

__all__ = ["Measurement", "Variant", "measure"]


class Variant(NamedTuple):
    """One way to add the deltas of a fusion.

    Attributes:
        weights: one weight a delta.
        chart: the chart they are added in.
        gated: whether the gates act.
        leash: largest drift of a context, nats, or None; see `tether.causal.leash`.
        leash_metric: what the leash is in.
    """

    weights: tuple[float, ...]
    chart: str
    gated: bool
    leash: float | None = None
    leash_metric: str = "softmax"


class Measurement(NamedTuple):
    """Per-token results on one text; n tokens, m of them with a next token, N deltas, R variants.

    Attributes:
        documents: document of each token, shape (n,).
        scored: which tokens have a next token, shape (n,), bool.
        base_nll: of the base at scored tokens, nats, shape (m,).
        nll: of each variant at scored tokens, nats, shape (R, m).
        softmax_kl: KL(base || variant) of the served softmax, nats, shape (R, n).
        latent_drift: Cauchy drift of U summed over dimensions, nats, shape (R, n).
        bound: a-priori bound on that drift from the deltas' own drifts, and from the leash if it is in that
            metric, nats, shape (R, n).
        gates: gate of each delta, shape (N, n); all ones when the fusion has no gates.
        leash: share of its move that each context keeps, shape (R, n), in [0, 1]; 1 where no leash binds.
    """

    documents: Tensor
    scored: Tensor
    base_nll: Tensor
    nll: Tensor
    softmax_kl: Tensor
    latent_drift: Tensor
    bound: Tensor
    gates: Tensor
    leash: Tensor


@torch.no_grad()
def measure(
    model: Any,
    fusion: Fusion,
    windows: Windows,
    variants: Sequence[Variant],
    *,
    batch_size: int = 8,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Measurement:
    """Compare the base with several ways to add its deltas.

    Cost per token: one backbone pass, one product with the (V, C) head for the base and one for every
    variant that moves the token (closed gates cost nothing).

    Args:
        model: the base CausalQwenForCausalLM; its own fusion, if any, is not used.
        fusion: all deltas with their gates.
        windows: the text.
        variants: how to add them.
        batch_size: windows a backbone pass.
        on_step: called with `done` and `total` tokens after each batch.

    Returns:
        Per-token results in the text's own order.
    """
    count, domains, kinds = len(windows.input_ids), len(fusion.domains), len(variants)
    scored = windows.targets >= 0
    base_nll = torch.zeros(count)
    nll, kl, moved_by, allowed = (torch.zeros(kinds, count) for _ in range(4))
    kept = torch.ones(kinds, count)
    gates_at = torch.ones(domains, count)
    done = 0
    for batch in windows.batches(batch_size):
        states = hidden_states(model, batch, fusion.layers)
        where = windows.positions(batch)
        gates = fusion.gates(states, batch.mask)[0][:, batch.mask]
        gates_at[:, where] = gates
        rows = chunk_rows(model.action.weight)
        for part, offsets in zip(states[batch.mask].split(rows), where.split(rows), strict=True):
            chunk_gates = gates_at[:, offsets]
            loc, log_scale = model.abduction(part[:, : fusion.hidden_size].to(model.action.weight.dtype))
            scores = model.action.score_loc(loc)
            log_prob = torch.log_softmax(scores.float(), dim=-1)
            prob = log_prob.exp()
            target = windows.targets[offsets]
            base = -log_prob.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            base_nll[offsets] = base
            x, y = fusion.deltas(part)
            alone = drift(x, y).sum(-1)  # (N, tokens)
            for row, variant in enumerate(variants):
                weights = torch.tensor(variant.weights).unsqueeze(-1) * (
                    chunk_gates if variant.gated else torch.ones_like(chunk_gates)
                )
                # Without a change of scale both charts add the same numbers, and the constant is 1.
                chart = "symmetric" if fusion.location_only and variant.chart == "linear" else variant.chart
                allowed[row, offsets] = fused_drift_bound(alone, weights, chart).float()
                nll[row, offsets] = base
                open_rows = (weights != 0).any(0)
                if not bool(open_rows.any()):
                    continue
                at = offsets[open_rows]
                fused_x, fused_y = fuse(
                    x[:, open_rows], y[:, open_rows], weights[:, open_rows], variant.chart
                )
                law = loc[open_rows], log_scale[open_rows]
                if variant.leash is not None and variant.leash_metric == "latent":
                    fused_x, fused_y, kept[row, at] = _pull(
                        *law, fused_x, fused_y, variant.leash, variant.chart
                    )
                    allowed[row, at] = allowed[row, at].clamp(max=variant.leash)
                shift = _shift(model, law[0], law[1].exp() * fused_y, scores[open_rows])
                if variant.leash is not None and variant.leash_metric == "softmax":
                    before = log_prob[open_rows]
                    factor = pull_scores(before, before + shift, variant.leash)[0]
                    fused_x, fused_y = location_path(fused_x, fused_y, factor)
                    # A move too large for its dtype is not finite, and then the base is served.
                    away = (factor > 0).unsqueeze(-1)
                    shift = torch.where(away, shift * factor.unsqueeze(-1), 0)
                    kept[row, at] = factor
                moved_by[row, at] = drift(fused_x, fused_y).sum(-1)
                distance, normaliser = (
                    softmax_shift(log_prob, shift, prob)
                    if bool(open_rows.all())
                    else (softmax_shift(log_prob[open_rows], shift))
                )
                chosen = target[open_rows].clamp(min=0).unsqueeze(-1)
                kl[row, at] = distance
                nll[row, at] = base[open_rows] - shift.gather(-1, chosen).squeeze(-1) + normaliser
        done += len(where)
        if on_step:
            on_step({"done": done, "total": count})
    return Measurement(
        windows.documents, scored, base_nll[scored], nll[:, scored], kl, moved_by, allowed, gates_at, kept
    )


def _shift(model: Any, loc: Tensor, move: Tensor, scores: Tensor) -> Tensor:
    """Return how far the scores of all classes move, float32."""
    weight = model.action.weight
    if weight.dtype == torch.float32:
        # The move alone, which keeps small differences, and without the class bias, which is no part of them.
        shifted: Tensor = move @ weight.T
        return shifted
    # In half precision what is served is rounded, and so far away from the base as it is rounded.
    moved: Tensor = model.action.score_loc(loc + move).float()
    return moved - scores.float()


def _pull(
    loc: Tensor, log_scale: Tensor, x: Tensor, y: Tensor, nats: float, chart: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moves that a leash in metric `latent` leaves, as they are served, and the factors."""
    law = leash_law(loc, log_scale, x, y, nats, chart)
    pulled = (law.factor < 1).unsqueeze(-1)
    near_x, near_y = law.log_scale - log_scale, (law.loc - loc) / log_scale.exp()
    return torch.where(pulled, near_x, x), torch.where(pulled, near_y, y), law.factor
