"""Adapters of every kind, made by PEFT itself on small models, and PEFT's own model at a share of their strength."""

import warnings

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model

import tiny

BASE = "qwen2"
"""Has biases at queries, keys and values, and a head of its own."""
ATTENTION = ["q_proj", "k_proj", "v_proj"]


def plain(base=BASE, seed=0):
    """A small causal LM whose biases, where it has any, are not 0 as they are at the start of a training."""
    model = tiny.backbone(base, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def lora(**fields):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **fields}
    )


TAKEN = {
    "LoRA": lora(),
    "by a pattern": lora(target_modules=r".*layers\.\d\..*(q|v|up)_proj"),
    "rsLoRA": lora(use_rslora=True, target_modules="all-linear"),
    "DoRA": lora(use_dora=True, target_modules="all-linear"),
    "rsDoRA": lora(use_dora=True, use_rslora=True),
    "bias of all": lora(bias="all", target_modules="all-linear"),
    "bias beside LoRA": lora(bias="lora_only"),
    "bias where no LoRA is": lora(bias="all", target_modules=["o_proj", "down_proj"]),
    "bias of B": lora(lora_bias=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "rsPiSSA": lora(init_lora_weights="pissa", use_rslora=True, target_modules="all-linear"),
    "OLoRA": lora(init_lora_weights="olora", use_rslora=True),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "patterns": lora(
        rank_pattern={"q_proj": 2, "model.layers.1.self_attn.v_proj": 6},
        alpha_pattern={"layers.0.self_attn.k_proj": 3, "^model.layers.1.self_attn.v_proj": 12, "v_proj": 5},
    ),
}  # fmt: skip
"""Kinds that a LoRA or a DoRA on the base stands for."""
REFUSED = {
    "trained head": (lora(modules_to_save=["lm_head"]), "lm_head.*trained whole.*train without modules_to_save"),
    "LoRA on the head": (lora(target_modules=["q_proj", "lm_head"]), "lm_head.*output head among its target_modules"),
    "trained embedding": (lora(modules_to_save=["embed_tokens"]), "the embedding of tokens was trained"),
    "trained tokens": (lora(trainable_token_indices=[1, 2]), "the embedding of tokens was trained"),
    "LoRA on the embedding": (lora(target_modules=["q_proj", "embed_tokens"]), "the embedding of tokens was trained"),
    "trained norm": (lora(modules_to_save=["norm"]), "norm.weight.*trained whole"),
    "drawn start": (lora(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
    "DoRA with biases": (lora(use_dora=True, bias="lora_only"), "biases.*beside DoRA"),
    "IA3": (
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "'IA3'.*merge_and_unload",
    ),
    "LoHa": (LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), "'LOHA'.*merge_and_unload"),
}  # fmt: skip
"""Kinds that are refused, with a part of the reason."""


def train(config, size=0.05, seed=3, base=BASE):
    """A small model with an adapter whose trained weights have been moved at random."""
    model = plain(base)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        # PEFT draws the start of A from the global generator.
        torch.random.manual_seed(seed)
        peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return peft.eval()


def write(config, folder, **options):
    """Train an adapter and let PEFT save it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(config, **options).save_pretrained(folder)
    return folder


def merged(folder, base=BASE):
    """What PEFT makes of a base with the adapter in a folder, as a plain model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(plain(base), folder).eval().merge_and_unload()


@torch.no_grad()
def at_share(folder, share, base=BASE):
    """PEFT's model with each weight that was trained at a share of its way from where PEFT starts it.

    B and its bias start at 0, lengths of rows (DoRA) and biases of the base at those of the base. PiSSA and OLoRA,
    whose start changes the base too, are merged by PEFT, and the weights go the share of their way.
    """
    model = plain(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(plain(base), folder).eval()
    start = peft.peft_config["default"].init_lora_weights
    if start in ("pissa", "olora"):
        whole = merged(folder, base).state_dict()
        model.load_state_dict(
            {name: own + share * (whole[name] - own) for name, own in model.state_dict().items()}
        )
        return model
    own = dict(model.named_parameters())
    for name, parameter in peft.named_parameters():
        at = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".lora_B." in name:
            parameter.mul_(share)
        elif "magnitude" in name:
            lengths = own[at.split(".lora_magnitude")[0] + ".weight"].norm(dim=1)
            parameter.copy_(lengths + share * (parameter - lengths))
        elif at in own and ".lora_" not in name:
            parameter.copy_(own[at] + share * (parameter - own[at]))
    return peft
