"""Who sleeps: means and gates look back within their own text, however it is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tether.causal.sleeping import recent_mean, still_open


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


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 6)), min_size=1, max_size=30),
    st.integers(0, 7),
    st.integers(0, 29),
)
def test_a_gate_stays_open_for_a_while_within_its_text(text, hold, cut):
    """Against a loop; a fresh text begins where the third number is 0, and cuts change nothing."""
    opened = torch.tensor([[pair[:2] for pair in text]])
    starts = [at for at, (*_, fresh) in enumerate(text) if fresh == 0 or at == 0]
    begun = [max(start for start in starts if start <= at) for at in range(len(text))]
    places = torch.tensor([[at - start for at, start in enumerate(begun)]])
    expected = torch.tensor([[
        [any(text[back][of] for back in range(max(begun[at], at - hold), at + 1)) for of in range(2)]
        for at in range(len(text))
    ]])  # fmt: skip
    assert torch.equal(still_open(opened, places, hold), expected)
    cut = min(cut, len(text) - 1)
    later = still_open(opened[:, cut:], places[:, cut:], hold, opened[:, :cut])
    assert torch.equal(later, expected[:, cut:])
    # No more is needed of what came before than `hold` positions.
    near = still_open(opened[:, cut:], places[:, cut:], hold, opened[:, max(0, cut - hold) : cut])
    assert torch.equal(near, expected[:, cut:])
