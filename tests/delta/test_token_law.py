"""What the drift of U allows tokens: against exact token laws, by integration, and by sampling."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch.testing import assert_close

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.token_law import check_token_law, token_law_figures, total_variation_bound
from tether.errors import ConfigError


def cauchy_kl(p, q):
    """KL of two Cauchy laws (loc, scale), by its textbook formula."""
    return math.log(((p[1] + q[1]) ** 2 + (p[0] - q[0]) ** 2) / (4 * p[1] * q[1]))


def test_total_variation_of_cauchy_laws_is_within_its_bound():
    for shift, scale in ((0.01, 1.0), (1.0, 1.0), (0.3, 5.0), (100.0, 0.1), (0.0, 1e4)):

        def gap(angle, shift=shift, scale=scale):
            # Half the distance of densities, in the angle under which the first is 1 / pi.
            u = math.tan(angle)
            return abs(1 - scale * (1 + u * u) / (scale**2 + (u - shift) ** 2)) / (2 * math.pi)

        cuts = sorted({math.atan(shift + scale * k) for k in (-10, -1, 0, 1, 10)})
        moved = quad(gap, -math.pi / 2, math.pi / 2, points=cuts, limit=400)[0]
        bound = float(
            total_variation_bound(torch.tensor(cauchy_kl((0, 1), (shift, scale)), dtype=torch.float64))
        )
        assert 0.2 * bound < moved <= bound <= 1


def test_figures_are_those_of_the_documents():
    drift = torch.tensor([0.02, 0.5, 0.0, 8.0, 0.1])
    figures = token_law_figures(drift, torch.tensor([0, 0, 0, 2, 2]))
    assert figures["kl_at_most"]["mean"] == pytest.approx(float(drift.mean()))
    assert figures["kl_at_most"]["max"] == 8
    tv = [min(math.sqrt(d / 2), math.sqrt(1 - math.exp(-d))) for d in drift.double().tolist()]
    assert figures["total_variation_at_most"]["mean"] == pytest.approx(np.mean(tv))
    assert figures["text_kl_at_most"] == {
        "mean": pytest.approx((0.52 + 8.1) / 2),
        "max": pytest.approx(8.1),
        "tokens": 2.5,
    }


def two_classes(u):
    return (u[:, 0] > 0).long()


def test_the_estimate_is_the_kl_of_two_classes(generator):
    """One dimension, two classes: P(U > 0) = 1/2 + atan(loc / scale) / pi, so the token laws are known."""
    base = torch.tensor([[0.0], [1.0], [-2.0]]), torch.ones(3, 1)
    moved = torch.tensor([[1.0], [-3.0], [-2.0]]), torch.tensor([[1.0], [2.0], [1.0]])
    check = check_token_law(two_classes, base, moved, draws=40_000, generator=generator)
    p, q = (0.5 + (loc / scale).double().atan()[:, 0] / math.pi for loc, scale in (base, moved))
    exact = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert bool(((check.kl - exact).abs() <= 4 * check.kl_error + 1e-3).all())
    assert bool(
        ((check.total_variation - (p - q).abs()).abs() <= 4 * check.total_variation_error + 1e-3).all()
    )
    assert_close(
        check.drift,
        torch.tensor(
            [cauchy_kl((0, 1), (1, 1)), cauchy_kl((1, 1), (-3, 2)), cauchy_kl((-2, 1), (-2, 1))]
        ).double(),
        rtol=1e-6,
        atol=1e-9,
    )
    assert bool((exact <= check.drift).all())
    assert check.violations() == 0


def test_a_wrong_bound_is_found(generator):
    base, moved = torch.zeros(1, 1), torch.full((1, 1), 3.0)
    check = check_token_law(two_classes, (base, base + 1), (moved, base + 1), draws=4000, generator=generator)
    assert check.violations() == 0
    assert check._replace(drift=check.drift / 10).violations() == 1
    with pytest.raises(ConfigError, match="even number"):
        check_token_law(two_classes, (base, base + 1), (moved, base + 1), draws=5, generator=generator)


@pytest.mark.parametrize("leash", [0.05, 0.5, 4.0])
def test_tokens_of_a_fused_model_keep_to_the_bound(generator, leash):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    heads = torch.randn(2, 32, 32, generator=generator) / 8
    delta = Delta(
        name="a",
        chart="symmetric",
        first=heads[0] / 4,
        second=10 * heads[1],
        gate=None,
        base=model.config.base_fingerprint,
    )
    fused = fuse(model, {delta: 1.0}, leash=leash, leash_metric="latent")
    ids = torch.randint(256, (1, 40), generator=generator)
    with torch.no_grad():
        laws = [(out.latent_loc[0], out.latent_log_scale[0].exp()) for out in (model(ids), fused(ids))]
    check = check_token_law(
        lambda u: model.action.score_loc(u).argmax(-1), *laws, draws=2000, generator=generator
    )
    assert check.violations() == 0
    assert float(check.drift.max()) <= leash * (1 + 1e-5)
    assert float(check.drift.median()) > 0.99 * leash
    print(check.kl / check.drift, check.kl_error, check.total_variation)
