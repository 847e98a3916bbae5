"""Learn a domain as a delta of the abduction head, from cached states, under a drift budget."""

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from tether.causal.fingerprint import fingerprint
from tether.causal.quantising import refuse_packed
from tether.delta.anchor import Anchor, anchor_text, check_base, feature_layers
from tether.delta.basis import middle_basis
from tether.delta.budget import Budget
from tether.delta.cache import StateCache, backbone_print, latent_print
from tether.delta.carried import STRENGTHS
from tether.delta.delta import Delta
from tether.delta.gate import check_windows, fit_gate
from tether.delta.head import METRICS, Head
from tether.delta.held_out import HeldOut, hold_out, leave_out, sample_texts
from tether.delta.low_rank import factored, shortened
from tether.delta.material import DISK, gather, states_of
from tether.delta.objective import CandidateSoftmax, mean_probability
from tether.delta.outcome import NO_HELP, budget_share, why_no_more
from tether.delta.output_head import output_head
from tether.delta.ray import MEASURED, Needs, Ray
from tether.delta.source import Source, reference, set_aside, spread
from tether.delta.strength import change_figures
from tether.delta.training import Aside, Fit, Step, Training
from tether.delta.values import ValueHead, value_figures, value_head
from tether.delta.windows import reader
from tether.errors import ConfigError
from tether.processes import joined
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


SEEN = 4096
"""Tokens of the domain on which a delta is made of low rank."""


def fit_delta(
    model: Any, domain: StateCache, anchor: Anchor, name: str, fit: Fit, on_step: Step | None = None
) -> Delta:
    """Fit one delta from cached states; the model itself is not touched.

    A part of the domain's text is kept aside first. On the rest domain NLL is minimised subject to drift on base
    text at most the budget: dual ascent on a multiplier during the fit, then one factor on the delta so that the
    drift *measured* on held-out base text is below the budget, within 5 % where a factor gives that. In metric
    `softmax` the constraint inside the fit is the Fisher form, calibrated once by a measured KL on the way. A hard
    budget is met on every training context instead. Last, the share of that factor is taken that has the least loss on
    the part kept aside; it is never more than the whole, so the drift stays within the budget.

    Cost: epochs x tokens x (candidates + sampled) x C for the loss, probe x V x C for each of two or three
    full-softmax measurements of the drift, and `MEASURED` x V x C for each of four to seven of the loss.

    Args:
        model: the base.
        domain: states of the domain's text.
        anchor: base text, from `anchor_text`.
        name: the domain.
        fit: options; the features are those of the cached states.
        on_step: called with step, steps, nll, drift and multiplier, and held_out where documents are aside.

    Returns:
        The delta with its record, without a sample.

    Raises:
        CheckpointError: states of another backbone than the model's, or of other layers than the anchor's.
        ConfigError: the fit diverged, or too few windows for a gate.
    """  # noqa: DOC502 - raised by check_base
    check_base(model, domain, anchor.layers)
    if fit.gate:
        check_windows(len(domain.windows.starts) - 1)
    started = time.process_time()
    generator = torch.Generator().manual_seed(fit.seed)
    output = output_head(model)
    held_out = hold_out(domain.windows, fit.held_out)
    own = leave_out(domain, held_out)
    domain = domain._replace(windows=held_out.windows)
    stay, away = set_aside(own.windows.documents[own.windows.starts[:-1]], fit.aside)
    basis = middle_basis(own)
    # It is as large as the text, and made again for the gate.
    del own
    anchor = anchor._replace(fitted=basis.reduce(anchor.fitted), probe=basis.reduce(anchor.probe))
    source = Source(model, domain, stay, basis)
    aside = Source(model, domain, away, basis) if len(away) else None
    prob = mean_probability(output, source.some(fit.probe // 4).loc)
    # What the base expects and what the text has, half and half: both belong into the exact part.
    counts = torch.bincount(source.targets, minlength=len(prob)).to(prob) / len(source)
    loss = CandidateSoftmax(output, prob + counts, size=fit.candidates, sampled=fit.sampled)
    watched = None
    if aside is not None and len(aside):
        some = spread(len(aside), 2 * fit.probe)
        watched = Aside(aside.take(some), aside.next_tokens(some))
    values = value_head(model)
    training = Training(fit, source, anchor, loss, generator, watched, values)
    needs = Needs(output, anchor.fisher, values)
    some_base = training.watched.some(fit.probe // 3)
    head = training.run(
        lambda head: float(fit.budget.statistic(needs.drift("softmax", head, some_base))), on_step
    )
    if not all(bool(part.isfinite().all()) for part in (head.first, head.second) if part is not None):
        raise ConfigError(f"the fit diverged: its heads are not finite; lower lr={fit.lr:g}")
    if fit.rank is not None:
        head = shortened(head, source.some(SEEN), anchor.fisher, fit.rank)
        head = head._replace(second=training.off_values(head.second))
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
    unseen = Source(model, domain, held_out.away, basis) if len(held_out.away) else None
    ray = Ray(head, source, anchor, fit.budget, fit.probe, needs)
    factor, found = _strength(ray, unseen, held_out)
    record |= found
    head = head.scaled(factor)
    if values is not None:
        # Where no document is kept aside, on what was learnt from.
        record["values"] = _value_record(model, values, head, source if unseen is None else unseen)
    # What a plan of a fusion needs, whatever the budget is in: `tether.delta.planned`.
    record["latent_base"] = float(needs.drift("latent", head, anchor.probe.some(fit.probe)).mean())
    few = source.some(fit.probe // 6)
    record["drift_domain"] = {metric: float(needs.drift(metric, head, few).mean()) for metric in METRICS}
    head = basis.expand(head)
    heads = {"second": head.second.cpu(), **({} if head.first is None else {"first": head.first.cpu()})}
    factors = {} if fit.rank is None else factored(heads, fit.rank)
    heads = {name: factors[name].whole() if factors else whole for name, whole in heads.items()}
    gate = None
    if fit.gate:
        # Nothing of the fit is needed any more.
        del training, ray, source, unseen, aside, few
        gate = fit_gate(leave_out(domain, held_out), background=anchor.background)
    record["cpu_seconds"] = time.process_time() - started
    return Delta(
        name=name,
        chart=fit.chart,
        first=heads["first"].contiguous() if "first" in heads else None,
        second=heads["second"].contiguous(),
        factors=factors,
        gate=gate,
        base=fingerprint(model),
        record=record,
        layers=domain.layers,
    )


# What a delta does to the numbers of a text, all of them.
def _value_record(model: Any, values: ValueHead, head: Head, text: Source) -> dict[str, Any]:
    numbers = (~text.values.isnan()).nonzero().squeeze(-1)
    at = text.take(numbers)
    before, after = (values.law(*at.moved(moved)) for moved in (None, head))
    return value_figures(before, after, text.values[numbers], model.action.number)


# The factor of a learnt delta, and what its record says of it.
def _strength(ray: Ray, unseen: Source | None, held_out: HeldOut) -> tuple[float, dict[str, Any]]:
    budget = ray.budget
    largest = 1.0 if budget.value is None else ray.meet().scale
    share, helps = 1.0, True
    kept: dict[str, Any] = {"kind": held_out.kind, "note": held_out.note, "documents": 0, "tokens": 0}
    if unseen is not None:
        some = spread(len(unseen), MEASURED)
        at, targets, documents = unseen.take(some), unseen.next_tokens(some), unseen.documents[some]
        found = ray.strength(at, targets, unseen.values[some], largest)
        share, helps = found.share, found.helps
        kept |= change_figures(found.nll[0.0], found.nll[share], documents)
        kept["looked"] = [{"factor": part * largest, "nll": nll} for part, nll in found.looked.items()]
    factor = share * largest
    figures: dict[str, Any] = {
        "factor": factor,
        "factor_budget": largest,
        "strengths": list(STRENGTHS),
        "held_out": kept,
        "base_text": ray.change(factor).figures(),
    }
    drift = None
    if budget.value is not None:
        drift = ray.limited(factor)
        figures |= {"drift_base": drift, "drift_tokens": ray.tokens}
    used = budget_share(budget, drift)
    why = why_no_more(budget, used, factor_budget=largest, share=share, helps=helps)
    figures |= {"budget_used": used, "budget_why": why, "warnings": [] if helps else [NO_HELP]}
    return factor, figures


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
    disk: float = DISK,
    sample: bool = True,
    on_step: Step | None = None,
    **options: Any,
) -> Delta:
    """Learn a domain from text.

    Processes that `torchrun` or `accelerate launch` started together all call this: they share the reading of the
    texts, one of them fits, and each gets the same delta.

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
        disk: bytes of hidden states that may be kept of each text; of a longer one, windows spread over it are used.
        sample: let the delta carry a few of the documents that were kept aside; not for private text.
        on_step: called with progress.
        options: other fields of `Budget` and `Fit`: `features="multi"`, `location_only=True`, `quantile=0.95`,
            `held_out=0.2`, `aside=0.1` and so on.

    Returns:
        The delta; `save` writes it.

    Raises:
        ConfigError: bad options, or a text missing, empty or shorter than one context; or processes that differ in
            them, or do not see one folder for states.
        CheckpointError: cached states of another backbone.
    """  # noqa: DOC502 - raised by what it calls
    refuse_packed(model, "learning a delta")
    fit = check_options(budget=budget, metric=metric, penalty=penalty, **options)
    layers = feature_layers(model, fit.features)
    with joined() as group:
        material = gather(
            model, tokenizer, texts, base_texts, name=name, window=window, tokens=tokens, gate=fit.gate, layers=layers,
            disk=disk,
        )  # fmt: skip
        group.agree(
            work="learning a delta", base=backbone_print(model), texts=material.hashes, options=fit, window=window,
            tokens=tokens, name=material.name, sample=sample,
        )  # fmt: skip
        domain, base, held_out = states_of(
            model, material.windows, cache_folder, layers=layers, on_step=on_step
        )
        # Reading is what takes long; a fit's steps are too small to be shared (docs/decisions.md).
        delta = group.once(
            lambda: fit_delta(model, domain, anchor_text(model, base, held_out), material.name, fit, on_step)
        )
    delta.record["texts"] = material.hashes
    delta.record["window"] = window
    if not sample:
        return delta
    kept = hold_out(material.windows[0], fit.held_out)
    return replace(delta, sample=sample_texts(kept, material.documents, reader(model, tokenizer)))
