import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

import tiny
from merge import lape
from tether.errors import CheckpointError, ConfigError
from tether.merge.encoding import encode
from tether.merge.signatures import Signatures
from tether.merge.towers import find_linears, find_tower
from tether.merge.weighting import path_weights

MODULE = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model():
    return tiny.backbone("llama").double()


@pytest.fixture(scope="module")
def bank(model):
    return lape.bank(model)


def plain(model, bank, sample, path, module):
    """Outputs, their gradients under the path's own mean loss, and the loss, by a pass over prompt and path alone."""
    length = int(bank.lengths[sample, path])
    prompt = bank.probes[sample].input_ids
    whole = torch.cat([prompt, bank.tokens[sample, path, :length]]).unsqueeze(0)
    kept = {}

    def hook(layer, args, output):
        del layer
        output.retain_grad()
        kept["y"], kept["x"] = output, args[0]

    handle = model.get_submodule(module).register_forward_hook(hook)
    logits = model(input_ids=whole[:, :-1]).logits[0, len(prompt) - 1 :]
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits, whole[0, len(prompt) :])
    model.zero_grad()
    loss.backward()
    predicting = slice(len(prompt) - 1, None)
    y, dy, x = kept["y"][0].detach(), kept["y"].grad[0], kept["x"][0].detach()
    return y[predicting], dy[predicting], x[predicting], loss.detach()


@pytest.mark.parametrize("weighting", ["position", "paper", "mean"])
@pytest.mark.parametrize("module", [MODULE, "model.layers.0.self_attn.v_proj"])
def test_components_are_those_of_each_path_alone(model, bank, tmp_path, weighting, module):
    found = encode(model, bank, tmp_path / weighting, weighting=weighting)
    weights = path_weights(bank.log_prob, bank.lengths, weighting)
    signature = found.signature(module)
    for sample in range(3):
        activation = gradient = fisher = loss = 0
        means, shares = [], []
        for path in range(4):
            y, dy, x, mean_loss = plain(model, bank, sample, path, module)
            w = weights.weights[sample, path, : len(y)].unsqueeze(-1)
            activation = activation + (w * y).sum(0)
            gradient = gradient + len(y) * (w * y * dy).sum(0)
            fisher = fisher + (dy.T @ x).square().sum(1) / 4
            means.append(y.mean(0))
            shares.append(float(w.sum()))
            if weighting != "position":
                loss = loss + shares[-1] * mean_loss
        mean = torch.stack(means)
        share = torch.tensor(shares, dtype=torch.float64)
        paper = share @ (mean * (mean - mean.mean(0)))
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
        assert_close(signature.activation[sample].double(), activation, **tolerance)
        assert_close(signature.gradient[sample].double(), gradient, **tolerance)
        assert_close(signature.fisher[sample].double(), fisher, **tolerance)
        assert_close(signature.paper_gradient[sample].double(), paper, **tolerance)
        if weighting != "position":
            assert_close(found.loss[sample].double(), loss, **tolerance)


def test_the_reference_is_the_parent_on_the_same_tokens(model, bank, tmp_path):
    parent = tiny.backbone("llama", seed=1).double()
    found = encode(model, bank, tmp_path, weighting="mean", reference=parent, gradients=False)
    for sample in range(3):
        value = 0
        for path in range(4):
            a = plain(model, bank, sample, path, MODULE)[0].mean(0)
            c = plain(parent, bank, sample, path, MODULE)[0].mean(0)
            value = value + a * (a - c) / 4
        assert_close(found.signature(MODULE).paper_gradient[sample].double(), value, rtol=1e-4, atol=1e-5)


def test_mean_of_the_documents_sums_keeps_its_scale_as_a_logarithm(model, bank, tmp_path):
    found = encode(model, bank, tmp_path, weighting="paper")
    value, scale = found.mean_phi(MODULE)
    mass = torch.exp(found.log_mass)
    expected = (mass.unsqueeze(-1).unsqueeze(-1) * found.phi(MODULE).double()).mean(0)
    assert_close(value * torch.exp(torch.tensor(scale, dtype=torch.float64)), expected, rtol=1e-6, atol=0)
    assert bool((found.effective >= 1).all())


def test_goes_on_where_it_stopped(model, bank, tmp_path):
    whole = encode(model, bank, tmp_path / "whole", chunk=1)
    files = sorted((tmp_path / "whole").glob("*.safetensors"))
    content = [file.read_bytes() for file in files]
    files[1].unlink()
    with pytest.raises(CheckpointError, match="1 of 3 files are missing"):
        Signatures(tmp_path / "whole")
    stamp = files[0].stat().st_mtime_ns
    again = encode(model, bank, tmp_path / "whole", chunk=1)
    assert files[0].stat().st_mtime_ns == stamp
    assert [file.read_bytes() for file in files] == content
    assert_close(again.loss, whole.loss)
    with pytest.raises(ConfigError, match="another weighting"):
        encode(model, bank, tmp_path / "whole", chunk=1, weighting="mean", gamma=0.9)


def test_signatures_of_another_model_or_of_other_paths_are_not_taken_up(model, bank, tmp_path):
    encode(model, bank, tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(ConfigError, match="another model"):
        encode(other, bank, tmp_path)
    with pytest.raises(ConfigError, match="another paths"):
        encode(model, bank._replace(tokens=bank.tokens + 1), tmp_path)


def test_only_statistics_are_stored_and_parameters_are_as_before(model, bank, tmp_path):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    encode(model, bank, tmp_path)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as opened:
        sizes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    assert all(shape[0] == 3 for shape in sizes.values())
    neurons = sum(json.loads((tmp_path / "signatures.json").read_text())["modules"].values())
    assert sum(shape[1] for shape in sizes.values() if len(shape) == 2) == 4 * neurons


def test_language_tower_of_a_vision_model(tmp_path):
    model = lape.llava()
    assert find_tower(model).prefix == "model.language_model.layers"
    assert len(find_linears(model)) == 2
    from tether.merge.paths import sample_paths

    bank = sample_paths(model, [lape.image_probe(), *lape.probes(1)], paths=2, shortest=2, longest=3)
    found = encode(model, bank, tmp_path, families=["mlp.down_proj"])
    phi = found.phi("model.language_model.layers.1.mlp.down_proj")
    assert phi.shape == (2, 32, 3)
    assert bool(torch.isfinite(phi).all())
    assert bool((found.signature("model.language_model.layers.1.mlp.down_proj").fisher > 0).any())


def test_bad_requests(model, bank, tmp_path):
    with pytest.raises(ConfigError, match=r"no module mlp\.gat_proj in model\.layers\.0; it has self_attn"):
        encode(model, bank, tmp_path, families=["mlp.gat_proj"])
    found = encode(model, bank, tmp_path, gradients=False)
    with pytest.raises(ConfigError, match="true gradients were not recorded"):
        found.phi(MODULE)
    with pytest.raises(ConfigError, match="was not encoded"):
        found.signature("model.layers.7.mlp.up_proj")
    assert bool(torch.isfinite(found.phi(MODULE, gradient="paper")).all())
