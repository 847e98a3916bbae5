"""What is kept aside of a domain's text, and the sample of it that a delta carries."""

import pytest
import torch

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.adapter_training import AdapterFit
from tether.delta.cache import cache_states
from tether.delta.held_out import hold_out, leave_out, sample_texts
from tether.delta.sharded import ShardedStates
from tether.delta.shards import cached
from tether.delta.training import Fit
from tether.delta.windows import reader, window_text
from tether.errors import ConfigError


@pytest.fixture
def windows(tokenizer):
    def cut(documents, length=64):
        return window_text(documents, tokenizer, length=length)

    return cut


def tokens_of(windows, numbers):
    return int((torch.isin(windows.documents, numbers) & (windows.targets >= 0)).sum())


def test_whole_documents_are_kept_aside_spread_over_the_text(windows):
    text = windows(["a b " * 50] * 40)  # 200 tokens each, of which 196 have a next one in a window of 64
    kept = hold_out(text, 0.15)
    assert kept.kind == "documents"
    assert kept.windows is text
    assert len(kept.away) == 6  # a seventh of 40 would be more than 0.15 of the tokens
    assert tokens_of(text, kept.away) >= 0.15 * tokens_of(text, torch.arange(40))
    assert sorted([*kept.away.tolist(), *kept.stay.tolist()]) == list(range(40))
    gaps = torch.tensor([-1, *kept.away.tolist(), 40]).diff()
    assert int(gaps.max()) <= 2 * 40 / 6
    assert f"6 documents ({tokens_of(text, kept.away)} tokens)" in kept.note


def test_at_least_256_tokens_and_two_documents_are_kept_aside_and_at_most_2048(windows):
    small = windows(["a b " * 16] * 24)
    assert 256 <= tokens_of(small, hold_out(small, 0.15).away) < 256 + 80
    two = windows(["a b " * 60] * 9)  # two of nine hold more than 0.15 of the tokens, one alone less than 256
    assert len(hold_out(two, 0.01).away) == 2
    large = windows(["a b " * 100] * 120)
    assert 2048 <= tokens_of(large, hold_out(large, 0.15).away) < 2048 + 400


def test_a_document_that_holds_much_of_the_text_stays_in_the_fit(windows):
    text = windows([*["a b " * 50] * 3, "a b " * 1000, *["a b " * 50] * 6])
    kept = hold_out(text, 0.15)
    assert kept.kind == "documents"
    assert 3 not in kept.away.tolist()
    assert tokens_of(text, kept.away) <= 0.25 * tokens_of(text, torch.arange(10))


@pytest.mark.parametrize(
    "documents",
    [["a b " * 800], ["a b " * 300] * 3, ["a b " * 300] * 4, ["a b " * 80, "a b " * 800, "a b " * 80]],
)
def test_a_text_of_few_documents_is_cut_at_its_windows(windows, documents):
    text = windows(documents)
    kept = hold_out(text, 0.15)
    assert kept.kind == "windows"
    assert kept.windows.documents.unique().tolist() == list(range(len(text.starts) - 1))
    assert all(
        len(kept.windows.documents[begin:end].unique()) == 1
        for begin, end in zip(text.starts[:-1].tolist(), text.starts[1:].tolist(), strict=True)
    )
    share = tokens_of(kept.windows, kept.away) / int((text.targets >= 0).sum())
    assert 0.1 < share <= 0.25
    # Spread over the text, not its end.
    assert int(kept.away.min()) < len(text.starts) / 3
    assert int(kept.away.max()) > len(text.starts) / 2
    assert "other windows of the same documents were learnt from" in kept.note


@pytest.mark.parametrize("documents", [["a b " * 200], ["a b " * 20] * 12, ["a b " * 255] * 1])
def test_of_a_text_that_is_too_short_nothing_is_kept_aside_and_a_sentence_says_so(windows, documents):
    text = windows(documents)
    kept = hold_out(text, 0.15)
    assert (kept.kind, len(kept.away)) == ("none", 0)
    assert kept.windows is text
    assert kept.stay.tolist() == text.documents.unique().tolist()
    assert "too short" in kept.note
    assert "at least 1024 tokens in 8 windows" in kept.note


def test_few_long_windows_are_too_short_as_well(windows):
    assert hold_out(windows(["a b " * 400], length=256), 0.15).kind == "none"


def test_a_gate_has_four_windows_left_or_nothing_is_kept_aside(windows):
    # Three windows hold most of the text; all of the others together are what should be kept aside.
    documents = ["a b " * 125] * 3 + ["a b " * 8 + "a"] * 8
    assert hold_out(windows(documents, length=512), 0.15).kind == "none"
    assert hold_out(windows([*documents, documents[0]], length=512), 0.15).kind == "documents"


def test_nothing_is_kept_aside_when_nothing_is_asked_for(windows):
    kept = hold_out(windows(["a b " * 50] * 40), 0.0)
    assert (kept.kind, len(kept.away)) == ("none", 0)
    assert "as was asked for" in kept.note


def test_the_choice_does_not_depend_on_what_the_documents_say(windows):
    assert torch.equal(
        hold_out(windows(tiny.documents("digits", 40, 1)), 0.15).away,
        hold_out(windows(tiny.documents("digits", 40, 2)), 0.15).away,
    )


def test_a_larger_share_can_be_asked_for(windows):
    text = windows(["a b " * 20] * 40)
    assert 0.5 <= tokens_of(text, hold_out(text, 0.5).away) / tokens_of(text, torch.arange(40)) < 0.55


@pytest.mark.parametrize("options", [{"held_out": -0.1}, {"held_out": 0.6}, {"held_out": float("nan")}])
def test_bad_shares(options):
    for kind in (Fit, AdapterFit):
        with pytest.raises(ConfigError, match=r"\[0, 0.5\]"):
            kind(**options)


def test_what_is_left_is_the_text_without_these_documents(caches):
    cache = caches["digits"]
    kept = hold_out(cache.windows, 0.15)
    rest, expected = leave_out(cache, kept), cache.only(kept.stay)
    assert len(kept.away) >= 2
    for ours, theirs in zip(rest.windows, expected.windows, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    every = torch.arange(len(expected.states))
    assert len(rest.states) == len(expected.states)
    assert rest.states.shape == expected.states.shape
    assert torch.equal(rest.states[every], expected.states)


def test_a_sample_is_of_what_was_kept_aside_and_bounded(windows, tokenizer):
    documents = [f"{number} " + "word " * 2000 for number in range(100)]
    text = window_text(documents, tokenizer, length=256)
    kept = hold_out(text, 0.15)
    many = kept._replace(away=torch.arange(0, 100, 4), stay=torch.arange(1, 100, 4))
    sample = sample_texts(many, documents, tokenizer)
    assert len(sample) == 16
    assert sum(len(piece.encode()) for piece in sample) <= 32_768
    assert all(len(piece) > 2000 for piece in sample)
    assert all(piece.endswith("word") for piece in sample)
    numbers = [int(piece.split()[0]) for piece in sample]
    assert set(numbers) <= set(range(0, 100, 4))
    assert (numbers[0], numbers[-1]) == (0, 96)


def test_a_sample_of_wide_letters_is_cut_between_letters(windows, tokenizer):
    documents = ["\u00e9\u4e2d" * 8000 for _ in range(8)]
    kept = hold_out(windows(["a b " * 50] * 8), 0.15)
    sample = sample_texts(kept, documents, tokenizer)
    assert sum(len(piece.encode()) for piece in sample) <= 32_768
    assert all(set(piece) == {"\u00e9", "\u4e2d"} for piece in sample)


def test_a_sample_of_one_document_is_of_its_windows(windows, tokenizer):
    document = " ".join(str(number) for number in range(1000, 2000))
    kept = hold_out(windows([document]), 0.15)
    sample = sample_texts(kept, [document], tokenizer)
    assert len(sample) == len(kept.away)
    for piece, number in zip(sample, kept.away.tolist(), strict=True):
        assert piece in document[64 * number : 64 * (number + 1)]
        assert len(piece) >= 60


def test_a_sample_of_a_model_that_reads_numbers_has_its_numbers(tokenizer):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    numeric = model.add_numbers(tokenizer)
    document = ", ".join(f"item {number / 8:g}" for number in range(1000, 2000))
    text = window_text([document], reader(model, tokenizer), length=64)
    sample = sample_texts(hold_out(text, 0.15), [document], numeric)
    assert len(sample) >= 2
    assert all(piece in document for piece in sample)
    assert all(any(letter.isdigit() for letter in piece) for piece in sample)


def test_no_sample_where_nothing_is_kept_aside(windows, tokenizer):
    assert sample_texts(hold_out(windows(["a b " * 50] * 2), 0.15), ["a b " * 50] * 2, tokenizer) == ()


def test_states_of_a_text_in_parts_are_left_where_they_are(model, tokenizer, tmp_path, monkeypatch):
    text = window_text(tiny.documents("digits", 24, 1), tokenizer, length=64)
    whole = cache_states(model, text, tmp_path / "whole.safetensors")
    monkeypatch.setattr("tether.delta.shards.PART_TOKENS", 500)
    parts = cached(model, text, tmp_path)
    assert isinstance(parts.states, ShardedStates)
    kept = hold_out(text, 0.15)
    index = torch.tensor([0, 7, 600])
    assert torch.equal(leave_out(parts, kept).states[index], leave_out(whole, kept).states[index])
