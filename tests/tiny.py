"""Small models made from real configs, and a byte tokenizer, so that tests go through the real loading code."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


def backbone(kind="llama", seed=0, layers=2):
    """A random causal LM; `llama` ties its head to the embedding, `qwen2` has its own head and qkv biases.

    `granite` divides its logits by 0.6, and `gemma2` caps them at 2.
    """
    sizes = SIZES | {"num_hidden_layers": layers}
    configs = {
        "llama": lambda: LlamaConfig(**sizes, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**sizes, tie_word_embeddings=False),
        "granite": lambda: GraniteConfig(**sizes, tie_word_embeddings=True, logits_scaling=0.6),
        "gemma2": lambda: Gemma2Config(
            **sizes,
            tie_word_embeddings=True,
            head_dim=8,
            query_pre_attn_scalar=8,
            final_logit_softcapping=2.0,
        ),
    }
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configs[kind]())
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # The usual start of 0.02 gives nearly uniform predictions; these have something to lose.
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    vocabulary |= {"<eos>": 256, "<pad>": 257}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def documents(kind, count, seed=0):
    """Text of two recognisable kinds: lines of digits, or lines of words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, size):
        return torch.randint(high, (size,), generator=generator).tolist()

    words = ["the", "of", "and", "model", "drift", "leash", "text", "base", "token", "state", "gate", "chart"]
    made = []
    for _ in range(count):
        if kind == "digits":
            made.append(
                " ".join(f"{a}{b}.{c}" for a, b, c in zip(draw(3, 25), draw(2, 25), draw(4, 25), strict=True))
            )
        else:
            made.append(" ".join(words[i] for i in draw(len(words), 25)))
    return made


BACKGROUND = torch.randn(8, 34, SIZES["hidden_size"], generator=torch.Generator().manual_seed(9))
"""In place of what a base writes of itself, for fits whose gates are not looked at."""
