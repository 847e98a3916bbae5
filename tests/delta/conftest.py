import pytest

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.cache import cache_states
from tether.delta.windows import window_text


@pytest.fixture(scope="session")
def model():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone())


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def caches(model, tokenizer, tmp_path_factory):
    """States of a domain, of base text, and of held-out base text."""
    folder = tmp_path_factory.mktemp("states")
    texts = {
        "digits": tiny.documents("digits", 40, 1),
        "words": tiny.documents("words", 40, 2),
        "words-held-out": tiny.documents("words", 40, 3),
    }
    return {
        name: cache_states(model, window_text(text, tokenizer, length=64), folder / f"{name}.safetensors")
        for name, text in texts.items()
    }
