"""What was observed of neurons: its description and its layers, damaged in every way."""

import pytest
import torch

from fuzzing import Reader, devices, refuse_devices, survive
from tether.errors import CheckpointError
from tether.merge.files import read_extra
from tether.merge.signatures import FIELDS
from tether.merge.tefm.neurons import Neurons
from tether.merge.tefm.observed import locate, parse_encoding
from tether.store.publish import write_json
from tether.store.writer import write_safetensors

NAME = "neurons-paper-0.99"


def _neurons(folder):
    found = locate(folder, parse_encoding("paper"), "layers.0.mlp.up_proj")
    wanted = [f"{found.module}.activation", f"{found.module}.paper_gradient", "loss", "log_mass"]
    values = [read_extra(str(found.file), name) for name in wanted]
    shapes = [(found.samples, 4)] * 2 + [(found.samples,)] * 2
    # As a merge's plan and its first reading refuse them.
    if [value.shape for value in values] != shapes or any(value.dtype.kind != "f" for value in values):
        raise CheckpointError(f"{found.file}: other shapes or types")
    known = Neurons(*(torch.from_numpy(value.copy()) for value in values))
    return known.phi


READER = Reader(_neurons, {f"{NAME}.json": "json", f"{NAME}-00000.safetensors": "safetensors"}, 0.4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neurons")
    draw = torch.Generator().manual_seed(0)
    module = "model.layers.0.mlp.up_proj"
    description = {
        "samples": 3, "chunk": 2, "weighting": "paper", "gamma": 0.99, "gradients": True, "reference": None,
        "model": "m", "paths": "p", "probes": "q", "modules": {module: 4},
    }  # fmt: skip
    write_json(folder / f"{NAME}.json", description)
    tensors = {f"{module}.{field}": torch.randn(3, 4, generator=draw) for field in FIELDS}
    tensors |= {name: torch.rand(3, generator=draw) for name in ("loss", "log_mass", "effective")}
    write_safetensors(folder / f"{NAME}-00000.safetensors", tensors)
    return folder


def test_damaged_files_are_refused_or_read_and_never_a_fault(whole, tmp_path):
    survive("neurons", READER, whole, tmp_path)


@devices
def test_devices_and_pipes_are_refused(whole, tmp_path):
    refuse_devices(READER, whole, tmp_path)
