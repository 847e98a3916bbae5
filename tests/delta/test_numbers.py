"""Deltas, adapters and certificates of a model that reads numbers: what is measured is what is served."""

import json
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numerals import find_numbers
from tether.cli.accounted import value_lines
from tether.delta.adapter_learning import learn_adapter
from tether.delta.adapter_serving import serve
from tether.delta.adapter_training import AdapterFit
from tether.delta.budget import Budget
from tether.delta.cache import hidden_states
from tether.delta.certificate import Certificate, certify
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.ledger import keep_ledger
from tether.delta.shards import cache_shards, cached, load_shards
from tether.delta.verification import verify
from tether.delta.windows import reader, window_text
from tether.store.documents import write_documents

TEXT = tiny.documents("digits", 12)


@pytest.fixture(scope="module")
def numeric():
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    model.add_numbers(tiny.tokenizer())
    return model


@pytest.fixture(scope="module")
def windows(numeric):
    return window_text(TEXT, reader(numeric, tiny.tokenizer()), length=64)


@pytest.fixture(scope="module")
def delta(numeric):
    return learn_delta(
        numeric,
        tiny.tokenizer(),
        TEXT,
        base_texts=tiny.documents("words", 12),
        budget=0.05,
        window=64,
        gate=False,
    )


def test_numbers_of_a_text_are_read_as_numbers(numeric):
    windows = window_text(TEXT, reader(numeric, tiny.tokenizer()), length=200)
    expected = [float(numeral.value) for document in TEXT for numeral in find_numbers(document)]
    found = windows.numeric_values[windows.input_ids == numeric.config.num_token_id]
    assert found.tolist() == expected[: len(found)]
    assert len(found) > 200


def test_states_are_those_of_the_model_with_numbers(numeric, windows, tmp_path):
    batch = next(windows.batches(4))
    with torch.no_grad():
        output = numeric(
            input_ids=batch.input_ids,
            numeric_values=batch.numeric_values,
            attention_mask=batch.mask.long(),
            output_hidden_states=True,
        )
    assert_close(
        hidden_states(numeric, batch)[batch.mask], output.hidden_states[-1][batch.mask], rtol=1e-4, atol=1e-4
    )
    first = cached(numeric, windows, tmp_path)
    assert torch.equal(first.windows.numeric_values, windows.numeric_values)
    parts = load_shards(cache_shards(numeric, windows, tmp_path / "parts", tokens=90))
    assert torch.equal(parts.windows.numeric_values, windows.numeric_values)
    # A state depends in its last bits on what it was batched with.
    assert_close(parts.states[:], first.states[:], rtol=1e-3, atol=1e-3)
    only = first.only(torch.tensor([2, 5]))
    assert torch.equal(
        only.windows.numeric_values,
        windows.numeric_values[torch.isin(windows.documents, torch.tensor([2, 5]))],
    )


@pytest.mark.parametrize("kind", ["delta", "adapter"])
def test_what_is_certified_is_what_is_served(numeric, windows, delta, kind):
    if kind == "delta":
        fused = fuse(numeric, {delta: 1.0})
    else:
        fit = AdapterFit(budget=Budget(value=0.05), probe=256, gate=False)
        made = learn_adapter(
            numeric,
            tiny.tokenizer(),
            TEXT,
            base_texts=tiny.documents("words", 12),
            name="a",
            fit=fit,
            window=64,
        )
        fused = serve(numeric, {made: 1.0}, gated=False)
    certificate = certify(numeric, fused, tiny.tokenizer(), TEXT, window=64)
    total = count = 0.0
    for batch in windows.batches(4):
        given = {
            "input_ids": batch.input_ids,
            "numeric_values": batch.numeric_values,
            "attention_mask": batch.mask.long(),
        }
        with torch.no_grad():
            before, after = (m(**given).logits[batch.mask].double().log_softmax(-1) for m in (numeric, fused))
        total += float((before.exp() * (before - after)).sum())
        count += int(batch.mask.sum())
    assert total / count > 1e-3
    assert certificate.figures["text"]["softmax_kl"]["mean"] == pytest.approx(total / count, rel=1e-3)


def test_a_certificate_holds_with_numbers_that_the_model_wrote(numeric, delta, tmp_path):
    with torch.no_grad():
        numeric.action.bias[-1] = 4.0  # awake, so that it writes numbers
    delta = Delta(**{**delta.__dict__, "base": renew_fingerprint(numeric)})
    save_checkpoint(fuse(numeric, {delta: 1.0}), tiny.tokenizer(), tmp_path / "fused")
    write_documents(tmp_path / "digits.jsonl", TEXT)
    fused = CausalQwenForCausalLM.from_pretrained(tmp_path / "fused")
    certificate = certify(
        numeric,
        fused,
        tiny.tokenizer(),
        tmp_path / "digits.jsonl",
        window=64,
        continuations=2,
        continuation_tokens=20,
    )
    path = certificate.save(tmp_path / "cert.json")
    assert verify(path) == []
    content = json.loads(path.read_text())
    written = content["figures"]["digits"]["continuations"]
    row, place = next(
        (r, t)
        for r, ids in enumerate(written["ids"])
        for t, token in enumerate(ids)
        if t >= 32 and token == numeric.config.num_token_id
    )
    # Little enough to change no draw after it.
    written["values"][row][place] += 0.012 * (1 + abs(written["values"][row][place]))
    path.write_text(json.dumps(Certificate(**content).sealed().model_dump(mode="json")))
    assert verify(path) == ["digits.continuations: 1 tokens are not what the model writes"]


@pytest.mark.parametrize("by", ["evidence", "sum"])
def test_the_ledger_says_what_happened_to_numbers(by):
    numeric = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    numeric.add_numbers(tiny.tokenizer())
    delta = learn_delta(
        numeric,
        tiny.tokenizer(),
        TEXT,
        base_texts=tiny.documents("words", 12),
        window=64,
        gate=False,
        epochs=1,
    )
    fused = fuse(numeric, {delta: 1.0}, by=by)
    found = keep_ledger(fused, tiny.tokenizer(), TEXT, window=64, tokens=600)["values"]
    windows = window_text(TEXT, reader(numeric, tiny.tokenizer()), length=64, tokens=600)
    errors = {"before": [], "after": []}
    for first, last in pairwise(windows.starts.tolist()):
        ids, values = windows.input_ids[None, first:last], windows.numeric_values[None, first:last]
        at = (ids[0, 1:] == numeric.config.num_token_id).nonzero().squeeze(-1)
        for when, model in (("before", numeric), ("after", fused)):
            with torch.no_grad():
                expected = model(input_ids=ids, numeric_values=values, mode="softmax").value_loc.reshape(-1)[
                    at
                ]
            errors[when].append((model.action.number(expected) - values[0, 1:][at]).abs())
    assert found["numbers"] == sum(map(len, errors["before"])) > 50
    for when, parts in errors.items():
        assert found[f"median_error_{when}"] == pytest.approx(float(torch.cat(parts).median()), rel=1e-4)
    assert found["drift"] > 0
    (line,) = value_lines("this text", found)
    assert f"median error of {found['numbers']} numbers is {found['median_error_after']:.4g}" in line
    assert value_lines("this text", {"numbers": 0}) == []
