"""Checkpoints and recipes on disk, small, for tests of merging."""

import json

import numpy as np
import yaml
from safetensors.numpy import save_file

from tether.merge.plan import make_plan
from tether.merge.recipe import read_recipe

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}


def save(folder, tensors, config=None, tokens=None):
    """A checkpoint folder; with a tokenizer of the given tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if tokens is not None:
        content = {"model": {"vocab": {token: number for number, token in enumerate(tokens)}}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def write_recipe(path, **fields):
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return path


def plan(folder, **fields):
    return make_plan(read_recipe(write_recipe(folder / "recipe.yaml", **fields)))


def decoder(seed=0, layers=2, width=8, hidden=12, heads=4, groups=2, size=2, vocab=10, head=True, bias=False):
    """Random tensors under the names of a Llama."""
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if head:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(layers):
        inside = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (heads * size, width),
            "self_attn.k_proj": (groups * size, width),
            "self_attn.v_proj": (groups * size, width),
            "self_attn.o_proj": (width, heads * size),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
        if bias:
            shapes |= {
                f"model.layers.{layer}.self_attn.{each}_proj.bias": inside[f"self_attn.{each}_proj"][:1]
                for each in "qkv"
            }
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tuned(tensors, seed, size=0.1):
    """The same with a small random change."""
    draw = np.random.default_rng(seed)
    return {
        name: (values + size * draw.standard_normal(values.shape)).astype(values.dtype)
        for name, values in tensors.items()
    }


def family(folder, config, tokens):
    """Write a parent and two fine-tunes; gives a recipe's fields for them."""
    parent = decoder()
    save(folder / "c", parent, config, tokens)
    for seed, name in enumerate("ab", start=1):
        save(folder / name, tuned(parent, seed), config, tokens)
    return {
        "operator": "task_arithmetic",
        "base": {"path": str(folder / "c")},
        "models": {name: {"path": str(folder / name), "weight": 0.5} for name in "ab"},
    }
