"""Fusion by evidence in a model: against experts run one by one, however the text is cut, padded and written."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

import tether
import tiny
from tether.causal import mixture, walk
from tether.causal.evidence import Rule
from tether.causal.experts import CLIP
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.memory import Memory
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.delta.delta import Delta
from tether.delta.fusion import fuse, unfuse
from tether.delta.gate import Gate
from tether.errors import CheckpointError, ConfigError

H = 32
RULE = Rule(prior=0.6, restarts=(0.0, 0.02, 0.2), floor=0.05, hold=1, grace=2, stay=1.1)
NATIVE = ("symmetric", "linear", "geodesic")
SHUT = -1.0
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}


def random_delta(model, name, seed, chart="symmetric", size=3.0, limit=40.0, layers=(), **fields):
    generator = torch.Generator().manual_seed(seed)
    width = H * (1 + len(layers))
    first, second = (size * torch.randn(H, width, generator=generator) / H for _ in range(2))
    whitening = torch.randn(3, H, generator=generator)
    gate = Gate(torch.zeros(H), whitening, torch.linspace(3 * limit, limit, 4))
    made = {"first": first, "second": second, "gate": gate, "layers": layers} | fields
    made.setdefault("record", {"strengths": [0.5, 1.0]})
    return Delta(name=name, chart=chart, base=model.config.base_fingerprint, **made)


def make(kind="llama", **options):
    return CausalQwenForCausalLM.from_backbone(tiny.backbone(kind), latent_scale=1.0, **options).eval()


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def deltas(model):
    return [
        random_delta(model, name, seed, chart)
        for seed, (name, chart) in enumerate(zip("abc", NATIVE, strict=True))
    ]


@pytest.fixture(scope="module")
def ids(model, deltas):
    """Texts that the experts have something to say about: an expert wrote the middle of each."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for delta in deltas:
        expert = fuse(model, {delta: 1.0}, by="sum", chart=delta.chart, gated=False)
        text = torch.randint(256, (1, 5), generator=generator)
        for _ in range(14):
            with torch.no_grad():
                law = expert(input_ids=text).logits[0, -1].softmax(-1)
            text = torch.cat([text, torch.multinomial(law, 1, generator=generator)[None]], 1)
        rows.append(torch.cat([text, torch.randint(256, (1, 4), generator=generator)], 1))
    return torch.cat(rows)


def scored_alone(model, weighted, ids, **options):
    """Probabilities of all classes under each expert, run alone; shape (K, B, T, V), float64."""
    experts = [model]
    for delta, weight in weighted.items():
        experts += [
            fuse(model, {delta: weight * s}, by="sum", chart=delta.chart, gated=False)
            for s in delta.strengths
        ]
    with torch.no_grad():
        return torch.stack([each(input_ids=ids, **options).logits.double() for each in experts])


def gates_alone(model, weighted, ids, gated, rule=RULE, given=None):
    """Where each expert is awake, by the gates of a sum that were open a moment ago; shape (K, B, T).

    A gate stays open as far as one with a limit `stay` times as far would be. From the position `given` on the model
    wrote: who would be awake at the next given token stays, and nobody wakes.
    """
    hold = rule.hold
    found = [torch.ones_like(ids, dtype=torch.bool)]
    for delta in weighted:
        gate = found[0]
        if gated:
            far = delta.gate._replace(threshold=rule.stay * delta.gate.threshold)
            with torch.no_grad():
                gate, stays = (
                    fuse(model, {each: 1.0}, by="sum", gated=True)(input_ids=ids).gates[0].bool()
                    for each in (delta, dataclasses.replace(delta, gate=far))
                )
            for t in range(1, ids.shape[1]):
                gate[:, t] |= gate[:, t - 1] & stays[:, t]
        held = [gate[:, max(0, t - hold) : t + 1].any(1) | (t < rule.grace) for t in range(ids.shape[1])]
        for t in range(ids.shape[1] if given is None or not gated else given, ids.shape[1]):
            held[t] = gate[:, max(0, given - hold) : given].any(1)
        found += [torch.stack(held, 1)] * len(delta.strengths)
    return torch.stack(found)


def chosen(model, weighted, ids, awake):
    """Shares of the experts in the gates' choice, by the densities of plain normal laws; shape (K, B, T)."""
    with torch.no_grad():
        states = model.backbone(ids).last_hidden_state.double()
    means = torch.stack([states[:, max(0, t - 3) : t + 1].mean(1) for t in range(ids.shape[1])], 1)
    found = [torch.zeros(ids.shape, dtype=torch.float64)]
    for delta in weighted:
        rows = delta.gate.whitening.double()
        near = torch.exp(-(means @ rows.T).square().sum(-1) / 2) * rows.norm(dim=-1).prod()
        found += [near / len(delta.strengths)] * len(delta.strengths)
    shares = torch.stack(found) * awake
    return shares / shares.sum(0).clamp(min=1e-300)


def by_hand(prob, awake, ids, rule, counts, given=None, scored=None, told=None, choice=None):
    """Weights served with in each context of each text, by plain probabilities; shape (B, T, K)."""
    left = (1 - rule.prior) / (1 if choice is None else 2)
    shares = [rule.prior]
    for count in counts:
        shares += [left / len(counts) / count] * count
    if choice is not None:
        shares.append(left)
        awake = torch.cat([awake, awake[1:].any(0, keepdim=True)])
    prior = torch.tensor(shares, dtype=torch.float64)
    rates = torch.tensor(rule.restarts, dtype=torch.float64)[:, None]
    batch, length = ids.shape
    found = torch.zeros(batch, length, len(prior), dtype=torch.float64)
    for b in range(batch):
        weights, aim = prior.expand(len(rates), -1) / len(rates), prior
        for t in range(length):
            if t == given:
                aim = weights / weights.sum(-1, keepdim=True)
            if t and (scored is None or scored[t]):
                up = awake[:, b, t - 1]
                came = prob[:, b, t - 1, ids[b, t]] * (1 if told is None else told[:, b, t])
                if choice is not None:
                    came = torch.cat([came, (choice[:, b, t - 1] * came).sum()[None]])
                heard = weights * torch.where(up, came, 0.0)
                moved = torch.where(up, heard / heard.sum() * (weights * up).sum(), weights)
                weights = (1 - rates) * moved + rates * moved.sum(-1, keepdim=True) * (
                    aim if given is not None and t >= given else prior
                )
            if rule.whole and given is not None and t == given - 1:
                # From here on with what the rate that forgets least says of the whole.
                least = weights[int(rates.argmin())]
                weights = (least / least.sum()).expand(len(rates), -1) / len(rates)
            served = weights.sum(0) * awake[:, b, t]
            served = (1 - rule.floor) * served / served.sum()
            served[0] += rule.floor
            found[b, t] = served
    if choice is not None:
        return found[..., :-1] + found[..., -1:] * choice.permute(1, 2, 0)
    return found


def check(model, weighted, ids, rule=RULE, gated=True, **options):
    """A fusion gives the weights and the law that are worked out by hand."""
    fused = fuse(model, weighted, rule=rule, gated=gated)
    scores = scored_alone(model, weighted, ids)
    awake = gates_alone(model, weighted, ids, gated, rule)
    choice = chosen(model, weighted, ids, awake) if gated and len(weighted) > 1 else None
    counts = [len(each.strengths) for each in weighted]
    weights = by_hand(scores.softmax(-1), awake, ids, rule, counts, choice=choice)
    law = torch.einsum("btk,kbtv->btv", weights, scores.softmax(-1))
    with torch.no_grad():
        out = fused(input_ids=ids, output_weights=True, **options)
    assert_close(out.log_weights.exp(), weights, rtol=1e-3, atol=1e-6)
    assert bool((out.log_weights[weights == 0] == -math.inf).all())
    expected = (law.log() + scores[0].logsumexp(-1, keepdim=True)).float()
    assert_close(out.logits, expected, rtol=1e-4, atol=2e-4)
    return fused, out, weights, awake


@pytest.mark.parametrize("gated", [False, True])
def test_it_serves_the_mixture_of_experts_that_are_run_alone(model, deltas, ids, gated):
    _, out, weights, awake = check(model, dict.fromkeys(deltas, 1.0), ids, gated=gated)
    share = awake[1:].double().mean()
    assert share == 1 if not gated else 0.2 < share < 0.8
    assert torch.equal(out.gates, awake[1::2].float())
    # There is something to see: some expert has most of the weight somewhere, and the law is not the base's.
    assert float(weights[..., 1:].max()) > 0.15
    assert float(weights[..., 0].min()) < 0.6
    with torch.no_grad():
        assert float((out.logits - model(input_ids=ids).logits).abs().max()) > 1


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(prior=0.5, restarts=(0.0,)), Rule(prior=0.01, restarts=(0.3,), floor=0.5)]
)
def test_it_does_so_by_any_rule(model, deltas, ids, rule):
    check(model, dict.fromkeys(deltas, 1.0), ids, rule)


def test_strengths_are_the_files_times_the_weight(model, deltas, ids):
    one, two, three = (
        dataclasses.replace(delta, record={"strengths": strengths})
        for delta, strengths in zip(deltas, [[0.25, 0.5, 1.0], [1.0], [0.3, 0.6]], strict=True)
    )
    fused, *_ = check(model, {one: 0.5, two: -1.0, three: 1.5}, ids)
    assert fused.fusion.strengths == ((0.125, 0.25, 0.5), (-1.0,), (0.3 * 1.5, 0.6 * 1.5))
    assert fused.fusion.domain == (-1, 0, 0, 0, 1, 2, 2)
    assert fused.fusion.experts == 7


def test_heads_of_the_location_alone_and_heads_that_read_middle_layers(ids):
    model = make("qwen2")
    still = random_delta(model, "still", 1, first=None)
    deep = random_delta(model, "deep", 2, "geodesic", layers=(1,))
    assert check(model, {still: 1.0}, ids)[0].fusion.location_only
    assert not check(model, {still: 1.0, deep: 1.0}, ids)[0].fusion.location_only
    fused, *_ = check(model, {deep: 1.0, random_delta(model, "b", 3, layers=(0, 1)): 1.0}, ids, gated=False)
    pieces(fused, ids, (7, 8))


@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_on_a_base_that_scales_or_caps_its_logits(ids, kind):
    model = make(kind)
    deltas = [random_delta(model, name, seed, size=4.0) for seed, name in enumerate("ab")]
    fused, out, *_ = check(model, dict.fromkeys(deltas, 1.0), ids, gated=False)
    with torch.no_grad():
        assert float((out.logits - model(input_ids=ids).logits).abs().max()) > 0.5
    # One by one, a token is evidence by the score of its class alone; few rows take another product with the head.
    pieces(fused, ids[:1], [*range(1, ids.shape[1])])


# However a text is cut


def whole(fused, ids, **options):
    with torch.no_grad():
        out = fused(input_ids=ids, output_weights=True, **options)
    return out.logits, out.log_weights.exp()


def pieces(fused, ids, cuts, **options):
    """The same text in one call and in several."""
    cache, logits, weights = None, [], []
    for first, last in itertools.pairwise([0, *cuts, ids.shape[1]]):
        with torch.no_grad():
            out = fused(
                input_ids=ids[:, first:last],
                past_key_values=cache,
                use_cache=True,
                output_weights=True,
                **options,
            )
        cache = out.past_key_values
        logits.append(out.logits)
        weights.append(out.log_weights.exp())
    expected = whole(fused, ids, use_cache=False, **options)
    assert_close(torch.cat(logits, 1), expected[0], rtol=1e-4, atol=2e-4)
    assert_close(torch.cat(weights, 1), expected[1], rtol=1e-3, atol=1e-5)
    return cache


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("written", [None, 0, 1, 7, 10, 22, 40])
def test_the_cut_of_a_text_does_not_matter(model, deltas, ids, gated, written):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE, gated=gated)
    for cuts in ([*range(1, ids.shape[1])], [7, 8, 20], [2], [22]):
        cache = pieces(fused, ids, cuts, written_from=written)
        assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("positions", [1, 5])
def test_the_size_of_blocks_does_not_matter(model, deltas, ids, positions, monkeypatch):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE)
    expected = whole(fused, ids)
    wanted = whole(fused, ids, logits_to_keep=9)
    monkeypatch.setattr(mixture, "BLOCK_BYTES", positions * 4 * model.action.weight.shape[0] * len(ids))
    blocks = []
    listen = walk.Walk.listen
    monkeypatch.setattr(
        walk.Walk, "listen", lambda self, scores, *at: blocks.append(at) or listen(self, scores, *at)
    )
    assert_close(whole(fused, ids), expected, rtol=1e-4, atol=1e-4)
    assert len(blocks) == math.ceil(ids.shape[1] / positions)
    assert_close(whole(fused, ids, logits_to_keep=9), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [1, 2, 22, 23, 24, 60])
def test_positions_that_are_kept_are_the_last_ones(model, deltas, ids, keep):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE)
    logits, weights = whole(fused, ids)
    for options in ({}, {"use_cache": False}, {"written_from": 5}):
        expected = whole(fused, ids, **options)
        found = whole(fused, ids, logits_to_keep=keep, **options)
        assert found[0].shape[1] == min(keep, ids.shape[1])
        assert_close(found[0], expected[0][:, -keep:], rtol=1e-4, atol=1e-4)
        assert_close(found[1], expected[1][:, -keep:], rtol=1e-4, atol=1e-6)
    assert_close(
        whole(fused, ids, logits_to_keep=keep), (logits[:, -keep:], weights[:, -keep:]), rtol=1e-4, atol=1e-4
    )


def test_a_cache_that_is_cropped_reordered_or_repeated_is_that_of_the_other_text(model, deltas, ids):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE)
    expected = whole(fused, ids)[0][:, 16:]

    def cache():
        with torch.no_grad():
            return fused(input_ids=ids[:, :16], use_cache=True).past_key_values

    def go_on(ids, cache):
        with torch.no_grad():
            return fused(input_ids=ids, past_key_values=cache).logits

    cropped = cache()
    with torch.no_grad():
        fused(input_ids=ids[:, 3:9], past_key_values=cropped)  # a guess that was wrong
    cropped.crop(-6)
    assert_close(go_on(ids[:, 16:], cropped), expected, rtol=1e-4, atol=2e-4)
    order = torch.tensor([2, 0, 0])
    moved = cache()
    moved.reorder_cache(order)
    assert_close(go_on(ids[order, 16:], moved), expected[order], rtol=1e-4, atol=2e-4)
    fewer = cache()
    fewer.batch_select_indices(torch.tensor([1]))
    assert_close(go_on(ids[1:2, 16:], fewer), expected[1:2], rtol=1e-4, atol=2e-4)
    more = cache()
    more.batch_repeat_interleave(2)
    assert_close(
        go_on(ids.repeat_interleave(2, 0)[:, 16:], more),
        expected.repeat_interleave(2, 0),
        rtol=1e-4,
        atol=2e-4,
    )
    emptied = cache()
    memory = emptied.layers[-1]
    assert len(memory) == 16
    assert [value.shape[1] for value in memory.last(3).values()] == [3] * len(memory.held)
    assert torch.equal(memory.last(3)["state"], memory.held["state"][:, -3:])
    memory.crop(-3)
    memory.crop(0)
    assert len(memory) == 13
    memory.reset()
    assert len(memory) == 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("left", [1, 2, 10, 15])
def test_a_prompt_that_is_cropped_to_where_nobody_asked_for_a_law(model, deltas, ids, gated, left):
    """The law that the next token was predicted by is worked out then, gates and all."""
    weighted = dict.fromkeys(deltas, 1.0)
    fused = fuse(model, weighted, rule=RULE, gated=gated)
    with torch.no_grad():
        begun = fused(
            input_ids=ids[:, :16], use_cache=True, logits_to_keep=1, written_from=999
        ).past_key_values
        assert not bool(begun.layers[-1].held["known"][:, :15].any())
        begun.crop(left - 16)
        out = fused(input_ids=ids[:, left:], past_key_values=begun, output_weights=True)
    scores, awake = scored_alone(model, weighted, ids), gates_alone(model, weighted, ids, gated)
    scored = [t >= left for t in range(ids.shape[1])]
    choice = chosen(model, weighted, ids, awake) if gated else None
    expected = by_hand(scores.softmax(-1), awake, ids, RULE, [2, 2, 2], scored=scored, choice=choice)
    assert_close(out.log_weights.exp(), expected[:, left:], rtol=1e-3, atol=1e-5)


def test_a_cache_whose_text_is_not_known_is_refused(model, deltas, ids):
    fused = fuse(model, dict.fromkeys(deltas, 1.0))
    with torch.no_grad():
        foreign = model(input_ids=ids[:, :9], use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="9 tokens of which a fusion by evidence has read 0"):
            fused(input_ids=ids[:, 9:], past_key_values=foreign)
        own = fused(input_ids=ids[:, :9], use_cache=True).past_key_values
        model(input_ids=ids[:, 9:11], past_key_values=own)
        with pytest.raises(ConfigError, match="11 tokens of which a fusion by evidence has read 9"):
            fused(input_ids=ids[:, 11:], past_key_values=own)
        with pytest.raises(ConfigError, match="DynamicCache and StaticCache"):
            tether.causal.memory.attach(object())
        # Keys and values that were taken back without a word to the memory.
        own = fused(input_ids=ids[:, :9], use_cache=True).past_key_values
        for layer in own.layers[:-1]:
            layer.crop(-4)
        got = fused(input_ids=ids[:, 5:], past_key_values=own).logits
    assert_close(got, whole(fused, ids)[0][:, 5:], rtol=1e-4, atol=2e-4)


# Padding and packing


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, deltas, ids, gated, side):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE, gated=gated)
    batch, mask = torch.full((3, 23), 257), torch.zeros(3, 23, dtype=torch.long)
    lengths = [23, 17, 9]
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(23 - length, 23)
        batch[row, at], mask[row, at] = ids[row, :length], 1
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        out = fused(input_ids=batch, attention_mask=mask, position_ids=places, output_weights=True)
        for row, length in enumerate(lengths):
            alone = fused(input_ids=ids[row : row + 1, :length], output_weights=True)
            seen = mask[row].bool()
            assert_close(out.logits[row, seen], alone.logits[0], rtol=1e-4, atol=2e-4)
            assert_close(out.log_weights[row, seen].exp(), alone.log_weights[0].exp(), rtol=1e-3, atol=1e-5)
            assert torch.equal(out.gates[:, row, seen], alone.gates[:, 0])
        assert not bool(out.gates[:, mask == 0].any())


def test_packed_documents_begin_anew(model, deltas, ids):
    """Places that begin at 0 again: weights restart, the first token is no evidence, and no gate looks across."""
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE)
    parts = [(0, 9), (9, 10), (10, 12), (12, 23)]
    places = torch.cat([torch.arange(last - first) for first, last in parts]).expand(3, -1)
    with torch.no_grad():
        states = fused.backbone(input_ids=ids, position_ids=places).last_hidden_state
        out = fused(input_ids=ids, position_ids=places, output_weights=True)
        for first, last in parts:
            # What experts read is what the backbone gave there; here it does look across.
            reading = walk.Reading(
                states[:, first:last], torch.ones(3, last - first, dtype=torch.bool), places[:, first:last],
                ids[:, first:last],
            )  # fmt: skip
            (block,) = fused.fusion.serve(fused.abduction, fused.action, reading)
            expected = block.log_weights.unflatten(0, (3, -1))
            assert_close(out.log_weights[:, first:last].exp(), expected.exp(), rtol=1e-3, atol=1e-6)
            awake = block.experts.awake.unflatten(0, (3, -1))
            assert torch.equal(out.log_weights[:, first:last] > -math.inf, awake)
    for cuts in ([5, 9, 11], [9], [10], [*range(1, 23)]):
        cache, found = None, []
        for first, last in itertools.pairwise([0, *cuts, 23]):
            with torch.no_grad():
                step = fused(
                    input_ids=ids[:, first:last], position_ids=places[:, first:last], past_key_values=cache,
                    output_weights=True,
                )  # fmt: skip
            cache = step.past_key_values
            found.append(step.log_weights.exp())
        assert_close(torch.cat(found, 1), out.log_weights.exp(), rtol=1e-3, atol=1e-5)


def test_no_token_is_evidence_that_begins_a_text_or_is_padding(model, deltas, ids):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE)
    mask = torch.ones(3, 23, dtype=torch.bool)
    mask[0, 20:], mask[1, :4] = False, False
    places = torch.arange(23).repeat(3, 1)
    places[1] = (places[1] - 4).clamp(min=0)
    places[2, 9:] -= 9
    with torch.no_grad():
        states = fused.backbone(input_ids=ids).last_hidden_state
        reading = walk.Reading(states, mask, places, ids)
        (block,) = fused.fusion.serve(fused.abduction, fused.action, reading)
    expected = torch.zeros(3, 23, dtype=torch.bool)
    expected[0, :19], expected[1, 4:22], expected[2, :22] = True, True, True
    expected[2, 8] = False
    assert torch.equal(block.scored.unflatten(0, (3, 23)), expected)
    assert not bool(block.gain[~block.scored].any())
    assert bool(block.gain[block.scored][:, 1:].any(-1).any())


# Prompts


def test_of_a_prompt_only_the_last_tokens_are_evidence(model, deltas, ids, monkeypatch):
    monkeypatch.setattr(walk, "PROMPT", 6)
    weighted, given = dict.fromkeys(deltas, 1.0), 15
    scores, awake = scored_alone(model, weighted, ids), gates_alone(model, weighted, ids, True, given=given)
    choice = chosen(model, weighted, ids, awake)
    scored = [t >= given - 6 for t in range(ids.shape[1])]
    expected = by_hand(scores.softmax(-1), awake, ids, RULE, [2, 2, 2], given, scored, choice=choice)
    fused = fuse(model, weighted, rule=RULE)
    assert_close(whole(fused, ids, written_from=given)[1], expected, rtol=1e-3, atol=1e-5)
    everything = by_hand(scores.softmax(-1), awake, ids, RULE, [2, 2, 2], given, choice=choice)
    assert float((everything - expected).abs().max()) > 0.01
    # Only what is kept or scored is looked at by anyone.
    looked = []
    listen = walk.Walk.listen
    monkeypatch.setattr(
        walk.Walk, "listen", lambda self, scores, *at: looked.append(at) or listen(self, scores, *at)
    )
    whole(fused, ids[:, :given], written_from=given, logits_to_keep=1)
    assert (looked[0][0], looked[-1][1]) == (given - 6 - 1, given)


@pytest.mark.parametrize("scored", [1, 2, 6])
def test_the_cut_of_a_prompt_does_not_matter(model, deltas, ids, scored, monkeypatch):
    monkeypatch.setattr(walk, "PROMPT", scored)
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE)
    given = 15
    expected = whole(fused, ids, written_from=given, use_cache=False)
    for cuts in ([15], [9, 10, 15], [5, 14, 15], [*range(1, 23)], [3, 18]):
        cache = None
        for first, last in itertools.pairwise([0, *cuts, 23]):
            with torch.no_grad():
                out = fused(
                    input_ids=ids[:, first:last], past_key_values=cache, logits_to_keep=1, written_from=given,
                    output_weights=True,
                )  # fmt: skip
            cache = out.past_key_values
            assert_close(out.logits[:, -1], expected[0][:, last - 1], rtol=1e-4, atol=2e-4)
            assert_close(out.log_weights[:, -1].exp(), expected[1][:, last - 1], rtol=1e-3, atol=1e-5)
    plain = fused.generate(ids, **GREEDY)
    for chunk in (4, 9, 22):
        assert torch.equal(fused.generate(ids, prefill_chunk_size=chunk, **GREEDY), plain)


def test_own_text_goes_back_to_the_weights_at_the_end_of_the_prompt(model, deltas, ids):
    weighted = dict.fromkeys(deltas, 1.0)
    scores, awake = scored_alone(model, weighted, ids), gates_alone(model, weighted, ids, False)
    rule = Rule(prior=0.6, restarts=(0.3,))
    fused = fuse(model, weighted, rule=rule, gated=False)
    for given in (1, 12, 22):
        expected = by_hand(scores.softmax(-1), awake, ids, rule, [2, 2, 2], given=given)
        assert_close(whole(fused, ids, written_from=given)[1], expected, rtol=1e-3, atol=1e-5)
        drawn = by_hand(scores.softmax(-1), awake, ids, rule, [2, 2, 2])
        assert given != 12 or float((expected - drawn).abs().max()) > 0.01


# Writing


@pytest.fixture(scope="module", params=[False, True], ids=["always", "gated"])
def writer(request, model, deltas, ids):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE, gated=request.param)
    plain = fused.generate(ids, **GREEDY)
    with torch.no_grad():
        open_ = fused(input_ids=plain).gates.mean()
    assert open_ == 1 if not request.param else 0.1 < open_ < 0.9
    assert not torch.equal(plain, model.generate(ids, **GREEDY))
    return fused, plain


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 5}, {"num_beams": 1}, {"num_return_sequences": 1},
    ],
    ids=str,
)  # fmt: skip
def test_every_way_of_writing_gives_the_same_text(writer, ids, options):
    fused, plain = writer
    assert torch.equal(fused.generate(ids, **GREEDY, **options), plain)
    assert torch.equal(fused.generate(ids.flip(0), **GREEDY, **options), plain.flip(0))


def test_assistants_and_look_ups_give_the_same_text(writer, model, ids):
    fused, plain = writer
    one = ids[1:2]
    assert torch.equal(fused.generate(one, **GREEDY), plain[1:2])
    for assistant in (tiny.backbone(), model):
        assert torch.equal(fused.generate(one, assistant_model=assistant, **GREEDY), plain[1:2])
    # A text with repetitions, so that what was looked up is taken now and then.
    again = torch.cat([ids[:1], ids[:1], ids[:1, :11]], 1)
    assert torch.equal(
        fused.generate(again, prompt_lookup_num_tokens=4, **GREEDY), fused.generate(again, **GREEDY)
    )


LENGTHS = [23, 9, 1, 20, 17, 23, 12, 5]


@pytest.fixture(scope="module")
def written_alone(writer, ids):
    rows = ids.repeat(3, 1)
    return [
        writer[0].generate(rows[row : row + 1, :length], **GREEDY)[0, length:]
        for row, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_give_the_same_text(writer, ids, side, options, written_alone):
    fused, _ = writer
    rows = ids.repeat(3, 1)
    batch, mask = torch.full((8, 23), 257), torch.zeros(8, 23, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        at = slice(0, length) if side == "right" else slice(23 - length, 23)
        batch[row, at], mask[row, at] = rows[row, :length], 1
    written = fused.generate(batch, attention_mask=mask, **GREEDY, **options)[:, 23:]
    assert torch.equal(written, torch.stack(written_alone))


def test_a_text_goes_on_with_its_cache(writer, ids):
    fused, plain = writer
    # What was written may hold the padding token, of which no mask is to be made.
    ones = {"attention_mask": torch.ones(3, 28, dtype=torch.long)}
    begun = fused.generate(ids, **(GREEDY | {"max_new_tokens": 5}), return_dict_in_generate=True)
    assert torch.equal(begun.sequences, plain[:, :28])
    told = {"output_logits": True, "return_dict_in_generate": True}
    rest = fused.generate(
        begun.sequences,
        past_key_values=begun.past_key_values,
        **(GREEDY | ones | told | {"max_new_tokens": 7}),
    )
    assert torch.equal(rest.sequences, plain)
    # Weights, too, go back to those at the end of the prompt and not to those where writing was interrupted.
    straight = fused.generate(ids, **GREEDY, **told)
    assert_close(torch.stack(rest.logits), torch.stack(straight.logits[5:]), rtol=1e-4, atol=2e-4)
    known = whole(fused, plain, written_from=23)[0][:, 22:-1]
    assert_close(torch.stack(straight.logits, 1), known, rtol=1e-4, atol=2e-4)
    assert float((whole(fused, plain)[0][:, 22:-1] - known).abs().max()) > 0.01
    # A cache that the caller holds, a given text after it, and the same without one.
    cache = DynamicCache(config=fused.config.backbone_config)
    first = fused.generate(ids, past_key_values=cache, **(GREEDY | {"max_new_tokens": 5}))
    assert torch.equal(
        fused.generate(first, past_key_values=cache, **(GREEDY | ones | {"max_new_tokens": 7})), plain
    )
    longer = torch.cat([plain, ids[:, :6]], 1)
    told = fused.generate(longer, past_key_values=cache, attention_mask=torch.ones_like(longer), **GREEDY)
    assert torch.equal(told[:, : longer.shape[1]], longer)


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_agree_with_and_without_cache(writer, ids, beams):
    fused, plain = writer
    options = GREEDY | {"num_beams": beams, "num_return_sequences": beams}
    cached = fused.generate(ids, **options)
    assert cached.shape == (3 * beams, 35)
    assert torch.equal(cached, fused.generate(ids, use_cache=False, **options))
    assert torch.equal(cached[:beams], fused.generate(ids[:1], **options))
    assert not torch.equal(cached[::beams], plain)


@pytest.mark.parametrize("mode", ["causal", "deterministic"])
def test_other_modes_write_the_same_text_whatever_the_cache(writer, ids, mode):
    fused, _ = writer
    noise = (
        {"noise": Noise.draw(3, H, generator=torch.Generator().manual_seed(1))} if mode == "causal" else {}
    )
    plain = fused.generate(ids, mode=mode, **noise, **GREEDY)
    assert torch.equal(fused.generate(ids, mode=mode, use_cache=False, **noise, **GREEDY), plain)
    pad = torch.full((3, 4), 257)
    padded = fused.generate(
        torch.cat([pad, ids], 1),
        attention_mask=torch.cat([0 * pad, 0 * ids + 1], 1),
        mode=mode,
        **noise,
        **GREEDY,
    )
    assert torch.equal(padded[:, 4:], plain)


def test_a_prompt_of_embeddings_is_no_evidence(writer, ids):
    fused, _ = writer
    embeds = fused.get_input_embeddings()(ids).detach()
    written = fused.generate(inputs_embeds=embeds, **GREEDY)
    slow = fused.generate(inputs_embeds=embeds, use_cache=False, **GREEDY)
    assert written.shape == (3, 12)
    with torch.no_grad():
        out = fused(inputs_embeds=embeds, output_weights=True)
        share = out.log_weights[..., 0].exp()
        known = torch.cat([ids, written], 1)
        # Nothing is told about the prompt, so before what was written weights are the prior of those awake.
        law = fused(inputs_embeds=embeds, use_cache=True)
        step = fused(
            input_ids=written[:, :1],
            past_key_values=law.past_key_values,
            output_weights=True,
            written_from=23,
        )
    awake = (out.log_weights > -math.inf).double()
    prior = fused.fusion.log_prior.exp()
    others = awake @ torch.nn.functional.pad(prior[1 : awake.shape[-1]], (1, 0))
    if fused.fusion.gated:
        others = others + 0.2 * (others > 0)  # of the gates' choice
    expected = 0.95 * 0.6 / (0.6 + others) + 0.05
    assert_close(share, expected, rtol=1e-8, atol=1e-8)
    assert not torch.equal(step.log_weights.exp()[:, 0], out.log_weights.exp()[:, -1])
    assert torch.equal(slow[:, :1], written[:, :1])
    assert known.shape == (3, 35)


def test_sampling_options_are_made_to_each_expert_before_they_are_mixed(model, deltas, ids):
    weighted = dict.fromkeys(deltas, 1.0)
    scores, awake = scored_alone(model, weighted, ids), gates_alone(model, weighted, ids, True)
    choice = chosen(model, weighted, ids, awake)
    weights = by_hand(scores.softmax(-1), awake, ids, RULE, [2, 2, 2], given=23, choice=choice)[:, -1]
    fused = fuse(model, weighted, rule=RULE)
    sharp = (scores[:, :, -1] / 0.7).softmax(-1)
    ordered, index = sharp.sort(-1, descending=True)
    # The smallest set of at least 0.8, by hand.
    kept = ordered.cumsum(-1) - ordered < 0.8
    cut = torch.zeros_like(sharp).scatter(-1, index, ordered * kept)
    law = torch.einsum("bk,kbv->bv", weights, cut / cut.sum(-1, keepdim=True))
    got = fused.generate(
        ids, do_sample=True, temperature=0.7, top_p=0.8, max_new_tokens=1, output_scores=True,
        return_dict_in_generate=True, pad_token_id=257,
    )  # fmt: skip
    assert_close(got.scores[0].softmax(-1).double(), law, rtol=1e-3, atol=1e-6)
    assert torch.equal(got.scores[0] > -9e3, law > 0)
    # By the configuration too, and nothing where all is neutral.
    fused.generation_config.temperature, fused.generation_config.top_p = 0.7, 0.8
    again = fused.generate(
        ids,
        do_sample=True,
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=257,
    )
    assert_close(again.scores[0], got.scores[0])
    neutral = fused.generate(
        ids, do_sample=True, temperature=1.0, top_p=1.0, max_new_tokens=1, output_scores=True,
        return_dict_in_generate=True, pad_token_id=257,
    )  # fmt: skip
    plain = torch.einsum("bk,kbv->bv", weights, scores[:, :, -1].softmax(-1))
    assert_close(neutral.scores[0].softmax(-1).double(), plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}])
def test_what_the_loop_suppresses_may_be_all_that_is_left(model, deltas, ids, cut):
    fused = fuse(model, dict.fromkeys(deltas, 1.0))
    with torch.no_grad():
        order = fused(input_ids=ids[:1], written_from=ids.shape[1]).logits[0, -1].argsort(descending=True)
    likely = [int(order[0]), int(fused.generate(ids[:1], max_new_tokens=1, pad_token_id=257)[0, -1])]
    drawn = fused.generate(
        ids[:1], do_sample=True, max_new_tokens=1, suppress_tokens=likely, pad_token_id=257, **cut
    )
    assert int(drawn[0, -1]) not in likely


def test_weights_are_carried_over_padding_within_a_text(model, deltas, ids):
    """A row that was padded on the right and goes on with its cache: padding neither restarts nor judges."""
    fused = fuse(model, dict.fromkeys(deltas, 1.0), gated=False, rule=RULE)
    pad = torch.full((len(ids), 3), 257)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(pad), torch.ones_like(ids[:, :4])], dim=1)
    begun = fused(input_ids=torch.cat([ids, pad], 1), attention_mask=mask[:, :26], output_weights=True)
    more = fused(
        input_ids=ids[:, :4], attention_mask=mask, past_key_values=begun.past_key_values, output_weights=True,
        position_ids=torch.arange(23, 27).expand(len(ids), 4),
    )  # fmt: skip
    end = begun.log_weights[:, 22]
    # The first token after the hole is predicted by nobody, so it says nothing.
    assert_close(more.log_weights[:, 0], end)
    assert float((more.log_weights[:, 1] - end).abs().max()) > 1e-4


# Other modes


def test_the_deterministic_law_is_the_mixture_of_the_experts_laws(model, deltas, ids):
    weighted = dict.fromkeys(deltas, 1.0)
    fused = fuse(model, weighted, rule=RULE)
    with torch.no_grad():
        out = fused(input_ids=ids, mode="deterministic", output_weights=True)
    own = scored_alone(model, weighted, ids, mode="deterministic").exp()
    expected = torch.einsum("btk,kbtv->btv", out.log_weights.exp(), own)
    assert_close(out.logits.double().exp(), expected, rtol=1e-4, atol=1e-7)
    assert_close(out.log_weights.exp(), whole(fused, ids)[1])


@pytest.mark.parametrize("form", ["constant", "class"])
def test_who_speaks_in_mode_causal_speaks_as_if_alone(ids, generator, form):
    model = make(threshold_form=form)
    with torch.no_grad():
        model.action.threshold.copy_(torch.randn(model.action.threshold.shape, generator=generator))
    weighted = {
        random_delta(model, name, seed, chart): 1.0
        for seed, (name, chart) in enumerate(zip("abc", NATIVE, strict=True))
    }
    fused = fuse(model, weighted, rule=RULE)
    noise = Noise.draw(3, H, generator=generator)
    told = torch.rand(3, 23, generator=generator, dtype=torch.float64)
    noise = dataclasses.replace(noise, known_speaker=told)
    with torch.no_grad():
        out = fused(input_ids=ids, mode="causal", noise=noise, output_weights=True)
    own = scored_alone(model, weighted, ids, mode="causal", noise=noise)
    below = out.log_weights.exp().cumsum(-1)
    speaker = (below <= told.unsqueeze(-1)).sum(-1)
    assert len(speaker.unique()) > 3
    expected = own.gather(0, speaker[None, ..., None].expand(1, -1, -1, own.shape[-1]))[0]
    assert_close(out.logits.double(), expected, rtol=1e-4, atol=1e-3)
    assert out.latent.shape == (3, 23, H)


# What sleeps


def shut(delta):
    return dataclasses.replace(delta, gate=delta.gate._replace(threshold=torch.full((4,), SHUT)))


def test_where_only_the_base_is_awake_its_scores_are_served_bit_for_bit(model, deltas, ids):
    with torch.no_grad():
        base = model(input_ids=ids)
        closed = {shut(delta): 1.0 for delta in deltas}
        assert not torch.equal(fuse(model, closed, rule=RULE)(input_ids=ids).logits[:, 0], base.logits[:, 0])
        out = fuse(model, closed, rule=dataclasses.replace(RULE, grace=0))(input_ids=ids)
        assert torch.equal(out.logits, base.logits)
        for name in ("value", "value_loc", "value_scale", "latent_loc", "latent_log_scale"):
            assert torch.equal(getattr(out, name), getattr(base, name)), name
        some = fuse(model, dict.fromkeys(deltas, 1.0), rule=dataclasses.replace(RULE, hold=0, grace=0))
        out = some(input_ids=ids)
        alone = out.gates.sum(0) == 0
        assert 0 < int(alone.sum()) < alone.numel()
        assert torch.equal(out.logits[alone], base.logits[alone])
        for mode in ("deterministic", "causal"):
            noise = {"noise": torch.full((3, H), 0.3)} if mode == "causal" else {}
            got, own = (each(input_ids=ids, mode=mode, **noise).logits for each in (some, model))
            assert torch.equal(got[alone], own[alone]), mode


@pytest.mark.parametrize(
    ("head", "size"),
    [("second", 1e38), ("second", math.inf), ("second", math.nan), ("first", math.inf), ("second", 5e35)],
    ids=["scores", "law", "nan", "scale", "now and then"],
)
@pytest.mark.parametrize("others", [1, 3])
def test_an_expert_that_overflows_sleeps(ids, head, size, others):
    """Of a law or of scores that are no finite numbers nothing is left in what is served."""
    model = make("qwen2")
    with torch.no_grad():
        # Two classes of which one has an infinite score wherever U is as far away as that.
        model.action.weight[200], model.action.weight[201] = 5.0, -5.0
    renew_fingerprint(model)
    deltas = [
        random_delta(model, name, seed, chart)
        for seed, (name, chart) in enumerate(zip("abc", NATIVE, strict=True))
    ]
    heads = {"first": None, "second": torch.zeros(H, H)} | {head: torch.full((H, H), size)}
    broken = dataclasses.replace(deltas[1], name="broken", **heads)
    good = dict.fromkeys(deltas[:others], 1.0)
    rule = Rule(prior=0.6, restarts=(0.0, 0.1))
    fused = fuse(model, good | {broken: 1.0}, rule=rule, gated=False)
    logits, weights = whole(fused, ids)
    assert bool(logits.isfinite().all())
    scores = scored_alone(model, good | {broken: 1.0}, ids)
    awake = torch.ones(len(scores), *ids.shape, dtype=torch.bool)
    # A scale that is infinite leaves no law either, though scores of its location alone are finite.
    awake[-2:] = scores[-2:].isfinite().all(-1) & (head == "second")
    assert torch.equal(weights > 0, awake.movedim(0, -1))
    apart = int((awake[-1] != awake[-2]).sum())
    assert apart > 5 if size == 5e35 else apart == 0
    assert not bool(awake[-1].all())
    expected = by_hand(scores.softmax(-1), awake, ids, rule, [2] * (others + 1))
    assert_close(weights, expected, rtol=1e-3, atol=1e-6)
    pieces(fused, ids, [*range(1, 23)])
    assert fused.generate(ids, **GREEDY).shape == (3, 35)


def test_half_precision_runs_and_is_close(deltas, ids):
    exact = make()
    half = CausalQwenForCausalLM.from_backbone(tiny.backbone().bfloat16(), latent_scale=1.0).eval()
    assert half.action.weight.dtype == torch.bfloat16
    laws = []
    for base in (exact, half):
        own = [
            random_delta(base, name, seed, chart)
            for seed, (name, chart) in enumerate(zip("abc", NATIVE, strict=True))
        ]
        fused = fuse(base, dict.fromkeys(own, 1.0), rule=RULE, gated=False)
        laws.append(whole(fused, ids)[0].softmax(-1))
        if base is half:
            check_weights = whole(fused, ids)[1]
            scores = scored_alone(half, dict.fromkeys(own, 1.0), ids)
            awake = torch.ones(7, *ids.shape, dtype=torch.bool)
            expected = by_hand(scores.softmax(-1), awake, ids, RULE, [2, 2, 2])
            assert float((check_weights - expected).abs().mean()) < 5e-3
            cache, found = None, []
            for t in range(23):
                with torch.no_grad():
                    step = fused(input_ids=ids[:, t : t + 1], past_key_values=cache, output_weights=True)
                cache = step.past_key_values
                found.append(step.log_weights.exp())
            assert float((torch.cat(found, 1) - check_weights).abs().mean()) < 5e-3
            assert fused.generate(ids, **GREEDY).shape == (3, 35)
    assert float((laws[0] - laws[1]).abs().sum(-1).mean()) < 0.1


def test_in_half_precision_a_token_says_the_same_whatever_the_cut(ids):
    """Scores that are worked out again, for one class only, are rounded as those of all classes were."""
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2").bfloat16(), latent_scale=1.0).eval()
    own = {random_delta(model, name, seed): 1.0 for seed, name in enumerate("ab")}
    fused = fuse(model, own, rule=Rule(restarts=(0.0,)), gated=False)
    with torch.no_grad():
        states = fused.backbone(input_ids=ids).last_hidden_state
    mask, places = torch.ones(3, 23, dtype=torch.bool), torch.arange(23).expand(3, -1)

    def gains(cuts):
        memory = Memory()
        for first, last in itertools.pairwise([0, *cuts, 23]):
            parts = (each[:, first:last] for each in (states, mask, places, ids))
            list(fused.fusion.serve(fused.abduction, fused.action, walk.Reading(*parts), memory))
        state = memory.held["state"][:, :, 0]
        return (state - state[..., :1]).diff(dim=1)

    one, many = gains([]), gains(range(1, 23))
    same = (one - many).abs() < 1e-5
    assert float(same.double().mean()) > 0.9
    assert float(one.abs().mean()) > 0.1


# Numbers


NUM = 258


@pytest.fixture(scope="module")
def counted():
    """A fusion that reads numbers, a text with some, and their values."""
    model = make("qwen2")
    model.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        model.action.bias[NUM] = 4.5
        model.action.value_weight.mul_(4)
    renew_fingerprint(model)
    own = [
        random_delta(model, name, seed, chart, size=8.0)
        for seed, (name, chart) in enumerate(zip("abc", NATIVE, strict=True))
    ]
    fused = fuse(model, dict.fromkeys(own, 1.0), rule=RULE, gated=False)
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(4))
    ids[:, 3], ids[0, 7], ids[1, 11] = NUM, NUM, NUM
    values = torch.zeros(2, 12, dtype=torch.float64)
    values[0, 3], values[1, 3], values[0, 7], values[1, 11] = 3.5, -1e6, 0.0, 42.0
    return model, dict.fromkeys(own, 1.0), fused, ids, values


def alone_values(model, weighted, ids, values):
    experts = [model]
    for delta, weight in weighted.items():
        experts += [
            fuse(model, {delta: weight * s}, by="sum", chart=delta.chart, gated=False)
            for s in delta.strengths
        ]
    with torch.no_grad():
        return [each(input_ids=ids, numeric_values=values) for each in experts]


def test_a_number_counts_as_evidence_up_to_its_clip(counted):
    model, weighted, fused, ids, values = counted
    outs = alone_values(model, weighted, ids, values)
    prob = torch.stack([out.logits.double().softmax(-1) for out in outs])
    told = torch.ones(len(outs), *ids.shape, dtype=torch.float64)
    transformed = model.action.transform(values).double()
    gains = []
    for b, t in (ids == NUM).nonzero().tolist():
        laws = [
            torch.distributions.Cauchy(o.value_loc[b, t - 1].double(), o.value_scale[b, t - 1].double())
            for o in outs
        ]
        density = torch.stack([law.log_prob(transformed[b, t]) for law in laws])
        gain = (density - density[0]).clamp(-CLIP, CLIP)
        told[:, b, t] = gain.exp()
        gains += gain[1:].tolist()
    assert max(map(abs, gains)) == CLIP
    assert min(map(abs, gains)) < CLIP
    awake = torch.ones(len(outs), *ids.shape, dtype=torch.bool)
    expected = by_hand(prob, awake, ids, RULE, [2, 2, 2], told=told)
    assert_close(whole(fused, ids, numeric_values=values)[1], expected, rtol=1e-3, atol=1e-5)
    without = by_hand(prob, awake, ids, RULE, [2, 2, 2])
    assert float((without - expected).abs().max()) > 0.01
    for cuts in ([3], [4], [7, 8], [11], [*range(1, 12)]):
        cache, found = None, []
        for first, last in itertools.pairwise([0, *cuts, 12]):
            with torch.no_grad():
                out = fused(
                    input_ids=ids[:, first:last], numeric_values=values[:, first:last], past_key_values=cache,
                    output_weights=True,
                )  # fmt: skip
            cache = out.past_key_values
            found.append(out.log_weights.exp())
        assert_close(torch.cat(found, 1), expected, rtol=1e-3, atol=1e-5)


def test_the_value_is_the_median_of_the_mixture(counted):
    model, weighted, fused, ids, values = counted
    outs = alone_values(model, weighted, ids, values)
    with torch.no_grad():
        out = fused(input_ids=ids, numeric_values=values, output_weights=True)
    loc, scale = (
        torch.stack([getattr(o, n) for o in outs], -1).double() for n in ("value_loc", "value_scale")
    )
    share = out.log_weights.exp()

    def below(value):
        return (share * (0.5 + torch.atan((value.double().unsqueeze(-1) - loc) / scale) / math.pi)).sum(-1)

    half = torch.full((2, 12), 0.5, dtype=torch.float64)
    assert_close(below(out.value_loc), half, rtol=1e-4, atol=1e-4)
    # The scale is half the way between the quartiles.
    low = high = None
    for level in (0.25, 0.75):
        bracket = (
            torch.full((2, 12), -1e12, dtype=torch.float64),
            torch.full((2, 12), 1e12, dtype=torch.float64),
        )
        for _ in range(200):
            middle = sum(bracket) / 2
            up = below(middle) < level
            bracket = torch.where(up, middle, bracket[0]), torch.where(up, bracket[1], middle)
        low, high = (bracket[0], high) if level < 0.5 else (low, bracket[0])
    assert_close(out.value_scale.double(), (high - low) / 2, rtol=1e-3, atol=1e-4)
    assert_close(out.value, model.action.number(out.value_loc))


def test_numbers_are_written_the_same_way_whatever_the_cache(counted):
    _, _, fused, ids, values = counted
    options = GREEDY | {"numeric_values": values, "return_dict_in_generate": True}
    fast, slow = (fused.generate(ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(fast.sequences, slow.sequences)
    assert_close(fast.numeric_values, slow.numeric_values, rtol=1e-4, atol=1e-4)
    assert bool((fast.sequences[:, 12:] == NUM).any())


# The model around it


def test_weights_are_given_when_asked_for(model, deltas, ids):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE)
    with torch.no_grad():
        assert fused(input_ids=ids).log_weights is None
        found = fused(input_ids=ids, output_weights=True, logits_to_keep=4).log_weights
        assert fused(input_ids=ids, return_logits=False).logits is None
    assert found.shape == (3, 4, 7)
    assert_close(found.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_the_loss_is_that_of_the_tokens_served(model, deltas, ids):
    fused = fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE)
    labels = ids.clone()
    labels[0, :9] = -100
    with torch.no_grad():
        out = fused(input_ids=ids, labels=labels)
        short = fused(input_ids=ids, labels=labels, logits_to_keep=5)
    law = out.logits.double().log_softmax(-1)[:, :-1]
    lost = -law.gather(-1, ids[:, 1:, None])[..., 0]
    assert_close(out.loss.double(), lost[labels[:, 1:] != -100].mean(), rtol=1e-5, atol=1e-6)
    assert_close(short.loss.double(), lost[:, -4:].mean(), rtol=1e-5, atol=1e-6)
    assert out.value_loss is None
    for mode in ("causal", "deterministic"):
        with pytest.raises(ConfigError, match="train the base"):
            fused(input_ids=ids, labels=labels, mode=mode)


def test_labels_that_are_numbers_are_refused(counted):
    _, _, fused, ids, values = counted
    with pytest.raises(ConfigError, match="labels with <NUM>"):
        fused(input_ids=ids, numeric_values=values, labels=ids)
    assert fused(input_ids=ids[:, :3], labels=ids[:, :3]).loss.isfinite()


def test_it_comes_back_from_its_folder_and_apart(model, deltas, ids, tmp_path):
    weights = [1.0, 0.5, -0.25]
    fused = fuse(model, dict(zip(deltas, weights, strict=True)), rule=RULE)
    tether.save_checkpoint(fused, tiny.tokenizer(), tmp_path / "fused")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    assert isinstance(loaded.fusion, mixture.Mixture)
    assert loaded.fusion.rule == RULE
    assert loaded.fusion.strengths == fused.fusion.strengths
    expected = whole(fused, ids)
    assert_close(whole(loaded, ids), expected, rtol=0, atol=0)
    assert torch.equal(loaded.generate(ids, **GREEDY), fused.generate(ids, **GREEDY))
    base, apart = unfuse(loaded)
    assert_close(base(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    assert [delta.name for delta in apart] == ["a", "b", "c"]
    assert [delta.chart for delta in apart] == list(NATIVE)
    for delta, own in zip(apart, deltas, strict=True):
        assert torch.equal(delta.first, own.first)
        assert torch.equal(delta.second, own.second)
    assert_close(whole(fuse(base, apart, rule=RULE), ids), expected, rtol=0, atol=0)
    # Without one of them it is what the others are.
    fewer = {delta: weight for delta, weight in apart.items() if delta.name != "b"}
    left = {delta: weight for delta, weight in zip(deltas, weights, strict=True) if delta.name != "b"}
    assert_close(whole(fuse(base, fewer), ids), whole(fuse(model, left), ids), rtol=0, atol=0)


def test_what_does_not_go_together_is_refused(model, deltas):
    one = {deltas[0]: 1.0}
    with pytest.raises(ConfigError, match="expected one of evidence, sum"):
        fuse(model, one, by="evidnce")
    for option in ({"chart": "linear"}, {"gate": "softmax"}, {"leash": 0.1}):
        with pytest.raises(ConfigError, match="options of sums"):
            fuse(model, one, by="evidence", **option)
        with pytest.raises(ConfigError, match="a rule of evidence with a sum"):
            fuse(model, one, rule=Rule(), **option)
        assert not isinstance(fuse(model, one, **option).fusion, mixture.Mixture)
    with pytest.raises(ConfigError, match="a rule of evidence with a sum"):
        fuse(model, one, by="sum", rule=Rule())
    with pytest.raises(ConfigError, match="is 0"):
        fuse(model, {deltas[0]: 0.0})
    fuse(model, {deltas[0]: 0.0}, by="sum")
    with pytest.raises(ConfigError, match="finite"):
        fuse(model, {deltas[0]: math.inf})
    with pytest.raises(CheckpointError, match="learnt on base"):
        fuse(model, {dataclasses.replace(deltas[0], base="sha256:" + "0" * 64): 1.0})
    with pytest.raises(ConfigError, match="no gate"):
        fuse(model, {dataclasses.replace(deltas[0], gate=None): 1.0}, gated=True)
    assert not fuse(model, {dataclasses.replace(deltas[0], gate=None): 1.0}).fusion.gated
    assert fuse(model, one).fusion.gated
    assert fuse(model, one).fusion.rule == Rule()
    described = fuse(model, one).config.fusion
    for strengths in ([], [[]], [[0.0]], [[math.inf]], [[1.0], [1.0]]):
        with pytest.raises(ConfigError, match="strengths"):
            mixture.Mixture(H, H, described | {"strengths": strengths})
    with pytest.raises(ConfigError, match="prior"):
        mixture.Mixture(H, H, described | {"prior": 1.0})
