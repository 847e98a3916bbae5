import pytest
import torch

from tether.causal.gates import gate_distance, gate_open, window_mean
from tether.delta.gate import fit_gate
from tether.errors import ConfigError


def open_rate(gate, cache):
    rates = []
    for batch in cache.windows.batches(8):
        states = torch.zeros(*batch.mask.shape, cache.states.shape[1])
        states[batch.mask] = cache.states[cache.windows.positions(batch)].float()
        mean, count, _ = window_mean(states, batch.mask, len(gate.threshold))
        distance = gate_distance(mean, gate.center[None], gate.whitening[None])
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
    assert gate.whitening.shape == (12, 32)
    assert gate.threshold.shape == (8,)
    gram = gate.whitening.double() @ gate.whitening.double().T
    assert bool((gram - torch.diag(gram.diagonal())).abs().max() < 1e-3 * gram.max())


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
