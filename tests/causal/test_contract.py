"""The model keeps the contract of transformers' causal LMs: arguments, outputs, loading, resizing, caches."""

import copy
import dataclasses
import functools
import json
import re
import types

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
import tiny_moe
from tether.causal.config import CausalQwenConfig
from tether.causal.evidence import Rule
from tether.causal.modeling import CausalOutput, CausalQwenForCausalLM
from tether.causal.positions import served_positions
from tether.causal.vocabulary import ASLEEP
from tether.errors import ConfigError

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 257}


@pytest.fixture(scope="module")
def pair():
    base = tiny.backbone("qwen2")
    return base, CausalQwenForCausalLM.from_backbone(base)


@pytest.fixture
def ids(generator):
    return torch.randint(256, (3, 11), generator=generator)


def labelled(ids):
    labels = ids.clone()
    labels[0, :4] = labels[1, -2:] = -100
    return labels


@pytest.mark.parametrize("items", [1, 7, torch.tensor(23)])
def test_the_loss_of_a_part_of_a_step_is_the_bases(pair, ids, items):
    base, model = pair
    with torch.no_grad():
        made, expected = (
            each(input_ids=ids, labels=labelled(ids), num_items_in_batch=items).loss for each in (model, base)
        )
    assert_close(made, expected, rtol=1e-5, atol=0)


def test_parts_of_a_step_add_up_to_it_in_every_mode(pair, ids):
    _, model = pair
    labels = labelled(ids)
    items = (labels[:, 1:] != -100).sum()
    for options in ({}, {"return_logits": False}, {"mode": "deterministic"}):
        with torch.no_grad():
            whole = model(input_ids=ids, labels=labels, **options).loss
            parts = [
                model(input_ids=ids[row], labels=labels[row], num_items_in_batch=items, **options).loss
                for row in (slice(0, 1), slice(1, 3))
            ]
        assert_close(sum(parts), whole, rtol=1e-5, atol=0)


def test_labels_that_are_shifted_already_are_not_shifted_again(pair, ids):
    base, model = pair
    shifted = torch.nn.functional.pad(labelled(ids), (0, 1), value=-100)[:, 1:].contiguous()
    other = shifted.roll(1, dims=0)
    with torch.no_grad():
        for targets in (shifted, other):
            made, expected = (
                each(input_ids=ids, labels=ids, shift_labels=targets).loss for each in (model, base)
            )
            assert_close(made, expected)
        assert_close(
            model(input_ids=ids, labels=ids, shift_labels=shifted).loss,
            model(input_ids=ids, labels=labelled(ids)).loss,
        )


def test_outputs_begin_as_those_of_other_causal_models(pair, ids):
    base, model = pair
    options = {"output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        made, expected = (each(input_ids=ids, labels=ids, **options) for each in (model, base))
        as_tuple = model(input_ids=ids, labels=ids, return_dict=False, **options)
    assert list(made)[: len(expected)] == list(expected)
    assert_close(made[:2], expected[:2])
    assert type(as_tuple) is tuple
    assert_close(as_tuple[:2], expected[:2])


def test_what_an_evaluation_collects_is_what_it_collects_of_a_plain_model():
    fields = {field.name for field in dataclasses.fields(CausalOutput)}
    kept = fields - set(CausalQwenConfig.keys_to_ignore_at_inference)
    assert kept == {"loss", "logits", "hidden_states", "attentions"}


@pytest.mark.parametrize("mode", ["softmax", "deterministic", "causal"])
@pytest.mark.parametrize(
    "keep", [torch.tensor([2, 7, 4]), torch.tensor([-1]), torch.tensor([[1, 2], [9, 3], [0, 0]])], ids=str
)
def test_positions_of_which_logits_are_asked_for(pair, ids, keep, mode):
    _, model = pair
    noise = torch.rand(3, model.latent_size)
    options = {"mode": mode} | ({"noise": noise} if mode == "causal" else {})
    with torch.no_grad():
        whole, some = (model(input_ids=ids, logits_to_keep=which, **options) for which in (0, keep))
    rows = torch.arange(3).unsqueeze(-1)
    for name in ("logits", "latent_loc", "latent_log_scale", "value", "value_loc"):
        assert_close(some[name], whole[name][rows, keep], rtol=1e-5, atol=1e-5)


def test_labels_are_scored_where_logits_are_asked_for(pair, ids):
    _, model = pair
    labels = torch.full_like(ids, -100)
    labels[:, 3], labels[:, 8] = ids[:, 3], ids[:, 8]
    with torch.no_grad():
        some = model(input_ids=ids, labels=ids, logits_to_keep=torch.tensor([7, 2]))
        assert_close(some.loss, model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize(
    "keep", [torch.tensor([11]), torch.tensor([-12]), torch.tensor([0.5]), torch.ones(3, 11) > 0]
)
def test_positions_that_are_none_are_refused(keep):
    with pytest.raises(ConfigError, match=r"logits_to_keep.*expected"):
        served_positions(keep, 11)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("mode", ["softmax", "deterministic"])
def test_any_cache_gives_the_same_text(kind, options, mode, ids):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(kind))
    options = options | {"disable_compile": True}
    common = GREEDY | {"attention_mask": torch.ones_like(ids), "mode": mode}
    assert torch.equal(model.generate(ids, **common, **options), model.generate(ids, **common))


def test_an_assistant_gives_the_same_text_in_any_mode(pair, ids):
    _, model = pair
    one = {"attention_mask": torch.ones_like(ids[:1])} | GREEDY
    for assistant in (
        tiny.backbone("qwen2", seed=1),
        CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2", seed=1)),
    ):
        for mode in ("softmax", "deterministic"):
            written = model.generate(ids[:1], mode=mode, assistant_model=assistant, **one)
            assert torch.equal(written, model.generate(ids[:1], mode=mode, **one))


def test_embedded_prompts_may_be_padded_on_either_side(pair, ids):
    _, model = pair
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    embedded = model.get_input_embeddings()(ids).detach()
    expected = model.generate(ids[:1, :-4], attention_mask=mask[:1, :-4], **GREEDY)[:, 7:]
    for prompts in ({"inputs_embeds": embedded}, {"input_ids": ids}):
        written = model.generate(**prompts, attention_mask=mask, **GREEDY)[:, -5:]
        assert torch.equal(written[:1], expected)


def test_the_config_answers_what_is_asked_of_any_causal_model(pair, tmp_path):
    base, model = pair
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(model.config, name) == getattr(base.config, name)
    assert not hasattr(model.config, "output_router_logits")
    model.config.save_pretrained(tmp_path)
    assert "vocab_size" not in json.loads((tmp_path / "config.json").read_text())
    config = CausalQwenConfig.from_pretrained(tmp_path)
    config.vocab_size = 300
    assert config.backbone_config.vocab_size == 300


def test_a_plain_checkpoint_is_wrapped_when_it_is_loaded(pair, ids, tmp_path):
    base, _ = pair
    base.save_pretrained(tmp_path)
    made = CausalQwenForCausalLM.from_pretrained(
        tmp_path, preset="paper", threshold=3.0, dtype=torch.bfloat16
    )
    assert (made.config.preset, made.config.threshold, made.dtype) == ("paper", 3.0, torch.bfloat16)
    model, info = CausalQwenForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    with pytest.raises(ConfigError, match=r"type 'qwen2'.*from_pretrained"):
        CausalQwenConfig.from_pretrained(tmp_path)


FUSED = {
    "by": "evidence", "domains": ["a"], "native": ["symmetric"], "weights": [1.0], "strengths": [[1.0]], "gated": False,
    "location_only": False, **Rule().described(),
}  # fmt: skip


def test_weights_are_taken_by_the_names_that_transformers_has(pair, ids, tmp_path):
    _, model = pair
    model.save_pretrained(tmp_path)
    named = CausalQwenForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path)
    given = CausalQwenForCausalLM.from_pretrained(
        pretrained_model_name_or_path=None, config=copy.deepcopy(model.config), state_dict=model.state_dict()
    )
    with torch.no_grad():
        for made in (named, given):
            assert torch.equal(made(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fusion", [None, FUSED], ids=["plain", "fused"])
def test_what_stays_in_float32_is_named_and_exists(pair, fusion, dtype, tmp_path):
    config = copy.deepcopy(pair[1].config)
    config.fusion = fusion
    CausalQwenForCausalLM(config).save_pretrained(tmp_path)
    model = CausalQwenForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    names = {part for name in model.state_dict() for part in name.split(".")}
    assert model._keep_in_fp32_modules_strict <= names
    for name, part in model.state_dict().items():
        kept = model._keep_in_fp32_modules_strict & set(name.split("."))
        assert part.dtype == (torch.float32 if kept else dtype), name


def test_deltas_that_a_checkpoint_lacks_move_nothing(pair, ids):
    _, model = pair
    config = copy.deepcopy(model.config)
    config.fusion = FUSED
    before = torch.are_deterministic_algorithms_enabled()
    # Memory that nobody has written to is filled with NaN then.
    torch.use_deterministic_algorithms(True)
    try:
        made = CausalQwenForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())
    finally:
        torch.use_deterministic_algorithms(before)
    assert not made.fusion.first.any()
    assert not made.fusion.second.any()
    with torch.no_grad():
        assert_close(made(input_ids=ids).logits.softmax(-1), model(input_ids=ids).logits.softmax(-1))


def test_caching_is_switched_off_where_trainers_switch_it_off(pair, ids):
    base, model = pair
    assert model.config.use_cache is True
    try:
        model.config.use_cache = False
        with torch.no_grad():
            assert [each(input_ids=ids).past_key_values for each in (base, model)] == [None, None]
    finally:
        model.config.use_cache = True


def test_a_multiple_that_is_no_integer_is_refused_in_the_words_of_the_base(pair):
    base, model = pair
    with pytest.raises(ValueError) as theirs:
        base.resize_token_embeddings(300, pad_to_multiple_of=1.3)
    with pytest.raises(ConfigError, match=re.escape(str(theirs.value))):
        model.resize_token_embeddings(300, pad_to_multiple_of=1.3)


def grown(model, size, folder):
    """Resize, save and load."""
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "options", [{}, {"noise_form": "constant", "threshold_form": "class", "threshold": 5.0}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("size", [300, 250])
def test_a_resized_model_is_resized_in_every_part_and_loads_again(kind, size, options, ids, tmp_path):
    base = tiny.backbone(kind)
    if size < 258:
        with pytest.raises(ConfigError, match="no model can be made"):
            CausalQwenForCausalLM.from_backbone(base, **options).resize_token_embeddings(size)
        base.config.pad_token_id = base.config.bos_token_id = base.config.eos_token_id = None
        base.generation_config.pad_token_id = None
    model = CausalQwenForCausalLM.from_backbone(base, **options)
    ids = ids % 250
    with torch.no_grad():
        before = {mode: model(input_ids=ids, mode=mode).logits for mode in ("softmax", "deterministic")}
        fingerprint = model.config.base_fingerprint
        again = grown(model, size, tmp_path)
        rows = min(size, 258)
        for each in (model, again):
            assert each.config.vocab_size == each.vocab_size == len(each.action.weight) == size
            assert (each.action.weight is each.get_input_embeddings().weight) == (kind == "llama")
            for mode, logits in before.items():
                after = each(input_ids=ids, mode=mode).logits
                assert after.shape[-1] == size
                assert_close(after[..., :rows], logits[..., :rows], rtol=1e-5, atol=1e-5)
    assert again.config.base_fingerprint == model.config.base_fingerprint != fingerprint


def test_numbers_stay_asleep_in_a_model_that_grows(ids, tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"))
    model.add_numbers(tiny.tokenizer())
    number = model.config.num_token_id
    again = grown(model, 280, tmp_path)
    assert float(again.action.bias[number].detach()) == ASLEEP
    assert not bool(again.action.bias[number + 1 :].any())
    with pytest.raises(ConfigError, match=f"<NUM> is token {number}"):
        model.resize_token_embeddings(number)
    for size in (0, 2.5):
        with pytest.raises(ConfigError, match="at least 1"):
            model.resize_token_embeddings(size)
    assert len(model.resize_token_embeddings(pad_to_multiple_of=64).weight) == 320


def test_what_could_not_be_loaded_again_is_not_resized():
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    before = {name: part.clone() for name, part in model.state_dict().items()}
    # A family that has one more part with an entry for each token, which its own resizing passes over.
    kind = type(model)

    class Wider(kind):
        def __init__(self, config):
            super().__init__(config)
            self.more = torch.nn.Embedding(config.vocab_size, 2)

    model.__class__ = Wider
    with pytest.raises(ConfigError, match=r"more\.weight would stay of shape \(258, 2\)"):
        model.resize_token_embeddings(300)
    model.__class__ = kind
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def _aux(output):
    loss = getattr(output, "aux_loss", None)
    return None if loss is None else loss.detach()


@pytest.mark.parametrize("family", tiny_moe.FAMILIES)
def test_a_mixture_of_experts_keeps_its_loss_of_routing(family):
    base = tiny_moe.build(family, output_router_logits=True, router_aux_loss_coef=0.3).eval()
    ids = tiny_moe.tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    model = CausalQwenForCausalLM.from_backbone(base)
    gradients = []
    for each in (base, model):
        output = each(input_ids=ids, attention_mask=mask, labels=ids)
        each.zero_grad()
        output.loss.backward()
        routers = [
            part.grad.clone() for name, part in each.named_parameters() if name.endswith("mlp.gate.weight")
        ]
        gradients.append((output.loss.detach(), _aux(output), routers))
    assert_close(gradients[1][0], gradients[0][0], rtol=1e-6, atol=0)
    assert_close(gradients[1][2], gradients[0][2], rtol=1e-4, atol=1e-7)
    if family == "deepseek_v3":  # has none of its own
        assert gradients[1][1] is None
    else:
        assert_close(gradients[1][1], gradients[0][1])
        assert float(gradients[1][1]) > 0
        with torch.no_grad():
            plain = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=False)
        assert float(gradients[1][0] - plain.loss) == pytest.approx(0.3 * float(gradients[1][1]), rel=1e-4)


def test_trainers_that_go_round_the_head_are_refused(pair):
    _, model = pair

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        return self.backbone(*args, **kwargs)

    with pytest.raises(ConfigError, match=r"TRL.*transformers\.Trainer"):
        model.forward = types.MethodType(forward, model)
    assert "forward" not in model.__dict__


def test_a_fused_model_is_not_resized():
    # Only of a model whose number of tokens would change is it asked whether it is fused.
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    model.fusion = torch.nn.Identity()
    assert model.resize_token_embeddings(258) is model.get_input_embeddings()
    with pytest.raises(ConfigError, match="fused deltas"):
        model.resize_token_embeddings(300)
