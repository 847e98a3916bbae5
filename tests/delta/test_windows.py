import tracemalloc

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.windows import window_text
from tether.errors import ConfigError
from tether.store.documents import read_documents


def test_windows_hold_every_document_in_order_and_never_cross_one():
    documents = ["a" * 100, "b" * 40, "c" * 10, "d" * 64]
    windows = window_text(documents, tiny.tokenizer(), length=64)
    # 100 = 64 + 36 tokens; the 10-token document is too short to be a window.
    assert windows.starts.tolist() == [0, 64, 100, 140, 204]
    assert windows.documents.unique().tolist() == [0, 1, 3]
    text = tiny.tokenizer().decode(windows.input_ids)
    assert text == "a" * 100 + "b" * 40 + "d" * 64
    ends = windows.starts[1:] - 1
    assert windows.targets[ends].tolist() == [-100] * 4
    inside = torch.ones(204, dtype=torch.bool)
    inside[ends] = False
    assert torch.equal(windows.targets[inside], windows.input_ids[1:][inside[:-1]])


def test_limits():
    documents = ["a" * 200] * 5
    assert len(window_text(documents, tiny.tokenizer(), length=64, per_document=1).input_ids) == 5 * 64
    # 200 = 64 * 3 + 8: the rest of 8 tokens is dropped; the window that brings 300 tokens is the last.
    assert len(window_text(documents, tiny.tokenizer(), length=64, tokens=300).input_ids) == 5 * 64
    assert (
        len(window_text(documents, tiny.tokenizer(), length=64, tokens=300, whole=True).input_ids) == 2 * 192
    )
    assert len(window_text(["a" * 6400], tiny.tokenizer(), length=64, tokens=300).input_ids) == 5 * 64
    for wrong in ({"length": 1}, {"length": 64, "tokens": 0}):
        with pytest.raises(ConfigError, match="at least 2 and at least 1"):
            window_text(documents, tiny.tokenizer(), **wrong)


def test_batches_give_every_token_once():
    windows = window_text(["x" * n for n in (64, 33, 200, 47)], tiny.tokenizer(), length=64)
    seen = torch.zeros(len(windows.input_ids), dtype=torch.long)
    for batch in windows.batches(2):
        where = windows.positions(batch)
        seen[where] += 1
        assert torch.equal(windows.input_ids[where], batch.input_ids[batch.mask])
        assert bool((batch.input_ids[~batch.mask] == 0).all())
    assert bool((seen == 1).all())


def test_text_shorter_than_a_context():
    with pytest.raises(ConfigError, match="at least one context of 256"):
        window_text(["short text"], tiny.tokenizer(), length=256)
    with pytest.raises(ConfigError, match="tokenizer"):
        window_text(["text"], None, length=2)


LONG = (
    " ".join([*tiny.documents("words", 40), *tiny.documents("digits", 10)])
    + " " * 700
    + "\n\n".join(tiny.documents("words", 20, 1))
    + "\u4e2d\u6587\u4e5f\u662f" * 400
    + "-" * 3000
    + " ".join(tiny.documents("digits", 20, 2))
)


def trained(kind):
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=alphabet, special_tokens=["<a>", "<e>"], show_progress=False
        )
    else:
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<a>", "<e>", "<u>"], unk_token="<u>", show_progress=False
        )
    core.train_from_iterator((LONG[at : at + 500] for at in range(0, len(LONG), 500)), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<a> $A <e>", special_tokens=[(name, core.token_to_id(name)) for name in ("<a>", "<e>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "numbers"])
def test_the_beginning_of_a_long_document_is_read_as_within_the_whole(kind):
    if kind == "numbers":
        model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
        tokenizer = model.add_numbers(tiny.tokenizer())
    else:
        tokenizer = trained(kind)
    for begin in range(0, 3000, 371):
        document = LONG[begin:] * 3
        whole = window_text([document], tokenizer, length=16)
        count = len(whole.input_ids)
        for tokens in (1, 40, count // 7, count // 3):
            part = window_text([document, document], tokenizer, length=16, tokens=tokens)
            size = len(part.input_ids)
            assert tokens <= size < tokens + 16
            for name in ("input_ids", "numeric_values"):
                read, expected = getattr(part, name), getattr(whole, name)
                assert read is expected is None or torch.equal(read, expected[:size])
            few = window_text([document, document], tokenizer, length=16, per_document=3)
            assert torch.equal(few.input_ids, whole.input_ids[:48].repeat(2))


def test_of_a_large_file_only_what_is_used_is_read(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 500_000)
    documents = read_documents(path)
    tracemalloc.start()
    windows = window_text(documents, tiny.tokenizer(), length=64, tokens=640)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(windows.input_ids) == 640
    assert peak < 2_000_000, peak  # the file has 22 MB
