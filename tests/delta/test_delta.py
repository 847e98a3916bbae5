"""What a delta's file says beside its heads: strengths, and a sample of its domain."""

import dataclasses
import json
import math

import pytest
import torch

from tether.delta.delta import Delta
from tether.errors import CheckpointError
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors


@pytest.fixture
def delta():
    return Delta(
        name="a", chart="symmetric", first=None, second=torch.eye(4), gate=None, base="sha256:0",
        record={"strengths": [0.25, 1.0]}, sample=("One text.", "Another: caf\u00e9."),
    )  # fmt: skip


def test_strengths_and_sample_come_back(delta, tmp_path):
    again = Delta.load(delta.save(tmp_path / "a.delta").path)
    assert again.sample == delta.sample == ("One text.", "Another: caf\u00e9.")
    assert again.strengths == delta.strengths == (0.25, 1.0)
    plain = dataclasses.replace(delta, sample=(), record={})
    assert Delta.load(plain.save(tmp_path / "b.delta").path).sample == ()


def rewritten(path, change):
    reader = CheckpointReader(path)
    described = json.loads(reader.metadata()["tether.delta"])
    change(described)
    tensors = {name: reader.tensor(name) for name in reader.names}
    write_safetensors(path, tensors, {"tether.delta": json.dumps(described)})
    return path


def test_a_file_without_strengths_and_sample_has_the_whole_and_none(delta, tmp_path):
    def older(described):
        del described["sample"], described["record"]["strengths"]

    again = Delta.load(rewritten(delta.save(tmp_path / "a.delta").path, older))
    assert (again.strengths, again.sample) == ((1.0,), ())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("one text", "no list of texts"),
        ({"a": "b"}, "no list of texts"),
        (["a", 3], "no list of texts"),
        (None, "no list of texts"),
        (["a"] * 17, "above 16 texts or 32768 bytes"),
        (["a" * 32_769], "above 16 texts or 32768 bytes"),
        (["\u4e2d" * 10_923], "above 16 texts or 32768 bytes"),
    ],
)
def test_a_sample_out_of_bounds_is_refused(delta, tmp_path, sample, message):
    path = delta.save(tmp_path / "a.delta").path
    rewritten(path, lambda described: described.update(sample=sample))
    with pytest.raises(CheckpointError, match=rf"a\.delta: damaged, its sample is {message}"):
        Delta.load(path)


def test_a_sample_at_its_bounds_is_read(delta, tmp_path):
    whole = dataclasses.replace(delta, sample=("a" * 2048,) * 16)
    assert Delta.load(whole.save(tmp_path / "a.delta").path).sample == whole.sample


@pytest.mark.parametrize(
    "strengths", [[], [0.0, 1.0], [1.0, 0.5], [0.5, 0.5], [2.0], ["1"], 1.0, [True], None]
)
def test_strengths_out_of_bounds_are_refused(delta, tmp_path, strengths):
    path = delta.save(tmp_path / "a.delta").path
    rewritten(path, lambda described: described["record"].update(strengths=strengths))
    with pytest.raises(CheckpointError, match=r"strengths .* are no ascending numbers in \(0, 1\]"):
        Delta.load(path)


def test_numbers_that_json_does_not_have_are_neither_written_nor_read(delta, tmp_path):
    path = dataclasses.replace(delta, record={"multiplier": math.inf, "curve": [math.nan, 1.5]}).save(
        tmp_path / "a.delta"
    )
    assert Delta.load(path.path).record == {"multiplier": None, "curve": [None, 1.5]}
    rewritten(path.path, lambda described: described["record"].update(strengths=[math.nan]))
    with pytest.raises(CheckpointError, match=r"a\.delta: .*NaN is no number"):
        Delta.load(path.path)


def test_a_record_that_is_no_mapping_is_refused(delta, tmp_path):
    path = rewritten(delta.save(tmp_path / "a.delta").path, lambda described: described.update(record=[1]))
    with pytest.raises(CheckpointError, match="its record is no mapping"):
        Delta.load(path)
