"""The operator through files: literal and corrected, what it reads, what it refuses, other widths, other towers."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import tiny
from checkpoints import plan, write_recipe
from merge import lape
from merge.test_vision import language, saved
from tether.cli.app import app
from tether.errors import CheckpointError, ConfigError
from tether.merge import operators
from tether.merge.encoding import encode
from tether.merge.ensembles import (
    importance,
    mean_curvature,
    neuron_features,
    spectral_labels,
    split_half_agreement,
)
from tether.merge.gram import load_grams
from tether.merge.information import copula_information
from tether.merge.journal import Journal
from tether.merge.matching import ensemble_similarity, match_ensembles
from tether.merge.observation import observe
from tether.merge.paper import fuse_paper
from tether.merge.paths import load_bank
from tether.merge.probes import EncodedProbe
from tether.merge.run import merge
from tether.merge.tefm.describe import describe_neurons
from tether.merge.tefm.layer import Side, directions_of, fuse_layer
from tether.merge.tefm.neurons import Neurons
from tether.merge.tefm.observed import parse_encoding
from tether.merge.tefm.switches import Options
from tether.store.reader import CheckpointReader

ENCODINGS = [parse_encoding("paper"), parse_encoding("position")]
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *(f"self_attn.{each}_proj" for each in "qkvo"),
        *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
    )
]


def moved(model, seed, size=0.05):
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return model


def keep(model, folder):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A parent C, two models A and B, and what was observed of both on the same probes."""
    folder = tmp_path_factory.mktemp("family")
    models = {"c": tiny.backbone("llama")}
    models |= {name: moved(models["c"], seed) for seed, name in enumerate("ab", start=1)}
    for name, model in models.items():
        keep(model, folder / name)
        if name != "c":
            checkpoint = CheckpointReader(folder / name).fingerprint()
            observe(
                model, lape.probes(6), folder / f"seen-{name}", paths=4, shortest=2, longest=8,
                checkpoint=checkpoint, encodings=ENCODINGS,
            )  # fmt: skip
    return folder, models


def fields(folder, base=True, **options):
    models = {name: {"path": str(folder / name), "observed": str(folder / f"seen-{name}")} for name in "ab"}
    found = {"operator": "lape_tefm", "models": models, "options": options}
    return found | ({"base": {"path": str(folder / "c")}} if base else {})


def tensors(folder):
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader.names}


def expected_literal(models, banks, name, folder, affinity):
    """One layer by the pieces alone, as they are called without any recipe."""
    phi = []
    for each in "ab":
        found = encode(models[each], banks[each], folder / each, weighting="paper")
        value, scale = found.mean_phi(name, "paper")
        phi.append(value * torch.exp(torch.tensor(scale, dtype=torch.float64)))
    labels = [spectral_labels(one, 8, affinity=affinity) for one in phi]
    curves = [one[:, 1].square() + one[:, 2] for one in phi]
    match = match_ensembles(ensemble_similarity(*phi, *labels, *curves))
    weights = [models[each].get_submodule(name).weight.detach().double() for each in "abc"]
    return fuse_paper(*weights, *phi, *labels, match)


@pytest.mark.parametrize("affinity", ["cosine", "shifted"])
def test_the_literal_merge_is_what_the_pieces_give(family, tmp_path, affinity):
    folder, models = family
    merge(plan(tmp_path, **fields(folder, form="literal", affinity=affinity)), tmp_path / "out", threads=1)
    found = tensors(tmp_path / "out")
    banks = {each: load_bank(folder / f"seen-{each}" / "paths.safetensors") for each in "ab"}
    for name in MODULES:
        expected = expected_literal(models, banks, name, tmp_path, affinity)
        # Float32 is what the result is stored in: the nearest one to the pieces' float64.
        assert torch.equal(found[f"{name}.weight"], expected.float())
        own = models["a"].get_submodule(name).weight.detach()
        assert float((found[f"{name}.weight"] - own).abs().max()) > 0.01
    for name in set(found) - {f"{module}.weight" for module in MODULES}:
        both = [models[each].state_dict()[name] for each in "ab"]
        assert_close(found[name], (both[0] + both[1]) / 2)


def neurons(folder, name, encoding, module, gradient="gradient", fisher=False):
    reader = CheckpointReader(
        folder / f"seen-{name}" / f"neurons-{encoding}-0000{module.split('.')[2]}.safetensors"
    )
    stored = [reader.tensor(f"{module}.{field}") for field in ("activation", gradient)]
    norms = reader.tensor(f"{module}.fisher") if fisher else None
    return Neurons(*stored, reader.tensor("loss"), reader.tensor("log_mass"), norms)


CASES = [
    ({"form": "corrected"}, "position-0.9", "gradient"),
    ({"form": "corrected", "weighting": "paper"}, "paper-0.99", "gradient"),
    ({"form": "corrected", "gradient": "paper"}, "position-0.9", "paper_gradient"),
    ({"form": "corrected", "hessian": "fisher"}, "position-0.9", "gradient"),
    ({"form": "literal", "weighting": "position", "rest": "whole"}, "position-0.9", "paper_gradient"),
    ({"form": "literal", "gradient": "true"}, "paper-0.99", "gradient"),
    ({"form": "literal", "direction": "inputs", "rank": 3, "rest": "whole"}, "paper-0.99", "paper_gradient"),
]


@pytest.mark.parametrize(("options", "encoding", "gradient"), CASES)
def test_the_operator_reads_what_its_switches_ask_for(family, tmp_path, options, encoding, gradient):
    folder, models = family
    merge(plan(tmp_path, **fields(folder, **options)), tmp_path / "out", threads=1)
    found = tensors(tmp_path / "out")
    chosen = Options(**options).chosen(parent=True)
    for module in MODULES:
        weights = {each: models[each].get_submodule(module).weight.detach().double() for each in "abc"}
        sides = [
            Side(weights[each], neurons(folder, each, encoding, module, gradient, chosen.hessian == "fisher"))
            for each in "ab"
        ]
        axes = None
        if chosen.direction == "inputs":
            layer = int(module.split(".")[2])
            grams = [load_grams(folder / f"seen-{each}", layer).grams[module] for each in "ab"]
            axes = directions_of(grams, chosen.rank)
        expected = fuse_layer(*sides, weights["c"], axes, chosen).weight
        assert torch.equal(found[f"{module}.weight"], expected.float())


def test_another_discount_is_another_observation(family, tmp_path):
    folder, models = family
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, **fields(folder, form="literal", gamma=0.5))
    said = str(caught.value)
    assert "seen-a has no neurons under weighting paper, gamma 0.5 (it has paper-0.99, position-0.9)" in said
    assert "--signatures paper:0.5" in said
    # What is wrong with a folder is said once, not once a tensor.
    assert said.count("no neurons under") == 1
    for name in "ab":
        given = {"paths": 4, "shortest": 2, "longest": 8, "encodings": [parse_encoding("paper:0.5")]}
        observe(models[name], lape.probes(6), folder / f"seen-{name}", **given)
    merge(plan(tmp_path, **fields(folder, form="literal", gamma=0.5)), tmp_path / "out", threads=1)


@pytest.mark.parametrize("form", ["literal", "corrected"])
def test_threads_and_interruptions_change_no_byte(family, tmp_path, monkeypatch, form):
    folder, _ = family

    def content(name):
        files = sorted((tmp_path / name).iterdir())
        return {file.name: file.read_bytes() for file in files}

    given = fields(folder, form=form)
    for threads in (1, 3):
        merge(plan(tmp_path, **given), tmp_path / f"out{threads}", threads=threads)
    assert content("out1") == content("out3")
    append, seen = Journal.append, []

    def counting(self, entry):
        if len(seen) == 7:
            raise KeyboardInterrupt
        append(self, entry)
        seen.append(entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", counting)
        with pytest.raises(KeyboardInterrupt):
            merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    assert content("out") == content("out1")


def test_without_a_parent_both_forms_run(family, tmp_path):
    folder, models = family
    for form in ("literal", "corrected"):
        merge(plan(tmp_path, **fields(folder, base=False, form=form)), tmp_path / form, threads=1)
        found = tensors(tmp_path / form)
        for module in MODULES:
            weights = {each: models[each].get_submodule(module).weight.detach().double() for each in "ab"}
            own = ("paper-0.99", "paper_gradient") if form == "literal" else ("position-0.9", "gradient")
            sides = [Side(weights[each], neurons(folder, each, own[0], module, own[1])) for each in "ab"]
            chosen = Options(form=form).chosen(parent=False)
            layer = int(module.split(".")[2])
            grams = [load_grams(folder / f"seen-{each}", layer).grams[module] for each in "ab"]
            axes = directions_of(grams, chosen.rank) if form == "corrected" else None
            expected = fuse_layer(*sides, None, axes, chosen).weight
            assert torch.equal(found[f"{module}.weight"], expected.float())


REFUSED = {
    "an unknown switch": (
        {"mask": "soft"},
        r"options: mask: Input should be 'paper', 'exponential' or 'none'",
    ),
    "an unknown option": ({"masks": "none"}, r"masks: unknown key; did you mean 'mask'"),
    "a number outside": ({"beta": -1.0}, "beta: Input should be greater than or equal to 0"),
    "no file of steps": ({"step": "nowhere.safetensors"}, "nowhere.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused(family, tmp_path, case):
    options, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        plan(tmp_path, **fields(family[0], **options))


def test_bad_recipes_are_refused(family, tmp_path, monkeypatch):
    folder, models = family
    given = fields(folder)
    three = given | {"models": given["models"] | {"d": dict(given["models"]["a"])}}
    with monkeypatch.context() as patch:
        patch.setattr(operators.lape_tefm, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"scikit-learn, which is missing; install 'tether\[merge\]'"):
            plan(tmp_path, **given)
    with pytest.raises(ConfigError, match="lape_tefm takes 2 models; the recipe has 3"):
        plan(tmp_path, **three)
    with pytest.raises(ConfigError, match=r"update is symmetric.*there is none; give base"):
        plan(tmp_path, **fields(folder, base=False, update="symmetric"))
    bare = given | {"models": {name: {"path": str(folder / name)} for name in "ab"}}
    with pytest.raises(ConfigError, match="observed: Field required"):
        plan(tmp_path, **bare)
    swapped = {"a": "seen-b", "b": "seen-a"}
    crossed = {name: {"path": str(folder / name), "observed": str(folder / swapped[name])} for name in "ab"}
    with pytest.raises(CheckpointError, match="was observed on another checkpoint"):
        merge(plan(tmp_path, **given | {"models": crossed}), tmp_path / "out", threads=1)
    observe(
        models["b"], lape.probes(5), tmp_path / "fewer", paths=2, shortest=2, longest=4, encodings=ENCODINGS
    )
    fewer = given["models"] | {"b": {"path": str(folder / "b"), "observed": str(tmp_path / "fewer")}}
    with pytest.raises(ConfigError, match=r"observed on \{'a': 6, 'b': 5\} probes: expected the same"):
        plan(tmp_path, **given | {"models": fewer})
    # The document's three numbers a neuron need no common samples.
    literal = fields(folder, form="literal") | {"models": fewer}
    merge(plan(tmp_path, **literal), tmp_path / "out", threads=1)
    with pytest.raises(ConfigError, match=r"solve_lambda: lape_tefm has no lambda"):
        plan(tmp_path, **given, check={"text": {"t": "t.jsonl"}, "accept": 0.1, "solve_lambda": True})


def test_a_last_step_is_taken_off(family, tmp_path):
    folder, _ = family
    merge(plan(tmp_path, **fields(folder)), tmp_path / "before", threads=1)
    draw = np.random.default_rng(0)
    number = "layers.0.mlp.up_proj.weight"
    whole = "layers.1.self_attn.q_proj.weight"
    steps = {number: draw.standard_normal(48), whole: draw.standard_normal((32, 32)).astype(np.float32)}
    save_file(steps, tmp_path / "steps.safetensors")
    given = fields(folder, step=str(tmp_path / "steps.safetensors"), eta=0.25)
    merge(plan(tmp_path, **given), tmp_path / "after", threads=1)
    before, after = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    for name in before:
        moved_by = before[name].double() - after[name].double()
        expected = torch.zeros_like(moved_by)
        if name == f"model.{number}":
            expected = torch.from_numpy(0.25 * np.sign(steps[number])).unsqueeze(-1).expand_as(moved_by)
        if name == f"model.{whole}":
            expected = torch.from_numpy(steps[whole]).double()
        assert_close(moved_by, expected, rtol=1e-5, atol=1e-6)


def permuted(model, seed):
    """The same function with hidden units in another order, and the map that undoes it."""
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    maps = {}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            order = torch.randperm(48, generator=draw)
            for name in ("gate_proj", "up_proj"):
                weight = layer.mlp.get_submodule(name).weight
                weight.copy_(weight[order].clone())
            down = layer.mlp.down_proj.weight
            down.copy_(down[:, order].clone())
            maps[f"layers.{number}.mlp"] = order.argsort().numpy()
    return model, maps


def test_a_model_in_other_order_is_brought_along_with_what_was_observed(family, tmp_path):
    folder, models = family
    other, maps = permuted(models["b"], 5)
    keep(other, tmp_path / "p")
    observe(other, lape.probes(6), tmp_path / "seen", paths=4, shortest=2, longest=8, encodings=ENCODINGS)
    save_file(
        {name: np.ascontiguousarray(index) for name, index in maps.items()}, tmp_path / "maps.safetensors"
    )
    for form in ("corrected", "literal"):
        plain = fields(folder, form=form)
        aligned = copy.deepcopy(plain)
        aligned["models"]["b"] = {
            "path": str(tmp_path / "p"),
            "observed": str(tmp_path / "seen"),
            "align": str(tmp_path / "maps.safetensors"),
        }
        aligned["into"] = plain["into"] = "a"
        merge(plan(tmp_path, **plain), tmp_path / f"{form}-plain", threads=1)
        merge(plan(tmp_path, **aligned), tmp_path / f"{form}-aligned", threads=1)
        one, two = tensors(tmp_path / f"{form}-plain"), tensors(tmp_path / f"{form}-aligned")
        for name in one:
            assert_close(one[name], two[name], rtol=0, atol=2e-3)


def narrowed(model, units):
    """A model with fewer hidden units a layer, and the map to it from the places of the wide one."""
    config = copy.deepcopy(model.config)
    config.intermediate_size = units
    small = type(model)(config).eval()
    state = {
        name: values[:, :units] if name.endswith("down_proj.weight") else values[:units]
        if "gate_proj" in name or "up_proj" in name
        else values
        for name, values in model.state_dict().items()
    }  # fmt: skip
    small.load_state_dict(state)
    index = np.concatenate([np.arange(units), np.full(48 - units, -1)])
    return small, {f"layers.{layer}.mlp": index for layer in (0, 1)}


def test_a_narrower_model_moves_the_units_that_it_has(family, tmp_path):
    folder, models = family
    small, maps = narrowed(models["b"], 40)
    keep(small, tmp_path / "n")
    observe(small, lape.probes(6), tmp_path / "seen", paths=4, shortest=2, longest=8, encodings=ENCODINGS)
    save_file(maps, tmp_path / "maps.safetensors")
    own = models["a"].state_dict()
    for form in ("corrected", "literal"):
        given = fields(folder, form=form) | {"into": "a"}
        given["models"]["b"] = {
            "path": str(tmp_path / "n"),
            "observed": str(tmp_path / "seen"),
            "align": str(tmp_path / "maps.safetensors"),
        }
        merge(plan(tmp_path, **given), tmp_path / form, threads=1)
        found = tensors(tmp_path / form)
        for layer in (0, 1):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            assert found[name].shape == (48, 32)
            if form == "corrected":
                assert torch.equal(found[name][40:], own[name][40:])
            assert float((found[name][:40] - own[name][:40]).abs().max()) > 0.01


def test_a_shallower_model_leaves_the_layers_that_it_lacks(family, tmp_path):
    folder, models = family
    small = tiny.backbone("llama", layers=1)
    small.load_state_dict({n: v for n, v in models["b"].state_dict().items() if ".layers.1." not in n})
    keep(small, tmp_path / "s")
    observe(small, lape.probes(6), tmp_path / "seen", paths=4, shortest=2, longest=8, encodings=ENCODINGS)
    save_file({"layers": np.array([0, -1])}, tmp_path / "maps.safetensors")
    given = fields(folder) | {"into": "a"}
    given["models"]["b"] = {
        "path": str(tmp_path / "s"),
        "observed": str(tmp_path / "seen"),
        "align": str(tmp_path / "maps.safetensors"),
    }
    made = plan(tmp_path, **given)
    merge(made, tmp_path / "out", threads=1)
    found, own = tensors(tmp_path / "out"), models["a"].state_dict()
    for module in MODULES:
        same = torch.equal(found[f"{module}.weight"], own[f"{module}.weight"])
        assert same == (".layers.1." in module)
    assert set(describe_neurons(made)) == {f"{name}.weight" for name in MODULES if ".layers.0." in name}


def pictured(folder, seed, kind, size, patches):
    """A vision-language model, and what was observed of it on two pictures and some text."""
    model = saved(folder, seed, kind, size)
    draw = torch.Generator().manual_seed(3)
    pixels = [torch.randn(1, 3, 8, 8, generator=draw) for _ in range(2)]
    ids = torch.tensor([5, *[255] * patches, 17, 23])
    shown = [*(EncodedProbe(ids, {"pixel_values": each}) for each in pixels), *lape.probes(2)]
    observe(model, shown, f"{folder}-seen", paths=3, shortest=2, longest=5, encodings=ENCODINGS)
    return model


@pytest.mark.parametrize("form", ["literal", "corrected"])
@pytest.mark.parametrize("into", ["a", "b"])
def test_language_towers_of_two_vision_language_models(tmp_path, form, into):
    models = {
        "c": saved(tmp_path / "c", 0),
        "a": pictured(tmp_path / "a", 1, "clip", 8, 4),
        "b": pictured(tmp_path / "b", 2, "siglip", 12, 4),
    }
    seen = {name: {"path": str(tmp_path / name), "observed": str(tmp_path / f"{name}-seen")} for name in "ab"}
    base = {"path": str(tmp_path / "c")}
    given = {"operator": "lape_tefm", "base": base, "models": seen, "into": into, "options": {"form": form}}
    report = merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    assert set(report["plan"]["kept"]) == {into}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    towers = {name: language(model) for name, model in models.items()}
    chosen = Options(form=form).chosen(parent=True)
    encoding, gradient = (
        ("paper-0.99", "paper_gradient") if form == "literal" else ("position-0.9", "gradient")
    )
    for name, values in language(loaded).items():
        if "_proj" not in name:
            assert_close(values, (towers["a"][name] + towers["b"][name]) / 2)
            continue
        layer = int(name.split(".")[1])
        module = f"model.language_model.{name.removesuffix('.weight')}"
        sides, grams = [], []
        for each in "ab":
            reader = CheckpointReader(
                tmp_path / f"{each}-seen" / f"neurons-{encoding}-{layer:05d}.safetensors"
            )
            kept = [reader.tensor(f"{module}.{field}") for field in ("activation", gradient)]
            known = Neurons(*kept, reader.tensor("loss"), reader.tensor("log_mass"))
            sides.append(Side(towers[each][name].double(), known))
            grams.append(load_grams(tmp_path / f"{each}-seen", layer).grams[module])
        axes = directions_of(grams, 16) if form == "corrected" else None
        expected = fuse_layer(*sides, towers["c"][name].double(), axes, chosen).weight
        assert torch.equal(values, expected.float())
    own = models[into].state_dict()
    for name, values in loaded.state_dict().items():
        if "vision_tower" in name or "projector" in name:
            assert torch.equal(values, own[name])


def test_what_is_found_in_each_layer(family, tmp_path):
    folder, _ = family
    found = describe_neurons(plan(tmp_path, **fields(folder, ensembles=4)))
    assert list(found) == sorted(f"{module}.weight" for module in MODULES)
    module = "model.layers.1.mlp.up_proj"
    one, a = found[f"{module}.weight"], neurons(folder, "a", "position-0.9", module)
    b = neurons(folder, "b", "position-0.9", module)
    labels = spectral_labels(neuron_features(b.phi), 4)
    assert one["ensembles"] == (tuple(torch.bincount(labels).tolist()),) * 2
    assert one["neurons"] == (48, 48)
    assert [pair[:2] for pair in one["pairs"]] == [(k, k) for k in range(4)]
    assert one["agreement"] == pytest.approx(split_half_agreement(a.phi, 4))
    information = copula_information(a.activation, a.loss)
    curve = mean_curvature(a.gradient.double())
    score = importance(a.phi.mean(0)[:, 1], information, curve / curve.mean())
    assert one["information"] == pytest.approx(float(information.mean()))
    assert one["foremost"][0] == int(score.argmax())
    assert one["importance"] == pytest.approx(float(score.max() / score.sum()))
    assert 0 < one["mask"][1] < one["mask"][0] < 1
    models = {name: {"path": str(folder / name)} for name in "ab"}
    averaged = plan(tmp_path, operator="linear", models=models)
    with pytest.raises(ConfigError, match="operator linear observes no neurons"):
        describe_neurons(averaged)
    recipe = write_recipe(tmp_path / "recipe.yaml", **fields(folder, form="literal"))
    ran = CliRunner().invoke(app, ["merge", "study-neurons", str(recipe), "--json"])
    assert ran.exit_code == 0, ran.output
    assert len(json.loads(ran.stdout)) == len(MODULES)
    ran = CliRunner().invoke(app, ["merge", "study-neurons", str(recipe)])
    assert "pairs of ensembles, mean TOS" in ran.stdout


def test_from_the_command_line(tmp_path):
    models = {"c": tiny.backbone("llama")}
    models |= {name: moved(models["c"], seed) for seed, name in enumerate("ab", start=1)}
    (tmp_path / "probes.jsonl").write_text(
        "".join(f'{{"text": "{t}"}}\n' for t in ("Go on", "What?", "One, two"))
    )
    run = CliRunner()
    for name, model in models.items():
        keep(model, tmp_path / name)
        if name == "c":
            continue
        words = [
            "merge",
            "observe",
            tmp_path / name,
            "--probes",
            tmp_path / "probes.jsonl",
            "--out",
            tmp_path / f"seen-{name}",
        ]
        ran = run.invoke(
            app, [*map(str, words), "--signatures", "paper", "--signatures", "position:0.9", "--json"]
        )
        assert ran.exit_code == 0, ran.output
        assert json.loads(ran.stdout)["signatures"] == ["paper", "position"]
    recipe = write_recipe(tmp_path / "recipe.yaml", **fields(tmp_path, form="literal"))
    dry = run.invoke(app, ["merge", str(recipe), "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["operator"] == "lape_tefm"
    # What it holds of the largest tensor in float64 is told beforehand.
    assert json.loads(dry.stdout)["memory_per_thread"] > 96 * 258 * 32
    ran = run.invoke(app, ["merge", str(recipe), "--out", str(tmp_path / "out"), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["plan"]["merged"] == len(tensors(tmp_path / "out"))
    bad = run.invoke(
        app,
        ["merge", "observe", "x", "--probes", "y", "--out", str(tmp_path / "z"), "--signatures", "paper:2"],
    )
    assert isinstance(bad.exception, ConfigError)
    assert "'paper:2': expected a weighting (position, paper" in str(bad.exception)
