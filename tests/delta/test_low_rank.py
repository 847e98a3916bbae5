"""Deltas of low rank: the best approximation in use, budgets met by what is served, thin files."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.head import Head, Reference
from tether.delta.learning import learn_delta
from tether.delta.low_rank import Factors, factored, shortened
from tether.errors import CheckpointError, ConfigError

DIGITS, WORDS = tiny.documents("digits", 30, 1), tiny.documents("words", 30, 2)


def drawn(seed, chart="symmetric"):
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(400, 12, generator=draw) @ torch.randn(12, 12, generator=draw)
    scale = torch.rand(8, generator=draw).add(0.1).expand(400, 8)
    root = torch.randn(8, 8, generator=draw)
    head = Head(torch.randn(8, 12, generator=draw), torch.randn(8, 12, generator=draw), chart)
    return head, Reference(states, torch.zeros(400, 8), scale), root @ root.T


def error(head, other, at, fisher):
    """What is lost in use: mean of (d - d')^T F (d - d') over the states, d the move of loc."""
    unit = at.scale if head.chart != "matrix" else torch.ones_like(at.scale)
    move = unit.double() * (at.states.double() @ (head.second - other.second).double().T)
    return float(((move @ fisher.double()) * move).sum(-1).mean())


@pytest.mark.parametrize("chart", ["symmetric", "matrix"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_other_head_of_that_rank_loses_less(chart, rank):
    head, at, fisher = drawn(0, chart)
    found = shortened(head, at, fisher, rank)
    assert torch.linalg.matrix_rank(found.second, rtol=1e-4) == rank
    assert torch.linalg.matrix_rank(found.first, rtol=1e-4) == rank
    least = error(head, found, at, fisher)
    # Eckart and Young: what is lost is the sum of the squares that are cut off.
    unit = at.scale[0].double() if chart != "matrix" else torch.ones(8, dtype=torch.float64)
    moment = at.states.double().T @ at.states.double() / 400
    left = torch.linalg.cholesky((fisher.double() * torch.outer(unit, unit)) + 1e-12 * torch.eye(8)).T
    right = torch.linalg.cholesky(moment)
    cut = torch.linalg.svdvals(left @ head.second.double() @ right)[rank:]
    assert least == pytest.approx(float(cut.square().sum()), rel=2e-3)
    # And no neighbour of that rank is better, nor the plain truncation.
    u, s, vh = torch.linalg.svd(head.second)
    plain = head._replace(second=(u[:, :rank] * s[:rank]) @ vh[:rank])
    assert error(head, plain, at, fisher) > least
    thin = factored({"second": found.second}, rank)["second"]
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        near = Factors(*(part + 1e-2 * torch.randn(part.shape, generator=draw) for part in thin))
        assert error(head, head._replace(second=near.whole()), at, fisher) > least * (1 - 1e-6)


def test_full_rank_changes_nothing():
    head, at, fisher = drawn(2)
    found = shortened(head, at, fisher, 8)
    torch.testing.assert_close(found.second, head.second, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.first, head.first, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def model():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone())


def learnt(model, **options):
    return learn_delta(
        model, tiny.tokenizer(), DIGITS, base_texts=WORDS, name="digits", window=64, epochs=2, probe=400, **options
    )  # fmt: skip


def test_the_budget_is_met_by_what_is_served_and_the_file_is_thin(model, tmp_path):
    whole, thin = learnt(model), learnt(model, rank=2)
    assert thin.record["fit"]["rank"] == 2
    assert torch.linalg.matrix_rank(thin.second, rtol=1e-5) <= 2
    # The measurement of the budget is of the delta of low rank.
    assert thin.record["drift_base"] <= 0.05
    held = thin.record["held_out"]
    assert held["nll_after"] < held["nll_before"]
    paths = [
        delta.save(tmp_path / f"{name}.delta").path for name, delta in (("whole", whole), ("thin", thin))
    ]
    sizes = [
        sum(value.numel() for name, value in load_file(path).items() if "gate" not in name) for path in paths
    ]
    assert sizes == [2 * 32 * 32, 2 * 2 * (32 + 32)]
    again = Delta.load(paths[1])
    for name in ("first", "second"):
        torch.testing.assert_close(getattr(again, name), getattr(thin, name), rtol=1e-6, atol=1e-7)
    ids = torch.arange(40)[None]
    served = [
        fuse(model, {delta: 1.0}, by="sum", gated=False)(input_ids=ids).logits for delta in (thin, again)
    ]
    torch.testing.assert_close(*served, rtol=1e-5, atol=1e-5)
    assert again.save(tmp_path / "again.delta").path.read_bytes() == paths[1].read_bytes()


def test_several_layers_and_numbers_left_alone_keep_the_rank():
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    model.add_numbers(tiny.tokenizer())
    several = learnt(model, rank=3, features="multi")
    assert several.second.shape == (32, 32 * (1 + len(several.layers)))
    assert torch.linalg.matrix_rank(several.second, rtol=1e-4) <= 3
    alone = learnt(model, rank=3, chart="matrix", location_only=True, keep_values=True)
    assert torch.linalg.matrix_rank(alone.second, rtol=1e-4) <= 3
    across = model.action.value_weight.detach().flatten()
    assert float((across / across.norm() @ alone.second).abs().max()) < 1e-5 * float(alone.second.abs().max())


def test_factors_of_other_heads_are_refused(model):
    thin = learnt(model, rank=2)
    with pytest.raises(ConfigError, match="its factors are not those of its heads"):
        replace(thin, second=2 * thin.second)
    with pytest.raises(ConfigError, match="rank=0"):
        learnt(model, rank=0)


@pytest.mark.parametrize("change", ["missing", "shape", "types", "both", "large", "nan"])
def test_damaged_factors_are_refused(model, tmp_path, change):
    path = learnt(model, rank=2, gate=False).save(tmp_path / "a.delta").path
    tensors = load_file(path)
    if change == "missing":
        del tensors["first.down"]
    elif change == "shape":
        tensors["second.down"] = torch.zeros(3, 32)
    elif change == "types":
        tensors["second.up"] = tensors["second.up"].half()
    elif change == "both":
        tensors["second"] = torch.zeros(32, 32)
    elif change == "large":
        for name in ("first", "second"):
            tensors |= {f"{name}.up": torch.ones(2**16, 1), f"{name}.down": torch.ones(1, 2**16)}
    else:
        tensors["second.up"][0, 0] = torch.nan
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        Delta.load(path)
