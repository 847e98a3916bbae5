"""Small mixture-of-experts models of five families, made from real configs."""

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 8}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 8}),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


def build(family, implementation="eager", **changes):
    config, model, extra = FAMILIES[family]
    settings = config(**(SIZES | extra | changes))
    settings._experts_implementation = implementation
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        made = model(settings)
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                # Routers start at zero or nearly: here they have something to choose by.
                torch.nn.init.normal_(parameter, std=0.3 if "gate.weight" in name else 0.1)
    return made


def tokens(batch=4, length=12, seed=0):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def train(model, shaper, optimizer, steps=3, scale=1.0):
    for step in range(steps):
        ids = tokens(seed=step)
        loss = model(input_ids=ids, labels=ids).loss * scale + shaper.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()
