"""Fingerprints follow the weights: what belongs to other weights is refused."""

import pytest
import torch

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.config import CausalQwenConfig
from tether.causal.fingerprint import fingerprint, is_changed
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse, unfuse
from tether.delta.shards import cached
from tether.delta.windows import window_text
from tether.errors import CheckpointError


def made(model):
    return Delta(
        name="a", chart="symmetric", first=None, second=torch.eye(32), gate=None, base=fingerprint(model)
    )


def step(model):
    """One step of an optimizer on the backbone, by hand."""
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("source", ["wrapped", "loaded"])
def test_a_model_trained_by_hand_is_another_base(tmp_path, source):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    if source == "loaded":
        save_checkpoint(model, tiny.tokenizer(), tmp_path / "before")
        model, _ = load(str(tmp_path / "before"))
    windows = window_text(tiny.documents("words", 4), tiny.tokenizer(), length=64)
    delta, before = made(model), fingerprint(model)
    cached(model, windows, tmp_path / "states")
    step(model)
    for use in (
        lambda: cached(model, windows, tmp_path / "states"),
        lambda: fuse(model, {delta: 1.0}, by="sum"),
    ):
        with pytest.raises(CheckpointError, match="have changed since"):
            use()
    save_checkpoint(model, tiny.tokenizer(), tmp_path / "after")
    again, _ = load(str(tmp_path / "after"))
    assert fingerprint(again) != before
    with pytest.raises(CheckpointError, match="was learnt on base"):
        fuse(again, {delta: 1.0}, by="sum")


def test_what_only_reads_changes_nothing(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    fused = fuse(model, {made(model): 1.0}, by="sum")
    fused(input_ids=torch.arange(8)[None])
    fused.to(torch.float64).to(torch.float32)
    assert not is_changed(fused)
    assert fingerprint(unfuse(fused)[0]) == fingerprint(model)


def test_a_fused_model_is_not_written_with_another_backbone(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    fused = fuse(model, {made(model): 1.0}, by="sum")
    step(fused)
    with pytest.raises(CheckpointError, match="since the deltas were fused"):
        save_checkpoint(fused, tiny.tokenizer(), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_models_made_from_a_config_have_fingerprints_of_their_own():
    config = tiny.backbone().config
    one, other = (CausalQwenForCausalLM(CausalQwenConfig(backbone_config=config)) for _ in range(2))
    assert fingerprint(one) != fingerprint(other)
    assert fuse(one, {made(one): 1.0}, by="sum").fusion.domains == ["a"]
    with pytest.raises(CheckpointError, match="was learnt on base"):
        fuse(other, {made(one): 1.0}, by="sum")
