"""What budgets alone allow, against fusions of random deltas over random contexts."""

import mpmath as mp
import pytest
import torch

import oracles
import tiny
from tether.cauchy.charts import CHARTS
from tether.cauchy.charts import fuse as fuse_moves
from tether.cauchy.divergence import drift
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.ledger import keep_ledger
from tether.delta.planned import budget_figures, planned_drift
from tether.errors import ConfigError
from tether.theory.plan import plan_fusion

WEIGHTS = (
    (1.0, 1.0, 1.0),
    (0.5, 1.0, 2.0),
    (0.3, 0.0, 0.0),
    (3.0, 0.0, 0.0),
    (0.2, 0.2, 0.1),
    (-1.0, 0.5, -2.0),
)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_mean_drifts_of_random_fusions_stay_within_the_plan(chart, weights, generator):
    largest = 0.0
    for _ in range(10):
        # Few contexts of very different sizes: means that single contexts carry.
        size = 10 ** (4 * torch.rand(2, 3, 5, 1, generator=generator, dtype=torch.float64) - 2)
        x, y = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) * size
        x = x.clamp(-20, 20)
        means = drift(x, y).sum(-1).mean(-1).tolist()
        for gates in ("none", "hard", "shares"):
            factors = torch.rand(3, 5, generator=generator, dtype=torch.float64)
            if gates != "shares":
                factors = torch.ones_like(factors) if gates == "none" else (factors > 0.5).double()
            moved = fuse_moves(x, y, torch.tensor(weights).double()[:, None] * factors, chart)
            allowed = planned_drift(means, weights, chart, shared=gates == "shares")
            if chart == "linear" and min(weights) < 0:
                assert allowed is None
                continue
            ratio = float(drift(*moved).sum(-1).mean()) / allowed
            assert ratio <= 1 + 1e-6  # rounding of the coordinates of large moves
            largest = max(largest, ratio)
    assert largest > 0.01 or (chart == "linear" and min(weights) < 0)


@pytest.mark.parametrize("chart", CHARTS)
def test_with_weights_of_one_it_is_the_plan_itself(chart):
    assert planned_drift([0.1, 0.2, 0.3], [1.0] * 3, chart) == plan_fusion([0.1, 0.2, 0.3], None, chart).bound


def test_equal_moves_attain_it_in_rootkl():
    x, y = torch.full((2, 1, 1), 0.3).double(), torch.full((2, 1, 1), 0.5).double()
    moved = drift(*fuse_moves(x, y, torch.tensor([1.0, 2.0]).double(), "rootkl")).sum()
    alone = float(drift(x[0], y[0]).sum())
    assert planned_drift([alone, alone], [1.0, 2.0], "rootkl") == pytest.approx(float(moved), rel=1e-9)


@pytest.mark.parametrize(("weight", "gate", "factor"), [(0.5, 1.0, 1.5), (0.2, 1.0, 1.8), (1.0, 0.02, 2.0)])
def test_a_small_weight_in_the_linear_chart_attains_it(weight, gate, factor):
    """A law that becomes far wider and moves far: at a share a of it the drift is 2 - a times as large."""
    x = mp.mpf(5000)
    alone, moved = oracles.drift(x, mp.exp(x)), oracles.drift(*([weight * gate * v for v in (x, mp.exp(x))]))
    allowed = planned_drift([float(alone)], [weight], "linear", shared=gate < 1)
    assert allowed == pytest.approx(factor * float(alone), rel=1e-9)
    assert 0.98 * allowed <= float(moved) <= allowed


def test_bad_numbers_are_refused():
    for means, weights in (([-0.1], [1.0]), ([0.1], [float("nan")]), ([0.1, 0.2], [1.0])):
        with pytest.raises(ConfigError):
            planned_drift(means, weights, "symmetric")


def test_a_fusion_carries_what_its_plan_needs():
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    deltas = {}
    for seed, weight in ((0, 1.0), (1, 0.5)):
        generator = torch.Generator().manual_seed(seed)
        made = Delta(
            name=f"d{seed}",
            chart="symmetric",
            first=None,
            second=torch.randn(32, 32, generator=generator) / 32,
            gate=None,
            base=model.config.base_fingerprint,
        )
        # Its mean drift on the very text of the ledger is what it was allowed.
        alone = keep_ledger(fuse(model, {made: 1.0}, by="sum"), tiny.tokenizer(), tiny.documents("words", 6))[
            "total"
        ]
        deltas[Delta(**{**made.__dict__, "record": {"latent_base": alone["measured"]}})] = weight
    fused = fuse(model, deltas, by="sum")
    figures = keep_ledger(fused, tiny.tokenizer(), tiny.documents("words", 6))
    total, planned = figures["total"], figures["budgets"]
    assert planned["measured"] == total["measured"] <= total["allowed"] <= planned["allowed"]
    means = [delta.record["latent_base"] for delta in deltas]
    assert planned["allowed"] == plan_fusion(means, None).bound
    held = {**fused.config.fusion, "leash": {"nats": 1e-3, "metric": "latent"}}
    assert budget_figures(held, 1e-3)["ratio"] == 1.0
    unknown = {**held, "budgets": [{"metric": "softmax", "budget": 0.1}] * 2}
    assert budget_figures(unknown, 1e-3) is None
