import json
import resource

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tiny
from tether.causal import loading
from tether.causal.fingerprint import weights_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    tiny.backbone().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_plain_checkpoint_is_wrapped_and_a_converted_one_is_loaded(folder, tmp_path):
    plain, _ = loading.load(str(folder), preset="paper")
    assert plain.config.preset == "paper"
    plain.save_pretrained(tmp_path / "converted")
    tiny.tokenizer().save_pretrained(tmp_path / "converted")
    again, tokenizer = loading.load(str(tmp_path / "converted"))
    assert isinstance(again, CausalQwenForCausalLM)
    assert again.config.base_fingerprint == plain.config.base_fingerprint
    assert tokenizer("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]
    backbone, _ = loading.load_backbone(str(folder))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, backbone(input_ids=ids).logits)


def test_the_fingerprint_is_of_the_weights_not_of_their_precision(folder):
    exact = AutoModelForCausalLM.from_pretrained(folder)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert weights_fingerprint(exact) == weights_fingerprint(half)
    with torch.no_grad():
        exact.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    assert weights_fingerprint(exact) != weights_fingerprint(half)


def test_what_cannot_be_loaded_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no/such-model.*smollm2-135m"):
        loading.load("no/such-model")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        loading.load(str(tmp_path))
    monkeypatch.setitem(
        loading.ALIASES, "gone", loading.PackagedBase(package="no_such_package", file="x.gguf")
    )
    with pytest.raises(CheckpointError, match="no_such_package"):
        loading.load("gone")


def test_a_missing_tokenizer_is_found_before_the_weights_are_read(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match="tokenizer"):
        loading.load(str(folder))


@pytest.mark.parametrize("kind", ["base", "converted"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 65_536},
        {"hidden_size": 16_384, "intermediate_size": 1_000_000},
        {"hidden_size": 8_192, "vocab_size": 1_000_000},
    ],
)
def test_widths_that_make_more_than_any_memory_holds_are_refused_without_it(folder, tmp_path, kind, sizes):
    place = folder
    if kind == "converted":
        place = tmp_path / "converted"
        loading.load(str(folder))[0].save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
    path = place / "config.json"
    content = json.loads(path.read_text())
    inner = content if "hidden_size" in content else content["backbone_config"]
    assert set(sizes) <= set(inner)
    inner |= sizes
    path.write_text(json.dumps(content))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(CheckpointError, match="makes a model of"):
        loading.load(str(place))
    # In kilobytes: what a tenth of one such matrix would take.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usage.ru_maxrss < 500_000


@pytest.mark.parametrize("damage", ["truncated", "header", "missing"])
def test_damaged_weights_give_one_message(folder, damage):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(
            content[: len(content) // 2] if damage == "truncated" else b"\xff" * 64 + content[64:]
        )
    with pytest.raises(CheckpointError, match="base"):
        loading.load(str(folder))


def test_unknown_fields_in_a_config_are_refused(folder, tmp_path):
    model, tokenizer = loading.load(str(folder))
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    path = tmp_path / "converted" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_scale": "wide"}))
    with pytest.raises(CheckpointError, match="latent_scale"):
        loading.load(str(tmp_path / "converted"))


# GGUF files


LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(base, path):
    """A Llama as one GGUF file: metadata, byte tokens with one merge, weights in float32."""
    gguf = pytest.importorskip("gguf")
    config, writer = base.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tiny.tokenizer().get_vocab(), key=tiny.tokenizer().get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens[:257], "ab"])
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for number in range(config.num_hidden_layers):
        names |= {f"model.layers.{number}.{name}": f"blk.{number}.{short}" for name, short in LAYER.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, short in names.items():
        values = base.get_parameter(f"{name}.weight").detach().numpy()
        if count := heads.get(name.rsplit(".", 1)[-1]):
            # llama.cpp pairs the two halves of a rotary dimension next to each other.
            halves = values.reshape(count, 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{short}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_read_by_its_path_and_known_by_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    ids = torch.arange(9)[None]
    for seed in (0, 1):
        # The second file takes the place of the first: same name, same size.
        base = tiny.backbone(seed=seed)
        write_gguf(base, tmp_path / "base.gguf")
        model, tokenizer = loading.load(str(tmp_path / "base.gguf"))
        assert tokenizer("abc")["input_ids"] == [257, tiny.tokenizer()("c")["input_ids"][0]]
        with torch.no_grad():
            assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(loading, "_convert_gguf", None)
    loading.load(str(tmp_path / "base.gguf"))


def test_a_gguf_file_that_is_missing_or_damaged_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"none\.gguf.*expected a GGUF file"):
        loading.load(str(tmp_path / "none.gguf"))
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(CheckpointError, match=r"damaged\.gguf: could not load"):
        loading.load(str(tmp_path / "damaged.gguf"))
    assert not (tmp_path / "cache").exists()
