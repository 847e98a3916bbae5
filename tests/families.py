"""A tiny model of every causal LM family of transformers, with its caps and multipliers set to values that matter."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

FAMILIES = tuple(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping if kind != "causal_qwen")
CAP, SCALE = 1.5, 0.6

SIZES = {
    64: (
        "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx encoder_hash_byte_group_vocab"
    ),
    48: "intermediate_size n_inner ffn_dim ffn_hidden_size d_ff d_inner decoder_ffn_dim encoder_ffn_dim",
    32: "hidden_size d_model n_embd emb_dim embedding_dim lru_width image_size",
    16: (
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size patch_size "
        "projection_dim expert_ffn_hidden_size q_lora_rank kv_lora_rank"
    ),
    8: (
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim mamba_d_state mamba_n_heads mamba_d_head "
        "state_size mamba_chunk_size chunk_size mamba_headdim linear_key_head_dim linear_value_head_dim "
        "linear_head_dim hidden_size_per_layer_input"
    ),
    4: (
        "num_hidden_layers num_layers num_attention_heads num_heads num_key_value_heads num_kv_heads n_head n_heads "
        "num_experts n_routed_experts num_local_experts encoder_attention_heads decoder_attention_heads rotary_dim "
        "index_topk linear_num_value_heads linear_num_heads attention_window_size sliding_window"
    ),
    2: (
        "n_layer n_layers encoder_layers decoder_layers num_experts_per_tok num_experts_per_token index_n_heads "
        "linear_num_key_heads"
    ),
    1: "n_group topk_group num_expert_group first_k_dense_replace",
}
"""Fields by the value they get where a config has them."""

HALVES = ["linear_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 1e4}
OWN = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 5,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HALVES},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "minicpm3": {"dim_model_base": 8},
    "reformer": {
        "is_decoder": True,
        "num_hidden_layers": 2,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "feed_forward_size": 48,
    },
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "num_hidden_layers": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layer_types": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 4,
        "n_mamba_heads": 8,
        "kv_channels": 8,
        "num_query_groups": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
"""What single families want beside that."""

UNBUILT = {
    "blt": "its config has no num_hidden_layers, so its own model cannot make a cache",
    "dots3_note": "its config names layers 25 to 41, so no small one exists",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is built",
    "gemma4_assistant": "its default config is refused by its own check",
    "gemma4_unified_assistant": "its layers share the cache of another model",
    "musicgen": "its class reads fields of the decoder that its own config does not have",
    "musicgen_melody": "its class reads fields of the decoder that its own config does not have",
    "qwen4_exp": "its text config has no defaults for the sparse attention",
    "qwen4_exp_text": "its config has no defaults for the sparse attention",
    "xlstm": "its native kernels refuse small heads",
}
"""Families of which no tiny model can be made, and why."""


def config(kind):
    """A small config of a family, of its parts as well."""
    made = CONFIG_MAPPING[kind]
    default = made()
    names = set(default.to_dict())
    fields = {name: size for size, group in SIZES.items() for name in group.split() if name in names}
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    fields |= {
        name: 3
        for name in names
        if name.endswith("_token_id") and isinstance(getattr(default, name), int) and name not in special
    }
    fields |= {name: number for number, name in enumerate(special) if name in names}
    for name in made.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig) and part.model_type in CONFIG_MAPPING:
            fields[name] = config(part.model_type).to_dict()
    return made(**(fields | OWN.get(kind, {})))


def after_head(text):
    """Fields of a text config by which its family changes logits: caps, and multipliers or divisors."""
    names = [name for name in text.to_dict() if "logit" in name or "lm_head" in name]
    caps = [name for name in names if "cap" in name and "attn" not in name and "router" not in name]
    return caps, [name for name in names if "scal" in name or "mult" in name]


def model(kind, seed=0):
    """A random model of a family, its logits spread out, with every cap and multiplier of the head set."""
    made = config(kind)
    text = made.get_text_config(decoder=True)
    caps, scales = after_head(text)
    for name in caps:
        setattr(text, name, CAP)
    for name in scales:
        setattr(text, name, SCALE)
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(made).eval()
        for parameter in base.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    # As in any model that comes from a file: Youtu sets this row to 0 on loading, whatever the file holds.
    embedding = base.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        with torch.no_grad():
            embedding.weight[embedding.padding_idx] = 0
    return base
