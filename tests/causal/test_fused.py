import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.cauchy.charts import CHARTS
from tether.causal.fused import Fusion
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import Gate
from tether.errors import ConfigError

H = 32


def random_delta(model, name, seed, chart="symmetric", size=0.3, window=4):
    generator = torch.Generator().manual_seed(seed)
    first, second = (size * torch.randn(H, H, generator=generator) / H for _ in range(2))
    whitening = torch.randn(3, H, generator=generator)
    gate = Gate(torch.zeros(H), whitening, torch.linspace(200.0, 40.0, window))
    return Delta(
        name=name,
        chart=chart,
        first=first,
        second=second,
        gate=gate,
        base=model.config.base_fingerprint,
        record={},
    )


@pytest.fixture
def model():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone())


@pytest.fixture
def ids(generator):
    return torch.randint(256, (3, 17), generator=generator)


def law(model, ids):
    with torch.no_grad():
        output = model(input_ids=ids)
    return output.latent_loc, output.latent_log_scale


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("native", ["symmetric", "linear"])
def test_one_delta_with_weight_one_is_itself_in_every_chart(model, ids, chart, native):
    delta = random_delta(model, "a", 1, native)
    loc, log_scale = law(model, ids)
    z = model.backbone(ids).last_hidden_state.detach()
    first, second = z @ delta.first.T, z @ delta.second.T
    moved = second * (first / 2).exp() if native == "symmetric" else second
    got = law(fuse(model, {delta: 1.0}, chart=chart, gated=False), ids)
    assert_close(got[0], loc + log_scale.exp() * moved, rtol=1e-5, atol=1e-5)
    assert_close(got[1], log_scale + first, rtol=1e-5, atol=1e-5)


def test_the_symmetric_chart_is_one_static_sum_of_weights(model, ids):
    deltas = [random_delta(model, name, seed) for seed, name in enumerate("abc")]
    weights = [1.0, -0.5, 2.0]
    static = Delta(
        name="sum",
        chart="symmetric",
        first=sum(w * d.first for w, d in zip(weights, deltas, strict=True)),
        second=sum(w * d.second for w, d in zip(weights, deltas, strict=True)),
        gate=None,
        base=deltas[0].base,
        record={},
    )
    many = law(fuse(model, dict(zip(deltas, weights, strict=True)), gated=False, by="sum"), ids)
    one = law(fuse(model, {static: 1.0}, by="sum"), ids)
    assert_close(many, one, rtol=1e-5, atol=1e-6)


def test_where_all_gates_are_closed_the_base_is_untouched_bit_for_bit(model, ids):
    delta = random_delta(model, "a", 1)
    shut = Delta(**{**delta.__dict__, "gate": delta.gate._replace(threshold=torch.full((4,), -1.0))})
    fused = fuse(model, {shut: 1.0}, by="sum")
    with torch.no_grad():
        assert torch.equal(fused(input_ids=ids).logits, model(input_ids=ids).logits)


def test_gates_decide_token_by_token(model, ids):
    fused = fuse(model, {random_delta(model, "a", 1): 1.0, random_delta(model, "b", 2): 1.0}, by="sum")
    with torch.no_grad():
        gates = fused(input_ids=ids).gates
        always = law(fuse(model, {random_delta(model, "a", 1): 1.0}, gated=False, by="sum"), ids)[0]
        only_a = (gates[0] == 1) & (gates[1] == 0)
        assert 0 < only_a.sum() < only_a.numel()
        assert_close(law(fused, ids)[0][only_a], always[only_a])


@pytest.mark.parametrize("mode", ["softmax", "deterministic"])
def test_generation_with_gates_does_not_depend_on_cache_padding_or_batch(model, ids, mode):
    fused = fuse(
        model,
        {random_delta(model, "a", 1, size=3.0): 1.0, random_delta(model, "b", 2, size=3.0): 1.0},
        by="sum",
    )
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 257, "mode": mode}
    short = ids[1:2, 8:]
    alone = fused.generate(short, attention_mask=torch.ones_like(short), **options)[0, short.shape[1] :]
    slow = fused.generate(short, attention_mask=torch.ones_like(short), use_cache=False, **options)[
        0, short.shape[1] :
    ]
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :8], mask[1, :8] = 257, 0
    padded = fused.generate(batch, attention_mask=mask, **options)[1, ids.shape[1] :]
    assert torch.equal(alone, slow)
    assert torch.equal(alone, padded)
    with torch.no_grad():
        whole = torch.cat([short[0], alone])[None]
        assert fused(input_ids=whole).gates.float().mean() not in (0.0, 1.0)


def test_beams_are_refused_only_with_gates(model, ids):
    delta = random_delta(model, "a", 1)
    with pytest.raises(ConfigError, match="num_beams=1"):
        fuse(model, {delta: 1.0}, by="sum").generate(ids, num_beams=2, max_new_tokens=2)
    fuse(model, {delta: 1.0}, gated=False, by="sum").generate(
        ids, num_beams=2, max_new_tokens=2, pad_token_id=257
    )


def test_a_description_that_does_not_fit_is_refused():
    described = {
        "chart": "symmetric",
        "native": ["symmetric"],
        "domains": ["a"],
        "weights": [1.0],
        "gated": False,
    }
    described |= {"location_only": True}
    with pytest.raises(ConfigError, match="linear, symmetric"):
        Fusion(H, H, described | {"chart": "linaer"})
    with pytest.raises(ConfigError, match="one of each"):
        Fusion(H, H, described | {"weights": [1.0, 2.0]})


@torch.no_grad()
def test_gates_follow_their_parameters_when_these_change(model, ids):
    """What gates know is prepared once; loading other weights in place, or putting others there, prepares it anew."""
    fused = fuse(model, {random_delta(model, "a", 1): 1.0}, by="sum")
    fusion, other = fused.fusion, 2 * torch.randn_like(fused.fusion.gate_center)
    before = fusion.gate_statistics()
    assert fusion.gate_statistics() is before
    fusion.gate_center.copy_(other)
    copied = fusion.gate_statistics()
    assert_close(copied.square, other.square().sum(-1))
    fusion.gate_center = torch.nn.Parameter(-other, requires_grad=False)
    assert_close(fusion.gate_statistics().shift, -copied.shift)
    fusion.double().float()
    fusion.gate_precision.data = fusion.gate_precision.data + 1
    assert not torch.equal(fusion.gate_statistics().share, copied.share)
