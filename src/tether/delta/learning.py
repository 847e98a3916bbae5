"""Learn a domain as a delta of the abduction head, from cached states, under a drift budget."""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.delta.budget import AIM, METRICS, Budget, Head, Reference, meet_budget, token_drift
from tether.delta.cache import StateCache, cached
from tether.delta.delta import Delta
from tether.delta.gate import fit_gate
from tether.delta.objective import CandidateSoftmax, mean_probability, output_fisher
from tether.delta.training import Fit, Step, Training
from tether.delta.windows import read_documents, window_text
from tether.errors import CheckpointError, ConfigError
from tether.store.manifest import versions

__all__ = ["Anchor", "anchor_text", "check_options", "fit_delta", "learn_delta"]

HELD_OUT = 0.4
"""Share of the base documents on which the budget is met; the fit sees the others."""


def reference(model: Any, states: Tensor) -> Reference:
    """Evaluate the base's abduction at some states.

    Args:
        model: a CausalQwenForCausalLM.
        states: z, shape (n, H), float32.

    Returns:
        States with loc and scale of U.
    """
    with torch.no_grad():
        loc, log_scale = model.abduction(states.to(model.action.weight.dtype))
    return Reference(states, loc, log_scale.exp())


class Anchor(NamedTuple):
    """Base text made ready for fits; one serves any number of domains.

    Attributes:
        fitted: base quantities at tokens that fits see.
        probe: at tokens of other documents, on which budgets are met.
        fisher: output Fisher at some of the fitted tokens, shape (C, C).
        base: fingerprint of the backbone.
    """

    fitted: Reference
    probe: Reference
    fisher: Tensor
    base: str


def anchor_text(model: Any, base: StateCache, held_out: StateCache, *, tokens: int = 1024) -> Anchor:
    """Make base text ready for fits.

    Cost: `tokens` products with the (V, C) head, about 3 CPU seconds for a 135M model.

    Args:
        model: the base.
        base: states of base text for the constraint.
        held_out: states of other base text on which budgets are met.
        tokens: for the Fisher.

    Returns:
        The anchor.

    Raises:
        CheckpointError: states of another backbone than the model's.
    """  # noqa: DOC502 - raised by _check_base
    for cache in (base, held_out):
        _check_base(model, cache)
    fitted = reference(model, base.states.float())
    fisher = output_fisher(model.action.weight.detach(), fitted.some(tokens).loc)
    return Anchor(fitted, reference(model, held_out.states.float()), fisher, base.base)


def _check_base(model: Any, cache: StateCache) -> None:
    if cache.base != model.config.base_fingerprint:
        raise CheckpointError(
            f"cached states are of backbone {cache.base[:19]}..., the model's is "
            f"{str(model.config.base_fingerprint)[:19]}...: delete the cache and run again"
        )


def fit_delta(
    model: Any, domain: StateCache, anchor: Anchor, name: str, fit: Fit, on_step: Step | None = None
) -> Delta:
    """Fit one delta from cached states; the model itself is not touched.

    Minimises domain NLL subject to mean drift on base text at most the budget: dual ascent on a multiplier
    during the fit, then one factor on the delta so that the drift *measured* on held-out base text is within
    5 % below the budget. In metric `softmax` the constraint inside the fit is the Fisher form, calibrated
    once by a measured KL on the way.

    Cost: epochs x tokens x (candidates + sampled) x C for the loss, and probe x V x C for each of two or
    three full-softmax measurements.

    Args:
        model: the base.
        domain: states of the domain's text.
        anchor: base text, from `anchor_text`.
        name: the domain.
        fit: options.
        on_step: called with step, steps, nll, drift and multiplier.

    Returns:
        The delta with its record.

    Raises:
        CheckpointError: states of another backbone than the model's.
        ConfigError: the model has a class bias.
    """  # noqa: DOC502 - raised by _check_base
    _check_base(model, domain)
    if model.action.bias is not None:
        raise ConfigError(
            "this model's classes have a bias (an added <NUM>), which fits do not take into account: learn on the "
            "model before numbers are added; a delta fits both"
        )
    started = time.process_time()
    generator = torch.Generator().manual_seed(fit.seed)
    states, targets = domain.scored()
    at, weight = reference(model, states), model.action.weight.detach()
    prob = mean_probability(weight, at.some(fit.probe // 4).loc)
    # What the base expects and what the text has, half and half: both belong into the exact part.
    counts = torch.bincount(targets, minlength=len(weight)).to(prob) / len(targets)
    loss = CandidateSoftmax(weight, prob + counts, size=fit.candidates, sampled=fit.sampled)
    training = Training(fit, at, targets, anchor.fitted, loss, anchor.fisher, generator)
    needs = {"weight": weight, "fisher": anchor.fisher}
    some = anchor.probe.some(fit.probe // 3)
    head = training.run(lambda head: float(token_drift("softmax", head, some, **needs).mean()), on_step)
    record: dict[str, Any] = {
        "budget": fit.budget.value,
        "metric": fit.budget.metric,
        "penalty": fit.budget.penalty,
        "multiplier": training.multiplier,
        "curve": training.curve,
        "tokens": len(targets),
        "versions": versions(),
    }
    if fit.budget.value is not None:
        head, met = _meet(head, anchor, fit, needs)
        record |= met
    aside = at.some(fit.probe // 6)
    record["drift_domain"] = {
        metric: float(token_drift(metric, head, aside, **needs).mean()) for metric in METRICS
    }
    gate = fit_gate(domain) if fit.gate else None
    record["cpu_seconds"] = time.process_time() - started
    first = None if head.first is None else head.first.contiguous()
    second = head.second.contiguous()
    return Delta(
        name=name, chart=fit.chart, first=first, second=second, gate=gate, base=domain.base, record=record
    )


def _meet(head: Head, anchor: Anchor, fit: Fit, needs: dict[str, Tensor]) -> tuple[Head, dict[str, Any]]:
    metric = fit.budget.metric
    probe = anchor.probe.some(fit.probe) if metric == "softmax" else anchor.probe

    def mean(metric: str, factor: float, at: Reference) -> float:
        return float(token_drift(metric, head.scaled(factor), at, **needs).mean())

    # Each full measurement is dear. How fast drift grows along the ray is learnt from a cheap form of it, and
    # where to begin from a third of the tokens, corrected by what that form says those are of the whole.
    inner = "latent" if metric == "latent" else "fisher"
    full, less = mean(inner, 1.0, probe), mean(inner, 0.9, probe)
    power = math.log(full / less) / math.log(1 / 0.9) if min(full, less) > 0 else 2.0
    value = fit.budget.value or 0.0
    third = probe.some(max(1, len(probe.states) // 3))
    rough = mean(metric, 1.0, third) * full / max(mean(inner, 1.0, third), 1e-30)
    start = (AIM * value / rough) ** (1 / power) if rough > 0 else 1.0
    met = meet_budget(lambda factor: mean(metric, factor, probe), value, start=start, power=power)
    figures = {"factor": met.scale, "drift_base": met.drift, "drift_tokens": len(probe.states)}
    return head.scaled(met.scale), figures


def check_options(
    *texts: Path, budget: float | None, metric: str, penalty: float | None, **options: Any
) -> Fit:
    """Find out what is wrong with options and files before a model is loaded.

    Args:
        texts: files that will be read.
        budget: see `Budget`; ignored with a penalty.
        metric: see `Budget`.
        penalty: see `Budget`.
        options: other fields of `Fit`.

    Returns:
        The options.

    Raises:
        ConfigError: a bad option, or a text that is missing, empty or not readable.
    """  # noqa: DOC502 - raised below
    fit = Fit(
        budget=Budget(value=None if penalty is not None else budget, metric=metric, penalty=penalty),
        **options,
    )
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
        budget: largest mean drift on base text, nats per token, > 0.
        name: the domain; None takes the file's name.
        metric: what the budget is in: `softmax`, `fisher` or `latent`.
        penalty: the source document's plain lambda in place of a budget.
        window: tokens a context.
        tokens: domain tokens to use at most; as many base tokens are used.
        cache_folder: where hidden states are kept for the next fit; None keeps them only for this call.
        on_step: called with progress.
        options: other fields of `Fit`.

    Returns:
        The delta; `save` writes it.

    Raises:
        ConfigError: bad options, or a text missing, empty or shorter than one context.
        CheckpointError: cached states of another backbone.
    """  # noqa: DOC502 - raised by what it calls
    fit = check_options(budget=budget, metric=metric, penalty=penalty, **options)
    path = Path(texts) if isinstance(texts, str | Path) else None
    documents = [read_documents(t) if isinstance(t, str | Path) else list(t) for t in (texts, base_texts)]
    if len(documents[1]) < 2:
        raise ConfigError(
            f"{len(documents[1])} base document: expected at least 2, some for the fit and some to meet the budget on"
        )
    cut = max(1, round(len(documents[1]) * (1 - HELD_OUT)))
    parts = {
        "the domain text": documents[0],
        f"the base text's part for the fit ({1 - HELD_OUT:.0%} of its documents)": documents[1][:cut],
        f"the base text's part to meet the budget on ({HELD_OUT:.0%} of its documents)": documents[1][cut:],
    }
    windows = [
        window_text(part, tokenizer, length=window, tokens=tokens, name=called)
        for called, part in parts.items()
    ]
    with tempfile.TemporaryDirectory(prefix="tether-") as temporary:
        folder = Path(cache_folder) if cache_folder else Path(temporary)
        domain, base, held_out = (cached(model, part, folder, on_step=on_step) for part in windows)
        anchor = anchor_text(model, base, held_out)
        return fit_delta(model, domain, anchor, name or (path.stem if path else "domain"), fit, on_step)
