"""The ledger of a fusion: who accounts for its drift, what domains do to each other, and what room is left."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.cauchy.charts import CHARTS, from_chart, to_chart
from tether.cauchy.divergence import drift
from tether.causal.fingerprint import fingerprint
from tether.causal.fused import Fusion
from tether.causal.leash import METRICS
from tether.causal.mixture import Mixture
from tether.causal.summed import bound_chart
from tether.delta.account import account
from tether.delta.cache import hidden_states
from tether.delta.measure import Variant, measure
from tether.delta.planned import budget_figures
from tether.delta.regret import account_figures
from tether.delta.shares import shares
from tether.delta.values import served_values
from tether.delta.windows import Windows, reader, window_text
from tether.errors import CertificateError, ConfigError
from tether.store.documents import documents_of
from tether.theory.bounds import K_INF, fused_drift_bound

__all__ = ["Allowance", "check_allowance", "keep_ledger", "room"]

ROWS = 64
"""Contexts whose deltas are held at once."""
PAIRED = 8
"""Up to so many domains each pair is accounted for; of more, each domain beside the rest, so that cost is linear."""


class Allowance(NamedTuple):
    """How far a fusion may drift on a declared text.

    Attributes:
        nats: largest mean drift over the text's contexts, > 0.
        metric: `softmax`, measured KL(base || fused) of the softmax, or `latent`, the drift of U.
    """

    nats: float
    metric: str


def room(nats: float, allowed: float, chart: str) -> float:
    """Find how much drift another delta may have, whatever it does, so that a fusion stays within a limit.

    sqrt of drift is subadditive in the repaired charts, and with a constant in `linear`:
    (sqrt(D) + sqrt(new))^2 <= allowed, K_inf (...)^2 in `linear`. It holds for means over contexts as well.

    Args:
        nats: drift of the fusion as it is, nats.
        allowed: limit, nats.
        chart: the chart of the fusion.

    Returns:
        Drift of a delta of weight 1, nats; 0 when there is no room.
    """
    reach = math.sqrt(allowed / (K_INF if chart == "linear" else 1.0)) - math.sqrt(nats)
    return max(reach, 0.0) ** 2


@torch.no_grad()
def keep_ledger(
    fused: Any,
    tokenizer: Any,
    text: str | Path | Sequence[str],
    *,
    next_drift: float | None = None,
    window: int = 256,
    tokens: int | None = 4000,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Account for the drift of a fused model on a text.

    The weights that are served are hashed first, and must be those that the config names
    (`tether.causal.fingerprint.fingerprint`). Cost: that and one backbone pass (three where there are numbers); for N
    deltas and n contexts about 10 N n C, and up to `PAIRED` deltas N^2 n C for pairs.

    Args:
        fused: a fused model.
        tokenizer: of its base.
        text: a file or documents, customarily the base text of the budgets.
        next_drift: latent drift of another delta to ask about, nats; None for none.
        window: tokens a context.
        tokens: of the text at most; None for all.
        on_step: called with `done` and `total` tokens.

    Returns:
        JSON-able figures, means over contexts, latent drift in nats unless said otherwise:

        `values`: what happened to the numbers of the text (`tether.delta.values.value_figures`). Beside it, for a
        fusion by evidence what `tether.delta.regret.account_figures` gives; for a sum:

        - `domains`: for each its weight, budget, how often its gate is open, `alone` (its drift at its weight),
          `share` (they add up to the fusion's drift), `removal` (by how much its removal lowers the drift);
        - `interactions`: for each pair what both together drift beyond the sum of each alone; of more than `PAIRED`
          domains, for each what all drift beyond the sum of it alone and of the rest without it;
        - `total`: `allowed` (the a-priori bound), `measured`, `ratio`, and `leashed`, what is left on a leash;
        - `budgets`: the same from the budgets alone, see `tether.delta.planned`, or None;
        - `charts`: allowed, measured and ratio, had the deltas been added in that chart, without a leash;
        - `softmax_kl`: measured KL(base || fused) of the softmax;
        - `allowance`: what the fusion was given, or None; `room`: what another delta may drift (latent) within
          the leash or allowance if it is in that metric; `next`: what one of `next_drift` would do.

    Raises:
        CertificateError: the model has no fused deltas.
        ConfigError: a negative `next_drift`, or text shorter than one context.
        IdentityError: the weights are not those that the config names.
    """  # noqa: DOC502 - raised by fingerprint
    fusion: Fusion | None = fused.fusion
    if fusion is None:
        raise CertificateError("the model has no fused deltas: expected one made by 'tether fuse'")
    fingerprint(fused)
    if next_drift is not None and not next_drift >= 0:
        raise ConfigError(f"another delta of drift {next_drift}: expected nats, >= 0")
    windows = window_text(documents_of(text), reader(fused, tokenizer), length=window, tokens=tokens)
    if isinstance(fusion, Mixture):
        if next_drift is not None:
            raise ConfigError(
                "another delta's drift of a fusion by evidence: by evidence a further expert adds at most its own "
                "drift times its weight in a context; leave it out"
            )
        (found,) = account([fused], windows, on_step=on_step)
        return {
            "by": "evidence",
            "allowance": fused.config.fusion.get("allowance"),
            **account_figures(fusion, found),
            "values": served_values(fused, windows),
        }
    sums = _accumulate(fused, fusion, windows, next_drift)
    count = len(windows.input_ids)
    mean: dict[str, Any] = {name: (value / count).tolist() for name, value in sums.items()}
    described = fused.config.fusion
    measured = _measured(fused, windows, on_step)
    allowance = described.get("allowance")
    limits = [
        limit["nats"]
        for limit in (described.get("leash"), allowance)
        if limit and limit["metric"] == "latent"
    ]
    names, total = fusion.domains, mean["total"]
    return {
        "tokens": count,
        "chart": described["chart"],
        "domains": {
            name: {
                "weight": fusion.weights[row],
                **described["budgets"][row],
                "gate_open": mean["gates"][row],
                "alone": mean["alone"][row],
                "share": mean["shares"][row],
                "removal": total - mean["without"][row],
            }
            for row, name in enumerate(names)
        },
        "interactions": _interactions(names, mean),
        "total": {**_ratio(mean["allowed"], total), "leashed": measured["latent"]},
        "budgets": budget_figures({**described, "leash": None}, total),
        "charts": {
            chart: _ratio(mean["allowed_in"][row], mean["total_in"][row]) for row, chart in enumerate(CHARTS)
        },
        "softmax_kl": measured["softmax"],
        "leash": described.get("leash"),
        "leash_pulled": measured["pulled"],
        "allowance": allowance,
        "room": min((room(total, limit, fusion.chart) for limit in limits), default=None),
        "next": None if next_drift is None else {"drift": next_drift, "allowed": mean["next"]},
        "values": served_values(fused, windows),
    }


def _interactions(names: Sequence[str], mean: dict[str, Any]) -> dict[str, float]:
    alone = mean["alone"]
    if "pairs" not in mean:
        left = mean["total"] - torch.tensor(alone, dtype=torch.float64) - torch.tensor(mean["without"])
        return {f"{name} + the rest": nats for name, nats in zip(names, left.tolist(), strict=True)}
    return {
        f"{names[a]} + {names[b]}": mean["pairs"][a][b] - alone[a] - alone[b]
        for a in range(len(names))
        for b in range(a + 1, len(names))
    }


def _ratio(allowed: float, measured: float) -> dict[str, float]:
    return {"allowed": allowed, "measured": measured, "ratio": measured / allowed if allowed > 0 else 0.0}


def _measured(fused: Any, windows: Windows, on_step: Any) -> dict[str, float]:
    if isinstance(fused.fusion, Mixture):
        (found,) = account([fused], windows, on_step=on_step)
        means = {"softmax": found.softmax_kl, "latent": found.latent_drift}
        return {name: float(values.double().mean()) for name, values in means.items()} | {"pulled": 0.0}
    fusion = fused.fusion
    leash = fusion.leash or (None, "softmax")
    variant = Variant(fusion.weights, fusion.chart, fusion.gated, *leash)
    result = measure(fused, fusion, windows, [variant], on_step=on_step)
    return {
        "softmax": float(result.softmax_kl.double().mean()),
        "latent": float(result.latent_drift.double().mean()),
        "pulled": float((result.leash < 1).double().mean()),
    }


def _accumulate(fused: Any, fusion: Fusion, windows: Windows, next_drift: float | None) -> dict[str, Tensor]:
    """Return sums over contexts."""
    sums: dict[str, Tensor] = {}
    for batch in windows.batches(8):
        states = hidden_states(fused, batch, fusion.layers)
        mask = batch.mask.to(states.device)
        gates = fusion.gates(states, mask)[0][:, mask]
        # Under softmax gates the others take over what a domain leaves.
        left = fusion.gates_without_largest(states, mask)
        inside = torch.zeros_like(gates) if left is None else left[..., mask]
        parts = zip(states[mask].split(ROWS), gates.split(ROWS, 1), inside.split(ROWS, 1), strict=True)
        for part, open_gates, others in parts:
            _, log_scale = fused.abduction(part[:, : fusion.hidden_size].to(fused.action.weight.dtype))
            x, y = fusion.deltas(part, log_scale)
            rest = None if left is None else others
            for name, value in _contexts(fusion, x, y, open_gates, rest, next_drift).items():
                sums[name] = sums.get(name, 0) + value.cpu()
            sums["gates"] = sums.get("gates", 0) + open_gates.double().sum(-1).cpu()
    return sums


def _contexts(
    fusion: Fusion, x: Tensor, y: Tensor, gates: Tensor, left: Tensor | None, next_drift: float | None
) -> dict[str, Tensor]:
    chart = fusion.chart
    strengths = torch.tensor(fusion.weights, dtype=torch.float64, device=x.device).unsqueeze(-1)
    of_bound = bound_chart(chart, fusion.location_only)
    first, second = to_chart(x, y, chart)
    weights = strengths * gates.double()
    scaled = [part.double() * weights.unsqueeze(-1) for part in (first, second)]

    def moved(a: Tensor, b: Tensor) -> Tensor:
        return drift(*from_chart(a, b, chart)).sum(-1)

    own, nats = shares(first, second, weights, chart)
    alone = drift(x, y).double().sum(-1)
    rest = [part.sum(0) - part for part in scaled]
    if left is None:
        without = moved(*rest)
    else:
        # The gates of the others add up to 1 again; after the largest one they are those without it.
        largest = gates.argmax(0, keepdim=True)
        growth = 1 / (1 - gates.double().scatter(0, largest, 0.0)).unsqueeze(-1)
        without = moved(*(part * growth for part in rest))
        last = [torch.einsum("mnc,mn->nc", part.double(), strengths * left) for part in (first, second)]
        without = without.scatter(0, largest, moved(*last).unsqueeze(0))
    found = {
        "shares": own.sum(-1),
        "total": nats.sum(),
        "alone": moved(*scaled).sum(-1),
        "without": without.sum(-1),
        "allowed": fused_drift_bound(alone, weights, of_bound).sum(),
    }
    if len(x) <= PAIRED:
        pairs = [moved(*(part + part[row] for part in scaled)).sum(-1) for row in range(len(x))]
        found["pairs"] = torch.stack(pairs)
    if next_drift is not None:
        # The fusion counts as one delta that drifts as measured, which is less than its bound.
        both = torch.stack([nats, torch.full_like(nats, next_drift)])
        found["next"] = fused_drift_bound(both, both.new_ones(2), of_bound).sum()
    bounds, drifts = [], []
    for other in CHARTS:
        bounds.append(fused_drift_bound(alone, weights, bound_chart(other, fusion.location_only)).sum())
        parts = to_chart(x, y, other)
        fused = [(part.double() * weights.double().unsqueeze(-1)).sum(0) for part in parts]
        drifts.append(drift(*from_chart(fused[0], fused[1], other)).sum())
    return found | {"allowed_in": torch.stack(bounds), "total_in": torch.stack(drifts)}


def check_allowance(
    fused: Any,
    tokenizer: Any,
    text: str | Path | Sequence[str],
    allowance: Allowance | Mapping[str, Any],
    *,
    window: int = 256,
    tokens: int | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> float:
    """Measure a fusion's mean drift on a text and refuse it when it is beyond what is allowed.

    Args:
        fused: the fusion as it would be, with its leash.
        tokenizer: of its base.
        text: a file or documents.
        allowance: the limit.
        window: tokens a context.
        tokens: of the text at most; None for all.
        on_step: called with `done` and `total` tokens.

    Returns:
        The mean drift measured, nats.

    Raises:
        ConfigError: an allowance that means nothing.
        CertificateError: the drift is beyond it.
    """
    limit = (
        allowance if isinstance(allowance, Allowance) else Allowance(allowance["nats"], allowance["metric"])
    )
    if limit.metric not in METRICS or not limit.nats > 0:
        raise ConfigError(
            f"a budget of {limit.nats} in {limit.metric!r}: expected nats > 0 in one of {', '.join(METRICS)}"
        )
    windows = window_text(documents_of(text), reader(fused, tokenizer), length=window, tokens=tokens)
    mean = _measured(fused, windows, on_step)[limit.metric]
    if not mean <= limit.nats:
        raise CertificateError(
            f"{' + '.join(fused.fusion.domains)}: mean {limit.metric} drift {mean:.5g} nats on this text, "
            f"{limit.nats:g} allowed; lower a weight, remove a domain, or raise what is allowed"
        )
    return mean
