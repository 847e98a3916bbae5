"""Measure how far fused models have moved from their base, context by context, in one pass over a text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.cauchy.divergence import drift
from tether.causal.fused import Fusion
from tether.causal.softmax import softmax_kl
from tether.causal.summed import Sum
from tether.delta.cache import hidden_states
from tether.delta.dealt import dealt
from tether.delta.output_head import chunk_rows
from tether.delta.windows import Windows

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

    @property
    def sum(self) -> Sum:
        """The sum whose law is served, and measured."""
        leash = None if self.leash is None else (self.leash, self.leash_metric)
        return Sum(weights=tuple(self.weights), chart=self.chart, leash=leash)


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

    What is measured is what the model serves: both read `tether.causal.summed.Sum.law`. Processes that work together
    (`tether.processes.joined`) measure a share of the windows each.

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

    def work(part: Windows) -> Measurement:
        return _measure(model, fusion, part, variants, batch_size, on_step)

    return Measurement(*dealt(windows, work, dim=-1))


@torch.no_grad()
def _measure(
    model: Any,
    fusion: Fusion,
    windows: Windows,
    variants: Sequence[Variant],
    batch_size: int,
    on_step: Callable[[dict[str, float]], None] | None,
) -> Measurement:
    count, domains, kinds = len(windows.input_ids), len(fusion.domains), len(variants)
    scored = windows.targets >= 0
    base_nll = torch.zeros(count)
    nll, kl, moved_by, allowed = (torch.zeros(kinds, count) for _ in range(4))
    kept = torch.ones(kinds, count)
    gates_at = torch.ones(domains, count)
    done, rows, head = 0, chunk_rows(model.action.weight), (model.action.weight, model.action.bias)
    for batch in windows.batches(batch_size):
        states = hidden_states(model, batch, fusion.layers)
        where, mask = windows.positions(batch), batch.mask.to(states.device)
        gates = fusion.gates(states, mask)[0][:, mask].float()
        gates_at[:, where] = gates.cpu()
        parts = zip(states[mask].split(rows), where.split(rows), gates.split(rows, 1), strict=True)
        for part, offsets, chunk_gates in parts:
            loc, log_scale = model.abduction(part[:, : fusion.hidden_size].to(model.action.weight.dtype))
            scores = model.action.score_loc(loc)
            log_prob = scores.float().log_softmax(-1)
            target = windows.targets[offsets].clamp(min=0).unsqueeze(-1).to(part.device)
            base = -log_prob.gather(-1, target).squeeze(-1)
            base_nll[offsets] = base.cpu()
            x, y = fusion.deltas(part, log_scale)
            alone = drift(x, y).sum(-1)  # (N, tokens)
            for row, variant in enumerate(variants):
                added = variant.sum
                acting = chunk_gates if variant.gated else torch.ones_like(chunk_gates)
                bound = added.bound(alone, acting, location_only=fusion.location_only)
                allowed[row, offsets], nll[row, offsets] = bound.float().cpu(), base.cpu()
                moved = (added.shares(acting) != 0).any(0)
                if not bool(moved.any()):
                    continue
                at, here = offsets[moved.cpu()], slice(None) if bool(moved.all()) else moved
                law = added.law(
                    loc[here],
                    log_scale[here],
                    x[:, here],
                    y[:, here],
                    acting[:, here],
                    head,
                    base_scores=scores[here],
                    keep_scores=True,
                )
                kept[row, at] = law.factor.cpu()
                moved_by[row, at] = drift(law.x, law.y).sum(-1).cpu()
                served = model.action.score_loc(law.loc) if law.scores is None else law.scores
                log_served = served.float().log_softmax(-1)
                kl[row, at] = softmax_kl(log_prob[here], log_served).cpu()
                nll[row, at] = -log_served.gather(-1, target[here]).squeeze(-1).cpu()
        done += len(where)
        if on_step:
            on_step({"done": done, "total": count})
    return Measurement(
        windows.documents, scored, base_nll[scored], nll[:, scored], kl, moved_by, allowed, gates_at, kept
    )
