"""Windows of text: what is in them, what is learnt, in which order."""

import json
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal import encoded
from tether.causal.apart import check_apart
from tether.causal.dataset import count_labels, make_examples, shuffled
from tether.causal.losses import IGNORE
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numbers import NumericTokenizer
from tether.causal.pairs import Pair
from tether.errors import ConfigError
from tether.store.documents import documents_of, read_documents
from tether.store.marked import Controlled

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


def test_documents_of_a_packed_window_do_not_see_each_other(plain):
    texts = ["abc", "defgh", "i", "jklmnopqrs", "tu"]
    examples = make_examples(texts, plain, window=7, packed=True)
    batch = examples.collate(range(examples.windows))
    assert batch["position_ids"].tolist()[:3] == [
        [0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6],
    ]  # fmt: skip
    assert "attention_mask" not in batch
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        alone = model(input_ids=torch.tensor([[*ids("abc", plain), EOS]])).logits
        assert_close(packed[0, :4], alone[0])
        second = model(input_ids=torch.tensor([ids("def", plain)])).logits
        assert_close(packed[0, 4:7], second[0])
        seen = model(input_ids=batch["input_ids"]).logits
    assert float((packed[0, 4:7] - seen[0, 4:7]).abs().max()) > 0.01


def test_a_backbone_that_takes_documents_for_one_text_is_refused(monkeypatch):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    check_apart(model)
    run = model.backbone.forward
    monkeypatch.setattr(
        model.backbone, "forward", lambda *given, position_ids=None, **named: run(*given, **named)
    )
    with pytest.raises(ConfigError, match="would see each other"):
        check_apart(model)


def test_a_packed_window_without_anything_to_learn_is_left_out():
    talking = tiny.tokenizer()
    talking.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "p" * 12}, {"role": "assistant", "content": "yes"}]
    documents = documents_of(
        [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "content": "no"}]}]
    )
    # Tokens 0 to 14, then 15 to 28, in windows of four: those at 0, 4, 8, 16 and 20 hold prompts alone, and nothing
    # predicts the last token in its own.
    examples = make_examples(documents, talking, window=4, packed=True)
    batch = examples.collate(range(examples.windows))
    whole = [*ids("yes", talking), *ids("p", talking), *ids("ppp", talking), *ids("n", talking)]
    assert batch["input_ids"].flatten().tolist() == whole
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


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


def test_pairs_of_a_file_are_learnt_as_pairs(plain, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "quite long ", "completion": "ä"}) + "\n\n")
    for window in (4, 9, 256):
        read = make_examples(read_documents(path), plain, window=window)
        assert (
            read.fingerprint()
            == make_examples([Pair("quite long ", "ä")], plain, window=window).fingerprint()
        )


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_on_disk_is_learnt_as_its_documents_are(plain, tmp_path, monkeypatch, packed):
    monkeypatch.setattr(encoded, "PIECE", 1500)
    path = tmp_path / "plain.txt"
    path.write_text("\n".join(tiny.documents("words", 60)))
    given = [path.read_text()]
    for window in (7, 64):
        read = make_examples(read_documents(path), plain, window=window, packed=packed)
        assert read.fingerprint() == make_examples(given, plain, window=window, packed=packed).fingerprint()


def test_control_tokens_in_a_text_are_letters_unless_asked_for(plain):
    letters = plain("a<eos>b", split_special_tokens=True)["input_ids"]
    assert EOS not in letters
    assert make_examples(["a<eos>b"], plain).input_ids.tolist() == letters
    assert make_examples([Controlled("a<eos>b")], plain).input_ids.tolist() == [letters[0], EOS, letters[-1]]
    pair = make_examples([Pair("<eos>", "<eos>b")], plain)
    assert pair.input_ids.tolist() == [*letters[1:-1], *letters[1:], EOS]


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
