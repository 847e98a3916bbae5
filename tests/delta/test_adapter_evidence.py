"""Adapters as experts by evidence: mixed by hand, the same text however it is cut and cached, and no pass for sleep."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig

import tiny
from tether.causal import walk
from tether.causal.evidence import Rule
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.causal.walk import PROMPT, Reading
from tether.delta.account import account
from tether.delta.adapter import Adapter, lora_config
from tether.delta.adapter_memory import AdapterMemory
from tether.delta.adapter_mixture import AdapterMixture
from tether.delta.adapter_passes import Passes, grouped
from tether.delta.adapter_serving import AdaptedForCausalLM, save_adapted, serve
from tether.delta.attached import Attached
from tether.delta.cache import backbone_print
from tether.delta.certificate import certify
from tether.delta.declared import alone_figures
from tether.delta.gate import Gate
from tether.delta.verification import verify
from tether.delta.windows import window_text
from tether.errors import ConfigError
from tether.store.documents import text_hash, write_documents

WINDOW = 3
RULE = Rule(prior=0.6, restarts=(0.01, 0.1), choice=False, hold=2, grace=0, stay=1.0)
GREEDY = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 257}


def random_ids(rows=1, length=40, seed=0):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(seed))


def window_mean(states):
    """Mean of the last WINDOW states at each position, shape (T, H), float64, by hand."""
    return torch.stack([states[max(0, t + 1 - WINDOW) : t + 1].double().mean(0) for t in range(len(states))])


def gate(model, seed, share=0.4):
    """A gate that opens now and then: around a random state, as far as `share` of random contexts are."""
    with torch.no_grad():
        states = [model.backbone(random_ids(seed=100 + i)).last_hidden_state[0] for i in range(8)]
    means = [window_mean(each) for each in states]
    center = means[0][10 + seed].float()
    distance = torch.stack([(each - center).square().sum(-1) for each in means])
    full = float(distance[:, WINDOW:].quantile(share))
    counts = [float(distance[:, count].quantile(share)) for count in range(WINDOW - 1)]
    return Gate(center, torch.zeros(1, len(center)), torch.tensor([*counts, full]), torch.ones(1))


def made(model, name, seed, *, gated=True, size=0.15):
    generator = torch.Generator().manual_seed(seed)
    config = lora_config(4, 8)
    tensors = {
        key: torch.randn(values.shape, generator=generator) * size if "lora_B" in key else values.clone()
        for key, values in Attached(model, name, config, generator).weights(name).items()
    }
    return Adapter(
        name=name, config=config, tensors=tensors, gate=gate(model, seed) if gated else None,
        base=backbone_print(model), record={"metric": "softmax", "budget": 0.05},
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapters(model):
    return [made(model, name, seed) for seed, name in enumerate(["a", "b", "c"])]


def served_by(model, adapters, **options):
    return serve(model, dict.fromkeys(adapters, 1.0), rule=RULE, **options)


@pytest.fixture(scope="module")
def served(model, adapters):
    return served_by(model, adapters)


@torch.no_grad()
def by_hand(model, adapters, ids, *, gated=True, rule=RULE, written=None):
    """Logits on the base's scale, shape (T, V), and who is awake, shape (T, K); every adapter runs alone everywhere."""
    states = [model.backbone(ids).last_hidden_state[0]]
    states += [Attached.of(model, {"x": each}).states("x", ids).last_hidden_state[0] for each in adapters]
    scores = [(each.double() @ model.action.weight.double().T) for each in states]
    awake = torch.ones(ids.shape[1], 1 + len(adapters), dtype=torch.bool)
    if gated:
        means = window_mean(states[0])
        for number, each in enumerate(adapters):
            limit = torch.tensor([float(each.gate.threshold[min(t, WINDOW - 1)]) for t in range(len(means))])
            near = (means - each.gate.center.double()).square().sum(-1) <= limit
            awake[:, 1 + number] = torch.stack(
                [near[max(0, t - rule.hold) : t + 1].any() for t in range(len(near))]
            )
        if written is not None:
            awake[written:] = awake[written - 1]
    prob = torch.stack([each.softmax(-1) for each in scores], 1)
    prior = torch.tensor([rule.prior] + [(1 - rule.prior) / len(adapters)] * len(adapters)).double()
    state = prior.repeat(len(rule.restarts), 1) / len(rule.restarts)
    towards, found = prior.repeat(len(rule.restarts), 1), []
    for t, token in enumerate(ids[0].tolist()):
        if written == t:
            towards = state / state.sum(1, keepdim=True)
        if t and (written is None or t >= written - PROMPT):
            on, p = awake[t - 1], prob[t - 1, :, token]
            before = state[:, on].sum()
            heard = torch.where(on, state * p, state)
            heard = torch.where(on, heard * before / heard[:, on].sum(), heard)
            rates = torch.tensor(rule.restarts).double()[:, None]
            state = (1 - rates) * heard + rates * heard.sum(1, keepdim=True) * towards
        if rule.whole and written is not None and t == written - 1:
            least = state[rule.restarts.index(min(rule.restarts))]
            state = (least / least.sum()).repeat(len(state), 1) / len(state)
        weights = state.sum(0) * awake[t]
        weights = weights / weights.sum()
        found.append((weights[:, None] * prob[t]).sum(0).log() + scores[0][t].logsumexp(-1))
    return torch.stack(found), awake


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("written", [None, 80])
def test_served_is_each_adapter_alone_mixed_by_hand(model, adapters, gated, written):
    served = served_by(model, adapters, gated=gated)
    ids = random_ids(length=90)
    expected, awake = by_hand(model, adapters, ids, gated=gated, written=written)
    assert not gated or bool((awake[:, 1:].any(0) & ~awake[:, 1:].all(0)).all())
    with torch.no_grad():
        output = served(input_ids=ids, use_cache=False, written_from=written, output_weights=True)
    # Where no evidence is taken and nothing is kept, weights differ in what comes before it alone.
    assert_close(output.logits[0].double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(output.gates[:, 0].T.bool(), awake[:, 1:])
    alone = ~awake[:, 1:].any(-1)
    with torch.no_grad():
        assert torch.equal(output.logits[0, alone], model(input_ids=ids, use_cache=False).logits[0, alone])
    assert not torch.equal(output.log_weights[0, -1].exp(), torch.tensor([0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3]))


def padded(left):
    """Three texts of 40, 33 and 21 tokens in one batch."""
    ids, mask = random_ids(3), torch.ones(3, 40, dtype=torch.int64)
    for row, missing in ((1, 7), (2, 19)):
        part = slice(None, missing) if left else slice(40 - missing, None)
        ids[row, part], mask[row, part] = 257, 0
    return ids, mask


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("cuts", [(1,) * 40, (7, 1, 1, 20, 3, 8), (39, 1)])
def test_a_text_in_pieces_is_the_whole_text(model, adapters, served, left, cuts):
    ids, mask = padded(left)
    with torch.no_grad():
        whole = served(input_ids=ids, attention_mask=mask, use_cache=False).logits
        cache, start, parts = None, 0, []
        for length in cuts:
            end = start + length
            output = served(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            parts, cache, start = [*parts, output.logits], output.past_key_values, end
        pieces = torch.cat(parts, 1)
        assert_close(pieces[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-4)
        for row in range(3):
            own = ids[row : row + 1, mask[row].bool()]
            assert_close(whole[row, mask[row].bool()], served(input_ids=own).logits[0], rtol=0, atol=1e-4)


def test_packed_documents_are_read_alone(served):
    ids, lengths = random_ids(2, 40, seed=4), (25, 15)
    places = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    document = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    seen = (document[:, None] == document) & torch.ones(40, 40).tril().bool()
    with torch.no_grad():
        alone = torch.cat(
            [served(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)], 1
        )
        for mask in (None, seen[None, None].expand(2, 1, -1, -1)):
            packed = served(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False)
            assert_close(packed.logits, alone, rtol=0, atol=1e-4)
        # A mask that lets all attend to all before them goes before positions that begin anew.
        given = {"input_ids": ids, "position_ids": places, "attention_mask": torch.ones_like(ids)}
        whole, kept = (served(**given, use_cache=cached).logits for cached in (False, True))
        assert_close(whole, kept, rtol=0, atol=1e-4)
        assert float((whole - alone)[:, 26:].abs().max()) > 0.1


WAYS = {
    "plain": {},
    "in chunks": {"prefill_chunk_size": 7},
    "a static cache": {"cache_implementation": "static"},
    "one beam": {"num_beams": 1},
}


def uncached(served, ids, **options):
    return served.generate(ids, use_cache=False, **{**GREEDY, **options})


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_writes_the_same(served, rows, way):
    ids = random_ids(rows, 30, seed=5)
    assert torch.equal(served.generate(ids, **GREEDY, **WAYS[way]), uncached(served, ids))


def test_guesses_that_are_taken_back_leave_nothing(model, served):
    ids = random_ids(1, 30, seed=6)
    ids = torch.cat([ids, ids[:, :20]], 1)
    expected = uncached(served, ids)
    assert torch.equal(served.generate(ids, **GREEDY, prompt_lookup_num_tokens=4), expected)
    other = tiny.backbone(seed=0)
    other.generation_config.num_assistant_tokens = 4
    assert torch.equal(served.generate(ids, **GREEDY, assistant_model=other), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_beams(served, rows):
    ids = random_ids(rows, 20, seed=7)
    for beams in (2, 3):
        assert torch.equal(
            served.generate(ids, **GREEDY, num_beams=beams), uncached(served, ids, num_beams=beams)
        )
    told = GenerationConfig(**GREEDY, num_beams=3, eos_token_id=256, bos_token_id=256)
    assert torch.equal(served.generate(ids, told), served.generate(ids, **GREEDY, num_beams=3))
    assert not torch.equal(served.generate(ids, told), served.generate(ids, **GREEDY))


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_no_text(served, left):
    ids, mask = padded(left)
    written = served.generate(ids, attention_mask=mask, **GREEDY)[:, 40:]
    for row in range(3):
        alone = uncached(served, ids[row : row + 1, mask[row].bool()])
        assert torch.equal(written[row], alone[0, int(mask[row].sum()) :])


def test_a_conversation_goes_on_with_its_cache(served):
    ids = random_ids(2, 30, seed=8)
    plain = uncached(served, ids)
    ten = {"max_new_tokens": 10, "min_new_tokens": 10}
    half = GREEDY | ten | {"return_dict_in_generate": True}
    first = served.generate(ids, **half)
    left = GREEDY["max_new_tokens"] - 10
    rest = GREEDY | {"max_new_tokens": left, "min_new_tokens": left}
    ones = torch.ones_like(first.sequences)
    # Interrupted and gone on with: restarts still go to the weights at the end of the prompt.
    went_on = served.generate(
        first.sequences, attention_mask=ones, past_key_values=first.past_key_values, **rest
    )
    assert torch.equal(went_on, plain)
    # Where something is given in between, what was written is given now, and the text goes on from there.
    first = served.generate(ids, **half)
    more = torch.cat([first.sequences, random_ids(2, 9, seed=9)], 1)
    told = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    again = served.generate(
        more, attention_mask=torch.ones_like(more), past_key_values=first.past_key_values, **told
    )
    assert torch.equal(again.sequences[:, : more.shape[1]], more)
    with torch.no_grad():
        texts = again.sequences[:, :-1]
        cache = served(input_ids=ids, written_from=30).past_key_values
        served(input_ids=texts[:, 30:39], past_key_values=cache, written_from=30)
        known = served(input_ids=texts[:, 39:], past_key_values=cache, written_from=more.shape[1]).logits
    written = GREEDY["max_new_tokens"]
    assert_close(torch.stack(again.logits, 1), known[:, -written:], rtol=0, atol=1e-4)
    with torch.no_grad():
        output = served(input_ids=texts, use_cache=False)
        cache = served(input_ids=texts[:, :50]).past_key_values
        cache.crop(-20)
        rest = served(input_ids=texts[:, 30:], past_key_values=cache)
    assert_close(rest.logits, output.logits[:, 30:], rtol=0, atol=1e-4)


def test_caches_are_repeated_selected_and_reordered(served):
    ids, more = random_ids(3, 25, seed=10), random_ids(6, 10, seed=11)
    with torch.no_grad():
        cache = served(input_ids=ids).past_key_values
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([0, 0, 1, 1, 2, 2])
        order = torch.tensor([5, 0, 0, 3, 2, 1])
        cache.reorder_cache(order)
        rows = rows[order]
        found = served(input_ids=more, past_key_values=cache).logits
        whole = served(input_ids=torch.cat([ids[rows], more], 1), use_cache=False).logits[:, 25:]
        assert_close(found, whole, rtol=0, atol=1e-4)
        cache.batch_select_indices(torch.tensor([4, 1]))
        last = random_ids(2, 5, seed=12)
        found = served(input_ids=last, past_key_values=cache).logits
        texts = torch.cat([ids[rows], more], 1)[[4, 1]]
        assert_close(
            found,
            served(input_ids=torch.cat([texts, last], 1), use_cache=False).logits[:, 35:],
            rtol=0,
            atol=1e-4,
        )
        cache.reset()
        assert_close(
            served(input_ids=last, past_key_values=cache).logits,
            served(input_ids=last).logits,
            rtol=0,
            atol=1e-4,
        )


def scripted(monkeypatch, pattern):
    """Let adapters be awake by place: pattern maps a place to the adapters awake there."""

    def since(opened, mask, places, before=None, **_):
        found = torch.full(opened.shape, 99)
        for row in range(len(mask)):
            for column, place in enumerate(places[row].tolist()):
                found[row, column, list(pattern(row, place))] = 0
        return found

    monkeypatch.setattr(walk, "since_open", since)
    runs, run = [], Passes._run

    def counted(self, names, given, cache):
        past = 0 if cache is None else cache.get_seq_length()
        text = given.get("input_ids", given.get("inputs_embeds"))
        runs.append(([*names], past, past + text.shape[1]))
        return run(self, names, given, cache)

    monkeypatch.setattr(Passes, "_run", counted)
    return runs


def steps(served, ids, first):
    """Logits of the last position after a prompt and after each further token."""
    with torch.no_grad():
        output = served(input_ids=ids[:, :first])
        found = [output.logits[:, -1]]
        for end in range(first + 1, ids.shape[1] + 1):
            output = served(input_ids=ids[:, end - 1 : end], past_key_values=output.past_key_values)
            found.append(output.logits[:, -1])
    return torch.stack(found, 1)


def test_what_sleeps_costs_no_pass_and_catches_up_when_it_wakes(served, monkeypatch):
    awake = {30: [0], 31: [0], 33: [0], 36: [0, 1], 37: [0, 1], 38: [1], 39: [1], 40: [0, 1]}
    runs = scripted(monkeypatch, lambda row, place: awake.get(place, []))
    ids = random_ids(1, 41, seed=13)
    found = steps(served, ids, 20)
    assert runs == [
        (["a"], 0, 31), (["a"], 31, 32), (["a"], 32, 34),
        (["a"], 34, 37), (["b"], 0, 37), (["a", "b"], 37, 38), (["b"], 38, 39),
        (["b"], 39, 40), (["a", "b"], 38, 41),
    ]  # fmt: skip
    with torch.no_grad():
        assert_close(found, served(input_ids=ids, use_cache=False).logits[:, 19:], rtol=0, atol=1e-4)


def test_positions_that_were_told_are_those_of_catching_up(served, monkeypatch):
    scripted(monkeypatch, lambda row, place: [0, 1] if place > 25 else [])
    ids = random_ids(2, 30, seed=26)
    places = torch.cat([torch.arange(10), torch.arange(15, 25), torch.arange(20, 30)]).expand(2, -1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        whole = served(**given, position_ids=places, use_cache=False).logits[:, 20:]
        cache = served(input_ids=ids[:, :20], position_ids=places[:, :20]).past_key_values
        found = served(input_ids=ids[:, 20:], past_key_values=cache).logits
        assert_close(found, whole, rtol=0, atol=1e-4)
    three = {"position_ids": places.expand(3, 2, -1)}
    reading = Reading(torch.zeros(2, 30, 32), torch.ones(2, 30) > 0, places, ids, given=three)
    with pytest.raises(ConfigError, match="one position a token"):
        served.fusion.read(reading, torch.ones(2, 30, 3) > 0, None)


def test_texts_of_a_batch_sleep_on_their_own(served, monkeypatch):
    runs = scripted(monkeypatch, lambda row, place: [[0, 2], [], [2]][row] if place >= 22 + row else [])
    ids = random_ids(3, 30, seed=14)
    found = steps(served, ids, 20)
    assert runs[-1] == (["a", "c", "c"], 29, 30)
    with torch.no_grad():
        assert_close(found, served(input_ids=ids, use_cache=False).logits[:, 19:], rtol=0, atol=1e-4)


def test_all_asleep_is_the_base_bit_for_bit_without_any_pass(model, served, monkeypatch):
    runs = scripted(monkeypatch, lambda row, place: [])
    ids = random_ids(2, 30, seed=15)
    assert torch.equal(served.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert runs == []


def test_a_prompt_wakes_nobody_before_its_last_tokens(served, monkeypatch):
    runs = scripted(monkeypatch, lambda row, place: [1] if place < 30 else [])
    served.generate(random_ids(1, 30 + PROMPT + 5, seed=16), **GREEDY)
    assert runs == []
    served.generate(random_ids(1, 30 + PROMPT - 5, seed=16), **GREEDY)
    assert runs == [(["b"], 0, 30)]


def test_evidence_of_a_law_that_nobody_had_asked_for(model, adapters, served, monkeypatch):
    runs = scripted(monkeypatch, lambda row, place: [0] if place % 2 else [])
    ids = random_ids(2, 40, seed=17)
    with torch.no_grad():
        # A chunk of a much longer prompt: no law of it is needed, until it is cut short.
        cache = served(input_ids=ids[:, :30], written_from=500, logits_to_keep=1).past_key_values
        cache.crop(-2)
        runs.clear()
        served(input_ids=ids[:, 28:], past_key_values=cache, written_from=36)
    # The prompt's last law was asked for, so keys and values are known up to there.
    assert runs == [(["a", "a"], 27, 28), (["a", "a"], 28, 40)]
    twin, prior = Attached.of(model, {"x": adapters[0]}), served.fusion.log_prior.exp()
    memory = next(layer for layer in cache.layers if isinstance(layer, AdapterMemory))
    for row in range(2):
        before, token = ids[row : row + 1, :28], ids[row, 28]
        with torch.no_grad():
            z = [
                run(before).last_hidden_state[0, -1]
                for run in (model.backbone, lambda i: twin.states("x", i))
            ]
            p = torch.stack([(e.double() @ model.action.weight.double().T).softmax(-1)[token] for e in z])
        heard = prior.clone()
        heard[:2] = prior[:2] * p * prior[:2].sum() / (prior[:2] * p).sum()
        rates = torch.tensor(RULE.restarts).double()[:, None]
        expected = ((1 - rates) * heard + rates * prior).mean(0)
        assert_close(memory.held["state"][row, 28].exp().sum(0), expected, rtol=0, atol=1e-5)


def test_batches_begin_where_little_is_computed_again():
    assert grouped({(1, 0): 5, (0, 0): 5, (0, 1): 5}, 6) == [([(0, 0), (0, 1), (1, 0)], 5)]
    assert grouped({(0, 0): 40, (1, 0): 30, (2, 0): 0}, 41, spare=10) == [
        ([(0, 0), (1, 0)], 30),
        ([(2, 0)], 0),
    ]
    assert grouped({(0, row): 0 for row in range(5)}, 10, most=20) == [
        ([(0, 0), (0, 1)], 0), ([(0, 2), (0, 3)], 0), ([(0, 4)], 0)
    ]  # fmt: skip


def test_a_large_batch_is_run_in_parts(served, monkeypatch):
    runs = scripted(monkeypatch, lambda row, place: [0, 1, 2])
    ids = random_ids(3, 20, seed=18)
    with torch.no_grad():
        whole = served(input_ids=ids, use_cache=False).logits
        monkeypatch.setattr("tether.delta.adapter_passes.grouped.__defaults__", (32, 50))
        parts = served(input_ids=ids, use_cache=False).logits
    assert [len(names) for names, *_ in runs] == [9, 2, 2, 2, 2, 1]
    assert_close(parts, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [2, 4, 5])
def test_products_of_few_rows_are_the_same(count):
    from tether.delta.adapter_passes import _product

    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(12, 7)
    rows = torch.randn(count, 1, 12, generator=generator)
    with torch.no_grad():
        assert_close(_product(layer, rows), torch.nn.functional.linear(rows, layer.weight, layer.bias))


def test_modes_and_embedded_prompts(model, served):
    ids = random_ids(2, 30, seed=19)
    noise = Noise.draw(2, model.latent_size, seed=3)
    for mode, more in (("deterministic", {}), ("causal", {"noise": noise})):
        assert torch.equal(
            served.generate(ids, **GREEDY, mode=mode, **more), uncached(served, ids, mode=mode, **more)
        )
    embeds = model.get_input_embeddings()(ids).detach()
    written = served.generate(inputs_embeds=embeds, **GREEDY)
    with torch.no_grad():
        cache, same = (
            served(**text).past_key_values for text in ({"inputs_embeds": embeds}, {"input_ids": ids})
        )
        features = (each.layers[-1].held["features"] for each in (cache, same))
        assert_close(*features, rtol=0, atol=1e-4)
        for place in range(24):
            output = served(input_ids=written[:, place : place + 1], past_key_values=cache, written_from=30)
            assert place == 23 or torch.equal(output.logits[:, -1].argmax(-1), written[:, place + 1])


def test_numbers_reach_the_adapters(adapters, monkeypatch):
    numeric = CausalQwenForCausalLM.from_backbone(tiny.backbone(), latent_scale=0.1)
    numeric.add_numbers(tiny.tokenizer())
    own = [Adapter(**{**each.__dict__, "base": backbone_print(numeric)}) for each in adapters]
    served = served_by(numeric, own, gated=False)
    ids, values = random_ids(2, 30, seed=20), torch.zeros(2, 30, dtype=torch.float64)
    ids[:, 5], values[0, 5], values[1, 5] = numeric.config.num_token_id, 3.0, -700.0
    with torch.no_grad():
        whole = served(input_ids=ids, numeric_values=values, use_cache=False)
        first = served(input_ids=ids[:, :20], numeric_values=values[:, :20])
        rest = served(input_ids=ids[:, 20:], past_key_values=first.past_key_values)
        other = served(input_ids=ids, numeric_values=values * 2, use_cache=False)
        z = Attached.of(numeric, {"x": own[0]}).states("x", inputs_embeds=numeric.embed(ids, values))
        expected = numeric.abduction(z.last_hidden_state)[0]
    assert_close(rest.logits, whole.logits[:, 20:], rtol=0, atol=1e-4)
    assert float((other.logits - whole.logits)[:, 6:].abs().max()) > 1e-3
    features = first.past_key_values.layers[-1].held["features"]
    assert_close(numeric.abduction(features[..., 32:64])[0], expected[:, :30], rtol=0, atol=1e-4)
    # Asleep while the numbers came.
    scripted(monkeypatch, lambda row, place: [0, 1, 2] if place >= 25 else [])
    with torch.no_grad():
        whole = served(input_ids=ids, numeric_values=values, use_cache=False)
        cache = served(input_ids=ids[:, :4]).past_key_values
        served(input_ids=ids[:, 4:10], numeric_values=values[:, 4:10], past_key_values=cache)
        rest = served(input_ids=ids[:, 10:], past_key_values=cache)
    assert_close(rest.logits, whole.logits[:, 10:], rtol=0, atol=1e-4)


def test_windows_that_slide(tokenizer):
    config = MistralConfig(**tiny.SIZES, sliding_window=8, tie_word_embeddings=True)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model = CausalQwenForCausalLM.from_backbone(backbone)
    served = served_by(model, [made(model, name, seed) for seed, name in enumerate("ab")])
    ids = random_ids(2, 40, seed=21)
    with torch.no_grad():
        assert_close(
            steps(served, ids, 20), served(input_ids=ids, use_cache=False).logits[:, 19:], rtol=0, atol=1e-4
        )


def test_saved_and_served_again(model, adapters, tokenizer, tmp_path):
    for part in (tiny.backbone(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    rule = Rule(prior=0.7, restarts=(0.02,), floor=0.05)
    weights = dict.fromkeys(adapters, 1.0)
    served = serve(model, weights, rule=rule)
    save_adapted(served, weights, tokenizer, tmp_path / "adapted", base=str(tmp_path / "base"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapted")
    assert isinstance(again, AdaptedForCausalLM)
    assert isinstance(again.fusion, AdapterMixture)
    assert again.fusion.rule == rule
    assert again.config.fusion == served.config.fusion
    assert (again.config.fusion["kind"], again.config.fusion["by"]) == ("adapters", "evidence")
    ids = random_ids(2, 30, seed=22)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, served(input_ids=ids).logits)


def test_a_folder_from_before_there_was_evidence_is_the_sum_it_was(model, adapters, tokenizer, tmp_path):
    for part in (tiny.backbone(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    weights = dict(zip(adapters, (1.0, 0.5, -0.2), strict=True))
    added = serve(model, weights, by="sum")
    assert "by" not in added.config.fusion
    save_adapted(added, weights, tokenizer, tmp_path / "old", base=str(tmp_path / "base"))
    described = json.loads((tmp_path / "old" / "config.json").read_text())["fusion"]
    assert set(described) >= {"chart", "weights"}
    assert not set(described) & {"by", "strengths", "prior"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert not isinstance(again.fusion, AdapterMixture)
    ids = random_ids(2, 30, seed=23)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, added(input_ids=ids).logits)
    with pytest.raises(ConfigError, match="one beam"):
        again.generate(ids, num_beams=2)


def test_options_of_sums_ask_for_a_sum(model, adapters):
    weights = dict.fromkeys(adapters[:2], 1.0)
    for option in ({"chart": "linear"}, {"leash": 0.1}, {"by": "sum"}):
        assert not isinstance(serve(model, weights, **option).fusion, AdapterMixture)
        if "by" not in option:
            with pytest.raises(ConfigError, match="options of sums"):
                serve(model, weights, by="evidence", **option)
    with pytest.raises(ConfigError, match="expected one of evidence, sum"):
        serve(model, weights, by="vote")
    with pytest.raises(ConfigError, match="rule"):
        serve(model, weights, by="sum", rule=RULE)


def test_what_evidence_does_not_take(model, adapters, monkeypatch):
    for weight in (0.5, 0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="no ray" if weight == weight else "finite"):
            serve(model, {adapters[0]: 1.0, adapters[1]: weight})
        if weight == weight:
            serve(model, {adapters[0]: 1.0, adapters[1]: weight}, by="sum")
    described = serve(model, {adapters[0]: 1.0}).config.fusion | {"strengths": [[0.5]]}
    with pytest.raises(ConfigError, match="expected 1 for each"):
        AdapterMixture(model.abduction, described, None)
    half = Adapter(**{**adapters[0].__dict__, "record": {"strengths": [0.5, 1.0]}})
    with pytest.raises(ConfigError, match="strengths"):
        serve(model, {half: 1.0})
    monkeypatch.setattr(
        model.config.get_text_config(), "layer_types", ["linear_attention", "full_attention"], False
    )
    with pytest.raises(ConfigError, match="linear_attention"):
        serve(model, {adapters[0]: 1.0})


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`"
)  # by PEFT, of adapters on embeddings
@pytest.mark.parametrize("fields", [{"target_modules": {"embed_tokens"}}, {"alora_invocation_tokens": [3]}])
def test_adapters_that_are_more_than_lora_on_linear_layers_are_refused(model, fields):
    config = lora_config(4, 8)
    for name, value in fields.items():
        setattr(config, name, value)
    attached = Attached(model, "a", config)
    with pytest.raises(ConfigError, match="only LoRA and DoRA on linear layers"):
        Passes(attached, ["a"], model.numeric)


def test_neither_the_model_nor_another_serving_is_touched(model, adapters):
    ids = random_ids(2, 20, seed=24)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        one, other = served_by(model, adapters[:1], gated=False), served_by(model, adapters[1:], gated=False)
        first = one(input_ids=ids).logits
        other(input_ids=ids)
        assert torch.equal(one(input_ids=ids).logits, first)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_accounts_certificates_and_what_is_served_agree(model, adapters, served, tokenizer, tmp_path):
    texts = tiny.documents("words", 6, 4)
    windows = window_text(texts, tokenizer, length=48)
    (found,) = account([served], windows)
    nll = torch.zeros(len(windows.input_ids))
    for batch in windows.batches(4):
        where, mask = windows.positions(batch), batch.mask
        for row in range(len(mask)):
            ids = batch.input_ids[row : row + 1, mask[row]]
            expected, awake = by_hand(model, adapters, ids)
            own = where[mask.nonzero()[:, 0] == row]
            asleep = found.log_weights[own] == -torch.inf
            assert torch.equal(~asleep, awake)
            targets = windows.targets[own].clamp(min=0)
            nll[own] = -expected.log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    assert_close(found.nll, nll[found.scored], rtol=0, atol=1e-4)
    for part in (tiny.backbone(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    write_documents(tmp_path / "words.jsonl", texts)
    weights = dict.fromkeys(adapters, 1.0)
    save_adapted(served, weights, tokenizer, tmp_path / "adapted", base=str(tmp_path / "base"))
    certificate = certify(
        model, served, tokenizer, {"words": tmp_path / "words.jsonl"}, window=48, continuations=2,
        continuation_tokens=12,
    )  # fmt: skip
    row = certificate.figures["words"]
    assert row["parts"]["violations"] == 0
    assert row["nll"] == pytest.approx(float(found.nll.mean()), rel=1e-4)
    assert set(row["shares"]) == {"base", "a", "b", "c"}
    certificate.save(tmp_path / "cert.json")
    assert verify(tmp_path / "cert.json") == []
    served.name_or_path = ""


def test_a_copy_serves_too(served):
    ids = random_ids(1, 20, seed=25)
    again = copy.deepcopy(served)
    with torch.no_grad():
        assert_close(again(input_ids=ids).logits, served(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_each_adapter_is_measured_alone_on_the_text_of_its_budget(model, tokenizer):
    documents = tiny.documents("words", 6, 3)
    windows = window_text(documents, tokenizer, length=48)
    texts = {"base": text_hash(documents)}
    own = [made(model, name, seed) for seed, name in enumerate(["a", "b"])]
    limited, rare = (replace(each, record=each.record | {"texts": texts}) for each in own)
    rare.record["quantile"] = 0.9
    served = serve(model, {limited: 1.0, made(model, "c", 2): 1.0, rare: 1.0}, rule=RULE)
    found = alone_figures(served, windows, texts["base"], 0.95)
    at = {}
    for adapter in (limited, rare):
        alone = serve(model, {adapter: 1.0}, by="sum", gated=False)
        kl = []
        for first, last in pairwise(windows.starts.tolist()):
            ids = windows.input_ids[first:last].unsqueeze(0)
            with torch.no_grad():
                before, after = (
                    each(input_ids=ids).logits.double().log_softmax(-1)[0] for each in (model, alone)
                )
            kl.append((before.exp() * (before - after)).sum(-1))
        at[adapter.name] = torch.cat(kl)
    assert {domain: set(figures) for domain, figures in found.items()} == {"a": {"budget"}, "b": {"budget"}}
    assert found["a"]["budget"]["mean"] == pytest.approx(float(at["a"].mean()), rel=1e-4)
    expected = float(at["b"].quantile(0.9, interpolation="higher"))
    assert found["b"]["budget"]["mean"] == pytest.approx(expected, rel=1e-4)
    assert found["a"]["budget"]["low"] < found["a"]["budget"]["mean"] < found["a"]["budget"]["high"]
