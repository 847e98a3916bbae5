"""Adapters and adapted models from strangers: nothing is written outside, nothing is fetched, run or searched for."""

import json
import re
import shutil
import time

import pytest
import torch
from peft import LoraConfig

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.adapter import Adapter, lora_config
from tether.delta.adapter_serving import BASE, find_base, save_adapted, serve
from tether.delta.attached import Attached
from tether.delta.delta import Delta
from tether.delta.peft_config import read_lora
from tether.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter on it, and both served, in folders."""
    folder = tmp_path_factory.mktemp("made")
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    save_checkpoint(model, tiny.tokenizer(), folder / "base")
    attached = Attached(model, "law", lora_config(2, 4), torch.Generator().manual_seed(0))
    tensors = {key: value.detach() + 0.01 for key, value in attached.weights("law").items()}
    config = attached.peft.peft_config[attached.slot("law")]
    adapter = Adapter(
        name="law", config=config, tensors=tensors, gate=None, base=model.config.base_fingerprint
    )
    adapter.save(folder / "law")
    served = serve(model, {adapter: 1.0}, by="sum")
    save_adapted(served, {adapter: 1.0}, tiny.tokenizer(), folder / "adapted", base=str(folder / "base"))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def rewritten(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "C:\\x", "a\u202eb", ""])
def test_an_adapter_of_a_name_that_is_a_path_is_not_read_nor_made(copy, name):
    rewritten(copy / "law" / "tether.json", lambda content: content["recipe"].update(name=name))
    with pytest.raises(CheckpointError, match=r"tether.json: name: .* is no name for a domain"):
        Adapter.load(copy / "law")
    good = Adapter.load(copy / "adapted" / "law")
    with pytest.raises(ConfigError, match="no name for a domain"):
        Adapter(**{**good.__dict__, "name": name})
    with pytest.raises(ConfigError, match="no name for a domain"):
        Delta(name=name, chart="symmetric", first=None, second=torch.ones(2, 2), gate=None, base="")


def test_an_adapted_model_of_other_folders_is_not_read(copy):
    config = copy / "adapted" / "config.json"
    rewritten(config, lambda content: content["fusion"].update(domains=["../law"]))
    with pytest.raises(CheckpointError, match=r"fusion: domains.0: .* is no name"):
        load(str(copy / "adapted"))
    shutil.copytree(copy / "law", copy / "adapted" / "other")
    rewritten(config, lambda content: content["fusion"].update(domains=["other"]))
    with pytest.raises(CheckpointError, match="in folders of other names"):
        load(str(copy / "adapted"))


def test_a_domain_named_as_a_file_of_the_folder_is_refused(copy):
    good = Adapter.load(copy / "law")
    base, tokenizer = load(str(copy / "base"))
    named = Adapter(**{**good.__dict__, "name": "config.json"})
    served = serve(base, {named: 1.0}, by="sum")
    with pytest.raises(ConfigError, match="is not a folder"):
        save_adapted(served, {named: 1.0}, tokenizer, copy / "again", base="smollm2-135m")
    assert not (copy / "again").exists()


@pytest.mark.parametrize(
    "said", ["org/name", "/srv/base", "\\\\host\\share", "C:\\base", "absent", None, "a\0b", ""]
)
def test_a_base_elsewhere_is_not_followed_unasked(copy, said):
    rewritten(copy / "adapted" / "config.json", lambda content: content.update(base=said))
    before = time.monotonic()
    with pytest.raises(CheckpointError, match=f"set {BASE} to the base's path"):
        find_base(copy / "adapted", said)
    assert time.monotonic() - before < 5
    with pytest.raises(CheckpointError, match="not followed unasked"):
        load(str(copy / "adapted"))


def test_a_base_that_was_asked_for_is_followed(copy, monkeypatch):
    expected, _ = load(str(copy / "adapted"))
    rewritten(copy / "adapted" / "config.json", lambda content: content.update(base="org/name"))
    monkeypatch.setenv(BASE, str(copy / "base"))
    found, _ = load(str(copy / "adapted"))
    ids = torch.arange(6).unsqueeze(0)
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_an_adapted_model_on_itself_is_refused(copy):
    rewritten(copy / "adapted" / "config.json", lambda content: content.update(base="../adapted"))
    before = time.monotonic()
    with pytest.raises(CheckpointError, match="is an adapted model"):
        load(str(copy / "adapted"))
    assert time.monotonic() - before < 5


CONFIGS = {
    "another method": ({"peft_type": "LOHA"}, "expected PEFT's description of a LoRA"),
    "a pattern": ({"target_modules": "(a+)+$"}, "target_modules is a pattern"),
    "patterns in a list": ({"target_modules": ["(a+)+$"]}, r"target_modules.*0: String should match"),
    "ranks by pattern": ({"rank_pattern": {"(a+)+$": 4}}, "'rank_pattern'"),
    "layers by pattern": ({"layers_to_transform": [0], "layers_pattern": "(a+)+$"}, "'layers_to_transform'"),
    "a package to import": ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "'megatron_co"),
    "weights from elsewhere": ({"init_lora_weights": "pissa"}, "'init_lora_weights'"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
    "a field from the future": ({"run_this": "now"}, "'run_this'"),
    "a huge rank": ({"r": 10**12}, "r: Input should be less than"),
    "another rank": ({"r": 3}, "expected a LoRA of rank 3"),
    "no number": ({"lora_alpha": "8"}, "lora_alpha: Input should be a valid number"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_only_plain_lora_is_read(copy, name):
    change, said = CONFIGS[name]
    rewritten(copy / "law" / "adapter_config.json", lambda content: content.update(change))
    before = time.monotonic()
    with pytest.raises(CheckpointError, match=said):
        Adapter.load(copy / "law")
    assert time.monotonic() - before < 5


def test_what_peft_writes_is_read_as_peft_reads_it(copy, tmp_path):
    found, expected = (
        read_lora(copy / "law" / "adapter_config.json"),
        LoraConfig.from_pretrained(copy / "law"),
    )
    unused = {"base_model_name_or_path", "peft_version", "auto_mapping", "revision"}
    for field, value in expected.to_dict().items():
        if field not in unused:
            assert found.to_dict()[field] == value, field
    LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, task_type="CAUSAL_LM").save_pretrained(
        tmp_path
    )
    assert read_lora(tmp_path / "adapter_config.json").target_modules == "all-linear"
    content = json.loads((tmp_path / "adapter_config.json").read_text()) | {"a_later_field": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    assert read_lora(tmp_path / "adapter_config.json").r == 4


def test_weights_that_are_no_numbers_are_refused(copy):
    good = Adapter.load(copy / "law")
    first = next(iter(good.tensors))
    wrong = Adapter(
        **{**good.__dict__, "tensors": {**good.tensors, first: good.tensors[first] * float("nan")}}
    )
    wrong.save(copy / "wrong")
    with pytest.raises(CheckpointError, match=re.escape(first) + ".*not numbers"):
        Adapter.load(copy / "wrong")
