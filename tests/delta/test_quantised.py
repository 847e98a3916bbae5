"""Bases in 4 and 8 bits: adapters are learnt, fused, served and certified on them; what needs full weights refuses."""

import json

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.fingerprint import fingerprint, is_changed
from tether.causal.loading import load, load_backbone
from tether.causal.quantising import Packing, find_packing, packed, recorded
from tether.delta.adapter import Adapter, lora_config
from tether.delta.adapter_learning import learn_adapter
from tether.delta.adapter_serving import save_adapted, serve
from tether.delta.adapter_training import AdapterFit
from tether.delta.attached import Attached
from tether.delta.budget import Budget
from tether.delta.certificate import certify
from tether.delta.export import export_plain
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.leashing import leash_adapter
from tether.delta.recomputing import recomputing
from tether.delta.verification import verify
from tether.errors import CheckpointError, ConfigError
from tether.store.documents import write_documents

pytest.importorskip("bitsandbytes")

FORMS = ("4bit", "8bit")
FIT = AdapterFit(budget=Budget(value=0.05), batch=4, lr=5e-3, probe=400, gate=False)
DIGITS, WORDS = tiny.documents("digits", 24, 1), tiny.documents("words", 24, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of width 64: 4 bits are packed in blocks of 64."""
    folder = tmp_path_factory.mktemp("quantised")
    narrow = dict(tiny.SIZES)
    tiny.SIZES.update(hidden_size=64, intermediate_size=128)
    try:
        for kind in ("llama", "qwen2"):
            for part in (tiny.backbone(kind), tiny.tokenizer()):
                part.save_pretrained(folder / kind)
    finally:
        tiny.SIZES.clear()
        tiny.SIZES.update(narrow)
    write_documents(folder / "words.jsonl", WORDS)
    write_documents(folder / "digits.jsonl", DIGITS)
    return folder


@pytest.fixture(scope="module")
def full(folder):
    return load(str(folder / "llama"))[0]


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return request.param


@pytest.fixture(scope="module")
def model(folder, form):
    return load(str(folder / "llama"), quantization_config=form)[0]


@pytest.fixture(scope="module")
def adapter(model):
    return learn_adapter(model, tiny.tokenizer(), DIGITS, base_texts=WORDS, name="digits", window=64, fit=FIT)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def dequantised(folder, form):
    """The same base by bitsandbytes' own way back: plain layers of what was packed."""
    config = find_packing(form).config()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).dequantize().eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_base_computes_with_what_was_packed_and_its_head_is_whole(folder, form, kind, generator):
    model, _ = load(str(folder / kind), quantization_config=form)
    plain, _ = load(str(folder / kind))
    ids = torch.randint(256, (2, 30), generator=generator)
    expected = logits(dequantised(folder / kind, form), ids)
    # 8 bits round activations too.
    error = float((logits(model, ids) - expected).norm() / expected.norm())
    assert error < (1e-6 if form == "4bit" else 0.08)
    assert not torch.equal(expected, logits(plain, ids))
    assert torch.equal(model.action.weight, plain.action.weight)
    assert model.action.weight.dtype == torch.float32
    layers = model.backbone.layers[0]
    assert not layers.mlp.up_proj.weight.is_floating_point()
    assert torch.equal(layers.input_layernorm.weight, plain.backbone.layers[0].input_layernorm.weight)


def test_a_fingerprint_is_of_the_packed_weights_and_stays(folder, form, model, full):
    again, _ = load(str(folder / "llama"), quantization_config=form)
    before = fingerprint(again)
    assert before == fingerprint(model) != fingerprint(full)
    logits(again, torch.arange(8)[None])
    again.generate(torch.arange(8)[None], max_new_tokens=3, pad_token_id=257)
    from tether.causal.fingerprint import served_fingerprint

    assert served_fingerprint(again) == before
    assert not is_changed(again)


def test_gradients_through_packed_layers_are_those_of_plain_ones(folder, generator):
    """bitsandbytes packs anew at the first pass without gradients on some CPUs, and has none through that."""
    model, _ = load(str(folder / "llama"), quantization_config="4bit")
    ids = torch.randint(256, (2, 30), generator=generator)
    logits(model, ids)
    found = []
    for backbone in (model.backbone, dequantised(folder / "llama", "4bit").base_model):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        backbone(inputs_embeds=embeds).last_hidden_state.square().sum().backward()
        found.append(embeds.grad)
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_an_adapter_is_learnt_and_says_on_what(model, form, adapter):
    assert adapter.base == fingerprint(model)
    assert adapter.record["quantised"] == recorded(model)
    assert adapter.record["quantised"]["bits"] == int(form[0])
    assert 0.94 * 0.05 <= adapter.record["drift_base"] <= 0.05
    assert adapter.record["held_out"]["change"] < -0.3
    assert not any(
        parameter.requires_grad for parameter in Attached.of(model, {"a": adapter}).peft.parameters()
    )


def test_the_twin_has_no_weights_of_its_own(model):
    attached = Attached(model, "a", lora_config(2, 4), torch.Generator().manual_seed(0))
    twin = attached.backbone.layers[0].mlp.up_proj.base_layer
    own = model.backbone.layers[0].mlp.up_proj
    assert twin.weight is own.weight
    if hasattr(own, "state") and own.state.CB is not None:
        assert twin.state.CB.data_ptr() == own.state.CB.data_ptr()


def test_layers_are_computed_again_here_too(model, generator):
    ids = torch.randint(256, (2, 30), generator=generator)
    attached = Attached(model, "a", lora_config(4, 8), torch.Generator().manual_seed(0))
    found = []
    for wanted in (False, True):
        attached.peft.zero_grad()
        with recomputing(attached.backbone, wanted=wanted):
            attached.states("a", ids).last_hidden_state.square().sum().backward()
        found.append([part.grad.clone() for part in attached.peft.parameters() if part.requires_grad])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by", ["evidence", "sum"])
def test_what_is_served_is_written_found_again_and_certified(folder, tmp_path, form, model, adapter, by):
    served = serve(model, {adapter: 1.0}, by=by)
    ids = torch.arange(40)[None]
    save_adapted(served, {adapter: 1.0}, tiny.tokenizer(), tmp_path / "fused", base=str(folder / "llama"))
    again, tokenizer = load(str(tmp_path / "fused"), device="cpu")
    assert packed(again) == packed(model)
    assert_close(logits(again, ids), logits(served, ids), rtol=0, atol=1e-5)
    words = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=257)
    assert torch.equal(words, served.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=257))
    certificate = certify(model, again, tokenizer, {"words": folder / "words.jsonl"}, window=64, tokens=400)
    assert certificate.model["quantised"] == recorded(model)
    path = tmp_path / "certificate.json"
    certificate.save(path)
    assert verify(path, base=str(folder / "llama")) == []
    # Another packing in the folder is another base, whatever the certificate says.
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["quantised"] == recorded(model)
    held = json.loads(path.read_text())
    del held["model"]["quantised"]
    from tether.delta.record import Certificate

    sealed = Certificate(**{**held, "seal": ""}).sealed().model_dump(mode="json")
    path.write_text(json.dumps(sealed))
    (wrong,) = verify(path)
    assert "the certificate says full precision" in wrong


def test_full_and_packed_bases_are_not_taken_for_each_other(folder, tmp_path, model, full, adapter):
    with pytest.raises(CheckpointError, match=r"base in \d bits.*given is in full precision.*tether leash"):
        serve(full, {adapter: 1.0})
    whole = learn_adapter(full, tiny.tokenizer(), DIGITS, base_texts=WORDS, name="digits", window=64, fit=FIT)
    assert "quantised" not in whole.record
    with pytest.raises(CheckpointError, match=r"base in full precision, the model given is in \d bits"):
        serve(model, {whole: 1.0})
    # Put on the full base by measuring it there.
    adapter.save(tmp_path / "law")
    put = leash_adapter(
        full, tiny.tokenizer(), tmp_path / "law", base_texts=WORDS, budget=0.03, window=64, tokens=400
    )
    assert put.record["learnt_on"]["quantised"] == adapter.record["quantised"]
    assert put.base == fingerprint(full)
    assert 0.9 * 0.03 <= put.record["drift_base"] <= 0.03
    serve(full, {put: 1.0})
    # The other way round its strength on the packed base is not known either.
    whole.save(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="made on base"):
        leash_adapter(model, tiny.tokenizer(), tmp_path / "whole", base_texts=WORDS, window=64, tokens=400)


def test_what_reads_or_writes_the_weights_refuses(folder, tmp_path, model, full):
    tokenizer = tiny.tokenizer()
    delta = learn_delta(
        full,
        tokenizer,
        DIGITS,
        base_texts=WORDS,
        name="digits",
        window=64,
        epochs=1,
        batch=64,
        probe=200,
        gate=False,
    )
    refused = {
        "learning a delta": lambda: learn_delta(model, tokenizer, DIGITS, base_texts=WORDS),
        "fusing deltas": lambda: fuse(model, {delta: 1.0}),
        "an export": lambda: export_plain(model, tokenizer, tmp_path / "plain"),
        "a checkpoint": lambda: model.save_pretrained(tmp_path / "saved"),
    }
    for what, act in refused.items():
        with pytest.raises(ConfigError, match=f"{what} needs the base in full precision"):
            act()
    assert list(tmp_path.iterdir()) == []
    full.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    with pytest.raises(ConfigError, match="quantise the plain base"):
        load(str(tmp_path / "converted"), quantization_config="4bit")


def test_forms_that_are_asked_for():
    from transformers import BitsAndBytesConfig

    assert find_packing(None) is None
    assert find_packing("4bit", torch.bfloat16).compute == "bfloat16"
    for form in FORMS:
        asked = find_packing(form)
        assert find_packing(asked.config()) == asked == find_packing(asked.model_dump(exclude_none=True))
    own = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    assert find_packing(own) == Packing(bits=4, kind="fp4", double=False, compute="bfloat16")
    for wrong in ("3bit", 4, {"quant_method": "gptq"}):
        with pytest.raises(ConfigError, match="expected 4bit or 8bit, or a BitsAndBytesConfig"):
            find_packing(wrong)
    with pytest.raises(ConfigError, match="llm_int8_skip_modules"):
        find_packing(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["up_proj"]))


def test_without_the_package_it_says_what_to_install(folder, monkeypatch):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "bitsandbytes" else there(name, *more),
    )
    with pytest.raises(ConfigError, match=r"bitsandbytes.*pip install 'tether\[quantised\]'"):
        load_backbone(str(folder / "llama"), quantization_config="4bit")


def test_damaged_words_of_a_packing_are_refused(folder, tmp_path, model, adapter):
    save_adapted(
        serve(model, {adapter: 1.0}),
        {adapter: 1.0},
        tiny.tokenizer(),
        tmp_path / "fused",
        base=str(folder / "llama"),
    )
    path = tmp_path / "fused" / "config.json"
    good = json.loads(path.read_text())
    for bad in ({"bits": 3}, {"bits": 4, "compute": "os.system"}, "4bit", {**good["quantised"], "more": 1}):
        path.write_text(json.dumps(good | {"quantised": bad}))
        with pytest.raises((CheckpointError, ConfigError)):
            load(str(tmp_path / "fused"))


def test_the_commands(folder, tmp_path, monkeypatch, tether):
    monkeypatch.chdir(tmp_path)
    texts = [
        "--text",
        folder / "digits.jsonl",
        "--base-text",
        folder / "words.jsonl",
        "--window",
        64,
        "--no-gate",
    ]
    learn = ["learn", folder / "llama", *texts, "--quantise", "4bit"]
    code, out, err = tether(*learn, "--out", "a.delta")
    assert (code, "--quantise 4bit: learning a delta needs" in err) == (2, True), err
    code, out, err = tether(*learn[:-1], "5bit", "--out", "a", "--adapter", "lora")
    assert (code, "expected 4bit or 8bit" in err) == (2, True), err
    code, out, err = tether(*learn, "--out", "law", "--adapter", "lora", "--print-config")
    assert "quantise: 4bit" in out
    code, out, err = tether(*learn, "--out", "law", "--adapter", "lora", "--lr", 0.005, "--json")
    assert code == 0, err
    assert json.loads(out)["quantised"]["kind"] == "nf4"
    assert Adapter.load("law").record["quantised"]["bits"] == 4
    code, out, err = tether("fuse", folder / "llama", "law", "--no-gate", "--out", "fused")
    assert (code, "tether leash" in err) == (2, True), err
    code, out, err = tether(
        "fuse", folder / "llama", "law", "--no-gate", "--out", "fused", "--quantise", "4bit"
    )
    assert code == 0, err
    # The folder says how its base is packed.
    monkeypatch.setenv("TETHER_BASE", str(folder / "llama"))
    code, out, err = tether("generate", "fused", "1.2", "--new-tokens", 3)
    assert (code, out[:3]) == (0, "1.2"), err
    code, out, err = tether("generate", folder / "llama", "1.2", "--new-tokens", 3, "--quantise", "8bit")
    assert (code, out[:3]) == (0, "1.2"), err
    write_documents(folder / "long.jsonl", [" ".join(WORDS[:6]), " ".join(WORDS[6:12])])
    certify = ["certify", folder / "llama", "fused", "--text", folder / "long.jsonl", "--tokens", 300]
    code, out, err = tether(*certify, "--continuations", 0, "--out", "c.json")
    assert code == 0, err
    code, out, err = tether("verify", "c.json", "--base", folder / "llama")
    assert code == 0, out + err
