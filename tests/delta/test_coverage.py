"""A certificate's bound on documents must hold as often as it says, over draws of the documents."""

import math

import numpy as np
import pytest
import torch

import tiny
from tether.delta.certificate import Settings, compose
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.measure import Measurement, Variant, measure
from tether.delta.summary import summarise
from tether.delta.windows import window_text

DRAWS, DOCUMENTS = 200, 80


def redraw(result, numbers):
    """The measurement of a text made of these documents of the measured one, some of them several times."""
    rows = [torch.nonzero(result.documents == int(number)).squeeze(-1) for number in numbers]
    tokens = torch.cat(rows)
    count = len(result.documents)
    place = result.scored.cumsum(0) - 1
    scored = place[tokens[result.scored[tokens]]]
    drawn = {}
    for name in result._fields:
        values = getattr(result, name)
        drawn[name] = values[..., tokens if values.shape[-1] == count else scored]
    drawn["documents"] = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    return Measurement(**drawn)


def certified(fused, result, metric):
    """The certificate's bound for documents, through the certificate itself."""
    figures = {"text": summarise(result, 0)}
    certificate = compose(fused, {"text": ["not needed here"]}, figures, Settings())
    return certificate.figures["text"][metric]["documents"]["at_most"]


def document_means(values, documents):
    totals, counts = np.bincount(documents, weights=values), np.bincount(documents)
    return totals / counts


@pytest.fixture(scope="module")
def fused(model):
    generator = torch.Generator().manual_seed(3)
    delta = Delta(
        name="a",
        chart="symmetric",
        first=torch.randn(32, 32, generator=generator) / 32,
        second=torch.randn(32, 32, generator=generator) / 2,
        gate=None,
        base=model.config.base_fingerprint,
    )
    return fuse(model, {delta: 1.0}, by="sum")


@pytest.mark.parametrize("metric", ["softmax_kl", pytest.param("latent_drift", marks=pytest.mark.slow)])
def test_the_quantile_certificate_covers_the_true_exceedance_rate(fused, tokenizer, metric):
    # Documents of two kinds, so that the drift of a document varies more than within one kind.
    texts = tiny.documents("words", 250, 5) + tiny.documents("digits", 50, 6)
    windows = window_text([text[: 40 + 7 * (i % 9)] for i, text in enumerate(texts)], tokenizer, length=32)
    variant = Variant((1.0,), "symmetric", False)
    result = measure(fused, fused.fusion, windows, [variant])
    everything = document_means(getattr(result, metric)[0].double().numpy(), result.documents.numpy())
    generator = np.random.default_rng(0)
    held, naive = 0, 0
    for _ in range(DRAWS):
        numbers = generator.integers(len(everything), size=DOCUMENTS)
        bound = certified(fused, redraw(result, numbers), metric)
        held += float((everything > bound * (1 + 1e-9)).mean()) <= 0.05
        naive += float((everything > np.quantile(everything[numbers], 0.95)).mean()) <= 0.05
    assert held >= 0.93 * DRAWS
    # The draw's own quantile, which is no bound, fails often: the check is one that can fail.
    assert naive < 0.8 * DRAWS


LAWS = {
    # Each gives a document's mean, and the 95 % quantile of its law.
    "log-normal": (lambda g, n: np.exp(g.standard_normal(n)), math.exp(1.6448536269514722)),
    "mostly closed gates": (lambda g, n: (g.random(n) < 0.2) * g.random(n), 0.75),
    "all closed": (lambda g, n: np.zeros(n), 0.0),
    "cauchy tails": (lambda g, n: np.abs(g.standard_cauchy(n)), math.tan(math.pi / 2 * 0.95)),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_coverage_on_laws_whose_quantile_is_known(fused, law):
    draw, truth = LAWS[law]
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(DRAWS):
        per_document = torch.tensor(draw(generator, DOCUMENTS), dtype=torch.float64)
        # Two tokens a document, one with all of its drift, so that documents and tokens differ.
        kl = torch.stack([2 * per_document, torch.zeros(DOCUMENTS)], dim=-1).reshape(1, -1)
        tokens = kl.shape[1]
        result = Measurement(
            **{name: torch.zeros(1, tokens) for name in Measurement._fields}
            | {
                "documents": torch.arange(DOCUMENTS).repeat_interleave(2),
                "scored": torch.ones(tokens, dtype=torch.bool),
                "base_nll": torch.zeros(tokens),
                "softmax_kl": kl,
            }
        )
        held += certified(fused, result, "softmax_kl") >= truth * (1 - 1e-9)
    assert held >= 0.93 * DRAWS
