"""Permuting units through the axis spec changes no logits: Llama, Qwen2, Qwen3 and vision-language models of them."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
)

from tether.errors import CheckpointError, ShapeError
from tether.merge.axes import AXES, FACTORS, Sizes, axes_of, find_tower, layer_of, sizes
from tether.merge.maps import axis_index, bring, check_maps, read_maps, source_name

SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llava(text):
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return LlavaConfig(text_config=text, vision_config=vision, image_token_id=39, vision_feature_layer=-1)


def qwen2_vl():
    text = {**SMALL, "head_dim": None, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
    text = {key: value for key, value in text.items() if value is not None}
    vision = {
        "depth": 1,
        "embed_dim": 8,
        "hidden_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "mlp_ratio": 2,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=39,
        video_token_id=38,
        vision_start_token_id=37,
        vision_end_token_id=36,
    )


# transformers' RMS norm sums in float32 even in a float64 model, and a permutation changes the order of its terms.
SAME = {"rtol": 0, "atol": 5e-6}

CONFIGS = {
    "llama, tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama, biases": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "llava of llama": lambda: llava(LlamaConfig(**SMALL)),
    "llava of qwen2": lambda: llava(Qwen2Config(**SMALL)),
    "qwen2-vl": qwen2_vl,
}


def build(kind):
    config = CONFIGS[kind]()
    loader = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        model = loader.from_config(config).double().eval()
        for parameter in model.parameters():
            # Gains and biases too: what is not moved with its units must show.
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def logits(model, state):
    ids = torch.tensor([[5, 17, 3, 30, 8, 1, 22], [9, 9, 31, 2, 4, 6, 7]])
    given_ = {"input_ids": ids}
    if type(model).__name__.startswith("Llava"):
        ids[:, 1:5] = 39
        given_["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).reshape(2, 3, 8, 8)
    if type(model).__name__.startswith("Qwen2VL"):
        ids[:, 1] = 39
        given_["pixel_values"] = torch.linspace(-1, 1, 2 * 4 * 48, dtype=torch.float64).reshape(8, 48)
        given_["image_grid_thw"] = torch.tensor([[1, 2, 2], [1, 2, 2]])
        given_["mm_token_type_ids"] = (ids == 39).int()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(**given_).logits


def permuted(state, config, maps):
    tower = find_tower(state)
    short = {name: canonical for canonical, name in tower.names.items()}
    lengths = sizes(
        config, {short[name]: tuple(values.shape) for name, values in state.items() if name in short}, "it"
    )
    check_maps(maps, lengths, lengths, (tower.layers, tower.layers), "maps")
    moved = {}
    for name, values in state.items():
        array = values.numpy()
        moved[name] = torch.from_numpy(bring(short.get(name, name), array, array, maps, lengths, lengths))
    return moved


def drawn(seed, spaces):
    draw = np.random.default_rng(seed)
    groups, queries, size = 3, 2, 4
    maps = {"residual": draw.permutation(24)}
    for layer in range(2):
        maps[f"layers.{layer}.mlp"] = draw.permutation(20)
        maps[f"layers.{layer}.group"] = draw.permutation(groups)
        maps[f"layers.{layer}.query"] = np.stack([draw.permutation(queries) for _ in range(groups)])
        maps[f"layers.{layer}.value"] = np.stack([draw.permutation(size) for _ in range(groups)])
    return {name: index for name, index in maps.items() if name.rpartition(".")[2] in spaces}


MODELS = {}
ENDS = ("model.embed_tokens.weight", "lm_head.weight")  # one tensor where they are tied


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    spaces=st.sets(st.sampled_from(["residual", "mlp", "group", "query", "value"]), min_size=1),
)
def test_any_permutation_leaves_the_logits_unchanged(kind, seed, spaces):
    if kind not in MODELS:
        model = build(kind)
        state = {name: values.clone() for name, values in model.state_dict().items()}
        MODELS[kind] = model, state, logits(model, state)
    model, state, before = MODELS[kind]
    config = model.config.to_dict()
    moved = permuted(state, config, drawn(seed, spaces))
    torch.testing.assert_close(logits(model, moved), before, **SAME)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("space", ["residual", "mlp", "group", "query", "value"])
def test_a_tensor_that_is_left_behind_shows(kind, space):
    model = build(kind)
    state = {name: values.clone() for name, values in model.state_dict().items()}
    before = logits(model, state)
    moved = permuted(state, model.config.to_dict(), drawn(1, {space}))
    torch.testing.assert_close(logits(model, moved), before, **SAME)
    changed = [name for name in state if not torch.equal(state[name], moved[name])]
    assert changed
    tied = model.config.to_dict().get("tie_word_embeddings")
    for name in changed:
        together = ENDS if tied and name in ENDS else (name,)
        left = logits(model, moved | {each: state[each] for each in together})
        assert (left - before).abs().max() > 1e-3, name


def test_tokens_are_reordered_with_embedding_and_head():
    model = build("qwen2")
    state = {name: values.clone() for name, values in model.state_dict().items()}
    order = np.random.default_rng(0).permutation(40)
    moved = permuted(state, model.config.to_dict(), {"vocab": order})
    ids = torch.tensor([[5, 17, 3]])
    with torch.no_grad():
        model.load_state_dict(state)
        before = model(input_ids=ids).logits
        model.load_state_dict(moved)
        # The token that was number order[i] is number i now.
        after = model(input_ids=torch.from_numpy(np.argsort(order))[ids]).logits
    torch.testing.assert_close(after, before[..., torch.from_numpy(order)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_the_tower_has_axes(kind):
    state = build(kind).state_dict()
    tower = find_tower(state)
    assert tower.layers == 2
    for canonical, name in tower.names.items():
        axes = axes_of(canonical)
        assert axes is not None, canonical
        assert len(axes) == state[name].dim()
    assert {factor for axes in AXES.values() for axis in axes for factor in axis} == set(FACTORS)
    assert not any(
        part in name for name in tower.names.values() for part in ("vision", "visual", "projector")
    )


def test_rope_is_no_symmetry():
    """The spec offers no map of query and key dimensions; here is why."""
    model = build("llama, biases")
    state = {name: values.clone() for name, values in model.state_dict().items()}
    before = logits(model, state)
    swapped = dict(state)
    for part in ("q_proj", "k_proj"):
        for kind in ("weight", "bias"):
            name = f"model.layers.0.self_attn.{part}.{kind}"
            heads = state[name].unflatten(0, (-1, 4))
            swapped[name] = heads[:, [1, 0, 3, 2]].flatten(0, 1)
    assert (logits(model, swapped) - before).abs().max() > 1e-3


ONE = Sizes(vocab=4, residual=6, mlp=5, group=2, query=2, value=3, rope=4)


def test_wider_targets_keep_their_own_where_nothing_corresponds():
    wide = ONE._replace(mlp=7)
    maps = {"layers.0.mlp": np.array([2, -1, 0, 1, 4, -1, 3])}
    values, fill = np.arange(30, dtype=np.float32).reshape(5, 6), -np.ones((7, 6), np.float32)
    found = bring("layers.0.mlp.up_proj.weight", values, fill, maps, wide, ONE)
    assert found[[0, 2, 3, 4, 6]].tolist() == values[[2, 0, 1, 4, 3]].tolist()
    assert (found[[1, 5]] == -1).all()
    down = bring("layers.0.mlp.down_proj.weight", values.T.copy(), fill.T.copy(), maps, wide, ONE)
    np.testing.assert_array_equal(down, found.T)


def test_groups_bring_their_heads_along():
    maps = {"layers.1.group": np.array([1, -1]), "layers.1.query": np.array([[1, 0], [0, 1]])}
    index = axis_index(("group", "query", "rope"), 1, maps, ONE, ONE)
    assert index.tolist() == [12, 13, 14, 15, 8, 9, 10, 11, *[-1] * 8]
    assert axis_index(("residual",), 1, maps, ONE, ONE) is None
    assert axis_index(("group", "query", "rope"), 0, maps, ONE, ONE) is None


def test_layers_are_renamed_to_their_counterparts():
    maps = {"layers": np.array([0, -1, 1])}
    assert source_name("layers.2.mlp.up_proj.weight", maps) == "layers.1.mlp.up_proj.weight"
    assert source_name("layers.1.mlp.up_proj.weight", maps) is None
    assert source_name("norm.weight", maps) == "norm.weight"
    assert layer_of("layers.12.mlp.up_proj.weight") == 12


WRONG = {
    "unknown": ({"layers.0.rope": np.arange(4)}, "layers.0.rope is no space"),
    "no such layer": ({"layers.5.mlp": np.arange(5)}, "layers.5.mlp is no space"),
    "a residual of a layer": ({"layers.0.residual": np.arange(6)}, "layers.0.residual is no space"),
    "shape": ({"residual": np.arange(5)}, "residual has shape (5,), expected (6,)"),
    "nested shape": ({"layers.0.value": np.arange(3)}, "layers.0.value has shape (3,), expected (2, 3)"),
    "range": ({"residual": np.array([0, 1, 2, 3, 4, 6])}, "residual holds 0..6, expected -1..5"),
    "twice": ({"layers.1.mlp": np.array([0, 1, 2, 2, 4])}, "layers.1.mlp uses a unit twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_maps_that_do_not_fit(case):
    maps, message = WRONG[case]
    with pytest.raises(ShapeError) as caught:
        check_maps(maps, ONE, ONE, (2, 2), "maps.safetensors")
    assert message in str(caught.value)


def test_sizes_that_differ_need_maps():
    with pytest.raises(ShapeError) as caught:
        check_maps({"layers.0.mlp": np.arange(5)}, ONE, ONE._replace(mlp=9, rope=8), (2, 3), "x")
    for part in (
        "layers.1.mlp has 5 units here and 9 there, and no map",
        "rope has 4",
        "2 layers here and 3 there",
    ):
        assert part in str(caught.value)


def test_files_of_maps_that_cannot_be_read(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(CheckpointError, match="cannot be read"):
        read_maps(tmp_path / "absent")
    save_file({"residual": np.ones(3, np.float32)}, tmp_path / "floats")
    with pytest.raises(CheckpointError, match="residual are not integers"):
        read_maps(tmp_path / "floats")


def test_configs_that_do_not_fit_their_tensors():
    shapes = {
        "layers.0.self_attn.q_proj.weight": (16, 6),
        "embed_tokens.weight": (4, 6),
        "layers.0.self_attn.v_proj.weight": (6, 6),
    }
    shapes |= {"layers.0.mlp.gate_proj.weight": (5, 6), "layers.0.self_attn.o_proj.weight": (6, 99)}
    with pytest.raises(CheckpointError, match=r"o_proj.weight \(6, 99\), expected \(6, 12\)"):
        sizes({"num_attention_heads": 4, "num_key_value_heads": 2}, shapes, "it")
    with pytest.raises(CheckpointError, match=r"num_attention_heads None, .*positive whole numbers"):
        sizes({}, shapes, "it")


def test_two_towers_are_none():
    names = ["embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight"]
    assert find_tower([f"{prefix}.{name}" for prefix in "ab" for name in names]) is None
    assert find_tower(["h.0.attn.weight"]) is None
