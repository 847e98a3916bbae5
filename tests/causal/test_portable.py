"""A checkpoint loads in a process that never imported tether, and says so where tether is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.portable import CODE
from tether.delta.adapter import Adapter, lora_config
from tether.delta.adapter_serving import save_adapted, serve
from tether.delta.attached import Attached
from tether.delta.cache import backbone_print
from tether.errors import ConfigError

IDS = [[5, 70, 71, 72, 99, 40, 3]]
LOADS = f"""
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, options = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, **options)
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
writer = pipeline("text-generation", folder, **options)
with torch.no_grad():
    logits = model(input_ids=torch.tensor({IDS})).logits[0, -1].tolist()
if model.config.model_type == "causal_qwen":
    model.save_pretrained(folder + "-again")
tokenizer.save_pretrained(folder + "-again")
text = writer("a 12", max_new_tokens=3, do_sample=False)[0]["generated_text"]
found = {{"logits": logits, "values": "numeric_values" in tokenizer("a 12"), "text": text}}
print(json.dumps(found))
"""
WITHOUT = f"import sys\nsys.modules['tether'] = None\n{LOADS}"


def run(code, folder, tmp_path, more=(), **options):
    # Outside the repository, so that nothing is imported from where the tests lie.
    environment = (
        os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"} | dict(more)
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(options)],
        cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=300,
        env=environment,
    )  # fmt: skip


def numbers(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.1)
    return save_checkpoint(model, model.add_numbers(tiny.tokenizer()), tmp_path / "numbers")


def plain(tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("llama"))
    return save_checkpoint(model, tiny.tokenizer(), tmp_path / "plain")


def adapted(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tiny.backbone("llama").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load(str(tmp_path / "base"))
    config = lora_config(2, 4)
    weights = Attached(model, "a", config, generator).weights("a")
    tensors = {name: 0.1 * torch.randn(values.shape, generator=generator) for name, values in weights.items()}
    adapter = Adapter(
        name="a", config=config, tensors=tensors, gate=None, base=backbone_print(model),
        record={"metric": "softmax", "budget": 0.05},
    )  # fmt: skip
    served = serve(model, {adapter: 1.0}, by="sum", gated=False)
    return save_adapted(served, {adapter: 1.0}, tokenizer, tmp_path / "adapted", base=str(tmp_path / "base"))


MAKE = {"plain": plain, "with numbers": numbers, "adapted": adapted}


@pytest.mark.parametrize("kind", MAKE)
def test_it_loads_where_nobody_imported_tether(kind, tmp_path):
    folder = MAKE[kind](tmp_path)
    ended = run(LOADS, folder, tmp_path, trust_remote_code=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor(IDS)).logits[0, -1]
    assert_close(torch.tensor(found["logits"]), expected)
    assert found["values"] == (kind == "with numbers")
    assert found["text"].startswith("a 12")
    # What it saves is such a checkpoint again, without a copy of half the package.
    again = folder.with_name(f"{folder.name}-again")
    assert sorted(path.name for path in again.glob("*.py")) == [f"{CODE}.py"] * (kind != "adapted")


@pytest.mark.parametrize("kind", MAKE)
def test_where_tether_is_not_installed_the_error_names_it(kind, tmp_path):
    ended = run(WITHOUT, MAKE[kind](tmp_path), tmp_path, trust_remote_code=True)
    assert ended.returncode == 1
    assert "made by the Python package tether" in ended.stderr
    assert "pip install tether" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", MAKE)
def test_after_import_of_tether_no_code_of_a_folder_is_run(kind, tmp_path):
    folder = MAKE[kind](tmp_path)
    (folder / f"{CODE}.py").write_text("raise SystemExit('this was run')\n")
    for options in ({}, {"trust_remote_code": True}):
        assert AutoModelForCausalLM.from_pretrained(folder, **options).config.model_type.startswith(
            "causal_qwen"
        )


@pytest.mark.parametrize("kind", MAKE)
def test_no_path_of_this_machine_is_written(kind, tmp_path):
    folder = MAKE[kind](tmp_path)
    config = (folder / "config.json").read_text()
    assert str(tmp_path) not in config
    assert json.loads(config)["architectures"] == [AutoConfig.from_pretrained(folder).model_class]


def test_a_name_that_others_can_follow_stays(tmp_path):
    backbone = tiny.backbone("llama")
    backbone.config._name_or_path = "someone/a-base"
    folder = save_checkpoint(
        CausalQwenForCausalLM.from_backbone(backbone), tiny.tokenizer(), tmp_path / "model"
    )
    assert (
        json.loads((folder / "config.json").read_text())["backbone_config"]["_name_or_path"]
        == "someone/a-base"
    )


def test_a_served_model_with_adapters_is_copied_and_not_saved_in_part(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(adapted(tmp_path))
    with pytest.raises(ConfigError, match=r"its folder \(.*adapted\) to be copied"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_adapters_come_from_a_hub_as_models_do(tmp_path):
    """Offline, what was fetched before lies in the hub's cache as links to its files."""
    folder = adapted(tmp_path)
    place = tmp_path / "home" / "hub" / "models--me--law"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        link = place / "snapshots" / ("0" * 40) / path.relative_to(folder)
        blob = place / "blobs" / str(number)
        for each in (link, blob):
            each.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    more = {"HF_HOME": str(tmp_path / "home"), "TETHER_BASE": str(tmp_path / "base")}
    code = LOADS.replace("tokenizer.save_pretrained", "str")
    ended = run(code, "me/law", tmp_path, more, trust_remote_code=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor(IDS)).logits[0, -1]
    assert_close(torch.tensor(found["logits"]), expected)
    missing = run(code, "me/other", tmp_path, more, trust_remote_code=True)
    assert missing.returncode == 1
