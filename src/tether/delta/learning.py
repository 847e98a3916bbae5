"""Learn a domain as a delta of the abduction head, from cached states, under a drift budget."""

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.fingerprint import fingerprint
from tether.delta.anchor import Anchor, anchor_text, check_base, feature_layers, output_head
from tether.delta.basis import middle_basis
from tether.delta.budget import AIM, Budget, meet_budget
from tether.delta.cache import StateCache, latent_print
from tether.delta.delta import Delta
from tether.delta.gate import check_windows, fit_gate
from tether.delta.head import METRICS, Head, Reference, token_drift
from tether.delta.material import gather, states_of
from tether.delta.objective import CandidateSoftmax, mean_probability
from tether.delta.source import PIECE, Source, reference, set_aside, spread
from tether.delta.training import Aside, Fit, Step, Training
from tether.errors import ConfigError
from tether.store.documents import read_documents
from tether.store.manifest import versions

__all__ = [
    "Anchor",
    "anchor_text",
    "check_options",
    "feature_layers",
    "fit_delta",
    "learn_delta",
    "reference",
]


def fit_delta(
    model: Any, domain: StateCache, anchor: Anchor, name: str, fit: Fit, on_step: Step | None = None
) -> Delta:
    """Fit one delta from cached states; the model itself is not touched.

    Minimises domain NLL subject to drift on base text at most the budget: dual ascent on a multiplier
    during the fit, then one factor on the delta so that the drift *measured* on held-out base text is within
    5 % below the budget. In metric `softmax` the constraint inside the fit is the Fisher form, calibrated
    once by a measured KL on the way. A hard budget is met on every training context instead.

    Cost: epochs x tokens x (candidates + sampled) x C for the loss, and probe x V x C for each of two or
    three full-softmax measurements.

    Args:
        model: the base.
        domain: states of the domain's text.
        anchor: base text, from `anchor_text`.
        name: the domain.
        fit: options; the features are those of the cached states.
        on_step: called with step, steps, nll, drift and multiplier, and held_out where documents are aside.

    Returns:
        The delta with its record.

    Raises:
        CheckpointError: states of another backbone than the model's, or of other layers than the anchor's.
        ConfigError: the fit diverged, or too few windows for a gate.
    """  # noqa: DOC502 - raised by check_base
    check_base(model, domain, anchor.layers)
    if fit.gate:
        check_windows(len(domain.windows.starts) - 1)
    started = time.process_time()
    generator = torch.Generator().manual_seed(fit.seed)
    weight, bias = output_head(model)
    stay, away = set_aside(domain.windows.documents, fit.aside)
    basis = middle_basis(domain)
    anchor = anchor._replace(fitted=basis.reduce(anchor.fitted), probe=basis.reduce(anchor.probe))
    source = Source(model, domain, stay, basis)
    aside = Source(model, domain, away, basis) if len(away) else None
    prob = mean_probability(weight, source.some(fit.probe // 4).loc, bias)
    # What the base expects and what the text has, half and half: both belong into the exact part.
    counts = torch.bincount(source.targets, minlength=len(weight)).to(prob) / len(source)
    loss = CandidateSoftmax(weight, prob + counts, size=fit.candidates, sampled=fit.sampled, bias=bias)
    watched = None
    if aside is not None and len(aside):
        some = spread(len(aside), 2 * fit.probe)
        watched = Aside(aside.take(some), aside.targets[some])
    training = Training(fit, source, anchor, loss, generator, watched)
    needs = _Needs(weight, anchor.fisher, bias)
    some_base = training.watched.some(fit.probe // 3)
    head = training.run(
        lambda head: float(fit.budget.statistic(needs.drift("softmax", head, some_base))), on_step
    )
    if not all(bool(part.isfinite().all()) for part in (head.first, head.second) if part is not None):
        raise ConfigError(f"the fit diverged: its heads are not finite; lower lr={fit.lr:g}")
    record: dict[str, Any] = {
        "budget": fit.budget.value,
        "metric": fit.budget.metric,
        "quantile": fit.budget.quantile,
        "hard": fit.budget.hard,
        "penalty": fit.budget.penalty,
        "multiplier": training.multiplier,
        "curve": training.curve,
        "stopped": training.stopped,
        "tokens": len(source),
        "tokens_aside": 0 if watched is None else len(watched.targets),
        "layers": list(domain.layers),
        "latent": latent_print(model),
        "fit": {
            field.name: getattr(fit, field.name)
            for field in fields(fit)
            if field.name not in {"budget", "features"}
        },
        "versions": versions(),
    }
    if fit.budget.value is not None:
        head, met = _meet(head, source, anchor, fit, needs)
        record |= met
    # What a plan of a fusion needs, whatever the budget is in: `tether.delta.planned`.
    record["latent_base"] = float(needs.drift("latent", head, anchor.probe.some(fit.probe)).mean())
    few = source.some(fit.probe // 6)
    record["drift_domain"] = {metric: float(needs.drift(metric, head, few).mean()) for metric in METRICS}
    head = basis.expand(head)
    gate = fit_gate(domain, background=anchor.background) if fit.gate else None
    record["cpu_seconds"] = time.process_time() - started
    return Delta(
        name=name,
        chart=fit.chart,
        first=None if head.first is None else head.first.contiguous(),
        second=head.second.contiguous(),
        gate=gate,
        base=fingerprint(model),
        record=record,
        layers=domain.layers,
    )


class _Needs(NamedTuple):
    """What drifts are computed from."""

    weight: Tensor
    fisher: Tensor
    bias: Tensor | None

    def drift(self, metric: str, head: Head, at: Reference) -> Tensor:
        return token_drift(metric, head, at, **self._asdict())


def _meet(head: Head, source: Source, anchor: Anchor, fit: Fit, needs: _Needs) -> tuple[Head, dict[str, Any]]:
    budget, metric = fit.budget, fit.budget.metric
    held_out = anchor.probe.some(fit.probe) if metric == "softmax" else anchor.probe

    def probe() -> Iterable[Reference]:
        if not budget.hard:
            return [held_out]
        # Every training context, a piece at a time: of a large text they are on disk.
        pieces = torch.arange(len(source)).split(PIECE)
        return itertools.chain((source.take(piece) for piece in pieces), [anchor.fitted])

    def drift(metric: str, factor: float, at: Iterable[Reference]) -> float:
        scaled = head.scaled(factor)
        return float(budget.statistic(torch.cat([needs.drift(metric, scaled, piece) for piece in at])))

    # Each full measurement is dear. How fast drift grows along the ray is learnt from a cheap form of it, and
    # where to begin from a third of the tokens, corrected by what that form says those are of the whole.
    inner = "latent" if metric == "latent" else "fisher"
    full, less = drift(inner, 1.0, probe()), drift(inner, 0.9, probe())
    power = math.log(full / less) / math.log(1 / 0.9) if min(full, less) > 0 else 2.0
    value = budget.value or 0.0
    some = held_out
    if budget.hard:
        some = source.some(len(source) * fit.probe // (len(source) + len(anchor.fitted.states)) + 1)
    third = [some.some(max(1, min(fit.probe, len(some.states)) // 3))]
    rough = drift(metric, 1.0, third) * full / max(drift(inner, 1.0, third), 1e-30)
    start = (AIM * value / rough) ** (1 / max(power, 0.5)) if rough > 0 else 1.0
    met = meet_budget(
        lambda factor: drift(metric, factor, probe()),
        value,
        start=start,
        power=power,
        ceiling=budget.stretch,
        tries=40 if metric == "latent" else 8,
    )
    tokens = len(source) + len(anchor.fitted.states) if budget.hard else len(held_out.states)
    figures = {"factor": met.scale, "drift_base": met.drift, "drift_tokens": tokens}
    return head.scaled(met.scale), figures


def check_options(
    *texts: Path,
    budget: float | None,
    metric: str = "softmax",
    penalty: float | None = None,
    quantile: float | None = None,
    hard: bool = False,
    stretch: float = 1.25,
    **options: Any,
) -> Fit:
    """Find out what is wrong with options and files before a model is loaded.

    Args:
        texts: files that will be read.
        budget: see `Budget`; ignored with a penalty.
        metric: see `Budget`.
        penalty: see `Budget`.
        quantile: see `Budget`.
        hard: see `Budget`.
        stretch: see `Budget`.
        options: other fields of `Fit`.

    Returns:
        The options.

    Raises:
        ConfigError: a bad option, or a text that is missing, empty or not readable.
    """  # noqa: DOC502 - raised below
    value = None if penalty is not None else budget
    limit = Budget(value=value, metric=metric, penalty=penalty, quantile=quantile, hard=hard, stretch=stretch)
    fit = Fit(budget=limit, **options)
    for path in texts:
        read_documents(path)
    return fit


def learn_delta(
    model: Any,
    tokenizer: Any,
    texts: str | Path | Sequence[str],
    *,
    base_texts: str | Path | Sequence[str],
    budget: float | None = 0.05,
    name: str | None = None,
    metric: str = "softmax",
    penalty: float | None = None,
    window: int = 256,
    tokens: int | None = None,
    cache_folder: str | Path | None = None,
    on_step: Step | None = None,
    **options: Any,
) -> Delta:
    """Learn a domain from text.

    Args:
        model: the base, from `tether.load`.
        tokenizer: its tokenizer.
        texts: the domain's text: a file (JSON lines with `text`, or plain) or a list of documents.
        base_texts: general text that the model shall keep treating as it does, likewise.
        budget: largest drift on base text, nats per token, > 0; of the mean unless `quantile` or `hard` says
            otherwise.
        name: the domain; None takes the file's name.
        metric: what the budget is in: `softmax`, `fisher` or `latent`.
        penalty: the source document's plain lambda in place of a budget.
        window: tokens a context.
        tokens: domain tokens to use at most, up to a window; as many base tokens are used.
        cache_folder: where hidden states are kept for the next fit; None keeps them only for this call.
        on_step: called with progress.
        options: other fields of `Budget` and `Fit`: `features="multi"`, `location_only=True`, `quantile=0.95`,
            `aside=0.1` and so on.

    Returns:
        The delta; `save` writes it.

    Raises:
        ConfigError: bad options, or a text missing, empty or shorter than one context.
        CheckpointError: cached states of another backbone.
    """  # noqa: DOC502 - raised by what it calls
    fit = check_options(budget=budget, metric=metric, penalty=penalty, **options)
    material = gather(
        model, tokenizer, texts, base_texts, name=name, window=window, tokens=tokens, gate=fit.gate
    )
    layers = feature_layers(model, fit.features)
    with states_of(model, material.windows, cache_folder, layers=layers, on_step=on_step) as states:
        domain, base, held_out = states
        anchor = anchor_text(model, base, held_out)
        delta = fit_delta(model, domain, anchor, material.name, fit, on_step)
    delta.record["texts"] = material.hashes
    delta.record["window"] = window
    return delta
