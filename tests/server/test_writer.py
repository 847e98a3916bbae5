"""Pieces of an answer add up to what `decode` makes of it, however it is cut, with and without a text to stop at."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from tether.causal.numbers import NumericTokenizer
from tether.server.writer import Ended, Writer

PLAIN = tiny.tokenizer()
NUMERIC = NumericTokenizer(tiny.tokenizer())


def write(ids, stops=(), tokenizer=PLAIN, numbers=None):
    """As the stock loop does: the prompt, then each token until the criterion says so."""
    pieces = []
    number = None if numbers is None else tokenizer.num_token_id
    writer = Writer(tokenizer, number, stops, pieces.append)
    ended = Ended(writer)
    writer.put(torch.tensor([[1, 2, 3]]))
    for at, each in enumerate(ids):
        if numbers is not None:
            writer.values.append(torch.tensor([numbers[at]], dtype=torch.float64))
        writer.put(torch.tensor([each]))
        if bool(ended(torch.tensor([[each]]), None)):
            break
    writer.end()
    return writer, pieces


@given(st.lists(st.integers(0, 257), max_size=40))
def test_pieces_of_any_bytes_add_up(ids):
    writer, pieces = write(ids)
    assert "".join(pieces) == writer.text == PLAIN.decode(ids, skip_special_tokens=True)
    assert writer.total_tokens == len(ids)


@given(st.text(max_size=20))
def test_a_piece_is_never_half_a_character(text):
    _, pieces = write(PLAIN(text)["input_ids"])
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces).replace("\ufffd" if "\ufffd" in text else "", "")
    assert all(pieces)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_where_the_first_text_to_stop_at_begins(text, stops):
    writer, pieces = write(PLAIN(text)["input_ids"], stops)
    # The first to be complete ends the answer.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    first = min(ends, default=None)
    seen = text[:first]
    begins = [seen.find(stop) for stop in stops if stop in seen]
    assert "".join(pieces) == writer.text == text[: min(begins, default=None)]
    assert writer.stopped == bool(begins)
    assert writer.total_tokens == len(seen)


def test_what_may_be_a_text_to_stop_at_is_held_back():
    pieces = []
    writer = Writer(PLAIN, None, ["END"], pieces.append)
    writer.put(torch.tensor([[1]]))
    for letter in "AEN":
        writer.put(torch.tensor(PLAIN(letter)["input_ids"]))
    assert pieces == ["A"]
    writer.put(torch.tensor(PLAIN("x")["input_ids"]))
    assert "".join(pieces) == "AENx"


@given(st.lists(st.one_of(st.integers(0, 257), st.floats(-1e6, 1e6)), max_size=20))
def test_numbers_are_written_by_their_values(given):
    number = NUMERIC.num_token_id
    ids = [number if isinstance(each, float) else each for each in given]
    numbers = [each if isinstance(each, float) else 5.0 for each in given]
    writer, pieces = write(ids, tokenizer=NUMERIC, numbers=numbers)
    values = [value if each == number else 0.0 for each, value in zip(ids, numbers, strict=True)]
    wanted = NUMERIC.decode(ids, values, skip_special_tokens=True, precision=6)
    assert "".join(pieces) == writer.text == wanted


def test_a_number_can_be_a_text_to_stop_at():
    number = NUMERIC.num_token_id
    letters = NUMERIC("a")["input_ids"]
    writer, _ = write([*letters, number, *letters], ["12.5"], NUMERIC, [0.0, 12.5, 0.0])
    assert writer.text == "a"
    assert writer.total_tokens == 2


def test_whoever_has_gone_stops_it_at_the_next_token():
    writer, _ = write([])
    assert not bool(Ended(writer)(torch.tensor([[1]]), None))
    writer.cancel()
    assert bool(Ended(writer)(torch.tensor([[1]]), None))


@pytest.mark.parametrize("token", [256, 257])
def test_control_tokens_are_not_shown(token):
    assert write([*PLAIN("a")["input_ids"], token])[0].text == "a"
