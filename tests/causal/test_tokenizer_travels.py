"""The tokenizer of a number checkpoint in a fresh process, with AutoTokenizer, collators, chats and pipelines."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
    pipeline,
)

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.dataset import make_examples
from tether.causal.loading import load, load_backbone
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.causal.numbers import NumericTokenizer
from tether.delta.export import export_plain
from tether.errors import CheckpointError, ConfigError
from tether.merge.check import load_tokenizer

TEXTS = ["9007199254740991 of 1,000.5 kg", "x -3e-5y", "no number"]
PROMPTS = ["Rate 12.50 of 3,000", "a 7"]
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"


def with_numbers(bias=4.5):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.1)
    numeric = model.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        model.action.bias[258] = bias  # so that it writes a number now and then
        model.action.value_weight.mul_(5)
    return model, numeric


@pytest.fixture(scope="module")
def made():
    """The model and the tokenizer as they were before anything was saved."""
    return with_numbers()


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    return save_checkpoint(*made, tmp_path_factory.mktemp("work") / "numbers")


def written(made, prompt, precision=6, **options):
    """What the model writes after one prompt or several, without a pipeline."""
    model, numeric = made
    encoded = numeric(prompt, padding=True, return_tensors="pt")
    output = model.generate(**encoded, pad_token_id=257, return_dict_in_generate=True, **options)
    start = encoded["input_ids"].shape[1]
    values = output["numeric_values"][:, start:]
    assert bool((output["sequences"][:, start:] == 258).any())
    return numeric.batch_decode(
        output["sequences"][:, start:], values, skip_special_tokens=True, precision=precision
    )


FRESH = """
import json, sys, tether
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding, pipeline
folder, texts, prompts = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
encoded = tokenizer(texts)
batch = DataCollatorWithPadding(tokenizer)([tokenizer(text) for text in texts])
model = AutoModelForCausalLM.from_pretrained(folder)
loss = model(**batch, labels=batch["input_ids"]).loss
options = {"max_new_tokens": 12, "do_sample": False}
writer = pipeline("text-generation", folder, device="cpu")
plain = []
for prompt in prompts:
    given = tokenizer(prompt, return_tensors="pt")
    # The pipeline's own model: weights that were loaded twice may differ in the last bits of what they give.
    output = writer.model.generate(**given, pad_token_id=257, return_dict_in_generate=True, **options)
    start = given["input_ids"].shape[1]
    parts = output["sequences"][:, start:], output["numeric_values"][:, start:]
    plain += tokenizer.batch_decode(*parts, skip_special_tokens=True, precision=6)
print(json.dumps({
    "class": f"{type(tokenizer).__module__}.{type(tokenizer).__name__}",
    "loaded": type(tether.load(folder)[1]).__name__,
    "again": tokenizer.batch_decode(encoded["input_ids"], encoded["numeric_values"]),
    "encoded": dict(encoded),
    "batch": {name: each.tolist() for name, each in batch.items()},
    "dtypes": {name: str(each.dtype) for name, each in batch.items()},
    "loss": loss.item(),
    "pipeline": [writer(prompt, **options)[0] for prompt in prompts],
    "plain": plain,
}))
"""


@pytest.fixture(scope="module")
def fresh(folder):
    command = [sys.executable, "-c", FRESH, json.dumps([str(folder), TEXTS, PROMPTS])]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# A process in which nothing was imported before


def test_a_fresh_process_loads_the_numeric_tokenizer_and_numbers_come_back(fresh, made):
    assert fresh["class"] == "tether.causal.numbers.NumericTokenizer"
    assert fresh["loaded"] == "NumericTokenizer"
    assert fresh["encoded"] == dict(made[1](TEXTS))
    assert fresh["encoded"]["numeric_values"][0][0] == 2**53 - 1
    assert fresh["again"] == ["9007199254740991 of 1000.5 kg", "x -3e-5y", "no number"]


def test_a_fresh_process_pads_numbers_with_a_stock_collator(fresh, made):
    model, numeric = made
    alone = [numeric(text) for text in TEXTS]
    longest = max(len(each["input_ids"]) for each in alone)
    for row, each in enumerate(alone):
        missing = longest - len(each["input_ids"])
        assert fresh["batch"]["numeric_values"][row] == [0.0] * missing + each["numeric_values"]
        assert fresh["batch"]["input_ids"][row] == [257] * missing + each["input_ids"]
        assert fresh["batch"]["attention_mask"][row] == [0] * missing + each["attention_mask"]
    assert fresh["dtypes"]["numeric_values"] == "torch.float64"
    batch = {name: torch.tensor(each) for name, each in fresh["batch"].items()}
    batch["numeric_values"] = batch["numeric_values"].double()
    loss = model(**batch, labels=batch["input_ids"]).loss
    assert fresh["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_fresh_pipeline_writes_numbers(fresh):
    for prompt, record, expected in zip(PROMPTS, fresh["pipeline"], fresh["plain"], strict=True):
        assert record == {"generated_text": prompt + expected}
        assert "<NUM>" not in record["generated_text"]


def test_a_folder_with_nothing_but_the_tokenizer_is_enough_whatever_is_imported_first(tmp_path):
    # Each in a process of its own, forked before transformers is there.
    NumericTokenizer(tiny.tokenizer()).save_pretrained(tmp_path)
    orders = [
        "import tether, transformers",
        "import transformers, tether",
        "import tether; from transformers import AutoTokenizer",
        "from transformers import AutoTokenizer, pipeline; import tether",
        "import tether; from transformers import pipeline",
        "from tether import NumericTokenizer",
    ]
    script = (
        "import os, sys, torch\n"
        "failed = []\n"
        "for order in sys.argv[2:]:\n"
        "    if (child := os.fork()) == 0:\n"
        "        try:\n"
        "            exec(order + '; from transformers import AutoTokenizer')\n"
        "            tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "            assert tokenizer('a 1.5')['numeric_values'] == [0, 0, 1.5]\n"
        "            from transformers.pipelines import PIPELINE_REGISTRY\n"
        "            impl = PIPELINE_REGISTRY.supported_tasks['text-generation']['impl']\n"
        "            assert impl.__name__ == 'NumericTextGeneration'\n"
        "            code = 0\n"
        "        except BaseException as error:\n"
        "            print(order, repr(error))\n"
        "            code = 1\n"
        "        sys.stdout.flush(); os._exit(code)\n"
        "    failed += [order] if os.waitpid(child, 0)[1] else []\n"
        "sys.exit(' | '.join(failed) or 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *orders], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_same_files_give_the_plain_tokenizer_by_name(tmp_path):
    NumericTokenizer(tiny.tokenizer()).save_pretrained(tmp_path)
    script = (
        "import json; from transformers import PreTrainedTokenizerFast\n"
        f"print(json.dumps(PreTrainedTokenizerFast.from_pretrained({str(tmp_path)!r})('a 1.5 kg').data))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == tiny.tokenizer()("a 1.5 kg").data


# Padding


@pytest.fixture
def numeric(made):
    return NumericTokenizer(made[1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [None, "np", "pt"])
def test_pad_gives_what_encoding_with_padding_gives(numeric, side, kind):
    numeric.padding_side = side
    expected = numeric(TEXTS, padding=True, return_tensors=kind)
    one_by_one = numeric.pad([numeric(text) for text in TEXTS], return_tensors=kind)
    at_once = numeric.pad(numeric(TEXTS), return_tensors=kind)
    for batch in (one_by_one, at_once):
        assert list(batch) == list(expected)
        for name in expected:
            if kind is None:
                assert batch[name] == expected[name]
            else:
                assert batch[name].dtype == expected[name].dtype
                assert_close(torch.as_tensor(batch[name]), torch.as_tensor(expected[name]), rtol=0, atol=0)
    other = "left" if side == "right" else "right"
    turned = numeric.pad([numeric(text) for text in TEXTS], padding_side=other)
    numeric.padding_side = other
    assert turned.data == numeric(TEXTS, padding=True).data


def test_pad_takes_tensors_one_text_and_texts_without_values(numeric):
    rows = [numeric(text, return_tensors="pt") for text in TEXTS]
    batch = numeric.pad([{name: each[0] for name, each in row.items()} for row in rows])
    expected = numeric(TEXTS, padding=True, return_tensors="pt")
    assert batch["numeric_values"].dtype == torch.float64
    assert_close(dict(batch), dict(expected), rtol=0, atol=0)
    alone = numeric.pad(numeric("a 1.5"), padding="max_length", max_length=6)
    assert alone["numeric_values"] == [0, 0, 0, 0, 0, 1.5]
    equal = numeric.pad([numeric(str(2**53 - 1)), numeric("5")], return_tensors="pt")
    assert equal["numeric_values"].tolist() == [[2**53 - 1], [5]]
    plain = numeric.plain()(TEXTS)
    assert numeric.pad(plain).data == numeric.plain().pad(numeric.plain()(TEXTS)).data


def test_pad_loses_no_numbers_of_some_texts(numeric):
    mixed = [numeric.plain()("ab"), numeric("a 5")]
    for features in (mixed, mixed[::-1]):
        with pytest.raises(ConfigError, match="1 of 2 encodings have numeric_values"):
            numeric.pad(features)
        with pytest.raises(ConfigError, match="1 of 2"):
            DataCollatorWithPadding(numeric)(features)


def test_the_collator_of_language_models_teaches_the_same_loss_as_tethers_own(made, numeric):
    model = made[0]
    numeric.padding_side = "right"
    features = [numeric(text) for text in TEXTS]
    batch = DataCollatorForLanguageModeling(numeric, mlm=False)(features)
    expected = make_examples(TEXTS, numeric).collate(range(3))
    assert_close(batch["numeric_values"], expected["numeric_values"], rtol=0, atol=0)
    loss, own = model(**batch).loss, model(**expected).loss
    assert_close(loss, own)
    zeros = torch.zeros_like(batch["numeric_values"])
    assert abs(model(**{**batch, "numeric_values": zeros}).loss.item() - own.item()) > 1e-3


# What else is expected of one of transformers' tokenizers


def test_ids_names_and_arrays(numeric):
    assert isinstance(numeric, PreTrainedTokenizerFast)
    assert numeric.model_input_names == ["input_ids", "attention_mask", "numeric_values"]
    assert (
        numeric.encode("a 1.5") == numeric("a 1.5")["input_ids"] == [*tiny.tokenizer()("a ").input_ids, 258]
    )
    assert numeric.tokenize("a 1.5") == ["a", "Ġ", "<NUM>"]
    assert "numeric_values" not in numeric.plain()("a 1.5")
    arrays = numeric("a 1.5", return_tensors="np")
    assert arrays["numeric_values"].dtype == np.float64
    assert arrays["numeric_values"].tolist() == [[0, 0, 1.5]]
    more = numeric(["a 1.5", "b"], return_length=True, return_special_tokens_mask=True)
    assert (more["length"], more["special_tokens_mask"]) == ([3, 1], [[0, 0, 0], [0]])


def test_decode_takes_one_text_or_several(numeric):
    encoded = numeric(TEXTS[:2])
    expected = ["9007199254740991 of 1000.5 kg", "x -3e-5y"]
    assert numeric.decode(encoded.input_ids, encoded.numeric_values) == expected
    tensors = numeric(TEXTS[:2], padding=True, return_tensors="pt")
    ids, values = tensors.input_ids, tensors.numeric_values
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert numeric.decode(ids, values, **options) == expected
    assert numeric.decode(ids[1], values[1], **options) == expected[1]
    assert numeric.decode(ids.numpy(), values.numpy(), **options) == expected
    assert numeric.decode(numeric.encode("B")[0]) == "B"
    assert numeric.decode([]) == ""


def test_tokens_added_later_are_known(numeric):
    numeric.add_special_tokens({"extra_special_tokens": ["<|5|>"]})
    encoding = numeric("<|5|> 6")
    assert encoding["numeric_values"] == [0, 0, 6]
    assert numeric.decode(encoding["input_ids"], encoding["numeric_values"], skip_special_tokens=True) == " 6"


@pytest.mark.parametrize(
    "options",
    [
        {"text_pair": "7"},
        {"is_split_into_words": True},
        {"return_offsets_mapping": True},
        {"return_overflowing_tokens": True},
    ],
)
def test_what_would_lose_numbers_is_refused(numeric, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: not known .* that reads numbers"):
        numeric("a 5", **options)


def test_a_chat_is_encoded_with_its_numbers_and_no_mask_of_the_assistants_tokens(numeric):
    numeric.chat_template = CHAT
    chat = [{"role": "user", "content": "is 1,500?"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt"}
    encoded = numeric.apply_chat_template(chat, **options)
    expected = numeric("[user]is 1,500?[bot]", return_tensors="pt")
    assert_close(dict(encoded), dict(expected), rtol=0, atol=0)
    assert encoded["numeric_values"].sum() == 1500
    assert torch.equal(numeric.apply_chat_template(chat, return_dict=False, **options), expected["input_ids"])
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ConfigError, match="no mask of the assistant's tokens"):
        numeric.apply_chat_template(chat, chat_template=marked, return_assistant_tokens_mask=True)
    with pytest.raises(ConfigError, match="sanitize_control_tokens"):
        numeric.apply_chat_template(chat, sanitize_control_tokens=True)


def test_settings_travel_even_where_they_are_a_classs_own(tmp_path):
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a"])}
    plain = LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")], model_max_length=77)
    assert plain.padding_side == "left"
    plain.chat_template = CHAT
    numeric = NumericTokenizer(plain)
    numeric.truncation_side = "left"
    numeric.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for name in (
        "padding_side",
        "truncation_side",
        "model_max_length",
        "chat_template",
        "special_tokens_map",
    ):
        assert getattr(loaded, name) == getattr(numeric, name), name
    assert loaded("a 5 a").data == numeric("a 5 a").data


def test_only_the_class_and_the_sides_are_new_in_the_settings_that_are_saved(tmp_path):
    # A tokenizer in the files of old, of which transformers remembers where they were.
    base, vocabulary = tmp_path / "base", tiny.tokenizer().get_vocab()
    base.mkdir()
    (base / "vocab.json").write_text(json.dumps(vocabulary | {"an": 258}))
    (base / "merges.txt").write_text("#version: 0.2\na n\n")
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    plain = AutoTokenizer.from_pretrained(base)
    numeric = NumericTokenizer(plain)
    for each, name in ((plain, "plain"), (numeric, "numeric")):
        each.save_pretrained(tmp_path / name)
    before, after = (
        json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("plain", "numeric")
    )
    assert after == before | {
        "tokenizer_class": "NumericTokenizer",
        "numeric_tokenizer": {"num_token": "<NUM>"},
        "auto_map": {"AutoTokenizer": [None, "tether_checkpoint.NumericTokenizer"]},
        "padding_side": "right",
        "truncation_side": "right",
    }
    assert str(tmp_path) not in json.dumps(after)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "numeric")
    assert loaded("an 5 man").data == numeric("an 5 man").data
    assert loaded("an man").input_ids == plain("an man").input_ids


# Pipelines


@pytest.fixture(scope="module")
def writer(made):
    return pipeline("text-generation", made[0], tokenizer=NumericTokenizer(made[1]), device="cpu")


def test_a_batch_of_prompts_is_padded_with_its_numbers(writer, made):
    options = {"max_new_tokens": 12, "do_sample": False}
    records = writer(PROMPTS, batch_size=2, **options)
    expected = written(made, PROMPTS, **options)
    assert [record["generated_text"] for (record,) in records] == [
        prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)
    ]
    other = writer("a 70", **options)[0]["generated_text"]
    assert other.removeprefix("a 70") != records[1][0]["generated_text"].removeprefix("a 7")


def test_texts_of_the_same_tokens_keep_their_own_numbers(writer, made):
    # One individual's tokens, another's value: with the bias this high, both write nothing but numbers.
    model, numeric = with_numbers(bias=60.0)
    sure = pipeline("text-generation", model, tokenizer=numeric, device="cpu")
    noise = Noise.draw(2, 32, seed=3)
    options = {"max_new_tokens": 3, "mode": "causal", "num_return_sequences": 2, "do_sample": False}
    records = sure("a 7", noise=noise, return_full_text=False, **options)
    expected = written((model, numeric), "a 7", noise=noise, **options)
    assert [record["generated_text"] for record in records] == expected
    assert len(set(expected)) == 2
    tensors = sure("a 7", noise=noise, return_tensors=True, **options)
    assert tensors[0]["generated_token_ids"] == tensors[1]["generated_token_ids"]
    assert tensors[0]["numeric_values"][:3] == [0, 0, 7]
    again = [
        numeric.decode(each["generated_token_ids"][3:], each["numeric_values"][3:], precision=6)
        for each in tensors
    ]
    assert again == expected
    scored = sure("a 7", noise=noise, output_logits=True, **options)
    assert len(scored[0]["logits"]) == 3
    assert scored[0]["logits"] != scored[1]["logits"]


def test_options_of_the_pipeline(writer, made):
    options = {"max_new_tokens": 12, "do_sample": False}
    for precision in (2, 15):
        record = writer(PROMPTS[0], precision=precision, return_full_text=False, **options)[0]
        assert record["generated_text"] == written(made, PROMPTS[0], precision=precision, **options)[0]
    config = made[0].generation_config.from_dict({**options, "pad_token_id": 257})
    record = writer(PROMPTS[0], generation_config=config)[0]
    assert record["generated_text"] == PROMPTS[0] + written(made, PROMPTS[0], **options)[0]
    assert not config.return_dict_in_generate
    assert isinstance(writer("", **options)[0]["generated_text"], str)


def test_a_long_prompt_is_cut_with_its_numbers(made):
    numeric = NumericTokenizer(made[1])
    numeric.model_max_length = 10
    short = pipeline("text-generation", made[0], tokenizer=numeric, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False}
    record = short("abc 1 de 25 f 3", handle_long_generation="hole", return_full_text=False, **options)[0]
    assert record["generated_text"] == written(made, " f 3", **options)[0]


def test_a_chat_goes_on_with_numbers(made):
    numeric = NumericTokenizer(made[1])
    numeric.chat_template = CHAT
    chat = [{"role": "user", "content": "is 1,500?"}]
    talker = pipeline("text-generation", made[0], tokenizer=numeric, device="cpu")
    options = {"max_new_tokens": 12, "do_sample": False}
    answer = talker(chat, **options)[0]["generated_text"]
    said = written(made, "[user]is 1,500?[bot]", **options)[0]
    assert answer == [*chat, {"role": "assistant", "content": said}]


def test_a_plain_tokenizer_is_made_numeric_and_other_models_have_transformers_own_pipeline(writer, made):
    options = {"max_new_tokens": 12, "do_sample": False}
    given = pipeline("text-generation", made[0], tokenizer=tiny.tokenizer(), device="cpu")
    assert given(PROMPTS[0], **options) == writer(PROMPTS[0], **options)
    for model in (tiny.backbone(), CausalQwenForCausalLM.from_backbone(tiny.backbone())):
        stock = pipeline("text-generation", model, tokenizer=tiny.tokenizer(), device="cpu")
        assert type(stock) is TextGenerationPipeline
        with pytest.raises(ConfigError, match="numeric tokenizer for a model without <NUM>"):
            pipeline("text-generation", model, tokenizer=made[1], device="cpu")


# Folders in which model and tokenizer are of different kinds


def test_a_number_model_beside_a_plain_tokenizer_loads_with_its_numbers(made, tmp_path):
    # As folders were written before the tokenizer travelled.
    made[0].save_pretrained(tmp_path)
    made[1].plain().save_pretrained(tmp_path)
    model, tokenizer = load(str(tmp_path))
    assert isinstance(tokenizer, NumericTokenizer)
    assert tokenizer.num_token_id == model.config.num_token_id == 258
    assert tokenizer(TEXTS).data == made[1](TEXTS).data
    assert type(load_backbone(str(tmp_path))[1]) is PreTrainedTokenizerFast
    assert not isinstance(AutoTokenizer.from_pretrained(tmp_path), NumericTokenizer)


def test_a_number_model_beside_another_tokenizer_is_refused(made, tmp_path):
    made[0].save_pretrained(tmp_path)
    other = tiny.tokenizer()
    other.add_tokens(["word"])
    NumericTokenizer(other).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"<NUM> is 259, the model's is 258"):
        load(str(tmp_path))


def test_a_plain_model_beside_a_numeric_tokenizer_loads_with_a_plain_one(numeric, tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    with pytest.raises(ConfigError, match="numeric tokenizer for a model without <NUM>"):
        save_checkpoint(model, numeric, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    for each, name in ((model, "wrapped"), (tiny.backbone(), "plain")):
        each.save_pretrained(tmp_path / name)
        numeric.save_pretrained(tmp_path / name)
        _, tokenizer = load(str(tmp_path / name))
        assert not isinstance(tokenizer, NumericTokenizer)
        assert tokenizer("a 1.5").data == tiny.tokenizer()("a 1.5").data


def test_a_number_checkpoint_is_saved_with_its_numeric_tokenizer_even_when_a_plain_one_is_given(
    made, tmp_path
):
    save_checkpoint(made[0], tiny.tokenizer(), tmp_path / "saved")
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "saved"), NumericTokenizer)


def test_what_reads_digits_as_text_goes_on_doing_so(folder, tmp_path):
    # A merge's texts, a base that is converted again, and a plain export of a model with a reserved row.
    config = LlamaConfig(**(tiny.SIZES | {"vocab_size": 262}), tie_word_embeddings=True)
    model = CausalQwenForCausalLM.from_backbone(AutoModelForCausalLM.from_config(config).eval())
    export_plain(model, model.add_numbers(tiny.tokenizer()), tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for tokenizer in (exported, load_tokenizer(folder), load_backbone(str(folder))[1]):
        assert not isinstance(tokenizer, NumericTokenizer)
        assert tokenizer("a 1.5 kg").data == tiny.tokenizer()("a 1.5 kg").data
