"""Who sleeps: means and gates look back within their own text, however it is cut."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tether.causal.sleeping import recent_mean, since_open

NEVER = 1000


@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("cut", [0, 1, 2, 6, 11])
def test_means_of_the_last_tokens_stay_inside_their_text(generator, window, cut):
    states = torch.randn(2, 12, 4, generator=generator)
    places = torch.tensor([[*range(12)], [0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    expected = torch.stack([
        torch.stack([row[max(t - window + 1, t - int(place[t])) : t + 1].mean(0) for t in range(12)])
        for row, place in zip(states, places, strict=True)
    ])  # fmt: skip
    assert_close(recent_mean(states, places, window), expected)
    if cut:
        two = recent_mean(states[:, cut:], places[:, cut:], window, states[:, :cut])
        assert_close(two, recent_mean(states, places, window)[:, cut:])


def test_means_of_half_precision_are_taken_in_single(generator):
    """Sums of many tokens would lose in half precision what tells contexts apart; one token may come alone."""
    states = torch.randn(1, 40, 3, generator=generator).bfloat16()
    places = torch.arange(40)[None]
    expected = torch.stack([states[0, max(0, t - 15) : t + 1].double().mean(0) for t in range(40)]).float()
    whole = recent_mean(states, places, 16)
    assert_close(whole[0], expected, rtol=1e-5, atol=1e-6)
    one = recent_mean(states[:, 39:], places[:, 39:], 16, states[:, :39])
    assert_close(one[0], expected[39:], rtol=1e-5, atol=1e-6)


@settings(max_examples=400)
@example([(False, True, 1, False, False, True)] * 3, 1, 1, 0, 0)
@example([(False, True, 1, False, True, True)] * 9, 2, 5, 7, 3)
@example([(True, True, 1, False, False, False)] + [(False, False, 1, False, True, False)] * 8, 2, 5, None, 0)
@given(
    st.lists(
        st.tuples(*[st.booleans()] * 2, st.integers(0, 6), *[st.booleans()] * 3), min_size=1, max_size=30
    ),
    st.integers(0, 7),
    st.integers(0, 29),
    st.one_of(st.none(), st.integers(0, 29)),
    st.integers(0, 4),
)
def test_tokens_since_a_gate_was_open_in_its_text(text, hold, cut, written, grace):
    """Against a loop; a text begins where the third number is 0, the fourth is padding, the last two say whose gates
    stay open, and cuts do not matter.
    """
    mask = [not (row[3] and at) for at, row in enumerate(text)]
    expected, places, place, now = [], [], -1, [NEVER, NEVER]
    for at, (one, two, fresh, _, *stay) in enumerate(text):
        if mask[at]:
            place = 0 if fresh == 0 or at == 0 else place + 1
            if place == 0:
                now = [NEVER, NEVER]
            if hold and written is not None and at >= written:
                now = [0 if known < hold else NEVER for known in now]
            else:
                now = [
                    0 if gate or (hold and stays and known == 0) else min(known + 1, NEVER)
                    for gate, stays, known in zip((one, two), stay, now, strict=True)
                ]
                if place < grace:
                    now = [min(known, hold) for known in now]
        expected.append([min(known, hold + 1) for known in now])
        places.append(max(place, 0))
    opened = torch.tensor([[pair[:2] for pair in text]]) & torch.tensor([mask]).unsqueeze(-1)
    whole = opened, torch.tensor([mask]), torch.tensor([places])
    staying = torch.tensor([[row[4:] for row in text]])
    seen = torch.tensor([mask])[0]
    found = since_open(*whole, staying=staying, hold=hold, grace=grace, written=written)
    assert torch.equal(found[0][seen], torch.tensor(expected)[seen].int())
    cut = min(cut, len(text) - 1)
    first = since_open(
        *(part[:, :cut] for part in whole), staying=staying[:, :cut], hold=hold, grace=grace, written=written
    )
    rest = since_open(
        *(part[:, cut:] for part in whole),
        first,
        staying=staying[:, cut:],
        hold=hold,
        grace=grace,
        written=None if written is None else written - cut,
    )
    assert torch.equal(torch.cat([first, rest], 1)[0][seen], found[0][seen])


def test_places_that_a_caller_gives_to_padding_begin_no_text():
    """`position_ids` may hold anything where there is no token."""
    mask = torch.tensor([[False, True, True, False, True]])
    places = torch.tensor([[-1, 0, 1, 0, 2]])
    opened = torch.tensor([[False, True, False, False, False]]).unsqueeze(-1)
    assert since_open(opened, mask, places, hold=5)[0, mask[0], 0].tolist() == [0, 1, 2]
    states = torch.tensor([[[9.0], [1.0], [3.0], [9.0], [5.0]]])
    assert bool(recent_mean(states, places, 2).isfinite().all())
