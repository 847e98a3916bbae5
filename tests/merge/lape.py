"""Tiny models and banks for the tests of probes, paths, signatures and Gram matrices."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tiny
from tether.merge.paths import sample_paths
from tether.merge.probes import EncodedProbe

IMAGE_TOKEN = 255


def probes(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [EncodedProbe(torch.randint(1, 250, (n,), generator=generator), {}) for n in lengths]


def bank(model, count=3, paths=4, shortest=2, longest=9, **options):
    return sample_paths(model, probes(count), paths=paths, shortest=shortest, longest=longest, **options)


def llava(seed=0):
    """A random LLaVA: CLIP tower of 4 patches, a projector, a Llama language tower."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**tiny.SIZES, tie_word_embeddings=False)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def image_probe(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([5] + [IMAGE_TOKEN] * 4 + [17, 23])
    return EncodedProbe(ids, {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)})
