"""Continuous batching of transformers is refused by every kind of model, with what to do instead."""

import pytest
import torch

import tiny
from tether.causal.fingerprint import fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.errors import ConfigError


def model(kind):
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    if kind == "converted":
        return base
    size = tiny.SIZES["hidden_size"]
    delta = Delta(
        name="law", chart="symmetric", first=torch.zeros(size, size), second=0.1 * torch.eye(size), gate=None,
        base=fingerprint(base),
    )  # fmt: skip
    return fuse(base, {delta: 1.0}, by=kind)


@pytest.mark.parametrize("kind", ["converted", "sum", "evidence"])
@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.generate_batch([[1, 2, 3]], max_new_tokens=2),
        lambda model: model.init_continuous_batching(),
        lambda model: model.continuous_batching_context_manager(),
    ],
    ids=["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"],
)
def test_it_is_refused_with_what_to_do(kind, call):
    with pytest.raises(ConfigError, match=r"continuous batching.*generate with padding.*'tether serve'"):
        call(model(kind))
