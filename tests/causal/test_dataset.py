"""Windows of text: what is in them, what is learnt, in which order."""

import json
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.dataset import count_labels, make_examples, shuffled
from tether.causal.losses import IGNORE
from tether.causal.numbers import NumericTokenizer
from tether.causal.pairs import Pair, holds_pairs, read_pairs
from tether.errors import ConfigError

EOS, PAD = 256, 257


@pytest.fixture(scope="module")
def plain():
    return tiny.tokenizer()


def ids(text, tokenizer):
    return tokenizer(text)["input_ids"]


def test_windows_stay_inside_documents_and_hold_every_token(plain):
    texts = ["abcdefg", "hi", "x"]
    examples = make_examples(texts, plain, window=4)
    ends = examples.starts.tolist()
    windows = [examples.input_ids[a:b].tolist() for a, b in pairwise(ends)]
    # "x" alone has nothing that predicts it.
    assert windows == [ids("abcd", plain), ids("efg", plain), ids("hi", plain)]
    assert examples.numeric_values is None
    assert count_labels(examples.labels, None) == (3 + 2 + 1, 0)


def test_batches_are_padded_on_the_right_and_padding_is_not_learnt(plain):
    batch = make_examples(["abc", "de"], plain).collate([1, 0])
    d, e = ids("de", plain)
    assert_close(batch["input_ids"][0], torch.tensor([d, e, PAD]))
    assert_close(batch["attention_mask"], torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert_close(batch["labels"][0], torch.tensor([IGNORE, e, IGNORE]))


def test_packed_windows_are_full_and_no_document_starts_as_a_label(plain):
    texts = ["abc", "defgh", "ij"]
    examples = make_examples(texts, plain, window=5, packed=True)
    joined = [*ids("abc", plain), EOS, *ids("defgh", plain), EOS, *ids("ij", plain), EOS]
    assert examples.input_ids.tolist() == joined[:13]
    assert examples.starts.tolist() == [0, 5, 10, 13]
    unlearnt = {place for place, label in enumerate(examples.labels.tolist()) if label == IGNORE}
    assert unlearnt == {0, 4, 5, 10}
    assert (examples.labels[[3, 9]] == torch.tensor([EOS, EOS])).all()


def test_only_the_completion_is_learnt_and_a_long_prompt_loses_its_start(plain):
    whole = make_examples([Pair("abc", "de")], plain)
    assert whole.input_ids.tolist() == [*ids("abcde", plain), EOS]
    assert whole.labels.tolist() == [IGNORE] * 3 + [*ids("de", plain), EOS]
    cut = make_examples([Pair("abc", "de")], plain, window=4)
    assert cut.input_ids.tolist() == [*ids("cde", plain), EOS]
    assert cut.labels.tolist() == [IGNORE, *ids("de", plain), EOS]


def test_numbers_carry_their_values_into_the_batch(plain):
    numeric = NumericTokenizer(plain)
    examples = make_examples([Pair("age 52, ", "load 1.5"), Pair("", "-3 kg")], numeric)
    batch = examples.collate([0, 1])
    number = batch["input_ids"] == numeric.num_token_id
    assert batch["numeric_values"].dtype == torch.float64
    assert batch["numeric_values"][number].tolist() == [52.0, 1.5, -3.0]
    assert (batch["numeric_values"][~number] == 0).all()
    # 52 is in a prompt, and nothing predicts the first token of a window.
    assert count_labels(examples.labels, numeric.num_token_id)[1] == 1
    assert count_labels(batch["labels"], numeric.num_token_id) == count_labels(
        examples.labels, numeric.num_token_id
    )


def test_tokens_end_the_text_after_the_document_that_reaches_them(plain):
    assert len(make_examples(["abcd", "efgh", "ij"], plain, tokens=5).input_ids) == 8


def test_every_pass_has_its_own_order_and_any_stretch_is_the_same(plain):
    whole = shuffled(7, 3, 0, 21)
    assert [sorted(whole[a : a + 7]) for a in (0, 7, 14)] == [list(range(7))] * 3
    assert whole[:7] != whole[7:14]
    assert [row for a in range(0, 21, 5) for row in shuffled(7, 3, a, min(a + 5, 21))] == whole
    assert shuffled(7, 4, 0, 21) != whole


def test_the_fingerprint_tells_texts_and_labels_apart(plain):
    prints = {
        make_examples(documents, plain, window=window).fingerprint()
        for documents, window in ((["abcd"], 9), (["abce"], 9), (["abcd"], 2), ([Pair("ab", "cd")], 9))
    }
    assert len(prints) == 4
    assert make_examples(["abcd"], plain, window=9).fingerprint() in prints


def test_pairs_are_read_from_json_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "q ", "completion": "ä"}) + "\n\n")
    assert holds_pairs(path)
    assert read_pairs(path) == [Pair("q ", "ä")]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert holds_pairs(path)
    assert read_pairs(path) == [Pair("q ", "ä")]
    path.write_text(json.dumps({"text": "a"}))
    assert not holds_pairs(path)
    assert not holds_pairs(tmp_path / "absent.jsonl")
    path.write_text("[]\n")
    assert not holds_pairs(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "line 2"),
        ('{"prompt": "a", "completion": " "}', "completion is empty"),
        ('{"prompt": 1, "completion": "b"}', "line 1"),
        ('{"prompt": "a", "completion": "\\ud83d"}', "line 1"),
        ("", "no text"),
    ],
)
def test_bad_pairs_are_named_by_line(tmp_path, lines, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines)
    with pytest.raises(ConfigError, match=message):
        read_pairs(path)


def test_bad_arguments(plain):
    with pytest.raises(ConfigError, match="nothing to learn"):
        make_examples(["a"], plain)
    with pytest.raises(ConfigError, match="window=1"):
        make_examples(["abc"], plain, window=1)
    with pytest.raises(ConfigError, match="expected the model's tokenizer"):
        make_examples(["abc"], None)
    endless = tiny.tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        make_examples(["abc"], endless, packed=True)
    with pytest.raises(ConfigError, match=r"absent\.jsonl does not exist"):
        read_pairs("absent.jsonl")
