"""Weights of a fusion: the most gain on the domains under a drift budget, certified on text not used for it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tether.causal.fused import Fusion
from tether.delta.budget import Budget, Met
from tether.delta.cache import StateCache
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.material import check_plain, states_of
from tether.delta.problem import BASE_TOKENS, Problem
from tether.delta.solver import minimise_loss
from tether.delta.source import spread
from tether.delta.windows import Windows, reader, window_text
from tether.errors import CertificateError, ConfigError
from tether.stats import clopper_pearson, quantile_upper_bound
from tether.store.documents import read_documents

__all__ = ["Weighed", "optimise_weights", "weigh_texts"]

MOST = 2.0
"""Largest weight, unless another is asked for."""
ROUNDS = 3
"""How often the surrogate is brought to the scale of the measured drift, and the problem solved again."""


class Weighed(NamedTuple):
    """Weights, and how they were found.

    Attributes:
        weights: one a delta, for `tether.fuse`.
        record: JSON-able figures: budget, factor, drift on the text the weights were scaled on, certificate
            from text not used before, loss of each domain with these weights, with all that were tried (equal ones
            at the budget, ones where the budget allows more, each round of the search), and of the base.
    """

    weights: dict[Delta, float]
    record: dict[str, Any]


def optimise_weights(
    model: Any,
    deltas: Sequence[Delta],
    domains: Mapping[str, StateCache],
    base: StateCache,
    *,
    budget: Budget,
    chart: str = "symmetric",
    gated: bool = False,
    most: float = MOST,
    confidence: float = 0.95,
    seed: int = 0,
) -> Weighed:
    """Find the weights with the least mean loss over the domains whose drift on base text is within a budget.

    Base documents are dealt to three parts. On the first, a convex surrogate of the drift of each context is
    a quadratic form in the weights, `a^T G(h) a`, with G the N x N inner products of the deltas' moves; its
    mean, or the mean of its largest values (CVaR, at or above the quantile), is held under the budget while
    the loss is minimised. On the second, one factor on the weights brings the measured statistic to 95 to
    100 % of the budget, by explicit evaluation at every factor tried. On the third, one context a document
    gives a certificate by order statistics.

    Cost: one evaluation of every delta at 2,048 domain tokens and 1,024 base contexts, then N^2 per context
    and step; measuring costs one fused evaluation whatever N.

    Args:
        model: the base.
        deltas: N >= 1 deltas of distinct names.
        domains: text of each domain by the delta's name, on which its loss is taken; best not the text it was
            learnt from.
        base: general text, of at least 6 documents.
        budget: the limit; its `stretch` is not used.
        chart: in which the deltas are added.
        gated: whether gates act.
        most: largest weight, > 0; weights are in [0, most].
        confidence: of the certificate.
        seed: of sampled classes and contexts.

    Returns:
        Weights with their record.

    Raises:
        ConfigError: a domain without text, a penalty or a hard budget, too few base documents, or text
            cached with other layers than the deltas read.
    """
    _check(deltas, domains, base, budget, most)
    generator = torch.Generator().manual_seed(seed)
    fused = fuse(model, dict.fromkeys(deltas, 1.0), chart=chart, gated=gated)
    if not isinstance(fused.fusion, Fusion):
        raise ConfigError("expected a model that can hold deltas")
    problem = Problem(model, fused.fusion, budget)
    numbers = base.windows.documents.unique()
    fitted, chosen, certified = (base.only(numbers[part::3]) for part in range(3))
    problem.follow(fitted, [domains[delta.name] for delta in deltas], generator)
    scaled = problem.contexts(chosen, spread(len(chosen.windows.input_ids), BASE_TOKENS))
    ones = np.ones(len(deltas))
    equal = problem.scale(ones, scaled, most)
    # Not convex, so a search can end above what needs none, and a budget spent to the full can cost a domain.
    tried = {"equal": (equal.scale * ones, equal)}
    if equal.scale > 1:
        tried["unit"] = ones, Met(1.0, float(budget.statistic(problem.drift(ones, scaled))), 1)
    weights = equal.scale * ones
    for number in range(ROUNDS):
        problem.linearise(weights)
        # What the surrogate says where the measured drift is the budget.
        limit = float(problem.surrogate(torch.tensor(weights))) or float(budget.value or 0.0)
        weights = minimise_loss(problem, limit, most, weights)
        met = problem.scale(weights, scaled, most)
        weights = weights * met.scale
        tried[f"round {number + 1}"] = weights, met
    losses = {"base": problem.losses(0 * ones)} | {
        name: problem.losses(values) for name, (values, _) in tried.items()
    }
    best = min(tried, key=lambda name: sum(losses[name]))
    weights, met = tried[best]
    losses["optimised"] = losses[best]
    record = {
        "budget": budget.value,
        "metric": budget.metric,
        "quantile": budget.quantile,
        "chart": chart,
        "gated": gated,
        "weights": [float(weight) for weight in weights],
        "chosen": best,
        "drift": met.drift,
        "drift_tokens": len(scaled.targets),
        "equal_weight": equal.scale,
        "equal_drift": equal.drift,
        "losses": {name: dict(zip(problem.names, values, strict=True)) for name, values in losses.items()},
        "certificate": _certify(problem, weights, certified, confidence, generator),
    }
    return Weighed({d: float(w) for d, w in zip(deltas, weights, strict=True)}, record)


def _check(
    deltas: Sequence[Delta],
    domains: Mapping[str, StateCache],
    base: StateCache,
    budget: Budget,
    most: float,
) -> None:
    _check_asked(deltas, domains, budget, most)
    _check_base(base.windows)
    layers = tuple(sorted({layer for delta in deltas for layer in delta.layers}))
    for name, cache in [("the base text", base), *domains.items()]:
        if cache.layers != layers:
            raise ConfigError(
                f"{name} was cached with the layers {list(cache.layers)}, the deltas together read {list(layers)}: "
                "cache it with those"
            )


def _check_asked(deltas: Sequence[Delta], domains: Mapping[str, Any], budget: Budget, most: float) -> None:
    if missing := [delta.name for delta in deltas if delta.name not in domains]:
        raise ConfigError(f"no text for {', '.join(missing)}: expected states of every delta's domain")
    if budget.value is None or budget.hard:
        raise ConfigError("expected a budget on the mean or a quantile of the drift on base text")
    if not most > 0:
        raise ConfigError(f"most={most}: expected a largest weight > 0")


def _check_base(windows: Windows) -> None:
    count = len(windows.documents.unique())
    if count < 6:
        raise ConfigError(
            f"{count} base documents: expected at least 6, two each to fit, to scale and to certify on; a plain file "
            "is one, JSON lines are one each"
        )


def _certify(
    problem: Problem,
    weights: np.ndarray[Any, Any],
    cache: StateCache,
    confidence: float,
    generator: torch.Generator,
) -> dict[str, Any]:
    # Quantile and exceedance rate from one random context of each document: those are independent.
    documents = cache.windows.documents
    order = torch.randperm(len(documents), generator=generator)
    # The first of each document in a random order.
    picked = torch.tensor(np.unique(documents[order].numpy(), return_index=True)[1])
    here = problem.contexts(cache, order[picked])
    values = problem.drift(weights, here).double().numpy()
    quantile, value = problem.budget.quantile or 0.95, float(problem.budget.value or 0.0)
    over = clopper_pearson(int((values > value).sum()), len(values), confidence)
    figures: dict[str, Any] = {
        "documents": len(values),
        "mean": float(values.mean()),
        "confidence": confidence,
        "quantile": quantile,
        "exceedance": {"of": value, "share": over.estimate, "at_most": over.high},
    }
    try:
        figures["at_most"] = quantile_upper_bound(values, quantile, confidence)
    except CertificateError as error:
        figures |= {"at_most": None, "reason": str(error)}
    return figures


def weigh_texts(
    model: Any,
    tokenizer: Any,
    deltas: Sequence[Delta],
    texts: Mapping[str, str | Path | Sequence[str]],
    base_texts: str | Path | Sequence[str],
    *,
    budget: Budget,
    window: int = 256,
    tokens: int | None = None,
    cache_folder: str | Path | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
    **options: Any,
) -> Weighed:
    """Find the weights of a fusion from text; see `optimise_weights`.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        deltas: what to fuse.
        texts: text of each domain by the delta's name: a file or a list of documents.
        base_texts: general text, likewise.
        budget: of the drift on base text.
        window: tokens a context.
        tokens: of each domain at most; three times as many of the base.
        cache_folder: where hidden states are kept; None keeps them only for this call.
        on_step: called with `done` and `total` tokens of the text that is read.
        options: `chart`, `gated`, `most`, `confidence`, `seed`.

    Returns:
        Weights with their record.

    Raises:
        ConfigError: a text missing, empty or shorter than one context, or what `optimise_weights` refuses.
    """  # noqa: DOC502 - raised by what it calls
    check_plain(model)
    # What is wrong with the deltas is found before any text is read by the model.
    _check_asked(deltas, texts, budget, options.get("most", MOST))
    fuse(
        model,
        dict.fromkeys(deltas, 1.0),
        chart=options.get("chart", "symmetric"),
        gated=options.get("gated", False),
    )
    named = {"the base text": base_texts, **texts}
    read = {n: read_documents(t) if isinstance(t, str | Path) else list(t) for n, t in named.items()}
    layers = sorted({layer for delta in deltas for layer in delta.layers})
    limits = {name: tokens and tokens * (1 if name in texts else 3) for name in read}
    tokenizer = reader(model, tokenizer)
    windows = {
        name: window_text(documents, tokenizer, length=window, tokens=limits[name], name=name)
        for name, documents in read.items()
    }
    _check_base(windows["the base text"])
    with states_of(model, list(windows.values()), cache_folder, layers=layers, on_step=on_step) as states:
        base, *own = states
        caches = dict(zip(texts, own, strict=True))
        return optimise_weights(model, deltas, caches, base, budget=budget, **options)
