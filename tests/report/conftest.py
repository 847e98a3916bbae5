"""A small synthetic run, as the demo would hand it to the report."""

import numpy as np
import pytest

COLUMNS = ["base", "law", "code", "gated", "linear"]
TEXTS = {"law": "domain", "code": "domain", "news": "base", "wiki": "base"}
TOKENS = 60


def make_results():
    """Numbers that a small run could have given: every check holds."""
    change = {
        "law": {"law": -0.3, "code": 0.02, "gated": -0.29, "linear": -0.1},
        "code": {"law": 0.04, "code": -0.2, "gated": -0.19, "linear": 0.5},
        "news": {"law": 0.01, "code": 0.02, "gated": 0.0, "linear": 0.07},
        "wiki": {"law": 0.01, "code": 0.03, "gated": 0.0, "linear": 0.08},
    }
    kl = {"law": 0.0456, "code": 0.0443, "gated": 3e-7, "linear": 0.151}
    base = {"law": 2.7404, "code": 2.2101, "news": 3.12, "wiki": 2.88}

    def cell(text, column):
        mean = change[text][column]
        documents = {
            "quantile": 0.95,
            "confidence": 0.95,
            "n": 8,
            "at_most": None,
            "reason": "needs 59 documents",
        }
        certified = documents | {"n": 60, "at_most": 0.0123}
        return {
            "nll": base[text] + mean,
            "nll_change": {"mean": mean, "low": mean - 0.015, "high": mean + 0.015},
            "softmax_kl": {"mean": kl[column], "documents": certified if text == "wiki" else documents},
            "latent_drift": {"mean": kl[column] * 7, "documents": documents},
        }

    curve = [
        {"step": s, "steps": 30, "nll": 3 - s / 20, "drift": 0.0016 * s, "multiplier": 5.0}
        for s in (10, 20, 30)
    ]
    delta = {"budget": 0.05, "metric": "softmax", "drift_base": 0.0489, "drift_tokens": 2048, "tokens": 3000}
    return {
        "title": "Two domains & a <leash>",
        "base": "tiny-lm",
        "budget": {"value": 0.05, "metric": "softmax"},
        "texts": {
            name: {
                "kind": kind,
                "title": f"{name.title()} text",
                "documents": 8,
                "tokens": TOKENS,
                "seen": "held-out documents",
            }
            for name, kind in TEXTS.items()
        },
        "columns": COLUMNS,
        "column_titles": {
            "base": "base", "law": "law delta", "code": "code | delta",
            "gated": "gated fusion", "linear": "ungated $x$ & <linear>",
        },
        "cells": {
            text: {"base": {"nll": base[text]}} | {column: cell(text, column) for column in COLUMNS[1:]}
            for text in TEXTS
        },
        "base_text": {c: {"softmax_kl": kl[c], "latent_drift": kl[c] * 7} for c in COLUMNS[1:]},
        "deltas": {name: delta | {"curve": curve} for name in ("law", "code")},
        "samples": [
            {"domain": "law", "prompt": "<script>alert(1)</script>", "base": "\n  two\n", "fused": "b </pre>"}
        ],
        "bounds": {"contexts": 480, "violations": 0},
        "certificate": "certificate.json",
        "verify": "tether verify certificate.json",
        "usage": {
            "learn": {"cpu_seconds": 48.25, "wall_seconds": 29.0, "peak_rss": 2_100_000_000},
            "measure": {"cpu_seconds": 1000.0, "wall_seconds": 600.5, "peak_rss": 950_000_000},
        },
        "versions": {"tether": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def make_arrays():
    rng = np.random.default_rng(0)
    arrays = {}
    for text in TEXTS:
        bound = rng.lognormal(-2, 1.5, (len(COLUMNS) - 1, TOKENS)).astype(np.float32)
        drift = bound * rng.uniform(0.1, 1, bound.shape).astype(np.float32)
        drift[2, : TOKENS // 2] = bound[2, : TOKENS // 2] = 0
        arrays[text] = {"latent_drift": drift, "bound": bound, "softmax_kl": drift / 10}
    return arrays


@pytest.fixture
def results():
    return make_results()


@pytest.fixture
def arrays():
    return make_arrays()


@pytest.fixture(scope="session")
def run():
    """One run to share among tests that change nothing."""
    return make_results(), make_arrays()
