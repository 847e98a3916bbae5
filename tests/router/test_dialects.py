"""Three domains that contradict each other: where an average keeps nothing, a router keeps what each has learnt."""

import pytest
import torch

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.learning import anchor_text, fit_delta
from tether.delta.measure import Variant, measure
from tether.delta.training import Fit
from tether.delta.windows import window_text
from tether.router.deltas import DeltaRouterFit, route_deltas

SYMBOLS = "xyz"
DIALECTS = {"P": 0, "Q": 1, "R": 2}
"""Mark of a dialect to how far each next symbol is from the one before; the base knows the marks and no rule."""
RUN = 7


def written(mark, count, seed, *, marks="PQRS", length=120):
    """Text in runs of a mark and symbols; without a mark it mixes `marks` and draws symbols at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (1,), generator=generator))

    texts = []
    for _ in range(count):
        text = ""
        while len(text) < length:
            at = draw(3)
            text += mark or marks[draw(len(marks))]
            for _ in range(RUN):
                text += SYMBOLS[at]
                at = (at + DIALECTS[mark]) % 3 if mark else draw(3)
        texts.append(text)
    return texts


@pytest.fixture(scope="module")
def base():
    model = tiny.backbone()
    tokens = torch.tensor(tiny.tokenizer()([t[:120] for t in written("", 400, 0)])["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for part in tokens.repeat(8, 1).split(16):
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return CausalQwenForCausalLM.from_backbone(model.eval())


@pytest.fixture(scope="module")
def gains(base, tmp_path_factory):
    """Nats that each dialect gains over the base: with its own delta, routed, averaged and summed."""
    folder = tmp_path_factory.mktemp("dialects")
    # Base text has a mark of its own, so that the budget does not say what dialects do to each other.
    texts = {mark: written(mark, 24, 1) for mark in DIALECTS}
    texts |= {"base": written("", 24, 1, marks="S"), "held-out": written("", 16, 2, marks="S")}
    caches = {
        name: cache_states(base, window_text(text, tiny.tokenizer(), length=64), folder / f"{name}.st")
        for name, text in texts.items()
    }
    anchor = anchor_text(base, caches["base"], caches["held-out"])
    fit = Fit(budget=Budget(value=0.3), epochs=6, batch=128, lr=3e-3, candidates=200, sampled=50, probe=300)
    deltas = [fit_delta(base, caches[mark], anchor, mark, fit) for mark in DIALECTS]
    routed = route_deltas(
        base, deltas, {mark: caches[mark] for mark in DIALECTS}, caches["base"], caches["held-out"],
        DeltaRouterFit(
            budget=0.1, tokens=3000, epochs=20, batch=128, candidates=200, sampled=50, probe=300, window=8
        ),
    )  # fmt: skip
    found = {"own": 0.0, "routed": 0.0, "average": 0.0, "sum": 0.0}
    for k, mark in enumerate(DIALECTS):
        variants = {
            "own": Variant(tuple(float(k == j) for j in range(3)), "symmetric", False),
            "routed": Variant(tuple(routed.fusion.weights), routed.fusion.chart, True),
            "average": Variant((1 / 3,) * 3, "symmetric", False),
            "sum": Variant((1.0,) * 3, "symmetric", False),
        }
        windows = window_text(written(mark, 12, 2), tiny.tokenizer(), length=64)
        result = measure(base, routed.fusion, windows, list(variants.values()))
        for name, nll in zip(variants, result.nll.mean(1).tolist(), strict=True):
            found[name] += float(result.base_nll.mean()) - nll
    return found


def test_a_router_keeps_what_an_average_loses(gains):
    # Research notes on FARS, section 7, figure 8.
    assert gains["own"] > 3 * 0.5, gains
    assert gains["routed"] >= 0.5 * gains["own"], gains
    assert gains["average"] < 0.1 * gains["own"], gains
    assert gains["sum"] < 0.1 * gains["own"], gains
