import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

import tiny
from merge import lape
from tether.errors import CheckpointError, ConfigError
from tether.merge.gram import gram_location, load_grams, save_grams, stream_grams
from tether.merge.packing import pack_bank, pack_sample
from tether.merge.paths import sample_paths
from tether.merge.towers import find_linears


@pytest.fixture(scope="module", params=["llama", "qwen2", "llava"])
def model(request):
    return lape.llava() if request.param == "llava" else tiny.backbone(request.param)


@pytest.fixture(scope="module")
def bank(model):
    images = [lape.image_probe()] if "Llava" in type(model).__name__ else []
    return sample_paths(model, [*images, *lape.probes(2)], paths=3, shortest=2, longest=6)


def hooked(model, bank, weights=None):
    """The same sums from hooks on all layers at once during ordinary passes."""
    sums = {}

    def hook(name, pack):
        def add(module, args):
            del module
            x = args[0][0].double()
            w = torch.ones(len(x)) if weights is None else weights(pack)
            sums[name] = sums.get(name, 0) + (x * w.double().unsqueeze(-1)).T @ x

        return add

    for sample in range(len(bank.probes)):
        pack = pack_sample(bank, sample, model)
        handles = [
            module.register_forward_pre_hook(hook(name, pack))
            for layer in find_linears(model)
            for name, module in layer.items()
        ]
        with torch.no_grad():
            model(**pack.inputs, use_cache=False)
        for handle in handles:
            handle.remove()
    return sums


def test_layer_by_layer_is_the_same_as_all_at_once(model, bank):
    found = {}
    for number, grams in stream_grams(model, pack_bank(bank, model)):
        assert all(f".{number}." in name for name in grams)
        found |= grams
    expected = hooked(model, bank)
    assert found.keys() == expected.keys()
    for name, gram in found.items():
        assert_close(gram.double(), expected[name], rtol=1e-4, atol=1e-4)


def test_weights_of_positions(model, bank):
    def weights(pack):
        return torch.where(pack.path < 0, 0.25, 0.9 ** pack.step.float())

    found = {}
    for _, grams in stream_grams(model, pack_bank(bank, model), weights=weights):
        found |= grams
    for name, expected in hooked(model, bank, weights).items():
        assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-4)


def test_inputs_of_the_head(model, bank):
    *_, (number, grams) = stream_grams(model, pack_bank(bank, model), head=True)
    assert number == 2
    total = 0
    for pack in pack_bank(bank, model):
        seen = []
        handle = model.lm_head.register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0][0].double())
        )
        with torch.no_grad():
            model(**pack.inputs, use_cache=False)
        handle.remove()
        total = total + seen[0].T @ seen[0]
    assert_close(grams["lm_head"].double(), total, rtol=1e-4, atol=1e-3)


def test_modules_with_one_input_share_a_matrix_and_files_hold_it_once(model, bank, tmp_path):
    layers = list(stream_grams(model, pack_bank(bank, model)))
    prefix = next(iter(layers[0].grams)).split(".0.")[0]
    mine = layers[0].grams
    assert mine[f"{prefix}.0.self_attn.q_proj"] is mine[f"{prefix}.0.self_attn.v_proj"]
    assert mine[f"{prefix}.0.mlp.gate_proj"] is mine[f"{prefix}.0.mlp.up_proj"]
    save_grams(tmp_path, layers)
    again = load_grams(tmp_path, 1)
    for name, gram in layers[1].grams.items():
        assert torch.equal(again.grams[name], gram)
        file, tensor = gram_location(tmp_path, 1, name)
        with safe_open(str(file), framework="pt") as opened:
            assert len(opened.keys()) == 4
            assert torch.equal(opened.get_tensor(tensor), gram)
    with pytest.raises(CheckpointError, match="accumulate them again"):
        load_grams(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"no Gram matrix of lm_head"):
        gram_location(tmp_path, 0, "lm_head")


def test_the_model_is_left_as_it_was(model, bank):
    pack = pack_sample(bank, 0, model)
    with torch.no_grad():
        before = model(**pack.inputs, use_cache=False).logits
    list(stream_grams(model, [pack]))
    with torch.no_grad():
        assert torch.equal(model(**pack.inputs, use_cache=False).logits, before)
    with pytest.raises(ConfigError, match="at least one pack"):
        next(stream_grams(model, []))
