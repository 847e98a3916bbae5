"""How a domain fares in a fusion is measured on a bounded part of its documents, spread over them."""

import pytest
import torch

import tiny
from tether.causal.fingerprint import fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta import fare as module
from tether.delta.delta import Delta
from tether.delta.fare import fare
from tether.delta.fusion import fuse
from tether.delta.windows import window_text


@pytest.fixture(scope="module")
def fused():
    generator = torch.Generator().manual_seed(0)
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("llama"))
    first, second = (0.1 * torch.randn(32, 32, generator=generator) for _ in range(2))
    delta = Delta(
        name="digits", chart="symmetric", first=first, second=second, gate=None, base=fingerprint(model)
    )
    return fuse(model, {delta: 1.0}, gated=False)


def test_a_long_text_is_measured_in_part_and_all_over(fused, monkeypatch):
    documents = tiny.documents("digits", 60, 1)
    every = window_text(documents, tiny.tokenizer(), length=48)
    most = int(every.starts[-1]) // 4
    monkeypatch.setattr(module, "CHECKED", most)
    taken, real = [], module.measure

    def measure(base, fusion, windows, *rest, **more):
        taken.append(windows)
        return real(base, fusion, windows, *rest, **more)

    monkeypatch.setattr(module, "measure", measure)
    found = fare(fused, tiny.tokenizer(), {"digits": documents}, window=48)["digits"]
    (windows,) = taken
    assert 0.8 * most < found.tokens <= 1.2 * most
    assert windows.documents.min() < 5
    assert windows.documents.max() >= 55
    monkeypatch.setattr(module, "CHECKED", 10**9)
    whole = fare(fused, tiny.tokenizer(), {"digits": documents}, window=48)["digits"]
    assert whole.tokens > 3 * found.tokens
    assert found.base == pytest.approx(whole.base, abs=0.2)
