"""Neurons on disk: a layer a file, as they were encoded, under several weightings, taken up after an interruption."""

import pytest
import torch

import tiny
from merge import lape
from tether.errors import CheckpointError, ConfigError
from tether.merge import observation
from tether.merge.encoding import encode
from tether.merge.observation import observe
from tether.merge.paths import load_bank
from tether.merge.signatures import FIELDS
from tether.merge.tefm.observed import Encoding, locate, parse_encoding
from tether.store.reader import CheckpointReader

GIVEN = {"paths": 2, "shortest": 2, "longest": 5}


@pytest.fixture(scope="module")
def model():
    return tiny.backbone("llama")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_layers_hold_what_was_encoded(model, tmp_path):
    # Ten probes are two chunks of samples.
    observe(model, lape.probes(10), tmp_path / "o", **GIVEN, encodings=[parse_encoding("paper")])
    bank = load_bank(tmp_path / "o" / "paths.safetensors")
    expected = encode(model, bank, tmp_path / "s", weighting="paper")
    for layer in (0, 1):
        for kind in ("self_attn.q_proj", "mlp.down_proj"):
            found = locate(tmp_path / "o", Encoding("paper", 0.99), f"layers.{layer}.{kind}")
            assert found.module == f"model.layers.{layer}.{kind}"
            assert found.samples == 10
            reader = CheckpointReader(found.file)
            for field in FIELDS:
                stored = reader.tensor(f"{found.module}.{field}")
                assert torch.equal(stored, getattr(expected.signature(found.module), field))
            for field in ("loss", "log_mass", "effective"):
                assert torch.equal(reader.tensor(field), getattr(expected, field))
    assert sorted(path.name for path in (tmp_path / "o").glob("neurons*")) == [
        "neurons-paper-0.99-00000.safetensors", "neurons-paper-0.99-00001.safetensors", "neurons-paper-0.99.json",
    ]  # fmt: skip


def test_a_folder_can_be_added_to_and_goes_on_after_an_interruption(model, tmp_path, monkeypatch):
    both = [parse_encoding("position"), parse_encoding("paper:0.5")]
    observe(model, lape.probes(), tmp_path / "whole", **GIVEN, encodings=both)
    observe(model, lape.probes(), tmp_path / "o", **GIVEN, encodings=both[:1])
    before = content(tmp_path / "o")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(observation, "write_layers", stop)
        with pytest.raises(KeyboardInterrupt):
            observe(model, lape.probes(), tmp_path / "o", **GIVEN, encodings=both)
    with pytest.raises(
        CheckpointError, match=r"has no neurons under weighting paper, gamma 0.5 \(it has position-0.9"
    ):
        locate(tmp_path / "o", both[1], "layers.0.mlp.up_proj")
    observe(model, lape.probes(), tmp_path / "o", **GIVEN, encodings=both)
    after = content(tmp_path / "o")
    assert after == content(tmp_path / "whole")
    assert before.items() <= after.items()

    def never(*arguments, **options):
        raise AssertionError("encoded again")

    monkeypatch.setattr(observation, "encode", never)
    observe(model, lape.probes(), tmp_path / "o", **GIVEN, encodings=both)


def test_a_module_that_was_not_observed(model, tmp_path):
    observe(model, lape.probes(1), tmp_path, **GIVEN, encodings=[parse_encoding("paper")])
    with pytest.raises(CheckpointError, match=r"layers\.7\.mlp\.up_proj was not observed"):
        locate(tmp_path, parse_encoding("paper"), "layers.7.mlp.up_proj")


@pytest.mark.parametrize("text", ["papers", "paper:0", "paper:1.5", "paper:x", "", "paper:nan"])
def test_weightings_that_are_none(text):
    with pytest.raises(ConfigError, match="expected a weighting"):
        parse_encoding(text)
    assert parse_encoding("mean").spelt == "mean"
    assert parse_encoding("paper:0.95").spelt == "paper:0.95"
