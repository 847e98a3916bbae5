"""Layers that lie elsewhere than on the device: the same figures, and a plain word where they must be whole."""

import json

import pytest
import torch

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.fingerprint import fingerprint
from tether.causal.loading import load
from tether.causal.offloading import is_offloaded, make_map
from tether.delta.adapter_learning import learn_adapter
from tether.delta.cache import compute_states
from tether.delta.certificate import certify
from tether.delta.export import export_plain
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.same_base import unlike
from tether.delta.verification import verify
from tether.delta.windows import window_text
from tether.errors import ConfigError
from tether.store.documents import write_documents

DIGITS, WORDS = tiny.documents("digits", 24, 1), tiny.documents("words", 24, 2)
AWAY = {"model.layers.1": "disk", "model.layers.3": "disk"}
FIT = {
    "base_texts": WORDS,
    "name": "digits",
    "window": 64,
    "epochs": 1,
    "batch": 64,
    "probe": 200,
    "gate": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "qwen2"):
        for part in (tiny.backbone(kind, layers=4), tiny.tokenizer()):
            part.save_pretrained(folder / kind)
    write_documents(
        folder / "words.jsonl", [" ".join(WORDS[:6]), " ".join(WORDS[6:12]), " ".join(WORDS[12:])]
    )
    write_documents(folder / "digits.jsonl", DIGITS)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return load(str(folder / "llama"))[0]


@pytest.fixture(scope="module")
def spread(folder, tmp_path_factory):
    return load(str(folder / "llama"), device_map=AWAY, offload_folder=tmp_path_factory.mktemp("away"))[0]


@pytest.fixture(scope="module")
def deltas(whole, spread):
    return [learn_delta(each, tiny.tokenizer(), DIGITS, **FIT) for each in (whole, spread)]


def resting(model):
    return [any(weight.is_meta for weight in layer.parameters()) for layer in model.backbone.layers]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_same_is_computed_and_weights_rest_elsewhere(folder, tmp_path, kind, generator):
    plain, _ = load(str(folder / kind))
    model, tokenizer = load(str(folder / kind), device_map=AWAY, offload_folder=tmp_path)
    ids = torch.randint(256, (2, 30), generator=generator)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 257}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert resting(model) == [False, True, False, True]
    assert is_offloaded(model)
    assert not is_offloaded(plain)
    assert fingerprint(model) == fingerprint(plain)
    windows = window_text(WORDS, tokenizer, length=64)
    assert torch.equal(compute_states(model, windows), compute_states(plain, windows))


def test_another_weight_on_disk_is_another_fingerprint(folder, tmp_path, whole):
    changed = tiny.backbone(layers=4)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    for part in (changed, tiny.tokenizer()):
        part.save_pretrained(tmp_path / "changed")
    model, _ = load(str(tmp_path / "changed"), device_map=AWAY)
    assert fingerprint(model) == fingerprint(load(str(tmp_path / "changed"))[0]) != fingerprint(whole)


def test_auto_fills_the_device_first_and_keeps_heads_there(folder, tmp_path):
    from accelerate.utils import compute_module_sizes

    plain, _ = load(str(folder / "llama"))
    layer = compute_module_sizes(plain.backbone.layers[0])[""]
    head = plain.action.weight.nbytes + plain.backbone.norm.weight.nbytes
    model, _ = load(
        str(folder / "llama"), device_map="auto", max_memory={"cpu": head + 2 * layer + layer // 2},
        offload_folder=tmp_path,
    )  # fmt: skip
    # accelerate leaves room for the largest layer, which comes and goes.
    assert resting(model) == [False, True, True, True]
    assert not model.action.weight.is_meta
    assert (
        load(str(folder / "llama"), device_map="auto")[0].backbone.layers[3].mlp.up_proj.weight.device.type
        == "cpu"
    )


def test_deltas_are_learnt_served_written_and_certified(folder, tmp_path, whole, spread, deltas):
    one, other = deltas
    assert torch.equal(one.second, other.second)
    assert one.base == other.base
    served = fuse(spread, {other: 1.0})
    save_checkpoint(served, tiny.tokenizer(), tmp_path / "fused")
    again, tokenizer = load(str(tmp_path / "fused"))
    ids = torch.arange(30)[None]
    assert torch.equal(logits(again, ids), logits(fuse(whole, {one: 1.0}), ids))
    # By the names of the plain model, though a checkpoint of tether has others.
    away, _ = load(str(tmp_path / "fused"), device_map=AWAY, offload_folder=tmp_path / "away")
    assert resting(away) == [False, True, False, True]
    assert torch.equal(logits(away, ids), logits(again, ids))
    assert unlike(spread, away) == unlike(whole, away) == []
    text = {"words": folder / "words.jsonl"}
    made = [certify(*pair, tokenizer, text, window=64) for pair in ((whole, again), (spread, away))]
    assert made[0].figures == made[1].figures
    made[1].save(tmp_path / "certificate.json")
    path = tmp_path / "certificate.json"
    assert verify(path, base=str(folder / "llama"), device_map=AWAY, offload_folder=tmp_path / "more") == []


def test_what_wants_the_layers_whole_refuses(folder, tmp_path, spread):
    tokenizer = tiny.tokenizer()
    refused = {
        "an adapter": lambda: learn_adapter(spread, tokenizer, DIGITS, base_texts=WORDS),
        "an export": lambda: export_plain(spread, tokenizer, tmp_path / "plain"),
    }
    for what, act in refused.items():
        with pytest.raises(ConfigError, match=f"{what} needs the whole backbone.*device_map"):
            act()
    with pytest.raises(ConfigError, match="expected one of both"):
        load(str(folder / "llama"), device_map=AWAY, quantization_config="4bit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"lm_head": "disk"}, "only layers are offloaded, such as 'model.layers.0'"),
        ({"model.embed_tokens": "disk"}, "only layers are offloaded"),
        ({"model.layers.9": "disk"}, "only layers are offloaded"),
        ("balanced", "expected 'auto', or places of layers"),
    ],
)
def test_maps_that_cannot_be(whole, asked, said):
    with torch.device("meta"):
        model = tiny.backbone(layers=4)
    with pytest.raises(ConfigError, match=said):
        make_map(model, asked, torch.device("cpu"))


def test_the_commands(folder, tmp_path, monkeypatch, tether):
    monkeypatch.chdir(tmp_path)
    base, text = folder / "llama", folder / "words.jsonl"
    learn = [
        "learn",
        base,
        "--text",
        folder / "digits.jsonl",
        "--base-text",
        text,
        "--window",
        64,
        "--no-gate",
    ]
    spread = ["--device-map", "auto"]
    code, _, err = tether(*learn, *spread, "--out", "law", "--adapter", "lora")
    assert (code, "--device-map: an adapter runs through every layer" in err) == (2, True), err
    code, _, err = tether(*learn, "--device-map", "disk", "--out", "a.delta")
    assert (code, "expected auto" in err) == (2, True), err
    code, _, err = tether(*learn, "--offload-folder", "x", "--out", "a.delta")
    assert (code, "without --device-map" in err) == (2, True), err
    code, out, err = tether(*learn, *spread, "--out", "a.delta", "--json")
    assert code == 0, err
    assert json.loads(out)["name"] == "a"
    assert tether("fuse", base, "a.delta", *spread, "--out", "fused")[0] == 0
    code, out, err = tether("generate", "fused", "1.2", "--new-tokens", 3, *spread)
    assert (code, out[:3]) == (0, "1.2"), err
    certify = ["certify", base, "fused", "--text", text, "--tokens", 300, "--continuations", 0, *spread]
    code, _, err = tether(*certify, "--out", "c.json")
    assert code == 0, err
    code, out, err = tether("verify", "c.json", "--base", base, *spread)
    assert code == 0, out + err
