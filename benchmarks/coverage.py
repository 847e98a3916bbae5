"""How often the certificate's bound on documents holds, on real text and the real base."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tether.causal.loading import load
from tether.delta.anchor import anchor_text
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.certificate import Settings, compose
from tether.delta.fusion import fuse
from tether.delta.learning import fit_delta
from tether.delta.measure import Measurement, Variant, measure
from tether.delta.summary import summarise
from tether.delta.training import Fit
from tether.delta.windows import window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents

__all__ = ["rows"]

Row = dict[str, Any]

DRAWS = 200
DOCUMENTS = 100
"""Documents a certificate; the order statistic then covers 96.3 % of draws for a law without ties."""
PIECE = 400
"""Characters kept of a base document: the pool is as large as can be measured, so documents are short."""


def rows(*, fast: bool) -> list[Row]:
    """Learn a delta, measure a pool of base documents, certify 200 draws from it.

    Args:
        fast: a fraction of the text.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    model, tokenizer = load("smollm2-135m")
    general = {name: documents(recipe) for name, recipe in BASE_TEXTS.items()}
    tokens, pool = (3_000, 60) if fast else (15_000, 250)
    fitted = [text[:1200] for name in general for text in general[name][pool:][:60]]
    parts = [documents(DOMAINS["tables"]), fitted[::2], fitted[1::2]]
    with tempfile.TemporaryDirectory() as folder:
        caches = [
            cache_states(model, window_text(part, tokenizer, tokens=tokens), Path(folder) / f"{number}.st")
            for number, part in enumerate(parts)
        ]
        anchor = anchor_text(model, *caches[1:])
        delta = fit_delta(model, caches[0], anchor, "tables", Fit(budget=Budget(value=0.05)))
    fused = fuse(model, {delta: 1.0}, by="sum")
    variants = [Variant((1.0,), "symmetric", gated) for gated in (True, False)]
    measured = {}
    for name, texts in general.items():
        windows = window_text(
            [text[:PIECE] for text in texts[:pool]], tokenizer, length=128, per_document=1, name=name
        )
        measured[name] = measure(model, fused.fusion, windows, variants)
    found = []
    for row, called in enumerate(("gated", "ungated")):
        for field in ("softmax_kl", "latent_drift"):
            for name, result in measured.items():
                found.append(_coverage(fused, result, row, field, f"{called} delta, {name}"))
            found.append(_shift(fused, measured, row, field, called))
    return found


def document_means(result: Measurement, row: int, field: str) -> np.ndarray:
    """Mean of each document; documents that gave no window are left out.

    Args:
        result: of `measure`.
        row: which variant.
        field: `softmax_kl` or `latent_drift`.

    Returns:
        Nats, shape (documents,).
    """
    number = torch.unique(result.documents, return_inverse=True)[1].numpy()
    return np.bincount(number, getattr(result, field)[row].double().numpy()) / np.bincount(number)


def certified(fused: Any, result: Measurement, row: int, field: str) -> float:
    """The bound on documents as a certificate states it.

    Args:
        fused: the certified model.
        result: measured on the text.
        row: which variant.
        field: `softmax_kl` or `latent_drift`.

    Returns:
        Nats.
    """
    figures = {"text": summarise(result, row)}
    certificate = compose(fused, {"text": ["drawn from measured documents"]}, figures, Settings())
    return float(certificate.figures["text"][field]["documents"]["at_most"])


def redraw(result: Measurement, numbers: np.ndarray) -> Measurement:
    """Put together what measuring a text of these documents would have given.

    Args:
        result: measured on all documents.
        numbers: documents of the new text, by their rank among those measured; repeats are new documents.

    Returns:
        The measurement of the new text.
    """
    rank = torch.unique(result.documents, return_inverse=True)[1]
    kept = [torch.nonzero(rank == int(number)).squeeze(-1) for number in numbers]
    tokens = torch.cat(kept)
    scored = (result.scored.cumsum(0) - 1)[tokens[result.scored[tokens]]]
    count = len(result.documents)
    drawn = {
        name: values[..., tokens if values.shape[-1] == count else scored]
        for name, values in result._asdict().items()
    }
    drawn["documents"] = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(rows) for rows in kept]))
    return Measurement(**drawn)


def _coverage(fused: Any, result: Measurement, row: int, field: str, case: str) -> Row:
    everything = document_means(result, row, field)
    generator = np.random.default_rng(0)
    held, naive = [], []
    for _ in range(DRAWS):
        numbers = generator.integers(len(everything), size=DOCUMENTS)
        bound = certified(fused, redraw(result, numbers), row, field)
        # The certificate sums tokens in another order than here.
        held.append((everything > bound * (1 + 1e-9)).mean() <= 0.05)
        naive.append((everything > np.quantile(everything[numbers], 0.95)).mean() <= 0.05)
    ours, baseline = float(np.mean(held)), float(np.mean(naive))
    return {
        "case": f"{case}: certificates of {DOCUMENTS} documents drawn from {len(everything)}; baseline: the draw's own "
        "95 % quantile",
        "metric": f"share of draws after which at most 5 % of documents exceed the bound on {field}",
        "ours": ours,
        "baseline": baseline,
        "ratio": ours / baseline if baseline else None,
        "runs": DRAWS,
    }


def _shift(fused: Any, measured: dict[str, Measurement], row: int, field: str, called: str) -> Row:
    """A certificate on one kind of text against documents of the other: what it does not promise."""
    (one, first), (other, second) = measured.items()
    exceed = [
        float((document_means(b, row, field) > certified(fused, a, row, field) * (1 + 1e-9)).mean())
        for a, b in ((first, first), (first, second))
    ]
    return {
        "case": f"{called} delta: certified on {one}, documents of {other} (another kind of text: no promise); "
        f"baseline: documents of {one}",
        "metric": f"share of documents over the bound on {field}",
        "ours": exceed[1],
        "baseline": exceed[0],
        "ratio": exceed[1] / exceed[0] if exceed[0] else None,
        "runs": 1,
    }
