"""Per-token measurements -> the figures of a table row: means with intervals, quantiles, certified bounds."""

from typing import Any

import numpy as np
from torch import Tensor

from tether.delta.measure import Measurement
from tether.delta.token_law import token_law_figures
from tether.errors import CertificateError
from tether.stats import bootstrap_mean, bootstrap_quantile, quantile_upper_bound, samples_needed

__all__ = ["mean_figures", "quantile_figures", "spread_figures", "summarise"]

TOLERANCE = 1e-5
"""Relative rounding allowed when a float32 drift, a sum over hundreds of dimensions, meets its bound."""


def summarise(
    result: Measurement, row: int, *, quantile: float = 0.95, confidence: float = 0.95
) -> dict[str, Any]:
    """Condense one variant's results on one text.

    Args:
        result: of `measure`.
        row: which variant.
        quantile: share of documents that the certified bound must cover.
        confidence: of intervals and of the certified bound.

    Returns:
        JSON-able figures, in nats: nll of base and variant; softmax_kl with its document-bootstrap
        interval; latent_drift; for both the certified document quantile (None with a reason where there are
        too few documents); the a-priori bound with the number of contexts that violate it; what the drift
        allows the law of tokens; the share of contexts that the leash pulled back; gate on-rates.
    """
    documents = result.documents.numpy()
    scored = result.scored.numpy()
    kl, drift, bound = (values[row] for values in (result.softmax_kl, result.latent_drift, result.bound))
    violated = drift > bound * (1 + TOLERANCE) + 1e-9
    positive = bound > 0
    return {
        "tokens": len(documents),
        "documents": int(np.unique(documents).size),
        "nll_base": float(result.base_nll.double().mean()),
        "nll": float(result.nll[row].double().mean()),
        "nll_change": mean_figures(result.nll[row] - result.base_nll, documents[scored], confidence),
        "softmax_kl": spread_figures(kl, documents, quantile, confidence),
        "latent_drift": spread_figures(drift, documents, quantile, confidence),
        "bound": {
            "contexts": len(documents),
            "violations": int(violated.sum()),
            "mean_allowed": float(bound.double().mean()),
            "largest_ratio": float((drift[positive] / bound[positive]).max())
            if bool(positive.any())
            else 0.0,
        },
        "token_law": token_law_figures(drift, result.documents),
        "leash_pulled": float((result.leash[row] < 1).double().mean()),
        "gates_open": [float(rate) for rate in result.gates.double().mean(-1)],
    }


def mean_figures(values: Tensor, documents: Any, confidence: float) -> dict[str, float | None]:
    """Give a mean with its interval over the draw of documents.

    Args:
        values: shape (n,).
        documents: document of each, shape (n,).
        confidence: of the interval.

    Returns:
        mean, low and high; the last two None where there is one document.
    """
    double = values.double().numpy()
    if len(np.unique(documents)) < 2:
        # One document says nothing about how documents differ.
        return {"mean": float(double.mean()), "low": None, "high": None}
    interval = bootstrap_mean(double, documents, confidence, np.random.default_rng(0))
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high}


def quantile_figures(values: Tensor, documents: Any, quantile: float, confidence: float) -> dict[str, Any]:
    """Give a quantile of the values with its interval over the draw of documents, in the form of `mean_figures`.

    Args:
        values: shape (n,).
        documents: document of each, shape (n,).
        quantile: which, in (0, 1).
        confidence: of the interval.

    Returns:
        quantile; mean, which holds the quantile's value, low and high; the last two None where there is one document.
    """
    double = values.double().numpy()
    if len(np.unique(documents)) < 2:
        rank = int(np.ceil(quantile * len(double))) - 1
        return {"quantile": quantile, "mean": float(np.sort(double)[rank]), "low": None, "high": None}
    interval = bootstrap_quantile(double, documents, quantile, confidence, np.random.default_rng(0))
    return {"quantile": quantile, "mean": interval.estimate, "low": interval.low, "high": interval.high}


def spread_figures(values: Tensor, documents: Any, quantile: float, confidence: float) -> dict[str, Any]:
    """Give a mean, quantiles of the values, and the certified quantile of the documents' means.

    Args:
        values: shape (n,).
        documents: document of each, shape (n,).
        quantile: share of documents that the certified bound must cover.
        confidence: of the interval and of the certified bound.

    Returns:
        mean, low, high, p99, max and documents.
    """
    figures: dict[str, Any] = mean_figures(values, documents, confidence)
    double = values.double().numpy()
    figures |= {"p99": float(np.quantile(double, 0.99)), "max": float(double.max())}
    totals = np.bincount(documents, weights=double)
    counts = np.bincount(documents)
    per_document = totals[counts > 0] / counts[counts > 0]
    figures["documents"] = {"quantile": quantile, "confidence": confidence, "n": len(per_document)}
    try:
        figures["documents"]["at_most"] = float(quantile_upper_bound(per_document, quantile, confidence))
    except CertificateError:
        needed = samples_needed(quantile, confidence)
        figures["documents"] |= {"at_most": None, "reason": f"needs {needed} documents"}
    return figures
