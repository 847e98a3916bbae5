import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
from disk import nearly_full
from tether.causal.checkpoint import save_checkpoint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.cache import cache_states
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import Gate
from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError
from tether.store.manifest import read_manifest
from tether.store.place import check_free
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors


def make(model, name="a", seed=0, *, gate=True, rank=3, window=4, base=None, first=True):
    generator = torch.Generator().manual_seed(seed)
    gates = Gate(torch.zeros(32), torch.randn(rank, 32, generator=generator), torch.full((window,), 90.0))
    return Delta(
        name=name,
        chart="symmetric",
        first=torch.randn(32, 32, generator=generator) / 32 if first else None,
        second=torch.randn(32, 32, generator=generator) / 32,
        gate=gates if gate else None,
        base=base or model.config.base_fingerprint,
        record={"budget": 0.1, "metric": "softmax"},
    )  # fmt: skip


def test_a_delta_comes_back_from_its_file(model, tmp_path):
    for name, delta in {"full": make(model), "plain": make(model, gate=False, first=False)}.items():
        saved = delta.save(tmp_path / f"{name}.delta")
        again = Delta.load(tmp_path / f"{name}.delta")
        assert saved.path == again.path == tmp_path / f"{name}.delta"
        assert torch.equal(again.second, delta.second)
        assert (again.first is None) == (delta.first is None)
        assert (again.gate is None) == (delta.gate is None)
        if delta.gate is not None:
            assert all(torch.equal(a, b) for a, b in zip(delta.gate, again.gate, strict=True))
        assert (again.name, again.chart, again.base, again.record) == (
            delta.name,
            delta.chart,
            delta.base,
            delta.record,
        )


def test_damaged_and_foreign_delta_files(model, tmp_path):
    path = tmp_path / "a.delta"
    with pytest.raises(CheckpointError, match=r"a\.delta"):
        Delta.load(path)
    make(model).save(path)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:40], b"", b"\0" * 8 + content[8:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.delta"):
            Delta.load(path)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="expected a delta file"):
        Delta.load(tmp_path / "model" / "model.safetensors")


def test_what_cannot_be_fused_is_named(model):
    a, b = make(model, "a", 1), make(model, "b", 2)
    with pytest.raises(ConfigError, match="at least one delta"):
        fuse(model, {}, by="sum")
    with pytest.raises(ConfigError, match="linear, symmetric"):
        fuse(model, {a: 1.0}, chart="linaer")
    for weight in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite"):
            fuse(model, {a: 1.0, b: weight}, by="sum")
    with pytest.raises(ConfigError, match="distinct names"):
        fuse(model, {a: 1.0, make(model, "a", 3): 1.0}, by="sum")
    with pytest.raises(CheckpointError, match="'x'"):
        fuse(model, {a: 1.0, make(model, "x", base="sha256:" + "0" * 64): 1.0}, by="sum")
    with pytest.raises(ConfigError, match="no gate"):
        fuse(model, {a: 1.0, make(model, "c", gate=False): 1.0}, gated=True, by="sum")
    with pytest.raises(ConfigError, match="fused already"):
        fuse(fuse(model, {a: 1.0}, by="sum"), {b: 1.0}, by="sum")
    with pytest.raises(ConfigError, match="same gate window"):
        fuse(model, {a: 1.0, make(model, "c", window=8): 1.0}, by="sum")


def test_weights_are_shared_with_the_base_and_the_base_is_untouched(model):
    fused = fuse(model, {make(model): 2.0}, by="sum")
    assert fused.backbone is model.backbone
    assert fused.action is model.action
    assert model.fusion is None
    assert model.config.fusion is None
    assert fuse(model, {make(model, gate=False): 1.0}, by="sum").fusion.gated is False


def test_gates_of_different_rank_live_together(model, generator):
    narrow, wide = make(model, "a", 1, rank=2), make(model, "b", 2, rank=5)
    ids = torch.randint(256, (2, 12), generator=generator)
    both = fuse(model, {narrow: 1.0, wide: 1.0}, by="sum")(input_ids=ids).gates
    alone = [fuse(model, {delta: 1.0}, by="sum")(input_ids=ids).gates[0] for delta in (narrow, wide)]
    assert torch.equal(both, torch.stack(alone))


def test_a_fused_checkpoint_loads_with_stock_classes(model, tokenizer, tmp_path, generator):
    deltas = {make(model, "a", 1): 1.0, make(model, "b", 2, first=False): -0.3}
    paths = {delta.name: delta.save(tmp_path / f"{delta.name}.delta").path for delta in deltas}
    fused = fuse(model, deltas, chart="geodesic")
    save_checkpoint(fused, tokenizer, tmp_path / "fused", inputs=paths)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    ids = torch.randint(256, (2, 15), generator=generator)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, fused(input_ids=ids).logits)
    assert again.config.fusion == fused.config.fusion
    assert [item.role for item in read_manifest(tmp_path / "fused").inputs] == ["a", "b"]


def test_an_output_folder_with_content_is_refused_before_and_kept(model, tokenizer, tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    for attempt in (lambda: check_free(tmp_path), lambda: save_checkpoint(model, tokenizer, tmp_path)):
        with pytest.raises(ConfigError, match="not empty"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(ConfigError, match="tokenizer"):
        save_checkpoint(model, None, tmp_path / "new")
    check_free(tmp_path / "new")


def test_a_delta_of_another_width_is_refused():
    wide = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    delta = make(wide)
    cut = Delta(**{**delta.__dict__, "second": delta.second[:, :16], "first": delta.first[:, :16]})
    with pytest.raises(CheckpointError, match=r"\(32, 16\)"):
        fuse(wide, {cut: 1.0}, by="sum")


def test_a_full_disk_gives_one_message_and_leaves_earlier_results(model, tokenizer, tmp_path):
    windows = window_text(tiny.documents("words", 9), tokenizer, length=48)
    attempts = {
        "model": lambda: save_checkpoint(model, tokenizer, tmp_path / "model"),
        "a.delta": lambda: make(model, "a").save(tmp_path / "a.delta"),
        "states": lambda: cache_states(model, windows, tmp_path / "states"),
    }
    (tmp_path / "a.delta").write_bytes(b"earlier")
    for name, attempt in attempts.items():
        message = f"{name} could not be written: File too large"
        with pytest.raises(CheckpointError, match=message), nearly_full(4_000):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["a.delta"]
    assert (tmp_path / "a.delta").read_bytes() == b"earlier"


def test_a_delta_of_another_latent_is_refused(model):
    from tether.delta.cache import latent_print

    delta = make(model)
    known = Delta(**{**delta.__dict__, "record": delta.record | {"latent": latent_print(model)}})
    fuse(model, {known: 1.0}, by="sum")
    paper = CausalQwenForCausalLM.from_backbone(tiny.backbone(), preset="paper")
    assert paper.config.base_fingerprint == model.config.base_fingerprint
    with pytest.raises(CheckpointError, match="another latent"):
        fuse(paper, {known: 1.0}, by="sum")


def test_a_fusion_of_a_half_precision_base_is_kept_and_taken_apart_bit_for_bit(tmp_path):
    from tether.causal.loading import load
    from tether.delta.fusion import unfuse

    tiny.backbone().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    base = CausalQwenForCausalLM.from_backbone(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    deltas = {make(base, name, seed): weight for name, seed, weight in (("a", 1, 1.0), ("b", 2, 0.5))}
    fused = fuse(base, deltas, by="sum")
    save_checkpoint(fused, tiny.tokenizer(), tmp_path / "both")
    again, _ = load(str(tmp_path / "both"))
    assert again.backbone.dtype == torch.bfloat16
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, fused(input_ids=ids).logits)
    own, parts = unfuse(again)
    left = fuse(own, {delta: weight for delta, weight in parts.items() if delta.name != "a"}, by="sum")
    wanted = fuse(base, {delta: weight for delta, weight in deltas.items() if delta.name != "a"}, by="sum")
    for name, values in wanted.fusion.state_dict().items():
        assert torch.equal(left.fusion.state_dict()[name], values), name


@pytest.mark.parametrize("description", ["{}", "xx", '{"format": 1}'])
def test_a_damaged_description_of_a_delta_is_refused(model, tmp_path, description):
    from safetensors.torch import save_file

    save_file({"second": torch.zeros(2, 2)}, tmp_path / "a.delta", {"tether.delta": description})
    with pytest.raises(CheckpointError, match="damaged"):
        Delta.load(tmp_path / "a.delta")


def test_gates_refuse_ways_to_write_that_take_tokens_back(model):
    fused = fuse(model, {make(model): 1.0}, by="sum")
    ids = torch.arange(3, 23).view(1, 20)
    for options in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 8}, {"assistant_model": model}):
        with pytest.raises(ConfigError, match="take tokens back"):
            fused.generate(ids, max_new_tokens=2, **options)
    first = fused.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ConfigError, match="gate_state"):
        fused.generate(first.sequences, max_new_tokens=2, past_key_values=first.past_key_values)
    output = fused(input_ids=ids, use_cache=True)
    with pytest.raises(ConfigError, match="gate_state"):
        fused(input_ids=ids[:, :1], past_key_values=output.past_key_values)
    both = {"past_key_values": output.past_key_values, "gate_state": output.gate_state}
    whole = fused(input_ids=torch.cat([ids, ids[:, :1]], -1)).logits[:, -1:]
    assert_close(fused(input_ids=ids[:, :1], **both).logits, whole, rtol=1e-4, atol=1e-4)
    plain = fuse(model, {make(model): 1.0}, gated=False, by="sum")
    assert plain.generate(ids, max_new_tokens=2, prompt_lookup_num_tokens=3).shape == (1, 22)


@pytest.mark.parametrize("chart", ["linear", "symmetric", "geodesic", "rootkl"])
def test_behind_a_closed_gate_the_base_is_served_however_large_the_delta(model, chart):
    generator = torch.Generator().manual_seed(3)
    closed = Gate(torch.zeros(32), torch.randn(3, 32, generator=generator), torch.full((4,), -1.0))
    heads = 100 * torch.randn(2, 32, 32, generator=generator)
    large = dataclasses.replace(make(model, "large"), first=heads[0], second=heads[1], gate=closed)
    ids = torch.randint(256, (2, 30), generator=generator)
    small = make(model)
    with torch.no_grad():
        alone, base = fuse(model, {large: 1.0}, chart=chart)(input_ids=ids), model(input_ids=ids)
        beside, without = (
            fuse(model, deltas, chart=chart)(input_ids=ids)
            for deltas in ({large: 1.0, small: 1.0}, {small: 1.0})
        )
    assert torch.equal(alone.logits, base.logits)
    assert_close(beside.logits, without.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "damage", ["no second", "half a gate", "shapes", "not numbers", "width", "gate width"]
)
def test_a_damaged_delta_is_refused_by_name(model, tmp_path, damage):
    whole = make(model)
    gate = whole.gate
    changes = {
        "shapes": {"first": whole.first[:, :20]},
        "not numbers": {"second": whole.second.clone().fill_(math.nan)},
        "width": {"first": None, "second": whole.second[:, :20]},
        "gate width": {"gate": Gate(gate.center[:20], gate.whitening[:, :20], gate.threshold)},
    }
    dataclasses.replace(whole, **changes.get(damage, {})).save(tmp_path / "a.delta")
    if damage in ("no second", "half a gate"):
        reader = CheckpointReader(tmp_path / "a.delta")
        gone = "second" if damage == "no second" else "gate.center"
        kept = {name: reader.tensor(name) for name in reader.names if name != gone}
        write_safetensors(tmp_path / "a.delta", kept, reader.metadata())
    with pytest.raises(CheckpointError, match=r"damaged"):
        fuse(model, {Delta.load(tmp_path / "a.delta"): 1.0}, by="sum")


def test_a_weight_that_32_bits_do_not_hold_is_refused(model):
    with pytest.raises(ConfigError, match="number of 32 bits"):
        fuse(model, {make(model): 1e39}, by="sum")
