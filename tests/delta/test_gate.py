import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from tether.causal.fused import Fusion
from tether.causal.gates import GateStatistics, gate_distance, gate_open, window_mean
from tether.delta.background import write_background
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import Gate, describe_gates, fit_gate, put_gate, take_gate
from tether.delta.stage import SHARES, fit_stage
from tether.errors import ConfigError


def open_rate(gate, cache):
    rates = []
    for batch in cache.windows.batches(8):
        states = torch.zeros(*batch.mask.shape, cache.states.shape[1])
        states[batch.mask] = cache.states[cache.windows.positions(batch)].float()
        mean, count, _ = window_mean(states, batch.mask, len(gate.threshold))
        window = len(gate.threshold)
        statistics = (values[None] for values in (gate.center, gate.whitening, gate.precision))
        distance = gate_distance(mean, count, window, GateStatistics.of(*statistics))
        rates.append(gate_open(distance, count, gate.threshold[None])[0][batch.mask])
    return float(torch.cat(rates).mean())


def test_a_gate_opens_on_its_domain_and_stays_shut_on_other_text(caches):
    gate = fit_gate(caches["digits"], window=16, rank=16)
    assert open_rate(gate, caches["digits"]) > 0.75
    assert open_rate(gate, caches["words"]) < 0.3


def test_the_accepted_share_is_the_quantile_on_documents_not_fitted_on(caches):
    strict = fit_gate(caches["digits"], window=16, rank=16, quantile=0.5)
    assert 0.3 < open_rate(strict, caches["digits"]) < 0.8


def test_whitened_means_have_unit_variance(caches):
    gate = fit_gate(caches["digits"], window=8, rank=12)
    assert gate.whitening.shape == (5, 12, 32)
    assert gate.threshold.shape == (8,)
    gram = gate.whitening[-1].double() @ gate.whitening[-1].double().T
    assert bool((gram - torch.diag(gram.diagonal())).abs().max() < 1e-3 * gram.max())


@pytest.mark.parametrize("count", [40, 400])
def test_no_direction_is_narrower_than_half_precision_can_tell(count, generator):
    """A text that always says the same: its states differ by rounding alone, and one more rounding is no stranger."""
    samples = (3 + 2e-3 * torch.randn(count, 32, generator=generator)).half().float()
    (center, whitening, precision), distance = fit_stage(samples, torch.arange(count) % 4, 8)
    assert float(precision) == pytest.approx(1000.0)
    assert_close(whitening.norm(dim=-1), torch.full((8,), 1000.0).sqrt())
    away = samples.double() - center.double()
    # Distances are under statistics of the other folds, whose centers differ by a fraction of the rounding.
    assert_close(distance.double(), 1000 * away.square().sum(-1), rtol=0.5, atol=1e-4)
    assert float(distance.max()) < 32


def some_documents(cache, count):
    return cache.only(cache.windows.documents.unique()[:count])


def test_statistics_and_threshold_are_those_of_the_dense_formulas(caches):
    few = some_documents(caches["digits"], 6)
    gate = fit_gate(few, window=1, rank=32, quantile=0.9, early=1)
    samples = few.states.double().numpy()
    fold = few.windows.documents.unique(return_inverse=True)[1].numpy() % 4

    def covariance(part, share):
        dense = np.cov(part.T)
        return (1 - share) * dense + share * np.trace(dense) / 32 * np.eye(32)

    found = {}
    for share in SHARES[1:]:  # a covariance of fewer samples than directions has no density
        total, distances = 0.0, np.zeros(len(samples))
        for number in range(4):
            train, out = samples[fold != number], fold == number
            law = stats.multivariate_normal(train.mean(0), covariance(train, share))
            total += law.logpdf(samples[out]).sum()
            away = samples[out] - train.mean(0)
            distances[out] = (away * np.linalg.solve(covariance(train, share), away.T).T).sum(-1)
        found[share] = total, distances
    best = max(found, key=lambda share: found[share][0])
    precision = (gate.whitening[0].T @ gate.whitening[0]).double().numpy()
    np.testing.assert_allclose(precision, np.linalg.inv(covariance(samples, best)), rtol=1e-3, atol=1e-3)
    # 0.9 of the contexts, with a seventh document counted beyond the six.
    place = math.ceil(0.9 * (1 + 1 / 6) * len(samples) - 1e-9) if 0.9 * 7 / 6 < 1 else len(samples)
    assert float(gate.threshold) == pytest.approx(np.sort(found[best][1])[place - 1], rel=1e-4)


def test_a_gate_of_few_documents_opens_on_documents_it_has_not_seen(caches):
    numbers = caches["digits"].windows.documents.unique()
    rates, strange = [], []
    for start in range(0, 40, 8):
        gate = fit_gate(caches["digits"].only(numbers[start : start + 8]), window=16, rank=16, early=1)
        rates.append(
            open_rate(gate, caches["digits"].only(numbers[~torch.isin(numbers, numbers[start : start + 8])]))
        )
        strange.append(open_rate(gate, caches["words"]))
    assert sum(rates) / len(rates) > 0.85
    assert sum(strange) / len(strange) < 0.5


@pytest.fixture(scope="module")
def background(model):
    return write_background(model, texts=64, length=24)


def test_the_background_is_what_the_base_writes(model, background):
    assert background.shape == (64, 24, 32)
    again = write_background(model, texts=64, length=24, at_once=16)
    assert torch.isfinite(again).all()
    # States of the text itself: the first depends on its first token alone, so few values occur often.
    starts = torch.unique(background[:, 0].round(decimals=3), dim=0)
    assert 1 < len(starts) < 64
    with torch.no_grad():
        single = model.backbone(torch.arange(258)[:, None], use_cache=False).last_hidden_state[:, 0]
    assert float(torch.cdist(background[:, 0], single).min(-1).values.max()) < 2e-2


def test_with_a_background_a_gate_opens_early_only_where_the_base_would_not_write(caches, background):
    with_it = fit_gate(caches["digits"], window=16, rank=16, background=background)
    without = fit_gate(caches["digits"], window=16, rank=16)
    assert bool((without.threshold[:7] < 0).all())
    assert bool((with_it.threshold[:7] >= 0).all())
    mask = torch.ones(64, 24, dtype=torch.bool)
    mean, count, _ = window_mean(background, mask, 16)
    statistics = (values[None] for values in (with_it.center, with_it.whitening, with_it.precision))
    distance = gate_distance(mean, count, 16, GateStatistics.of(*statistics))
    opened = gate_open(distance, count, with_it.threshold[None])[0]
    full = float(opened[:, 15:].mean())
    for stage in (slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 8), slice(8, 15)):
        assert float(opened[:, stage].mean()) <= full + 0.02 + 1e-6
    assert open_rate(with_it, caches["digits"]) > open_rate(without, caches["digits"])


def test_gates_of_all_shapes_go_into_a_fusion_and_come_back(model, caches, background):
    gates = {
        "staged": fit_gate(caches["digits"], window=8, rank=12, background=background),
        "plain": Gate(torch.zeros(32), torch.randn(3, 32), torch.full((8,), 9.0)),
    }
    description = {
        "domains": list(gates),
        "native": ["symmetric"] * 2,
        "weights": [1.0, 1.0],
        "chart": "symmetric",
    }
    description |= {"gated": True, "location_only": True} | describe_gates(list(gates.values()))
    fusion = Fusion(32, 32, description)
    z, mask = torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.bool)
    for row, (name, gate) in enumerate(gates.items()):
        put_gate(fusion, row, gate, name)
    mean = window_mean(z, mask, 8)[0]
    distance = (torch.einsum("ph,bth->btp", gates["plain"].whitening, mean)).square().sum(-1)
    assert torch.equal(fusion.gates(z, mask)[0][1], (distance <= 9.0).float())
    again = Fusion(32, 32, description | describe_gates([take_gate(fusion, row) for row in range(2)]))
    for row in range(2):
        put_gate(again, row, take_gate(fusion, row), "again")
    for name, parameter in fusion.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
    with pytest.raises(ConfigError, match="same gate window"):
        put_gate(fusion, 0, Gate(torch.zeros(32), torch.randn(3, 32), torch.full((9,), 9.0)), "delta 'a'")


def test_bad_requests(caches):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        fit_gate(caches["digits"], quantile=1.0)
    windows = caches["digits"].windows
    short = windows._replace(
        starts=windows.starts[:3],
        **{
            name: getattr(windows, name)[: windows.starts[2]]
            for name in ("input_ids", "targets", "documents")
        },
    )
    with pytest.raises(ConfigError, match="at least 4 windows"):
        fit_gate(
            caches["digits"]._replace(windows=short, states=caches["digits"].states[: windows.starts[2]])
        )


def test_a_fusion_with_softmax_gates_shares_each_context(model, caches, background):
    heads = torch.randn(2, 32, 32) / 32
    deltas = [
        Delta(
            name=name,
            chart="symmetric",
            first=None,
            second=head,
            gate=fit_gate(caches[name], window=8, rank=12, background=background),
            base=model.config.base_fingerprint,
        )
        for name, head in zip(("digits", "words"), heads, strict=True)
    ]
    weights = dict.fromkeys(deltas, 1.0)
    shared, single = fuse(model, weights, gate="softmax"), fuse(model, weights, by="sum")
    assert (shared.config.fusion["gate"], single.config.fusion["gate"]) == ("softmax", "one-class")
    z, mask = torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.bool)
    z[0] = caches["digits"].states[:20].float()
    parts, opened = shared.fusion.gates(z, mask)[0], single.fusion.gates(z, mask)[0]
    assert bool((parts <= opened).all())
    torch.testing.assert_close(parts.sum(0), opened.amax(0))
    with pytest.raises(ConfigError, match="one-class, softmax"):
        fuse(model, weights, gate="loudest")
