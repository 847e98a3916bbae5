import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
from tether.causal.config import CausalQwenConfig
from tether.causal.modeling import CausalQwenForCausalLM
from tether.errors import ConfigError

KINDS = ["llama", "qwen2"]


@pytest.fixture(params=KINDS)
def pair(request):
    base = tiny.backbone(request.param)
    return base, CausalQwenForCausalLM.from_backbone(base)


@pytest.fixture
def ids(generator):
    return torch.randint(256, (3, 11), generator=generator)


def test_softmax_mode_starts_as_the_base_bit_for_bit(pair, ids):
    base, model = pair
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_softmax_loss_is_the_bases(pair, ids):
    base, model = pair
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        assert_close(model(input_ids=ids, labels=labels).loss, base(input_ids=ids, labels=labels).loss)


def test_greedy_text_is_the_bases_with_left_padding(pair, ids):
    base, model = pair
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
    assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))


def test_sampling_draws_what_the_base_draws(pair, ids):
    base, model = pair
    drawn = []
    for writer in (base, model):
        torch.random.manual_seed(3)
        drawn.append(writer.generate(ids, do_sample=True, top_k=0, max_new_tokens=8, pad_token_id=257))
    assert torch.equal(*drawn)


def test_deterministic_mode_is_the_cauchy_tail_of_every_score(pair, ids):
    base, _ = pair
    model = CausalQwenForCausalLM.from_backbone(
        base, latent_scale=0.02, class_noise=0.7, noise_form="constant", threshold=1.5
    )
    with torch.no_grad():
        z = base.model(ids).last_hidden_state.double()
        weight = base.get_output_embeddings().weight.double()
        loc = z @ weight.T
        scale = (weight.abs() * 0.02).sum(-1) + 0.7
        expected = (0.5 + torch.atan((loc - 1.5) / scale) / torch.pi).log()
        got = model(input_ids=ids, mode="deterministic").logits
    assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def test_deterministic_loss_is_the_summed_binary_cross_entropy(pair, ids):
    _, model = pair
    with torch.no_grad():
        output = model(input_ids=ids, mode="deterministic", labels=ids)
        prob = output.logits[:, :-1].double().exp()
        hit = torch.nn.functional.one_hot(ids[:, 1:], prob.shape[-1]).double()
        expected = torch.nn.functional.binary_cross_entropy(prob, hit, reduction="none").sum(-1).mean()
    assert_close(output.loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_deterministic_generation_takes_the_largest_probability(pair, ids):
    _, model = pair
    with torch.no_grad():
        expected = model(input_ids=ids, mode="deterministic").logits[:, -1].argmax(-1)
    written = model.generate(ids, mode="deterministic", do_sample=False, max_new_tokens=1, pad_token_id=257)
    assert torch.equal(written[:, -1], expected)


def test_values_follow_linear_stability(pair, ids):
    base, model = pair
    with torch.no_grad():
        output = model(input_ids=ids)
        z = base.model(ids).last_hidden_state
    weight = model.action.value_weight[0]
    assert_close(output.value_loc, z @ weight)
    assert_close(output.value_scale, (weight.abs().sum() * 0.0245).expand_as(output.value_scale))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_in_a_fresh_process_after_import_tether(kind, ids, tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(kind))
    with torch.no_grad():
        model.abduction.log_scale.bias += 0.1
        expected = model(input_ids=ids)
    model.save_pretrained(tmp_path)
    script = (
        "import tether, torch, sys; from transformers import AutoModelForCausalLM;"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r});"
        f"output = model(input_ids=torch.tensor({ids.tolist()}));"
        "print(type(model).__name__, output.logits.double().sum().item(), output.value_scale.double().sum().item())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    name, logits, scale = run.stdout.split()
    assert name == "CausalQwenForCausalLM"
    assert float(logits) == pytest.approx(expected.logits.double().sum().item(), rel=1e-5)
    assert float(scale) == pytest.approx(expected.value_scale.double().sum().item(), rel=1e-6)


def test_the_tied_head_stays_tied_and_is_stored_once(tmp_path):
    CausalQwenForCausalLM.from_backbone(tiny.backbone("llama")).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.action.weight is model.get_input_embeddings().weight
    untied = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"))
    assert untied.action.weight is not untied.get_input_embeddings().weight


def test_the_start_is_the_same_on_every_run():
    first, second = (CausalQwenForCausalLM.from_backbone(tiny.backbone()) for _ in range(2))
    assert torch.equal(first.action.value_weight, second.action.value_weight)


def test_latents_stay_float32_on_a_bfloat16_backbone(ids):
    base = tiny.backbone().to(torch.bfloat16)
    model = CausalQwenForCausalLM.from_backbone(base)
    with torch.no_grad():
        output = model(input_ids=ids)
        assert (
            output.latent_loc.dtype
            == output.latent_log_scale.dtype
            == output.value_loc.dtype
            == torch.float32
        )
        assert torch.equal(output.logits, base(input_ids=ids).logits)
        assert model(input_ids=ids, mode="deterministic").logits.dtype == torch.float32


def test_presets():
    base = tiny.backbone()
    paper = CausalQwenForCausalLM.from_backbone(base, preset="paper")
    assert (paper.config.latent_scale, paper.config.threshold, paper.config.class_noise) == (
        100.0,
        100.0,
        0.0,
    )
    assert_close(paper.abduction.log_scale.bias.exp(), torch.full((32,), 100.0))
    assert CausalQwenForCausalLM.from_backbone(base, threshold=3.0).config.threshold == 3.0


def test_bad_requests_are_refused_by_name(ids):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    with pytest.raises(ConfigError, match="softmax, deterministic"):
        model(input_ids=ids, mode="argmax")
    with pytest.raises(ConfigError, match="softmax, deterministic"):
        model.generate(ids, mode="argmax")
    with pytest.raises(ConfigError, match="calibrated"):
        CausalQwenForCausalLM.from_backbone(tiny.backbone(), preset="papre")
    with pytest.raises(ConfigError, match="expected some of"):
        CausalQwenForCausalLM.from_backbone(tiny.backbone(), gamma=3.0)
    with pytest.raises(ConfigError, match="output head"):
        CausalQwenForCausalLM.from_backbone(tiny.backbone().model)
    with pytest.raises(ConfigError, match="latent_scale > 0"):
        CausalQwenConfig(backbone_config=tiny.backbone().config, latent_scale=0.0)
    with pytest.raises(ConfigError, match="hidden size 32"):
        CausalQwenConfig(backbone_config=tiny.backbone().config, latent_size=8)
