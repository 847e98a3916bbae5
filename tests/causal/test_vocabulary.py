"""The token <NUM>: a reserved row changes nothing, an added row changes nothing the base does."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numbers import NumericTokenizer
from tether.causal.vocabulary import ASLEEP, add_numbers, wake_numbers
from tether.errors import ConfigError

KINDS = ["llama", "qwen2"]
DIGITS = [tiny.tokenizer().get_vocab()[digit] for digit in "0123456789"]


def wrapped(kind="llama", **fields):
    return CausalQwenForCausalLM.from_backbone(tiny.backbone(kind), **fields)


def roomy(dtype=torch.float32):
    """A base with four more rows than its tokenizer has tokens."""
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        config = LlamaConfig(**(tiny.SIZES | {"vocab_size": 262}), tie_word_embeddings=True)
        base = AutoModelForCausalLM.from_config(config)
        for parameter in base.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return base.to(dtype).eval()


@pytest.fixture
def ids(generator):
    return torch.randint(256, (3, 9), generator=generator)


def test_a_reserved_row_changes_no_weight_and_no_logit(ids):
    model = CausalQwenForCausalLM.from_backbone(roomy())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = {mode: model(input_ids=ids, mode=mode).logits for mode in ("softmax", "deterministic")}
    numeric = model.add_numbers(tiny.tokenizer())
    assert model.config.num_token_id == numeric.num_token_id == 258
    assert not numeric.grows
    assert not model.config.class_bias
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        for mode, logits in expected.items():
            assert torch.equal(model(input_ids=ids, mode=mode).logits, logits)
    wake_numbers(model, torch.randn(4, 32), 0.2)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_added_row_leaves_the_bases_choices(kind, dtype, ids):
    base = tiny.backbone(kind).to(dtype)
    with torch.no_grad():
        expected = torch.softmax(base(input_ids=ids).logits.double(), dim=-1)
    text = base.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=257)
    model = CausalQwenForCausalLM.from_backbone(base)
    numeric = model.add_numbers(tiny.tokenizer())
    assert model.config.num_token_id == numeric.num_token_id == 258
    assert (model.vocab_size, model.config.get_text_config().vocab_size) == (259, 259)
    assert (model.get_input_embeddings().num_embeddings, len(numeric)) == (259, 259)
    with torch.no_grad():
        got = torch.softmax(model(input_ids=ids).logits.double(), dim=-1)
        assert not bool(got[..., 258].any())
        assert_close(got[..., :258], expected, rtol=1e-5 if dtype == torch.float32 else 0.07, atol=0)
        high = model(input_ids=ids, mode="deterministic").logits
    assert bool((high[..., 258] < high[..., :258].amax(-1)).all())
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=257), text)


@pytest.mark.parametrize("form", ["fill", "constant"])
def test_deterministic_probabilities_of_the_bases_classes_stay(form, ids):
    fields = {"threshold_form": "class", "noise_form": form, "class_noise": 40.0, "threshold": 3.0}
    plain, grown = wrapped(**fields), wrapped(**fields)
    grown.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        expected = plain(input_ids=ids, mode="deterministic").logits
        got = grown(input_ids=ids, mode="deterministic").logits
        assert_close(got[..., :258], expected, rtol=1e-5, atol=1e-6)
        # The new class is judged like the others: same threshold, same size of its noise.
        _, scale = grown.action.scores(torch.zeros(1, 32), torch.full((1, 32), grown.config.latent_scale))
    assert grown.action.threshold[258].item() == 3.0
    if form == "fill":
        assert_close(scale, torch.full((1, 259), 40.0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_row_is_the_mean_of_the_digits(kind):
    base = tiny.backbone(kind)
    embedding, head = base.get_input_embeddings().weight.clone(), base.get_output_embeddings().weight.clone()
    model = CausalQwenForCausalLM.from_backbone(base)
    tied = model.action.weight is model.get_input_embeddings().weight
    model.add_numbers(tiny.tokenizer())
    assert tied is (kind == "llama")
    assert (model.action.weight is model.get_input_embeddings().weight) is tied
    grown = model.get_input_embeddings().weight
    assert torch.equal(grown[:258], embedding)
    assert torch.equal(model.action.weight[:258], head)
    assert_close(grown[258], embedding[DIGITS].mean(0))
    assert_close(model.action.weight[258], head[DIGITS].mean(0))
    bias = torch.zeros(259)
    bias[258] = ASLEEP
    assert torch.equal(model.action.bias, bias)


def test_a_frozen_model_stays_frozen():
    model = wrapped("qwen2").requires_grad_(False)
    model.add_numbers(tiny.tokenizer())
    thawed = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert thawed == ["action.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_model_loads_in_a_fresh_process(kind, ids, tmp_path):
    model = wrapped(kind)
    numeric = model.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        model.action.bias[258] = 1.25
        values = torch.zeros(ids.shape, dtype=torch.float64)
        ids[:, 4], values[:, 4] = 258, 12.5
        expected = model(input_ids=ids, numeric_values=values)
    model.save_pretrained(tmp_path)
    numeric.save_pretrained(tmp_path)
    script = (
        "import tether, torch; from transformers import AutoModelForCausalLM;"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r});"
        f"ids = torch.tensor({ids.tolist()}); values = torch.tensor({values.tolist()});"
        "output = model(input_ids=ids, numeric_values=values);"
        "print(model.config.num_token_id, model.config.class_bias, float(model.action.bias[258]),"
        "model.action.weight is model.get_input_embeddings().weight,"
        "output.logits.double().sum().item(), output.value.sum().item())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    number, biased, bias, tied, logits, value = run.stdout.split()
    assert (number, biased, bias, tied) == ("258", "True", "1.25", str(kind == "llama"))
    assert float(logits) == pytest.approx(expected.logits.double().sum().item(), rel=1e-6)
    assert float(value) == pytest.approx(expected.value.sum().item(), rel=1e-6)

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids, numeric_values=values).logits, expected.logits)
    tokenizer = add_numbers(again, AutoTokenizer.from_pretrained(tmp_path))
    assert tokenizer.num_token_id == 258
    assert len(again.action.weight) == 259


def test_a_second_call_does_nothing():
    model = wrapped()
    numeric = model.add_numbers(tiny.tokenizer())
    before = copy.deepcopy(model.state_dict())
    for tokenizer in (tiny.tokenizer(), numeric, NumericTokenizer(tiny.tokenizer(), rows=259)):
        assert model.add_numbers(tokenizer).num_token_id == 258
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_numeric_tokenizer_is_taken_as_it_is():
    numeric = NumericTokenizer(tiny.tokenizer())
    assert wrapped().add_numbers(numeric) is numeric


def foreign(more):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(more)])
    return tokenizer


def test_tokenizers_of_other_models_are_refused():
    model = wrapped()
    before = len(model.action.weight)
    with pytest.raises(ConfigError, match="token 261 of a model with 258 rows"):
        model.add_numbers(foreign(3))
    assert len(model.action.weight) == before
    assert model.config.num_token_id is None
    model.add_numbers(tiny.tokenizer())
    with pytest.raises(ConfigError, match="is 259, the model's is 258"):
        model.add_numbers(foreign(1))


@pytest.mark.parametrize("share", [0.002, 0.1, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_woken_number_is_as_frequent_as_told(share, dtype, generator):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2").to(dtype))
    model.add_numbers(tiny.tokenizer())
    loc = torch.randn(200, 32, generator=generator)
    with torch.no_grad():
        base = torch.softmax(model.action.score_loc(loc).double(), dim=-1)[:, :258]
        wake_numbers(model, loc, share)
        prob = torch.softmax(model.action.score_loc(loc).double(), dim=-1)
        rest = torch.softmax(model.action.score_loc(loc)[:, :258].double(), dim=-1)
    assert float(prob[:, 258].mean()) == pytest.approx(share, rel=1e-4 if dtype == torch.float32 else 0.03)
    assert_close(rest, base)
    woken = model.action.bias[258].item()
    wake_numbers(model, loc, share / 2)
    assert model.action.bias[258].item() == woken


def test_waking_asks_for_a_share_and_numbers():
    model = wrapped()
    with pytest.raises(ConfigError, match="without <NUM>"):
        wake_numbers(model, torch.zeros(2, 32), 0.1)
    model.add_numbers(tiny.tokenizer())
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="share="):
            wake_numbers(model, torch.zeros(2, 32), share)
