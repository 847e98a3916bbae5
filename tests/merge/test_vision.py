"""Vision-language models of different classes: language towers merge, the chosen parent's vision stays."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    SiglipVisionConfig,
)

import tiny
from checkpoints import plan
from tether.merge.run import merge

TEXT = {**tiny.SIZES, "tie_word_embeddings": False}
IMAGE = 255  # the byte that stands for an image patch


def vision(kind, size):
    sizes = {"hidden_size": size, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind](**sizes, image_size=8, patch_size=4)


def saved(folder, seed, kind=None, size=8):
    text = LlamaConfig(**TEXT)
    if kind is None:
        config, loader = text, AutoModelForCausalLM
    else:
        strategy = "default" if kind == "clip" else "full"
        config = LlavaConfig(
            text_config=text, vision_config=vision(kind, size), image_token_id=IMAGE, vision_feature_layer=-1,
            vision_feature_select_strategy=strategy,
        )  # fmt: skip
        loader = AutoModelForImageTextToText
    torch.random.manual_seed(seed)
    model = loader.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def language(model):
    inner = model.model.language_model if hasattr(model.model, "language_model") else model.model
    return {**inner.state_dict(), "lm_head.weight": model.lm_head.weight.detach()}


def answer(model, patches=4):
    ids = torch.tensor([[5, *[IMAGE] * patches, 9, 40]])
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


@pytest.fixture
def family(tmp_path):
    return {
        "c": saved(tmp_path / "c", 0),
        "a": saved(tmp_path / "a", 1, "clip"),
        "b": saved(tmp_path / "b", 2, "siglip", 12),
    }


@pytest.mark.parametrize("into", ["a", "b", "base"])
def test_the_merged_model_sees_with_its_own_tower(tmp_path, family, into):
    models = {name: {"path": str(tmp_path / name), "weight": 0.4} for name in "ab"}
    fields = {
        "operator": "task_arithmetic",
        "base": {"path": str(tmp_path / "c")},
        "models": models,
        "into": into,
    }
    report = merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    own = family["c" if into == "base" else into]
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert type(config) is type(own.config)
    loader = AutoModelForCausalLM if into == "base" else AutoModelForImageTextToText
    loaded = loader.from_pretrained(tmp_path / "out").eval()
    parts = {name: language(model) for name, model in family.items()}
    for name, values in language(loaded).items():
        expected = parts["c"][name] + sum(0.4 * (parts[each][name] - parts["c"][name]) for each in "ab")
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    if into == "base":
        assert report["plan"]["kept"] == {}
        return
    assert set(report["plan"]["kept"]) == {into}
    # The parent's own class, with the merged language model put in by hand, answers the same.
    own.model.language_model.load_state_dict(
        {k: v for k, v in language(loaded).items() if k != "lm_head.weight"}
    )
    own.lm_head.weight.data.copy_(loaded.lm_head.weight)
    torch.testing.assert_close(answer(loaded), answer(own), rtol=0, atol=0)


def test_two_of_one_class_merge_their_towers_when_asked(tmp_path):
    one, two = saved(tmp_path / "a", 1, "clip"), saved(tmp_path / "b", 2, "clip")
    models = {name: {"path": str(tmp_path / name)} for name in "ab"}
    merge(plan(tmp_path, operator="linear", models=models, towers="merge"), tmp_path / "out", threads=1)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for name, values in loaded.state_dict().items():
        expected = (one.state_dict()[name] + two.state_dict()[name]) / 2
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_the_check_reads_text_with_vision_models_too(tmp_path, family):
    from tether.store.documents import write_documents

    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 5))
    check = {
        "text": {"words": str(tmp_path / "words.jsonl")},
        "tokens": 256,
        "window": 64,
        "paths": 1,
        "path_length": 4,
    }
    models = {name: {"path": str(tmp_path / name), "weight": 0.4} for name in "ab"}
    fields = {
        "operator": "linear",
        "base": {"path": str(tmp_path / "c")},
        "models": models,
        "into": "a",
        "check": check,
    }
    report = merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    assert list(report["check"]["references"]) == ["base", "a", "b"]
