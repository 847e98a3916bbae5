"""The embedded base: real weights, real text."""

import pytest
import torch
from torch.testing import assert_close

import tether
from tether.demo.corpora import BASE_TEXTS, documents

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair():
    base, tokenizer = tether.load_backbone("smollm2-135m")
    return base, tether.CausalQwenForCausalLM.from_backbone("smollm2-135m"), tokenizer


@pytest.fixture(scope="module")
def ids(pair):
    text = "\n".join(documents(BASE_TEXTS["news"])[:4])
    return pair[2](text, return_tensors="pt")["input_ids"][:, :512]


def test_logits_are_the_bases_on_512_tokens_of_news(pair, ids):
    base, model, _ = pair
    assert ids.shape == (1, 512)
    with torch.no_grad():
        expected, got = base(input_ids=ids).logits, model(input_ids=ids).logits
    assert_close(got, expected, rtol=0, atol=1e-4)
    # It is a language model, not noise: the text is predicted far better than by chance (10.8 nats).
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:])
    assert loss < 4.0


def test_greedy_text_is_the_bases_over_64_tokens(pair, ids):
    base, model, _ = pair
    prompt = ids[:, :48]
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 2}
    mask = torch.ones_like(prompt)
    texts = [writer.generate(prompt, attention_mask=mask, **options) for writer in (base, model)]
    assert texts[0].shape[1] == 48 + 64
    assert torch.equal(*texts)


def test_the_calibrated_preset_keeps_nearly_all_of_the_bases_choices(pair, ids):
    _, model, _ = pair
    with torch.no_grad():
        plain = model(input_ids=ids).logits.argmax(-1)
        decided = model(input_ids=ids, mode="deterministic").logits.argmax(-1)
        paper = tether.CausalQwenForCausalLM.from_backbone(pair[0], preset="paper")
        literal = paper(input_ids=ids, mode="deterministic").logits.argmax(-1)
    assert float((plain == decided).float().mean()) >= 0.98
    assert float((plain == literal).float().mean()) <= 0.01
