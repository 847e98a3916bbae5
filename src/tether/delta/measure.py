"""Measure how far fused models have moved from their base, context by context, in one pass over a text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.cauchy.charts import fuse
from tether.cauchy.divergence import drift
from tether.causal.fused import Fusion
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
    """

    weights: tuple[float, ...]
    chart: str
    gated: bool


class Measurement(NamedTuple):
    """Per-token results on one text; n tokens, m of them with a next token, N deltas, R variants.

    Attributes:
        documents: document of each token, shape (n,).
        scored: which tokens have a next token, shape (n,), bool.
        base_nll: of the base at scored tokens, nats, shape (m,).
        nll: of each variant at scored tokens, nats, shape (R, m).
        softmax_kl: KL(base || variant) of the served softmax, nats, shape (R, n).
        latent_drift: Cauchy drift of U summed over dimensions, nats, shape (R, n).
        bound: a-priori bound on that drift from the deltas' own drifts, nats, shape (R, n).
        gates: gate of each delta, shape (N, n); all ones when the fusion has no gates.
    """

    documents: Tensor
    scored: Tensor
    base_nll: Tensor
    nll: Tensor
    softmax_kl: Tensor
    latent_drift: Tensor
    bound: Tensor
    gates: Tensor


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
    gates_at = torch.ones(domains, count)
    done = 0
    for batch in windows.batches(batch_size):
        states = hidden_states(model, batch)
        where = windows.positions(batch)
        gates = fusion.gates(states, batch.mask)[0][:, batch.mask]
        gates_at[:, where] = gates
        rows = chunk_rows(model.action.weight)
        for part, offsets in zip(states[batch.mask].split(rows), where.split(rows), strict=True):
            chunk_gates = gates_at[:, offsets]
            loc, log_scale = model.abduction(part.to(model.action.weight.dtype))
            log_prob = torch.log_softmax(model.action.score_loc(loc).float(), dim=-1)
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
                fused_x, fused_y = fuse(x, y, weights, chart=variant.chart)
                moved_by[row, offsets] = drift(fused_x, fused_y).sum(-1)
                allowed[row, offsets] = fused_drift_bound(alone, weights, variant.chart).float()
                nll[row, offsets] = base
                open_rows = (weights != 0).any(0)
                if not bool(open_rows.any()):
                    continue
                shift = model.action.score_loc((log_scale.exp() * fused_y)[open_rows]).float()
                distance, normaliser = (
                    softmax_shift(log_prob, shift, prob)
                    if bool(open_rows.all())
                    else (softmax_shift(log_prob[open_rows], shift))
                )
                chosen = target[open_rows].clamp(min=0).unsqueeze(-1)
                kl[row, offsets[open_rows]] = distance
                nll[row, offsets[open_rows]] = (
                    base[open_rows] - shift.gather(-1, chosen).squeeze(-1) + normaliser
                )
        done += len(where)
        if on_step:
            on_step({"done": done, "total": count})
    return Measurement(
        windows.documents, scored, base_nll[scored], nll[:, scored], kl, moved_by, allowed, gates_at
    )
