"""Texts that are larger than memory should hold: read piece by piece, with the same result to the last bit."""

import logging
import tracemalloc

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from delta.test_windows import LONG, trained
from tether.causal import encoded
from tether.causal.encoded import encode, encode_blocks
from tether.causal.gates import window_mean
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numbers import NumericTokenizer
from tether.delta import gate as gates
from tether.delta import material, shards
from tether.delta.gate import _Contexts
from tether.delta.learning import learn_delta
from tether.delta.material import gather
from tether.delta.sharded import FileRows
from tether.delta.shards import cached, read_states
from tether.delta.source import Source
from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError
from tether.store.documents import read_documents, write_documents
from tether.store.marked import Controlled
from tether.store.nameless import Nameless

TEXT = LONG[:9000] + "\n".join(
    ["a <e> 1.5 b", *tiny.documents("digits", 300, 3), *tiny.documents("words", 300, 4)]
)


def phrases():
    """A tokenizer whose tokens may hold several words, so that most ends of words are no ends of tokens."""
    core = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<e>"], max_token_length=40, show_progress=False
    )
    core.train_from_iterator([TEXT[at : at + 400] for at in range(0, len(TEXT), 400)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def reading(kind):
    if kind == "numbers":
        return NumericTokenizer(tiny.tokenizer())
    if kind == "phrases":
        return phrases()
    return tiny.tokenizer() if kind == "letters" else trained(kind)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "letters", "numbers", "phrases"])
def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(monkeypatch, kind, control):
    monkeypatch.setattr(encoded, "PIECE", 3000)
    tokenizer = reading(kind)
    blocks = [TEXT[at : at + 1000] for at in range(0, len(TEXT), 1000)]
    parts = list(encode_blocks(tokenizer, blocks, control=control))
    whole = encode(tokenizer, Controlled(TEXT) if control else TEXT)
    assert len(parts) > 4
    assert [number for part in parts for number in part.ids] == whole.ids
    assert [value for part in parts for value in part.values] == whole.values
    # No piece is much longer than was asked for, but for the stretches without spaces.
    assert sorted(len(part.ids) for part in parts)[len(parts) // 2] < len(whole.ids) / 3


def test_without_a_seam_the_text_is_read_whole(monkeypatch):
    monkeypatch.setattr(encoded, "PIECE", 2000)
    (part,) = encode_blocks(tiny.tokenizer(), ["x" * 1000] * 9)
    assert part.ids == encode(tiny.tokenizer(), "x" * 9000).ids


def test_windows_of_a_large_plain_file_are_those_of_its_content(monkeypatch, tmp_path):
    monkeypatch.setattr(encoded, "PIECE", 2000)
    (tmp_path / "plain.txt").write_text(TEXT)
    text = read_documents(tmp_path / "plain.txt")
    for asked in ({"length": 64}, {"length": 50, "per_document": 9}, {"length": 64, "tokens": 700}):
        one, other = (window_text(each, tiny.tokenizer(), **asked) for each in (text, [TEXT]))
        for name in ("input_ids", "targets", "documents", "starts"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_of_a_large_file_that_is_read_whole_a_piece_is_held(monkeypatch, tmp_path):
    monkeypatch.setattr(encoded, "PIECE", 20_000)
    monkeypatch.setattr("tether.store.plain.BLOCK", 20_000)
    path = tmp_path / "plain.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 25_000)
    text, tokenizer = read_documents(path), tiny.tokenizer()
    tracemalloc.start()
    windows = window_text(text, tokenizer, length=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 1.1 million tokens: four bytes each in an array that grows, one for its mark; lists took over 16 MB.
    assert len(windows.input_ids) > 1_050_000
    assert peak < 12_000_000, peak


def test_control_tokens_are_letters_for_windows_too():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True)]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    document = "some words <|end|> more words " * 3
    letters = window_text([document], tokenizer, length=16)
    assert not bool((letters.input_ids == end).any())
    assert tokenizer.decode(letters.input_ids) == document[: len(letters.input_ids)]
    asked = window_text([Controlled(document)], tokenizer, length=16)
    assert int((asked.input_ids == end).sum()) == 3
    # The beginning of a longer one likewise.
    few = window_text([Controlled(document * 400)], tokenizer, length=16, tokens=48)
    assert torch.equal(few.input_ids, asked.input_ids[:48])


@pytest.fixture(scope="module")
def model():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone())


def text_of(lengths):
    return [tiny.documents("digits", 1, seed)[0][:size] for seed, size in enumerate(lengths)]


def test_rows_of_a_file_are_those_of_the_tensor(tmp_path):
    values = torch.randn(40, 6).half()
    (tmp_path / "rows").write_bytes(b"head" + values.numpy().tobytes())
    nameless = Nameless()
    nameless.write(b"head" + values.numpy().tobytes())
    for file in (tmp_path / "rows", nameless):
        rows = FileRows(file, 4, (40, 6))
        for index in (
            torch.tensor([39, 3, 4, 5, 3, 0]),
            torch.arange(0),
            torch.arange(40) % 3 == 0,
            slice(5, 30, 4),
        ):
            assert torch.equal(rows[index], values[index])
        with pytest.raises(CheckpointError, match="cut short"):
            FileRows(file, 4, (41, 6))[torch.tensor([40])]


def test_states_in_a_nameless_file_and_in_a_cache_are_read_in_one_order(model, tmp_path, monkeypatch):
    for limit in ("KEPT_BYTES", "MIXED_BYTES"):
        monkeypatch.setattr(f"tether.delta.source.{limit}", 0)
    windows = window_text(tiny.documents("digits", 60), tiny.tokenizer(), length=48)
    monkeypatch.setattr(shards, "PART_TOKENS", 500)
    sources = [
        Source(model, cache)
        for cache in (read_states(model, windows), cached(model, windows, tmp_path / "states"))
    ]
    orders = [list(source.batches(64, torch.Generator().manual_seed(0))) for source in sources]
    assert all(torch.equal(one, other) for one, other in zip(*orders, strict=True))
    for source in sources:
        assert torch.equal(source.next_tokens(orders[0][0]), source.targets[orders[0][0]])
    for one, other in zip(*(source.take(orders[0][0]) for source in sources), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lengths", [[100] * 30, list(range(33, 130)), [1500]])
def test_means_of_contexts_are_those_of_whole_windows(model, lengths):
    windows = window_text(
        text_of(lengths) if lengths[0] < 999 else ["".join(text_of([90] * 40))], tiny.tokenizer(), length=64
    )
    cache = read_states(model, windows)
    contexts = _Contexts(cache, 32)
    for counts, most in ((torch.tensor([1]), 999), (torch.tensor([5, 6, 7]), 40), (torch.tensor([32]), 300)):
        row, time = contexts.some(counts, most)
        assert len(row) <= most
        assert len(set(zip(row.tolist(), time.tolist(), strict=True))) == len(row)
        found = contexts.means(row, time)
        for one, at, mean in zip(row.tolist(), time.tolist(), found, strict=True):
            assert at + 1 in counts or (32 in counts and at >= 31)
            begin, end = windows.starts[one : one + 2].tolist()
            whole = cache.states[torch.arange(begin, end)].float().unsqueeze(0)
            expected = window_mean(whole, torch.ones(1, end - begin, dtype=torch.bool), 32)[0][0, at]
            assert torch.equal(mean, expected)


def test_gates_hold_no_more_than_the_contexts_of_a_stage(model, monkeypatch):
    monkeypatch.setattr(gates, "CONTEXTS", 50)
    sizes = []
    means = _Contexts.means
    monkeypatch.setattr(_Contexts, "means", lambda self, *at: sizes.append(len(at[0])) or means(self, *at))
    gates.fit_gate(read_states(model, window_text(tiny.documents("words", 60), tiny.tokenizer(), length=64)))
    assert max(sizes) == 50


def test_states_that_would_fill_the_disk_are_of_fewer_windows(model, tmp_path, caplog, monkeypatch):
    write_documents(tmp_path / "own.jsonl", tiny.documents("digits", 80, 1))
    write_documents(tmp_path / "base.jsonl", tiny.documents("words", 20, 2))
    texts = tmp_path / "own.jsonl", tmp_path / "base.jsonl"
    every = gather(model, tiny.tokenizer(), *texts, window=64).windows[0]
    disk = 64 * len(every.input_ids) / 4  # the width is 32
    with caplog.at_level(logging.WARNING):
        few = gather(model, tiny.tokenizer(), *texts, window=64, disk=disk).windows[0]
    assert "64 bytes each" in caplog.text
    assert 0.2 * len(every.input_ids) < len(few.input_ids) <= 0.27 * len(every.input_ids)
    assert int(few.documents.min()) < 4
    assert int(few.documents.max()) > 75
    begin, end = few.starts[3:5].tolist()
    at = (every.documents == few.documents[begin]).nonzero()[0, 0]
    assert any(
        torch.equal(every.input_ids[at + shift : at + shift + end - begin], few.input_ids[begin:end])
        for shift in range(300)
    )
    delta = learn_delta(
        model, tiny.tokenizer(), texts[0], base_texts=texts[1], window=64, epochs=1, disk=disk, gate=False
    )
    assert delta.record["tokens"] < len(few.input_ids)
    with pytest.raises(ConfigError, match="room for the states of a window at least"):
        gather(model, tiny.tokenizer(), *texts, window=64, disk=10)
    monkeypatch.setattr(material.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match=r"0\.0 GB are free, and hidden states take .*64 bytes a token"):
        learn_delta(model, tiny.tokenizer(), texts[0], base_texts=texts[1], window=64)
