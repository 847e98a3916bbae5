"""Configs under which equal weights are another function, told by running the models, are refused; others are not."""

import json
import shutil

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tiny
from checkpoints import plan
from tether.errors import ConfigError

SMALL = tiny.SIZES | {"head_dim": 8, "tie_word_embeddings": False, "attn_implementation": "eager"}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 1.0,
    "sliding_window": 6,
}
WINDOW = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
}
OPTIONS = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": WINDOW,
    "gemma2": GEMMA,
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 6},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "granite": {"embedding_multiplier": 2.0, "attention_multiplier": 0.4},
    "cohere": {},
    "glm4": {},
    "smollm3": {},
    "deepseek_v3": EXPERTS
    | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8}
    | {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4}
    | {"num_key_value_heads": 4},
}
ROPE = {"rope_theta": 1e4, "rope_type": "default"}

FUNCTIONS = [
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": None, "layer_types": None}),
    ("gemma2", {"query_pre_attn_scalar": 64}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": 30.0}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("deepseek_v3", {"routed_scaling_factor": 1.0}),
    ("granite", {"embedding_multiplier": 3.0}),
    ("granite", {"residual_multiplier": 0.5}),
    ("granite", {"attention_multiplier": 0.1}),
    ("granite", {"logits_scaling": 4.0}),
    ("cohere", {"logit_scale": 1.0}),
    ("llama", {"rope_parameters": ROPE | {"rope_theta": 5e5}}),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    ("glm4", {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}),
    ("smollm3", {"no_rope_layers": [0, 1]}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rms_norm_eps": 0.1}),
]
NOTED = [
    ("llama", {"eos_token_id": 3}),
    ("llama", {"max_position_embeddings": 4096}),
    ("llama", {"rms_norm_eps": 1e-5}),
]
HARMLESS = [
    ("llama", {"initializer_range": 1.0, "use_cache": False, "pretraining_tp": 2, "attention_dropout": 0.5}),
    ("mixtral", {"router_aux_loss_coef": 0.7, "output_router_logits": True}),
    ("qwen2", {"max_window_layers": 1}),
]
IDS = torch.arange(24).reshape(1, 24) * 7 % 251


def model_of(kind, changes):
    options = SMALL | OPTIONS[kind] | changes
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() > 1 else 1.0)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def family(folder, kind, changes, own=None):
    """Write one set of weights under two configs; give the recipe, and how far the logits are apart."""
    one, other = own or model_of(kind, {}), model_of(kind, changes)
    other.load_state_dict(one.state_dict())
    if not (folder / "c").exists():
        one.save_pretrained(folder / "c")
        shutil.copytree(folder / "c", folder / "b")
    other.config.save_pretrained(folder / "b")
    fields = {
        "operator": "task_arithmetic",
        "base": {"path": str(folder / "c")},
        "models": {"b": {"path": str(folder / "b")}},
        "vocabulary": "same-rows",
    }
    return fields, float((logits(one) - logits(other)).abs().max())


def label(case):
    return f"{case[0]}-{'-'.join(case[1])}"


@pytest.mark.parametrize("case", FUNCTIONS, ids=label)
def test_another_function_is_refused(tmp_path, case):
    fields, apart = family(tmp_path, *case)
    assert apart > 1e-2
    with pytest.raises(ConfigError, match=r"b: its config has .* its weights are another function"):
        plan(tmp_path, **fields)
    assert "the result is read as base's says" in plan(tmp_path, **fields, conventions="into").notes[-1]


@pytest.mark.parametrize("case", NOTED, ids=label)
def test_what_surrounds_the_function_is_noted(tmp_path, case):
    fields, apart = family(tmp_path, *case)
    assert apart < 5e-3
    (key,) = case[1]
    assert any(note.startswith(f"b: {key} ") for note in plan(tmp_path, **fields).notes)


@pytest.mark.parametrize("case", HARMLESS, ids=label)
def test_the_same_function_passes(tmp_path, case):
    fields, apart = family(tmp_path, *case)
    assert apart < 1e-5
    assert plan(tmp_path, **fields).notes == ()


def test_what_a_config_leaves_out_has_the_value_that_transformers_gives_it(tmp_path):
    fields, _ = family(tmp_path, "mistral", {})
    file = tmp_path / "b" / "config.json"
    config = json.loads(file.read_text())
    for key in ("hidden_act", "attention_dropout", "rope_parameters"):
        del config[key]
    file.write_text(json.dumps(config))
    assert plan(tmp_path, **fields).notes == ()
    # 4096 where it is left out, and 16 in the other.
    del config["sliding_window"]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="attention sliding_attention 4096 instead of sliding_attention 16"):
        plan(tmp_path, **fields)


def test_configs_of_unknown_code_are_compared_as_they_are_written(tmp_path):
    fields, _ = family(tmp_path, "llama", {})
    for name in "bc":
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text()) | {
            "model_type": "of my own",
            "odd": {"depth": [1]},
        }
        file.write_text(json.dumps(config))
    assert plan(tmp_path, **fields).notes == ()
    # Off, and a factor of 1, are what is left out.
    file.write_text(json.dumps(config | {"odd": {"depth": [1], "more": False, "logit_scale": 1.0}}))
    assert plan(tmp_path, **fields).notes == ()
    file.write_text(json.dumps(config | {"odd": {"depth": [2]}}))
    with pytest.raises(ConfigError, match=r"odd\.depth \[1\] instead of \[2\]"):
        plan(tmp_path, **fields)


def mutants(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 2 + 0.5]
    if isinstance(value, dict) and "rope_theta" in value:
        return [value | {"rope_theta": 5e5}]
    return {None: [4], "silu": ["gelu"]}.get(value, []) if value is None or isinstance(value, str) else []


# Whether a head is tied is told by its bytes; the others change what a forward pass returns beside its logits.
FORWARD = {
    "tie_word_embeddings",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "dtype",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
def test_no_key_that_changes_a_logit_passes(tmp_path, kind):
    own = model_of(kind, {})
    config = own.config.to_dict()
    refused = 0
    for key in sorted(config.keys() - FORWARD):
        for value in mutants(config[key]):
            try:
                fields, apart = family(tmp_path, kind, {key: value}, own)
            except Exception:
                continue  # another shape, or no such model
            if apart < 1e-6:
                continue
            try:
                notes = plan(tmp_path, **fields).notes
            except ConfigError:
                refused += 1
            else:
                assert "eps" in key, (kind, key, value, apart, notes)
                assert notes, (kind, key, value)
    assert refused >= 2
