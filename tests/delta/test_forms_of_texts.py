"""Whatever form the same texts come in, the same delta is learnt, bit for bit."""

import pytest
import torch

import tiny
from store.test_tables import FORMS, cells, lines
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.learning import learn_delta
from tether.store.documents import read_documents

TEMPLATE = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}<eos>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone())


def rows_of(kind):
    texts = tiny.documents("digits", 130, 5)
    if kind == "talks":
        return [
            {
                "messages": [
                    {"role": "user", "content": f"Which? {n}"},
                    {"role": "assistant", "content": text[:90]},
                ],
                "n": n,
            }
            for n, text in enumerate(texts)
        ]
    if kind == "pairs":
        return [{"prompt": f"Which? {n}", "completion": f" {text[:90]}"} for n, text in enumerate(texts)]
    return [{"text": text, "n": n} for n, text in enumerate(texts)]


def learnt(model, tokenizer, text, base):
    delta = learn_delta(
        model,
        tokenizer,
        text,
        base_texts=base,
        name="own",
        window=48,
        epochs=1,
        candidates=100,
        sampled=20,
        probe=200,
    )
    return [delta.first, delta.second, *delta.gate], delta.record["texts"], delta.sample


@pytest.mark.parametrize("kind", ["talks", "pairs", "text"])
def test_every_form_gives_one_delta(model, tokenizer, tmp_path, kind):
    rows, general = rows_of(kind), [{"text": text} for text in tiny.documents("words", 130, 6)]
    lines(tmp_path / "own.jsonl", rows)
    lines(tmp_path / "base.jsonl", general)
    tensors, hashes, sample = learnt(model, tokenizer, tmp_path / "own.jsonl", tmp_path / "base.jsonl")
    forms = ["rows.parquet", "saved", "rows.csv"] if kind == "text" else ["rows.parquet", "saved", "folder"]
    for form in forms:
        (tmp_path / kind).mkdir(exist_ok=True)
        FORMS[form](tmp_path / kind / f"own-{form}", rows)
        # Base text may be of any form too.
        FORMS[form](tmp_path / kind / f"base-{form}", general)
        found = learnt(model, tokenizer, tmp_path / kind / f"own-{form}", tmp_path / kind / f"base-{form}")
        assert all(torch.equal(own, expected) for own, expected in zip(found[0], tensors, strict=True))
        assert found[1:] == (hashes, sample)


def test_a_field_of_another_name_gives_the_same_delta(model, tokenizer, tmp_path):
    rows = rows_of("text")
    lines(tmp_path / "own.jsonl", rows)
    lines(tmp_path / "base.jsonl", [{"text": text} for text in tiny.documents("words", 60, 6)])
    cells(tmp_path / "own.tsv", [{"id": row["n"], "body": row["text"]} for row in rows])
    expected = learnt(model, tokenizer, tmp_path / "own.jsonl", tmp_path / "base.jsonl")
    found = learnt(
        model, tokenizer, read_documents(tmp_path / "own.tsv", field="body"), tmp_path / "base.jsonl"
    )
    assert all(torch.equal(own, other) for own, other in zip(found[0], expected[0], strict=True))
    assert found[1:] == expected[1:]
