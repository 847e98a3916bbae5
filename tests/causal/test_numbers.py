import copy
import io
import pickle
import string
import time
from contextlib import redirect_stdout

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, TensorType

import tiny
from tether.causal.numbers import NumericEncoding, NumericStreamer, NumericTokenizer, check_numeric
from tether.causal.numerals import find_numbers
from tether.errors import CheckpointError, ConfigError, ShapeError

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def metaspace(kind):
    """A small SentencePiece-like tokenizer: ASCII, bytes for the rest, and merges across the space."""
    symbols = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *string.printable.replace(" ", "")]
    vocabulary = {symbol: number for number, symbol in enumerate(["<unk>", "<s>", "</s>", *symbols])}
    merges = [("▁", "k"), ("▁k", "g"), ("k", "g"), ("▁", "▁"), ("a", "n"), ("▁", "a"), ("▁a", "n")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    core = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    strip = [decoders.Strip(" ", 1, 0)]
    if kind == "llama-2":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        core.normalizer, strip = normalizers.Replace(" ", "▁"), []
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=kind == "first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def prefixed_bytes():
    made = tiny.tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


KINDS = {
    "bytes": tiny.tokenizer,
    "bytes with a space first": prefixed_bytes,
    **{kind: (lambda kind=kind: metaspace(kind)) for kind in ("llama-2", "always", "first", "gemma")},
}
WRAPPED = {kind: NumericTokenizer(make()) for kind, make in KINDS.items()}
PLAIN = {kind: make() for kind, make in KINDS.items()}


def reserved(*names, rows=None, **options):
    made = tiny.tokenizer()
    made.add_tokens(list(names), **options)
    return made, NumericTokenizer(made, rows=rows)


@pytest.fixture
def numeric():
    return NumericTokenizer(tiny.tokenizer())


# Encoding


def test_tokens_values_and_surfaces(numeric):
    encoding = numeric("ab -1,500.5kg, 7%", return_tensors="pt")
    n = numeric.num_token_id
    plain = tiny.tokenizer()
    expected = [*plain("ab ").input_ids, n, *plain("kg, ").input_ids, n, *plain("%").input_ids]
    assert encoding.input_ids.tolist() == [expected]
    assert_close(
        encoding.numeric_values,
        torch.tensor(
            [[-1500.5 if i == 3 else 7.0 if i == 8 else 0.0 for i in range(10)]], dtype=torch.float64
        ),
    )
    assert encoding.surfaces == [["-1,500.5", "7"]]
    assert list(encoding) == ["input_ids", "attention_mask", "numeric_values"]
    assert isinstance(encoding, NumericEncoding)


def test_lists_for_one_text_and_for_several(numeric):
    one, two = numeric("a 5"), numeric(["a 5", "b"])
    assert one.numeric_values == [0.0, 0.0, 5.0]
    assert two.numeric_values == [[0.0, 0.0, 5.0], [0.0]]
    assert (one.surfaces, two.surfaces) == ([["5"]], [["5"], []])
    assert numeric("").numeric_values == []


def test_large_integers_survive(numeric):
    assert numeric("9007199254740991", return_tensors="pt").numeric_values.item() == 2**53 - 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(numeric, side):
    numeric.padding_side = side
    batch = numeric(["1 ab", "x 2 y 3"], padding=True, return_tensors="pt")
    pads = [0.0] * 3
    expected = [[*pads, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0, 3]]
    if side == "right":
        expected[0] = [1, 0, 0, 0, *pads]
    assert batch.numeric_values.tolist() == expected
    assert batch.attention_mask.sum().item() == 11
    assert bool((batch.input_ids[batch.attention_mask == 0] == numeric.pad_token_id).all())
    longer = numeric("1", padding="max_length", max_length=4, return_tensors="pt")
    assert sorted(longer.numeric_values[0].tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize(("side", "values"), [("right", [1, 0, 2, 0]), ("left", [0, 3, 0, 4])])
def test_truncation_takes_values_along(numeric, side, values):
    numeric.truncation_side = side
    cut = numeric("1 2 3 4", truncation=True, max_length=4)
    assert cut.numeric_values == values
    assert cut.surfaces == [[str(value) for value in values if value]]
    assert numeric("1 a b", truncation=True, max_length=2).surfaces == [["1"] if side == "right" else []]


def test_special_tokens_carry_no_value():
    encoding = WRAPPED["first"]("5 kg")
    assert encoding.input_ids[0] == 1
    assert encoding.numeric_values[:2] == [0.0, 5.0]
    assert WRAPPED["first"]("5", add_special_tokens=False).numeric_values == [5.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["", "a", " a  b", "kg an ▁ <s>x</s> y", "1.2.3 H2O 007", "é 漢字 \n\t", "5² <NUM"]
)
def test_text_without_numbers_is_left_alone(kind, text):
    mine, theirs = WRAPPED[kind](text), PLAIN[kind](text)
    assert mine.input_ids == theirs.input_ids
    assert mine.attention_mask == theirs.attention_mask
    assert WRAPPED[kind].decode(mine.input_ids) == PLAIN[kind].decode(theirs.input_ids)


def test_the_users_tokenizer_stays_as_it_was():
    given_ = metaspace("always")
    before = given_.backend_tokenizer.to_str()
    NumericTokenizer(given_)("5 kg")
    assert given_.backend_tokenizer.to_str() == before
    assert "<NUM>" not in given_.get_vocab()


# The way back


def as_given(kind, got, text):
    """Without the space that one of the kinds puts first, and shows when it decodes."""
    return got.removeprefix(" ") if kind == "bytes with a space first" and not text.startswith(" ") else got


WORDS = st.text(
    st.sampled_from(string.ascii_letters + string.punctuation + " \n\t0123456789é漢²−"), max_size=8
)
NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.integers(-(10**12), 10**12).map("{:,}".format),
    st.floats(-1e9, 1e9).map(repr),
    st.sampled_from([".5", "+3", "\u22124", "1e-5", "5kg", "5 kg", "$3", "7%"]),
)


def within_limit(text):
    try:
        find_numbers("x" + text)
        find_numbers(text)
    except ConfigError:
        return False
    return True


MIXED = st.lists(st.one_of(WORDS, NUMBERS), max_size=12).map("".join).filter(within_limit)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(MIXED)
@example("5kg 5 kg 5  kg")
@example("5")
@example("x<NUM>5<NUM> <NUM>")
@example("<s>5</s>7 <s> 8kg")
def test_round_trip(kind, text):
    if kind not in {"bytes", "gemma"}:
        # These lose a space at the start of a text or behind a special token without our doing.
        text = "x" + text.replace("<s>", "").replace("</s>", "")
    numeric = WRAPPED[kind]
    encoding = numeric(text, add_special_tokens=False)
    ids, values = encoding.input_ids, encoding.numeric_values
    assert as_given(kind, numeric.decode(ids, values, surfaces=encoding.surfaces[0]), text) == text
    assert all(
        value == 0 or number == numeric.num_token_id for number, value in zip(ids, values, strict=True)
    )
    assert len(encoding.surfaces[0]) == ids.count(numeric.num_token_id)
    printed = numeric.decode(ids, values)
    if not encoding.surfaces[0]:
        assert as_given(kind, printed, text) == text


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_beside_numbers_are_not_lost(kind):
    numeric = WRAPPED[kind]
    for text in ("5kg", "5 kg", "a 5", "a5 5", "(5)", "5  an", "5", "5 6", "5\n6", "5%an", "$5,an"):
        encoding = numeric(text)
        got = numeric.decode(encoding.input_ids, surfaces=encoding.surfaces[0], skip_special_tokens=True)
        assert as_given(kind, got, text) == text
    assert numeric("5kg").input_ids != numeric("5 kg").input_ids
    assert numeric("x 5 kg", add_special_tokens=False).input_ids[-1] != numeric.num_token_id


def test_numbers_without_surface_are_formatted(numeric):
    encoding = numeric("a 1,500 b 2.50 c +3")
    ids, values = encoding.input_ids, encoding.numeric_values
    assert numeric.decode(ids, values) == "a 1500 b 2.5 c 3"
    assert numeric.decode(ids, values, surfaces=["1,500"]) == "a 1,500 b 2.5 c 3"
    assert numeric.decode(ids, values, precision=1) == "a 2000 b 2 c 3"
    assert numeric.decode(ids, surfaces=encoding.surfaces[0]) == "a 1,500 b 2.50 c +3"
    assert numeric.decode(torch.tensor(ids), torch.tensor(values) / 10) == "a 150 b 0.25 c 0.3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_print_in_their_own_precision(numeric, dtype):
    ids = [numeric.num_token_id]
    assert numeric.decode(ids, torch.tensor([0.1], dtype=dtype)) == "0.1"
    assert numeric.decode(ids, torch.tensor([1e30], dtype=dtype)) == "1e30"


def test_numbers_survive_without_special_tokens():
    numeric = WRAPPED["first"]
    encoding = numeric("an 5 kg")
    assert numeric.decode(encoding.input_ids, encoding.numeric_values, skip_special_tokens=True) == "an 5 kg"
    assert numeric.decode(encoding.input_ids, encoding.numeric_values).startswith("<s>")


def test_batch_decode(numeric):
    texts = ["a 1,000", "2 bc 3 d"]
    batch = numeric(texts, padding=True, return_tensors="pt")
    options = {"skip_special_tokens": True}
    ids, values = batch.input_ids, batch.numeric_values
    assert numeric.batch_decode(ids, values, surfaces=batch.surfaces, **options) == texts
    assert numeric.batch_decode(ids, values, **options) == ["a 1000", "2 bc 3 d"]
    assert numeric.batch_decode(PLAIN["bytes"](["x", "yz"]).input_ids) == ["x", "yz"]
    with pytest.raises(ShapeError, match="as many of each"):
        numeric.batch_decode(ids, values[:1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["<NUM>", "a <NUM> b", "<NUM>5<NUM>", "<<NUM>>", "5 <NUM>kg"])
def test_the_name_of_the_token_is_plain_text(kind, text):
    numeric = WRAPPED[kind]
    encoding = numeric(text)
    assert encoding.input_ids.count(numeric.num_token_id) == len(encoding.surfaces[0]) == text.count("5")
    got = numeric.decode(encoding.input_ids, encoding.numeric_values, skip_special_tokens=True)
    assert as_given(kind, got, text) == text


# Which token


def test_an_existing_num_token_is_used():
    plain, numeric = reserved("<unused0>", "<NUM>", "z")
    assert (numeric.num_token, numeric.num_token_id) == ("<NUM>", plain.convert_tokens_to_ids("<NUM>"))
    assert not numeric.grows
    assert len(numeric) == len(plain)


@pytest.mark.parametrize(
    "name",
    [
        "<|reserved_special_token_0|>",
        "<unused0>",
        "[unused1]",
        "<|extra_0|>",
        "<reserved_3>",
        "<|reserved_token_7|>",
    ],
)
def test_the_first_reserved_token_is_used(name):
    plain, numeric = reserved("<tool>", name, name.replace("0", "9"), special_tokens=True, rows=300)
    assert (numeric.num_token, numeric.num_token_id) == (name, plain.convert_tokens_to_ids("<tool>") + 1)
    assert not numeric.grows
    encoding = numeric(f"5 {name} 6kg")
    assert encoding.surfaces == [["5", "6"]]
    assert numeric.decode(encoding.input_ids, encoding.numeric_values) == f"5 {name} 6kg"


def test_reserved_tokens_in_use_are_not_taken():
    plain = tiny.tokenizer()
    plain.add_tokens(["<unused0>", "<unused1>", "<unused2>"])
    plain.pad_token = "<unused0>"
    plain.chat_template = "{{ '<unused1>' }}"
    assert NumericTokenizer(plain).num_token == "<unused2>"


def test_a_reserved_token_that_swallows_spaces_is_made_exact():
    _, numeric = reserved(AddedToken("<unused0>", lstrip=True, rstrip=True, normalized=True))
    encoding = numeric("a 5 b")
    assert numeric.num_token == "<unused0>"
    assert numeric.decode(encoding.input_ids, encoding.numeric_values) == "a 5 b"


@pytest.mark.parametrize(("rows", "grows"), [(None, True), (258, True), (259, False), (320, False)])
def test_an_added_token_takes_the_first_free_row(rows, grows):
    plain = tiny.tokenizer()
    numeric = NumericTokenizer(plain, rows=rows)
    assert numeric.num_token_id == len(plain) == 258
    assert numeric.grows is grows
    assert len(numeric) == 259


def test_numbers_in_names_of_special_tokens_are_names():
    plain = tiny.tokenizer()
    plain.add_tokens(["<|0.5|>", "[7]"], special_tokens=True)
    numeric = NumericTokenizer(plain)
    encoding = numeric("<|0.5|>6 [7]-8")
    assert encoding.surfaces == [["6", "-8"]]
    assert numeric.decode(encoding.input_ids, encoding.numeric_values) == "<|0.5|>6 [7]-8"


# What else a tokenizer does


def test_settings_are_taken_over_and_can_be_set(numeric):
    assert (numeric.pad_token_id, numeric.eos_token_id, numeric.bos_token_id) == (257, 256, 256)
    assert (numeric.padding_side, numeric.is_fast) == ("left", True)
    numeric.padding_side = "right"
    numeric.pad_token = numeric.eos_token
    plain = numeric.plain()
    assert (plain.padding_side, plain.pad_token_id) == ("right", 256)
    assert numeric.convert_ids_to_tokens(numeric.num_token_id) == "<NUM>"


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_the_same(kind):
    numeric = WRAPPED[kind]
    for other in (
        copy.deepcopy(numeric),
        pickle.loads(pickle.dumps(numeric)),
        NumericTokenizer(numeric),
        NumericTokenizer(numeric.plain()),
    ):
        assert other("an <NUM> 5kg").data == numeric("an <NUM> 5kg").data
        assert other.num_token_id == numeric.num_token_id


def test_an_encoding_keeps_its_surfaces(numeric):
    encoding = numeric(["a 5", "7 b"], return_tensors="pt")
    assert pickle.loads(pickle.dumps(encoding)).surfaces == copy.copy(encoding).surfaces == [["5"], ["7"]]
    assert encoding.to("cpu").surfaces == [["5"], ["7"]]


def test_chat_template(numeric):
    numeric.chat_template = CHAT
    messages = [{"role": "user", "content": "is 1,500 <NUM>?"}, {"role": "assistant", "content": "-2"}]
    text = "<|user|>is 1,500 <NUM>?<eos><|assistant|>-2<eos><|assistant|>"
    assert numeric.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    encoding = numeric.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    assert encoding.surfaces == [["1,500", "-2"]]
    assert numeric.batch_decode(encoding.input_ids, encoding.numeric_values, surfaces=encoding.surfaces) == [
        text
    ]
    assert encoding.input_ids[0].tolist().count(256) == 2
    batch = numeric.apply_chat_template([messages, messages[:1]], padding=True, return_tensors="pt")
    assert batch.surfaces == [["1,500", "-2"], ["1,500"]]
    words = [{"role": "user", "content": "hello"}]
    plain = tiny.tokenizer()
    plain.chat_template = CHAT
    assert numeric.apply_chat_template(words).input_ids == plain.apply_chat_template(words).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    numeric = WRAPPED[kind]
    numeric.save_pretrained(tmp_path)
    loaded = NumericTokenizer.from_pretrained(tmp_path, rows=len(numeric))
    text = "an <NUM> 5kg 6 kg 1,000.5"
    assert (loaded.num_token, loaded.num_token_id, loaded.grows) == (
        numeric.num_token,
        numeric.num_token_id,
        False,
    )
    assert loaded(text).data == numeric(text).data
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for words in ("an kg  x", "H2O\n1.2.3"):
        assert stock(words).input_ids == PLAIN[kind](words).input_ids
    assert stock.backend_tokenizer.normalizer is None or "\ufdd0" not in stock.backend_tokenizer.to_str()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_that_rebuilds_itself_when_loaded(legacy, tmp_path):
    plain = LlamaTokenizer(vocab=PLAIN["llama-2"].get_vocab(), merges=[("▁", "k"), ("k", "g")], legacy=legacy)
    numeric = NumericTokenizer(plain)
    numeric.save_pretrained(tmp_path)
    text = "an 5kg or 5 kg <NUM>  7"
    encoding = NumericTokenizer.from_pretrained(tmp_path)(text)
    assert encoding.data == numeric(text).data
    assert numeric.decode(encoding.input_ids, surfaces=encoding.surfaces[0], skip_special_tokens=True) == text
    assert AutoTokenizer.from_pretrained(tmp_path)("an kg").input_ids == plain("an kg").input_ids


def test_the_choice_is_kept_when_the_vocabulary_changes(tmp_path):
    NumericTokenizer(tiny.tokenizer(), rows=258).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.add_tokens(["<unused0>"])
    assert NumericTokenizer(loaded).num_token == "<NUM>"
    _, numeric = reserved("<unused0>")
    numeric.save_pretrained(tmp_path / "other")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "other")
    loaded.add_tokens(["<NUM>"])
    assert NumericTokenizer(loaded).num_token == "<unused0>"


# Streaming


def stream(
    numeric,
    text,
    surfaces=False,
    skip_prompt=False,
    values=True,
    prompt="is 1,500 and\n2.50:",
    batch_axis=True,
):
    """What a generating model does: the prompt at once, then one token after another."""
    streamer = NumericStreamer(numeric, skip_prompt=skip_prompt, skip_special_tokens=True)
    start = numeric(prompt, return_tensors="pt")
    following = numeric(text, return_tensors="pt")
    streamer.prompt_values = start.numeric_values if values else None
    streamer.prompt_surfaces = start.surfaces[0] if surfaces else None
    printed = io.StringIO()
    with redirect_stdout(printed):
        streamer.put(start.input_ids)
        for token, value in zip(following.input_ids[0], following.numeric_values[0].float(), strict=True):
            # A model has a value for every token; it counts at <NUM> only.
            streamer.values.append((value + (0.0 if token == numeric.num_token_id else 9.0)).reshape(1))
            streamer.put(token.reshape(1))
        streamer.end()
    assert streamer.values == []
    assert streamer.prompt_values is None
    return printed.getvalue()


def test_numbers_are_streamed(numeric):
    text = " 0.1 apples\nfor -3kg 漢 each. 1,000"
    assert stream(numeric, text) == "is 1500 and\n2.5: 0.1 apples\nfor -3kg 漢 each. 1000\n"
    assert stream(numeric, text, surfaces=True).startswith("is 1,500 and\n2.50: 0.1 apples\n")
    assert stream(numeric, text, skip_prompt=True, values=False) == " 0.1 apples\nfor -3kg 漢 each. 1000\n"
    assert stream(numeric, "no\nnumber", values=False, prompt="a\nb\n") == "a\nb\nno\nnumber\n"


def test_a_streamer_can_be_used_again(numeric):
    streamer = NumericStreamer(numeric)
    printed = io.StringIO()
    with redirect_stdout(printed):
        for value in (1.5, 2.5):
            streamer.put(numeric("a", return_tensors="pt").input_ids)
            streamer.values.append(torch.tensor([value]))
            streamer.put(torch.tensor([numeric.num_token_id]))
            streamer.end()
    assert printed.getvalue() == "a1.5\na2.5\n"


def test_a_streamer_misses_values(numeric):
    streamer = NumericStreamer(numeric)
    with pytest.raises(ConfigError, match="set prompt_values"):
        streamer.put(numeric("5 a", return_tensors="pt").input_ids)
    streamer = NumericStreamer(numeric, skip_prompt=True)
    streamer.put(numeric("5 a", return_tensors="pt").input_ids)
    with pytest.raises(ConfigError, match="append to values"):
        streamer.put(torch.tensor([numeric.num_token_id]))
    with pytest.raises(ShapeError, match="one text"):
        streamer.put(torch.zeros(2, 3, dtype=torch.long))


# Refusals


def test_unusable_tokenizers():
    with pytest.raises(ConfigError, match="NoneType: expected a fast tokenizer"):
        NumericTokenizer(None)
    made = tiny.tokenizer()
    made.split_special_tokens = True
    with pytest.raises(ConfigError, match="split_special_tokens=False"):
        NumericTokenizer(made)


def test_a_number_beyond_the_limit_is_read_as_its_letters(numeric):
    text = "from 1e31 to 5 and 1e400"
    encoded = numeric(text)
    assert encoded.surfaces == [["5"]]
    plain = tiny.tokenizer()
    around = [plain(part)["input_ids"] for part in ("from 1e31 to ", " and 1e400")]
    assert encoded["input_ids"] == [*around[0], numeric.num_token_id, *around[1]]
    assert numeric.decode(encoded["input_ids"], surfaces=encoded.surfaces[0]) == text


def test_unusable_texts(numeric):
    with pytest.raises(ConfigError, match="int: expected a text"):
        numeric([5])
    with pytest.raises(ConfigError, match="noncharacters"):
        numeric("a\ufdd0\ufdd1")
    with pytest.raises(ConfigError, match="None, 'np' or 'pt'"):
        numeric("a", return_tensors=TensorType.MLX)
    with pytest.raises(ConfigError, match="at least one text"):
        numeric([])
    with pytest.raises(ShapeError, match="padding=True"):
        numeric(["a", "ab"], return_tensors="pt")
    numeric.pad_token = None
    with pytest.raises(ValueError, match="does not have a padding token"):
        numeric(["a", "ab"], padding=True)


def test_unusable_values(numeric):
    ids, n = [97, numeric.num_token_id], numeric.num_token_id
    with pytest.raises(ConfigError, match="pass numeric_values"):
        numeric.decode(ids)
    with pytest.raises(ShapeError, match="one floating point value for each token"):
        numeric.decode(ids, [1.0])
    with pytest.raises(ShapeError, match="2 surfaces for 1 <NUM>"):
        numeric.decode(ids, [0.0, 1.0], surfaces=["1", "2"])
    with pytest.raises(ConfigError, match="the token there is 97 and not <NUM>"):
        numeric.decode(ids, [1.0, 1.0])
    for value in (float("nan"), float("inf"), -1e31):
        with pytest.raises(ConfigError, match=r"at \(1,\).*finite number of at most 1e\+30"):
            numeric.decode(ids, [0.0, value])
    with pytest.raises(ShapeError):
        check_numeric(torch.tensor([[n]]), torch.tensor([1.0]), n)
    with pytest.raises(ShapeError, match=r"torch\.int64"):
        check_numeric(torch.tensor([n]), torch.tensor([1]), n)
    check_numeric(torch.tensor([[n, 3]]), torch.tensor([[1e30, 0.0]]), n)


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="expected a folder written by save_pretrained"):
        NumericTokenizer.from_pretrained(tmp_path)


# Size


def test_a_megabyte_takes_seconds():
    text = "the 5 apples of 1,000.5 kg cost -3e4 (v2.1)\n" * 23_000
    start = time.process_time()
    encoding = WRAPPED["bytes"](text)
    assert len(encoding.surfaces[0]) == 69_000
    assert WRAPPED["bytes"].decode(encoding.input_ids, surfaces=encoding.surfaces[0]) == text
    assert time.process_time() - start < 30


@pytest.mark.slow
def test_smollm():
    from tether.causal.loading import resolve

    plain = AutoTokenizer.from_pretrained(resolve("smollm2-135m"))
    numeric = NumericTokenizer(plain, rows=49152)
    assert (numeric.num_token, numeric.num_token_id, numeric.grows) == ("<NUM>", 49152, True)
    words = "The cat's  naïve\n\tplan, v2.1 of H2O - 漢字."
    assert numeric(words).input_ids == plain(words).input_ids
    text = "On 2024-01-05 it fell from 1,234.5 to -3.5e-2 (5%), i.e. 7kg; <NUM>.\n  10-20"
    encoding = numeric(text)
    assert [value for value in encoding.numeric_values if value] == [1234.5, -0.035, 5, 7, 10, 20]
    assert numeric.decode(encoding.input_ids, encoding.numeric_values, surfaces=encoding.surfaces[0]) == text
    chat = numeric.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True
    )
    assert chat.surfaces == [["2", "2"]]
