"""Checkpoints as `tether.load` takes them: converted and fused models, plain bases, adapted models."""

import json

import pytest
import torch

import tiny
from fuzzing import Reader, devices, refuse_devices, survive
from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.adapter import Adapter, lora_config
from tether.delta.adapter_serving import save_adapted, serve
from tether.delta.attached import Attached
from tether.errors import CheckpointError

TOKENIZER = {"tokenizer.json": "json", "tokenizer_config.json": "json"}


def _load(folder):
    load(str(folder / "model"))


READERS = {
    "converted": Reader(
        _load,
        {
            f"model/{name}": kind
            for name, kind in {"config.json": "json", "generation_config.json": "json"}.items()
        },
        0.3,
    ),
    "weights": Reader(
        _load,
        {"model/model.safetensors": "safetensors"}
        | {f"model/{name}": kind for name, kind in TOKENIZER.items()},
        0.3,
    ),
    "base": Reader(_load, {"model/config.json": "json"}, 0.3),
    "adapted": Reader(_load, {"model/config.json": "json", "model/law/tether.json": "json"}, 0.4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One folder a reader with undamaged files, written by tether and transformers."""
    top = tmp_path_factory.mktemp("whole")
    folders = {name: top / name for name in READERS}
    model, tokenizer = CausalQwenForCausalLM.from_backbone(tiny.backbone()), tiny.tokenizer()
    for name in ("converted", "weights"):
        save_checkpoint(model, tokenizer, folders[name] / "model")
    tiny.backbone().save_pretrained(folders["base"] / "model")
    tokenizer.save_pretrained(folders["base"] / "model")
    save_checkpoint(model, tokenizer, folders["adapted"] / "base")
    attached = Attached(model, "law", lora_config(2, 4), torch.Generator().manual_seed(0))
    adapter = Adapter(
        name="law", config=attached.peft.peft_config[attached.slot("law")],
        tensors={key: value.detach() + 0.01 for key, value in attached.weights("law").items()}, gate=None,
        base=model.config.base_fingerprint,
    )  # fmt: skip
    served = serve(model, {adapter: 1.0}, by="sum")
    save_adapted(served, {adapter: 1.0}, tokenizer, folders["adapted"] / "model", base="../base")
    return folders


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_and_never_a_fault(name, whole, tmp_path):
    survive(name, READERS[name], whole[name], tmp_path)


@devices
@pytest.mark.parametrize("name", READERS)
def test_devices_and_pipes_are_refused(name, whole, tmp_path):
    refuse_devices(READERS[name], whole[name], tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**6), ("hidden_size", 2**31), ("head_dim", 2**31), ("vocab_size", 2**40)],
)
def test_a_config_that_asks_for_more_than_its_weights_hold_is_refused_before_it_is_built(
    field, value, whole, tmp_path
):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (whole["base"] / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=f"config.json: {field} is {value}; the weights beside it"):
        load(str(folder))
