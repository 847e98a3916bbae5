import math

import pytest
import torch

import tiny
from merge import lape
from tether.errors import ConfigError
from tether.merge.paths import sample_paths
from tether.merge.study import common_lengths, study_lengths
from tether.merge.verdicts import judge
from tether.merge.weighting import path_weights

MODULE = ("mlp.up_proj",)


@pytest.fixture(scope="module")
def model():
    return tiny.backbone("llama").double()


@pytest.fixture(scope="module")
def bank(model):
    return sample_paths(model, lape.probes(3), paths=8, shortest=16, longest=16)


@pytest.fixture(scope="module")
def study(model, bank):
    return study_lengths(model, bank, lengths=(4, 8, 16), shortest=2, families=MODULE)


def outputs(model, bank, sample, path):
    prompt, length = bank.probes[sample].input_ids, int(bank.lengths[sample, path])
    whole = torch.cat([prompt, bank.tokens[sample, path, :length]])
    found = []
    handles = [
        layer.mlp.up_proj.register_forward_hook(
            lambda m, a, y: found.append(y[0, len(prompt) - 1 :].detach())
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=whole[None, :-1])
    for handle in handles:
        handle.remove()
    return torch.cat(found, -1)


def phi(model, bank, lengths, form):
    total = 0
    weights = path_weights(bank.log_prob, lengths, form)
    for sample in range(3):
        for path in range(8):
            y = outputs(model, bank, sample, path)
            w = weights.weights[sample, path, : len(y)].unsqueeze(-1)
            total = total + math.exp(float(weights.log_mass[sample])) * (w * y).sum(0) / 3
    return total


@pytest.mark.parametrize("form", ["position", "paper", "sum", "mean", "self-normalised"])
def test_changes_are_those_of_encodings_computed_path_by_path(model, bank, study, form):
    uniform = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    found = [phi(model, bank, common_lengths(bank, n, 2, uniform), form) for n in (4, 8, 16)]
    row = study.row(form)
    for i in range(2):
        expected = float((found[i] - found[2]).norm() / found[2].norm())
        assert row.change[i] == pytest.approx(expected, rel=1e-3)
    assert row.size == pytest.approx(float(found[0].norm() / found[2].norm()), rel=1e-3)


def test_lengths_are_common_and_within_their_range(bank):
    uniform = torch.rand(3, 8)
    short, long = (common_lengths(bank, n, 2, uniform) for n in (4, 16))
    assert bool((short <= long).all())
    assert int(short.min()) >= 1
    assert int(short.max()) <= 4


def test_theorem_is_judged_claim_by_claim(study):
    verdict = {claim.name: claim.verdict for claim in study.claims}
    assert len(verdict) == 8
    assert set(verdict.values()) <= {"holds", "violated", "undecided"}
    # gamma 0.99 over 12 tokens bounds nothing, whatever was measured.
    assert verdict["document's sums: bias O(gamma^len_max), gamma 0.99"] != "holds"
    assert study.effective[-1] < study.effective[0]


def test_verdicts_follow_the_figures(study):
    def judged(**changes):
        rows = [row._replace(**changes) if row.weighting == "position" else row for row in study.rows]
        claims = judge(study._replace(rows=tuple(rows)))
        return {
            claim.name.split(": ")[1][:4]: claim.verdict for claim in claims if claim.name.startswith("posi")
        }

    still = judged(change=(0.01, 0.01), noise=0.02, rate=1.4)
    assert still == {"phi[": "holds", "bias": "holds", "samp": "holds", "move": "holds"}
    noisy = judged(change=(0.3, 0.2), noise=0.5, rate=4.0)
    assert noisy["phi["] == noisy["bias"] == "undecided"
    assert noisy["samp"] == "violated"
    moving = judged(change=(9.0, 9.0), noise=0.02, rate=1.5)
    assert moving == {"phi[": "violated", "bias": "violated", "samp": "holds", "move": "violated"}


def test_underflow_is_counted(bank, model):
    lower = bank._replace(log_prob=bank.log_prob - 20)
    found = study_lengths(model, lower, lengths=(4, 16), shortest=2, families=MODULE)
    assert found.underflow[1] > found.underflow[0] >= 0
    assert all(math.isfinite(value) for row in found.rows for value in (*row.change, row.size, row.noise))


def test_bad_requests(model, bank):
    with pytest.raises(ConfigError, match="ascending"):
        study_lengths(model, bank, lengths=(16, 8))
    with pytest.raises(ConfigError, match="paths of 16 tokens"):
        study_lengths(model, bank, lengths=(8, 32))
