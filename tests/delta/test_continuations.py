import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.noise import Noise
from tether.delta.continuations import (
    PROMPT,
    continue_texts,
    generated_part,
    not_drawn,
    prompts,
    text_windows,
)
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.measure import Variant, measure
from tether.errors import ConfigError


@pytest.fixture(scope="module")
def fused(model):
    generator = torch.Generator().manual_seed(0)
    second = 40 * torch.randn(32, 32, generator=generator) / 32
    base = model.config.base_fingerprint
    delta = Delta(name="a", chart="symmetric", first=None, second=second, gate=None, base=base)
    return fuse(model, {delta: 1.0}, leash=0.002)


def test_what_was_written_is_what_the_model_draws(model, fused, tokenizer):
    begun = prompts(tiny.documents("words", 5), tokenizer, 3)
    written = continue_texts(fused, begun, 40, seed=7)
    ids = written.ids
    assert ids.shape == (3, PROMPT + 40)
    assert torch.equal(ids[:, :PROMPT], begun.ids)
    assert not_drawn(fused, written, seed=7) == 0
    # Another seed or model draws otherwise, and one changed token is noticed.
    assert not_drawn(fused, written, seed=8) > 60
    assert not_drawn(model, written, seed=7) > 0
    ids[1, PROMPT + 5] = (ids[1, PROMPT + 5] + 1) % 256
    assert not_drawn(fused, written, seed=7) >= 1


def test_draws_have_the_softmax_law(model):
    """Ten thousand individuals draw the first token after one prompt."""
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    noise = Noise.draw(10_000, 4, seed=0)
    uniform = noise.at(torch.full((10_000, 1), 32))[:, 0].double()
    drawn = (scores - (-uniform.log()).log()).argmax(-1)
    share = torch.bincount(drawn, minlength=4) / 10_000
    assert_close(share, scores.softmax(-1), rtol=0, atol=0.02)


def test_only_contexts_of_generated_tokens_are_kept(model, fused, tokenizer):
    begun = prompts(tiny.documents("words", 5), tokenizer, 2)
    written = continue_texts(fused, begun, 9)
    ids, windows = written.ids, text_windows(written)
    result = measure(model, fused.fusion, windows, [Variant((1.0,), "symmetric", False, 0.002)])
    part = generated_part(result, 9)
    assert part.softmax_kl.shape == (1, 18)
    with torch.no_grad():
        before, after = model(ids).logits.double(), fused(ids).logits.double()
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[:, PROMPT - 1 : -1]
    assert_close(part.softmax_kl[0].double(), kl.flatten(), rtol=1e-3, atol=1e-6)
    chosen = -q[:, PROMPT - 1 : -1].gather(-1, ids[:, PROMPT:, None])[..., 0]
    assert_close(part.nll[0].double(), chosen.flatten(), rtol=1e-4, atol=1e-4)
    assert float(kl.max()) <= 0.002 * (1 + 1e-5)
    assert float((part.leash < 1).float().mean()) > 0


def test_short_documents_cannot_be_continued(tokenizer):
    with pytest.raises(ConfigError, match="nothing to continue"):
        prompts(["short"], tokenizer, 2)
