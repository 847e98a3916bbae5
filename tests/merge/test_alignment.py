"""Units of a permuted, narrower or shallower model are found again, and merge in the other's coordinates."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM, Qwen2Config

from checkpoints import LLAMA, decoder, plan, save, tuned
from tether.errors import ConfigError
from tether.merge.alignment import align_layers, align_units, assign, record, write_maps
from tether.merge.axes import find_tower, sizes
from tether.merge.gram import LayerGrams, save_grams
from tether.merge.maps import bring
from tether.merge.run import merge

CONFIG = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
IDS = torch.randint(0, 60, (8, 64), generator=torch.Generator().manual_seed(4))


def model(**changes):
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        made = AutoModelForCausalLM.from_config(Qwen2Config(**{**CONFIG, **changes})).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def lengths(made):
    tower = find_tower(made.state_dict())
    shapes = {short: tuple(made.state_dict()[name].shape) for short, name in tower.names.items()}
    return sizes(made.config.to_dict(), shapes, "it")


def moved(made, maps):
    """The same function with its units in another order."""
    tower, size = find_tower(made.state_dict()), lengths(made)
    state = made.state_dict()
    for short, name in tower.names.items():
        array = state[name].numpy()
        state[name] = torch.from_numpy(bring(short, array, array, maps, size, size))
    other = AutoModelForCausalLM.from_config(made.config).eval()
    other.load_state_dict(state)
    return other


def shuffle(seed=0, groups=3, queries=2, size=4):
    draw = np.random.default_rng(seed)
    maps = {"residual": draw.permutation(24)}
    for layer in range(3):
        maps[f"layers.{layer}.mlp"] = draw.permutation(40)
        maps[f"layers.{layer}.group"] = draw.permutation(groups)
        maps[f"layers.{layer}.query"] = np.stack([draw.permutation(queries) for _ in range(groups)])
        maps[f"layers.{layer}.value"] = np.stack([draw.permutation(size) for _ in range(groups)])
    return maps


def test_a_permuted_model_is_put_in_order_again():
    one = model()
    two = moved(one, shuffle())
    found = align_units(record(one, IDS), record(two, IDS), lengths(one), lengths(two))
    assert min(found.similarity.values()) > 0.99
    assert set(found.unmatched.values()) == {0}
    back = moved(two, found.maps)
    for name, values in one.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], values, rtol=0, atol=0)


def test_a_model_is_aligned_with_itself_by_no_maps():
    one = model()
    found = align_units(record(one, IDS), record(one, IDS), lengths(one), lengths(one))
    assert found.maps == {}


def test_hidden_units_that_a_narrower_model_lacks_are_left_unmatched():
    one, two = model(), model(intermediate_size=30)
    # The narrower one has 30 of the wider one's units, in another order.
    kept = np.random.default_rng(1).permutation(40)[:30]
    state = {name: values.clone() for name, values in one.state_dict().items()}
    for name in list(state):
        if "gate_proj" in name or "up_proj" in name:
            state[name] = state[name][kept]
        elif "down_proj" in name:
            state[name] = state[name][:, kept]
    two.load_state_dict(state)
    found = align_units(record(one, IDS), record(two, IDS), lengths(one), lengths(two))
    expected = np.full(40, -1)
    expected[kept] = np.arange(30)
    # The first layer reads the same stream; the later ones read what the lacking units have changed.
    np.testing.assert_array_equal(found.maps["layers.0.mlp"], expected)
    assert found.unmatched["layers.0.mlp"] == 10


def test_layers_that_were_taken_out_are_found():
    one, two = model(num_hidden_layers=4), model(num_hidden_layers=3)
    state = one.state_dict()
    for layer, there in enumerate((0, 1, 3)):
        for name in two.state_dict():
            if f"layers.{layer}." in name:
                state[name] = one.state_dict()[name.replace(f"layers.{layer}.", f"layers.{there}.")]
    two.load_state_dict({name: state[name] for name in two.state_dict()})
    found = align_units(record(one, IDS), record(two, IDS), lengths(one), lengths(two))
    assert found.maps["layers"][:2].tolist() == [0, 1]
    assert (found.maps["layers"] < 0).sum() == found.unmatched["layers"] == 1


def test_assignment_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for shape in ((5, 5), (4, 7), (7, 4)):
        table = draw.standard_normal(shape)
        index, mean = assign(table, floor=-10)
        rows, columns = linear_sum_assignment(-table)
        assert mean == pytest.approx(table[rows, columns].mean())
        assert (index >= 0).sum() == min(shape)
        index, _ = assign(table, floor=0.5)
        assert all(table[row, column] >= 0.5 for row, column in enumerate(index) if column >= 0)


def test_layers_stay_in_order():
    index, mean = align_layers(np.array([[0.1, 0.9], [0.9, 0.1]]))
    assert sorted(index.tolist()) == [-1, 0] or index.tolist() == [1, -1]
    assert mean == pytest.approx(0.9)


def test_heads_of_other_sizes_and_other_tokens_are_refused():
    one, size = record(model(), IDS), lengths(model())
    with pytest.raises(ConfigError, match="heads have 4 dimensions here and 8 there"):
        align_units(one, one, size, size._replace(rope=8))
    with pytest.raises(ConfigError, match="different numbers of tokens"):
        align_units(one, record(model(), IDS[:3]), size, size)


def files(folder, second, config=LLAMA, maps=None):
    save(folder / "c", decoder(), LLAMA)
    save(folder / "a", tuned(decoder(), 1), LLAMA)
    save(folder / "b", second, config)
    models = {name: {"path": str(folder / name), "weight": 0.5} for name in "ab"}
    if maps is not None:
        write_maps(folder / "maps.safetensors", maps)
        models["b"]["align"] = str(folder / "maps.safetensors")
    return {"operator": "task_arithmetic", "base": {"path": str(folder / "c")}, "models": models}


def test_a_permuted_model_merges_as_the_one_it_was(tmp_path):
    two = tuned(decoder(), 2)
    draw = np.random.default_rng(0)
    maps = {
        "residual": draw.permutation(8),
        "layers.0.mlp": draw.permutation(12),
        "layers.1.group": np.array([1, 0]),
    }
    tower = find_tower(two)
    shapes = {short: two[name].shape for short, name in tower.names.items()}
    size = sizes(LLAMA, shapes, "it")
    permuted = {
        name: bring(short, two[name], two[name], maps, size, size) for short, name in tower.names.items()
    }
    inverse = {name: np.argsort(index) for name, index in maps.items()}
    merge(plan(tmp_path, **files(tmp_path, two)), tmp_path / "plain", threads=1)
    made = plan(tmp_path, **files(tmp_path, permuted, maps=inverse))
    merge(made, tmp_path / "aligned", threads=2)
    name = "model.safetensors"
    assert (tmp_path / "aligned" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert made.memory(1) > plan(tmp_path, **files(tmp_path, two)).memory(1)


@pytest.mark.parametrize("into", ["base", "a"])
def test_a_narrower_shallower_model_gives_what_it_has(tmp_path, into):
    second = tuned(decoder(layers=1, width=6, hidden=9), 2)
    maps = {
        "residual": np.array([0, 1, -1, 2, 3, 4, -1, 5]),
        "layers": np.array([-1, 0]),
        **{f"layers.{layer}.mlp": np.array([8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -1, -1]) for layer in range(2)},
    }
    merge(plan(tmp_path, **files(tmp_path, second, maps=maps), into=into), tmp_path / "out", threads=1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    parent, one = decoder(), tuned(decoder(), 1)
    half = {name: parent[name] + 0.5 * (one[name] - parent[name]) for name in parent}
    up = "model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_allclose(found[up.format(0)], half[up.format(0)], atol=1e-6)
    expected = half[up.format(1)].copy()
    columns, theirs = [0, 1, 3, 4, 5, 7], second[up.format(0)]
    for row in range(9):
        expected[row, columns] += 0.5 * (theirs[8 - row] - parent[up.format(1)][row, columns])
    np.testing.assert_allclose(found[up.format(1)], expected, atol=1e-6)


def test_layers_may_go_but_not_a_kind_of_tensor(tmp_path):
    # The result has no place for these biases, whichever layers they are brought to.
    second = tuned(decoder(layers=1, bias=True), 2)
    fields = files(tmp_path, second, maps={"layers": np.array([-1, 0])})
    with pytest.raises(ConfigError, match=r"b has 3 tensors that base lacks: .*bias"):
        plan(tmp_path, **fields)
    deeper = tuned(decoder(layers=3), 2)
    made = plan(tmp_path, **files(tmp_path, deeper, maps={"layers": np.array([0, 2])}))
    assert made.summary()["merged"] == len(decoder())


def test_maps_that_do_not_fit_are_said_before_the_work(tmp_path):
    fields = files(tmp_path, tuned(decoder(hidden=9), 2), maps={"residual": np.arange(7)})
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, **fields)
    assert "residual has shape (7,), expected (8,)" in str(caught.value)
    assert "layers.0.mlp has 12 units here and 9 there, and no map" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be the one they are aligned to"):
        plan(tmp_path, **fields, into="b")


def grams(folder, tensors, seed):
    """Gram matrices of random inputs for every linear layer, as the probes side writes them."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for layer in range(2):
        found = {}
        for name, values in tensors.items():
            if f"layers.{layer}." in name and name.endswith("_proj.weight"):
                x = torch.randn(50, values.shape[1], generator=draw)
                found[name.removesuffix(".weight")] = x.T @ x
        made.append(LayerGrams(layer, found))
    save_grams(folder, made)
    return {name: gram for layer in made for name, gram in layer.grams.items()}


def test_regression_mean_solves_each_linear_layer(tmp_path):
    tensors = {"a": tuned(decoder(), 1), "b": tuned(decoder(), 2)}
    found = {}
    for seed, (name, each) in enumerate(tensors.items()):
        save(tmp_path / name, each, LLAMA)
        found[name] = grams(tmp_path / f"grams-{name}", each, seed)
    models = {name: {"path": str(tmp_path / name), "grams": str(tmp_path / f"grams-{name}")} for name in "ab"}
    made = plan(tmp_path, operator="regression_mean", models=models, options={"shrinkage": 0.8})
    merge(made, tmp_path / "out", threads=2)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in merged:
        one, two = (torch.from_numpy(tensors[each][name]).double() for each in "ab")
        if name.endswith("_proj.weight"):
            s = []
            for each in "ab":
                gram = found[each][name.removesuffix(".weight")].double()
                gram = gram / gram.diagonal().mean()
                s.append(0.8 * gram + 0.2 * torch.diag(gram.diagonal()) + 1e-6 * torch.eye(len(gram)))
            expected = torch.linalg.solve(s[0] + s[1], s[0] @ one.T + s[1] @ two.T).T
        else:
            expected = (one + two) / 2
        torch.testing.assert_close(torch.from_numpy(merged[name]).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tied", "head"), [(True, "lm_head"), (False, "embed_tokens")])
def test_a_head_that_is_not_that_of_the_models_is_refused(tmp_path, tied, head):
    for seed, name in enumerate("ab"):
        each = tuned(decoder(head=not tied), seed)
        save(tmp_path / name, each, LLAMA | {"tie_word_embeddings": tied})
        grams(tmp_path / f"grams-{name}", each, seed)
    models = {name: {"path": str(tmp_path / name), "grams": str(tmp_path / f"grams-{name}")} for name in "ab"}
    with pytest.raises(ConfigError, match=f"options.head is {head}, but"):
        plan(tmp_path, operator="regression_mean", models=models, options={"head": head})


def test_regression_mean_scales_its_change_from_a_parent(tmp_path):
    tensors = {"base": decoder(), "a": tuned(decoder(), 1), "b": tuned(decoder(), 2)}
    models = {}
    for seed, (name, each) in enumerate(tensors.items()):
        save(tmp_path / name, each, LLAMA)
        if name != "base":
            grams(tmp_path / f"grams-{name}", each, seed)
            models[name] = {"path": str(tmp_path / name), "grams": str(tmp_path / f"grams-{name}")}
    merged = {}
    for scale in (1.0, 1.3):
        made = plan(
            tmp_path,
            operator="regression_mean",
            models=models,
            base={"path": str(tmp_path / "base")},
            options={"lambda": scale},
        )
        merge(made, tmp_path / f"out{scale}", threads=1)
        merged[scale] = load_file(tmp_path / f"out{scale}" / "model.safetensors")
    for name, parent in tensors["base"].items():
        expected = parent + 1.3 * (merged[1.0][name].astype(np.float64) - parent)
        np.testing.assert_allclose(merged[1.3][name], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="give it as base"):
        plan(tmp_path, operator="regression_mean", models=models, options={"lambda": 1.3})


def test_threads_of_a_merge_change_no_byte_of_a_regression_mean(tmp_path):
    models = {}
    for seed, name in enumerate("ab"):
        tensors = tuned(decoder(), seed + 1)
        save(tmp_path / name, tensors, LLAMA)
        grams(tmp_path / f"grams-{name}", tensors, seed)
        models[name] = {"path": str(tmp_path / name), "grams": str(tmp_path / f"grams-{name}")}
    made = plan(tmp_path, operator="regression_mean", models=models)
    for threads in (1, 2, 4):
        merge(made, tmp_path / f"out{threads}", threads=threads)
    first, *others = ((tmp_path / f"out{n}" / "model.safetensors").read_bytes() for n in (1, 2, 4))
    assert all(other == first for other in others)


def test_regression_mean_brings_the_gram_matrices_of_an_aligned_model_along(tmp_path):
    tensors = {"a": tuned(decoder(), 1), "b": tuned(decoder(), 2)}
    order = {
        "layers.0.mlp": np.random.default_rng(0).permutation(12),
        "residual": np.random.default_rng(1).permutation(8),
    }
    tower = find_tower(tensors["b"])
    size = sizes(LLAMA, {short: tensors["b"][name].shape for short, name in tower.names.items()}, "it")
    for seed, (name, each) in enumerate(tensors.items()):
        save(tmp_path / name, each, LLAMA)
        grams(tmp_path / f"grams-{name}", each, seed)
    plain = {name: {"path": str(tmp_path / name), "grams": str(tmp_path / f"grams-{name}")} for name in "ab"}
    merge(plan(tmp_path, operator="regression_mean", models=plain), tmp_path / "plain", threads=1)
    permuted = {
        name: bring(short, tensors["b"][name], tensors["b"][name], order, size, size)
        for short, name in tower.names.items()
    }
    save(tmp_path / "p", permuted, LLAMA)
    whole = {}
    for file in (tmp_path / "grams-b").iterdir():
        (tmp_path / "grams-p").mkdir(exist_ok=True)
        content = load_file(file)
        for name, gram in content.items():
            mlp = "layers.0.mlp.down_proj" in name
            index = order["layers.0.mlp"] if mlp else order["residual"]
            if "o_proj" not in name and (mlp or "down_proj" not in name):
                content[name] = np.ascontiguousarray(gram[np.ix_(index, index)])
        whole |= content
        save_file(content, tmp_path / "grams-p" / file.name)
    write_maps(tmp_path / "maps", {name: np.argsort(index) for name, index in order.items()})
    models = plain | {
        "b": {
            "path": str(tmp_path / "p"),
            "grams": str(tmp_path / "grams-p"),
            "align": str(tmp_path / "maps"),
        }
    }
    merge(plan(tmp_path, operator="regression_mean", models=models), tmp_path / "aligned", threads=1)
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("plain", "aligned"))
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-6, atol=1e-6)


def test_missing_and_misshapen_gram_matrices(tmp_path):
    tensors = {name: tuned(decoder(), seed) for seed, name in enumerate("ab")}
    for name, each in tensors.items():
        save(tmp_path / name, each, LLAMA)
    grams(tmp_path / "grams-a", tensors["a"], 0)
    grams(tmp_path / "grams-b", decoder(hidden=16), 0)
    models = {name: {"path": str(tmp_path / name), "grams": str(tmp_path / f"grams-{name}")} for name in "ab"}
    with pytest.raises(
        ConfigError, match=r"down_proj has shape \(16, 16\); .*down_proj.weight needs \(12, 12\)"
    ):
        plan(tmp_path, operator="regression_mean", models=models)
    models["b"]["grams"] = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no Gram matrices"):
        plan(tmp_path, operator="regression_mean", models=models)


def test_regression_mean_of_a_model_with_itself_gives_it_back(tmp_path):
    tensors = tuned(decoder(), 1)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, tensors, LLAMA)
        grams(tmp_path / f"grams-{name}", tensors, seed)
    models = {name: {"path": str(tmp_path / name), "grams": str(tmp_path / f"grams-{name}")} for name in "ab"}
    merge(plan(tmp_path, operator="regression_mean", models=models), tmp_path / "out", threads=1)
    for name, values in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_allclose(values, tensors[name], rtol=1e-5, atol=1e-6)
