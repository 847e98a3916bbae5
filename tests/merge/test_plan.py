"""Everything that can be wrong with a merge is said before any weight is read; and what a plan holds."""

import json
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import LLAMA, decoder, family, plan, save, tuned, write_recipe
from tether.errors import CheckpointError, ConfigError
from tether.merge import survey as surveying
from tether.merge.plan import make_plan
from tether.merge.recipe import read_recipe
from tether.merge.run import merge
from tether.store.reader import CheckpointReader

TOKENS = list("abcdefghij")


@pytest.fixture
def models(tmp_path):
    """A parent and two fine-tunes, and a recipe for them."""
    return family(tmp_path, LLAMA, TOKENS)


def refused(folder, fields, *parts):
    """Planning fails, names each part, and reads no weight and writes no file."""
    with pytest.raises(ConfigError) as caught:
        plan(folder, **fields)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def test_a_plan_says_what_will_happen(tmp_path, models):
    made = plan(tmp_path, **models)
    summary = made.summary()
    assert summary["merged"] == len(decoder())
    assert summary["kept"] == {}
    assert (summary["into"], summary["tokenizer"]) == ("base", "base")
    size = sum(values.nbytes for values in decoder().values())
    assert summary["bytes_read"] == 3 * size
    assert summary["bytes_written"] == size + len(made.shards[0].header)
    assert summary["notes"] == []
    json.dumps(summary)


def test_planning_reads_no_weights(tmp_path, models, monkeypatch):
    for name in ("tensor", "slice", "fingerprint"):
        monkeypatch.setattr(CheckpointReader, name, lambda *_: pytest.fail("read"))
    plan(tmp_path, **models)


def test_plans_differ_when_a_file_or_an_option_does(tmp_path, models):
    digests = {plan(tmp_path, **models).digest}
    assert plan(tmp_path, **models).digest in digests
    digests.add(plan(tmp_path, **models, seed=1).digest)
    digests.add(plan(tmp_path, **models, options={"lambda": 0.5}).digest)
    digests.add(plan(tmp_path, **models, overrides=[{"match": "*norm*", "keep": "a"}]).digest)
    save(tmp_path / "a", tuned(decoder(), 9))
    digests.add(plan(tmp_path, **models).digest)
    assert len(digests) == 5


MISSPELT = {
    "of the recipe": ({"opeartor": "linear"}, "opeartor: unknown key; did you mean 'operator'?"),
    "of a model": (
        {"models": {"a": {"path": "a", "wieght": 1}}},
        "wieght: unknown key; did you mean 'weight'?",
    ),
    "of an option": ({"options": {"lamda": 1}}, "lamda: unknown key; did you mean 'lambda'?"),
    "of an override": (
        {"overrides": [{"matches": "*", "keep": "a"}]},
        "matches: unknown key; did you mean 'match'?",
    ),
    "of the check": (
        {"check": {"text": {"x": "y"}, "acept": 1}},
        "acept: unknown key; did you mean 'accept'?",
    ),
    "another operator's": (
        {"models": {"a": {"path": "a", "density": 1}}},
        "density: unknown key; known: weight",
    ),
    "of the parent": ({"base": {"path": "c", "weight": 1}}, "base: unknown keys weight"),
    "operator": (
        {"operator": "tise"},
        "operator 'tise' is not known; expected one of linear, task_arithmetic",
    ),
    "a model's name": ({"into": "c"}, "into: 'c' is not an input; expected one of base, a, b"),
    "a kept model": ({"overrides": [{"match": "*", "keep": "x"}]}, "overrides.0.keep: 'x' is not an input"),
    "a reference": (
        {"check": {"text": {"x": "y"}, "references": ["x"]}},
        "check.references.x: 'x' is not an input",
    ),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_misspelt_keys_and_names(tmp_path, models, case):
    fields, message = MISSPELT[case]
    refused(tmp_path, models | fields, message)


def test_values_of_the_wrong_kind(tmp_path, models):
    models["models"]["a"]["weight"] = "much"
    refused(tmp_path, models, "models.a: weight", "'much'")
    models["models"]["a"]["weight"] = float("nan")
    refused(tmp_path, models, "weight", "finite")
    refused(
        tmp_path,
        models | {"operator": "ties/mergekit", "models": {"a": {"path": "a", "density": 2}}},
        "density",
    )


def test_keys_that_come_twice(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("operator: linear\nmodels: {}\noperator: slerp\n")
    with pytest.raises(ConfigError, match="'operator': expected each field once"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "lines of 'name: value'"),
        ("a: [\n", "expected YAML"),
        ("a: &b [1]\nc: *b\n", "without aliases"),
        ("seed: " + "9" * 50, "a whole number of 50 characters"),
        (None, "does not exist"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_filter_that_would_backtrack_takes_no_time(tmp_path, models):
    models["overrides"] = [{"match": "*l*l*l*l*l*l*l*l*l*l*l*l*l*l*l*l" + "*e*e*e" * 40, "keep": "a"}]
    before = time.process_time()
    refused(tmp_path, models, "matches no tensor of the result")
    assert time.process_time() - before < 5


def test_filters_that_match_nothing(tmp_path, models):
    overrides = [{"match": "*.mpl.*", "models": {"a": {"weight": 1}}}, {"match": "*.mlp.*", "keep": "a"}]
    refused(
        tmp_path,
        models | {"overrides": overrides},
        "overrides.0: '*.mpl.*' matches no tensor of the result",
        "lm_head.weight",
    )


def test_overrides_that_do_nothing_or_two_things(tmp_path, models):
    refused(tmp_path, models | {"overrides": [{"match": "*"}]}, "changes nothing")
    override = {"match": "*", "keep": "a", "options": {"lambda": 1}}
    refused(tmp_path, models | {"overrides": [override]}, "keep excludes options")


def test_vocabularies_of_other_sizes(tmp_path, models):
    save(tmp_path / "b", tuned(decoder(vocab=12), 2), LLAMA, [*TOKENS, "k", "l"])
    refused(
        tmp_path,
        models,
        "2 tokens are only in the latter ('k', 'l')",
        "the vocabularies have different sizes",
        "(12, 8)",
        "(10, 8)",
    )


def test_vocabularies_of_equal_size_with_other_tokens(tmp_path, models):
    save(tmp_path / "b", tuned(decoder(), 2), LLAMA, [*TOKENS[1::-1], *TOKENS[2:]])
    refused(tmp_path, models, "the vocabularies of base and b differ: 2 tokens have other numbers ('a', 'b')")
    plan(tmp_path, **models, vocabulary="same-rows")


def test_vocabularies_that_cannot_be_compared_are_noted(tmp_path, models):
    (tmp_path / "b" / "tokenizer.json").unlink()
    assert plan(tmp_path, **models).notes == (
        "vocabularies not compared, no tokenizer beside the weights: b",
    )


def test_a_tokenizer_asked_of_a_model_that_has_none(tmp_path, models):
    (tmp_path / "b" / "tokenizer.json").unlink()
    refused(tmp_path, models | {"tokenizer": "b"}, "tokenizer: b has no tokenizer beside its weights")
    assert plan(tmp_path, **models, tokenizer="a").summary()["tokenizer"] == "a"


def test_a_tokenizer_that_cannot_be_read(tmp_path, models):
    (tmp_path / "b" / "tokenizer.json").write_text('{"model": {}}')
    refused(tmp_path, models, "has no vocabulary that can be read")
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    refused(tmp_path, models, "tokenizer.json is damaged")


TIED = LLAMA | {"tie_word_embeddings": True}


def test_a_head_that_tying_would_lose(tmp_path, models):
    save(tmp_path / "c", decoder(head=False), TIED, TOKENS)
    refused(tmp_path, models, "a has a head of its own, base ties its head to its embedding", "set into to a")


def test_tied_heads_among_untied_ones_stand_for_their_embedding(tmp_path, models):
    tied = tuned(decoder(head=False), 3)
    save(tmp_path / "b", tied, TIED, TOKENS)
    made = plan(tmp_path, **models)
    head = next(tensor for tensor in made.tensors if tensor.name == "lm_head.weight")
    assert [source.name for source in head.models] == ["lm_head.weight", "model.embed_tokens.weight"]
    merge(made, tmp_path / "out", threads=1)
    found = CheckpointReader(tmp_path / "out").tensor("lm_head.weight").numpy()
    parent, one = decoder()["lm_head.weight"], tuned(decoder(), 1)["lm_head.weight"]
    expected = parent + 0.5 * (one - parent) + 0.5 * (tied["model.embed_tokens.weight"] - parent)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_stored_head_that_is_a_copy_of_the_embedding_is_left_out(tmp_path, models):
    for seed, name in enumerate("cab"):
        tensors = tuned(decoder(), seed)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        save(tmp_path / name, tensors, TIED)
    made = plan(tmp_path, **models)
    assert "lm_head.weight" not in made.places
    assert made.notes == ("lm_head.weight is left out: it is a copy of the embedding that base ties it to",)
    # A last value that differs makes it a head of its own.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1
    save(tmp_path / "b", tensors, TIED)
    refused(tmp_path, models, "b has a head of its own, base ties its head to its embedding")


@pytest.mark.parametrize("nested", [False, True])
def test_a_stored_head_of_its_own_beside_a_tied_config_is_merged(tmp_path, models, nested):
    config = {"text_config": TIED} if nested else TIED
    for name in "abc":
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    made = plan(tmp_path, **models)
    assert (
        "base: config.json ties the head to the embedding, but a head of its own is stored" in made.notes[0]
    )
    merge(made, tmp_path / "out", threads=1)
    found = CheckpointReader(tmp_path / "out").tensor("lm_head.weight").numpy()
    expected = 0.5 * sum(tuned(decoder(), seed)["lm_head.weight"] for seed in (1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["text_config"] if nested else written)["tie_word_embeddings"] is False
    assert not plan(tmp_path, **models, into="a").summary()["tied"]


def test_a_head_that_was_a_copy_when_the_merge_was_planned(tmp_path, models):
    for name in "abc":
        tensors = decoder()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        save(tmp_path / name, tensors, TIED)
    made = plan(tmp_path, **models)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)
    save(tmp_path / "b", tensors, TIED)
    with pytest.raises(CheckpointError, match="its head was its embedding then"):
        merge(made, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["a", "c", "all"])
def test_rotary_tables_of_old_checkpoints_do_not_stop_a_merge(tmp_path, models, where):
    whole = tmp_path / "whole"
    merge(plan(tmp_path, **models), whole, threads=1)
    for seed, name in enumerate("cab"):
        if where in {name, "all"}:
            tables = {
                f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float64) for n in range(2)
            }
            save(tmp_path / name, (tuned(decoder(), seed) if seed else decoder()) | tables)
    made = plan(tmp_path, **models)
    names = {"a": ["a"], "c": ["base"], "all": ["base", "a", "b"]}[where]
    assert list(made.notes) == [
        f"2 rotary tables of {name} are left out: they are computed from the config" for name in names
    ]
    merge(made, tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_quantised_inputs(tmp_path, models):
    config = LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    packed = decoder() | {"model.layers.0.mlp.up_proj.qweight": np.zeros((2, 2), np.int32)}
    save(tmp_path / "b", packed)
    message = refused(tmp_path, models, "quant_method gptq", "qweight is I32")
    assert message.count("dequantise it first") == 2


def test_pickles_and_other_files(tmp_path, models):
    marker = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return (marker.touch, ())

    import pickle

    hostile = pickle.dumps(Harmful())
    (tmp_path / "b" / "model.safetensors").unlink()
    (tmp_path / "b" / "pytorch_model.bin").write_bytes(hostile)
    (tmp_path / "loose.pt").write_bytes(hostile)
    (tmp_path / "packed.gguf").write_bytes(b"GGUF")
    models["models"] |= {
        "x": {"path": str(tmp_path / "loose.pt")},
        "y": {"path": str(tmp_path / "packed.gguf")},
    }
    message = refused(
        tmp_path, models, "pickle files (pytorch_model.bin)", "loose.pt is a pickle file", "is a GGUF file"
    )
    assert message.count("which can run code") == 2
    assert not marker.exists()


def test_adapters_are_no_models(tmp_path, models):
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "adapter_model.safetensors")
    (tmp_path / "b" / "adapter_config.json").write_text("{}")
    refused(tmp_path, models, "holds an adapter and no model; merge it into its base first")


def test_code_that_is_not_carried_is_noted(tmp_path, models):
    (tmp_path / "c" / "config.json").write_text(json.dumps(LLAMA | {"auto_map": {"AutoModel": "code.Model"}}))
    assert "auto_map" in plan(tmp_path, **models).notes[0]


def test_missing_files(tmp_path, models):
    models["models"]["a"]["path"] = str(tmp_path / "absent")
    (tmp_path / "b" / "model.safetensors").unlink()
    refused(tmp_path, models, "absent does not exist", "b: ", "holds no weights that can be read")


def test_damaged_files(tmp_path, models):
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    (tmp_path / "a" / "config.json").write_text("[]")
    refused(tmp_path, models, "a: ", "config.json is damaged", "b: ", "cannot be read")


def test_missing_and_surplus_tensors(tmp_path, models):
    less, more = tuned(decoder(), 1), tuned(decoder(bias=True), 2)
    del less["model.layers.1.mlp.up_proj.weight"]
    save(tmp_path / "a", less)
    save(tmp_path / "b", more)
    refused(
        tmp_path,
        models,
        "a lacks 1 tensors of base: model.layers.1.mlp.up_proj.weight",
        "b has 6 tensors that base lacks",
    )


def test_other_depths_and_widths(tmp_path, models):
    save(tmp_path / "a", tuned(decoder(layers=1), 1))
    save(tmp_path / "b", tuned(decoder(hidden=16), 2))
    refused(
        tmp_path,
        models,
        "a lacks 9 tensors of base",
        "b: 6 tensors have other shapes than in base: model.layers.0.mlp.down_proj.weight (8, 16) for (8, 12)",
    )


def test_all_problems_come_at_once(tmp_path, models):
    save(tmp_path / "a", tuned(decoder(hidden=16), 1), LLAMA, list("jihgfedcba"))
    models |= {"overrides": [{"match": "nothing", "keep": "a"}]}
    message = refused(tmp_path, models, "vocabularies", "(16, 8) for (12, 8)", "matches no tensor")
    assert message.count("\n  - ") == 3


def test_weights_that_are_no_numbers(tmp_path, models):
    for name, tensor, bad in (("a", "model.norm.weight", np.nan), ("b", "model.embed_tokens.weight", np.inf)):
        tensors = tuned(decoder(), 1)
        tensors[tensor].flat[3] = bad
        save(tmp_path / name, tensors)
    made = plan(tmp_path, **models)
    with pytest.raises(CheckpointError) as caught:
        merge(made, tmp_path / "out", threads=2)
    assert "a: model.norm.weight" in str(caught.value)
    assert "b: model.embed_tokens.weight" in str(caught.value)
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


def test_operators_say_what_they_need(tmp_path, models):
    fields = {key: value for key, value in models.items() if key != "base"}
    refused(tmp_path, fields, "works on differences from a parent; give it as base")
    refused(
        tmp_path,
        models | {"operator": "slerp", "models": {"a": {"path": "a"}}},
        "takes 2 models; the recipe has 1",
    )
    models["models"] = {name: {"path": each["path"]} for name, each in models["models"].items()}
    refused(tmp_path, models | {"operator": "slerp"}, "options: t", "required")


def test_half_the_tensors_with_other_settings(tmp_path, models):
    overrides = [
        {
            "match": "*.mlp.*",
            "models": {"a": {"weight": 1.0}, "b": {"weight": 0.0}},
            "options": {"lambda": 0.5},
        },
        {"match": "*.layers.1.mlp.*", "keep": "b"},
    ]
    merge(plan(tmp_path, **models, overrides=overrides), tmp_path / "out", threads=1)
    found = CheckpointReader(tmp_path / "out")
    parent, one, two = decoder(), tuned(decoder(), 1), tuned(decoder(), 2)
    for name in parent:
        expected = 0.5 * (one[name] + two[name])
        if ".0.mlp." in name:
            expected = parent[name] + 0.5 * (one[name] - parent[name])
        elif ".1.mlp." in name:
            expected = two[name]
        np.testing.assert_allclose(found.tensor(name).numpy(), expected, atol=1e-6)


def vision(prefix, width=6):
    draw = np.random.default_rng(width)
    names = ("encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.mlp.fc1.weight")
    return {f"{prefix}.{name}": draw.standard_normal((width, width)).astype(np.float32) for name in names}


def test_language_towers_are_found_by_structure_and_vision_is_kept(tmp_path):
    def wrapped(seed, head, prefix):
        return {
            (head if name == "lm_head.weight" else name.replace("model.", prefix, 1)): values
            for name, values in tuned(decoder(), seed).items()
        }

    first = wrapped(1, "language_model.lm_head.weight", "language_model.model.") | vision(
        "vision_tower.vision_model"
    )
    second = wrapped(2, "lm_head.weight", "model.language_model.") | vision("model.visual", 10)
    save(tmp_path / "c", decoder(), LLAMA)
    save(tmp_path / "a", first, {"text_config": LLAMA})
    save(tmp_path / "b", second, {"text_config": LLAMA})
    fields = {
        "operator": "task_arithmetic",
        "base": {"path": str(tmp_path / "c")},
        "models": {name: {"path": str(tmp_path / name), "weight": 0.5} for name in "ab"},
        "into": "a",
    }
    made = plan(tmp_path, **fields)
    assert "2 tensors outside the language tower are kept from a" in made.notes
    merge(made, tmp_path / "out", threads=1)
    found = CheckpointReader(tmp_path / "out")
    assert set(found.names) == set(first)
    for name in vision("vision_tower.vision_model"):
        np.testing.assert_array_equal(found.tensor(name).numpy(), first[name])
    up = "layers.1.mlp.up_proj.weight"
    expected = 0.5 * (first[f"language_model.model.{up}"] + second[f"model.language_model.{up}"])
    np.testing.assert_allclose(found.tensor(f"language_model.model.{up}").numpy(), expected, atol=1e-6)
    head = 0.5 * (first["language_model.lm_head.weight"] + second["lm_head.weight"])
    np.testing.assert_allclose(found.tensor("language_model.lm_head.weight").numpy(), head, atol=1e-6)
    merged = fields | {"towers": "merge"}
    refused(
        tmp_path,
        merged,
        "b lacks 2 tensors of a",
        "base lacks 2 tensors of a",
        "b has 2 tensors that a lacks",
    )


def test_unknown_structures_merge_by_name(tmp_path):
    odd = {"h.0.attn.weight": np.ones((3, 3), np.float32), "steps": np.arange(3)}
    for name in "ab":
        save(tmp_path / name, odd)
    models = {name: {"path": str(tmp_path / name)} for name in "ab"}
    made = plan(tmp_path, operator="linear", models=models)
    assert {tensor.name: tensor.kept is not None for tensor in made.tensors} == {
        "h.0.attn.weight": False,
        "steps": True,
    }
    merge(made, tmp_path / "out", threads=1)
    assert CheckpointReader(tmp_path / "out").tensor("steps").tolist() == [0, 1, 2]


def test_eight_thousand_tensors_are_planned_at_once(tmp_path):
    names = [f"model.layers.{layer}.mlp.experts.{n}.w.weight" for layer in range(80) for n in range(100)]
    tensors = {name: np.zeros((2, 2), np.float32) for name in names}
    for name in "cab":
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    fields = {
        "operator": "ties/mergekit",
        "base": {"path": str(tmp_path / "c")},
        "models": {name: {"path": str(tmp_path / name), "density": 0.5} for name in "ab"},
        "overrides": [
            {"match": "*.layers.7.*", "options": {"lambda": 0.5}},
            {"match": "*.9.w.*", "keep": "a"},
        ],
    }
    recipe = read_recipe(write_recipe(tmp_path / "recipe.yaml", **fields))
    start = time.process_time()
    made = make_plan(recipe)
    assert time.process_time() - start < 5
    assert len(made.tensors) == 8000


def test_a_survey_is_not_repeated_for_a_resumed_merge(tmp_path, models, monkeypatch):
    made = plan(tmp_path, **models)
    record = tmp_path / "survey.json"
    first = surveying.survey(made.opened, [], record, 2)
    assert first.fingerprints["a"] == CheckpointReader(tmp_path / "a").fingerprint()
    monkeypatch.setattr(CheckpointReader, "fingerprint", lambda *_: pytest.fail("read again"))
    assert surveying.survey(made.opened, [], record, 2) == first


def test_what_tether_has_learnt_in_a_model_is_not_dropped(tmp_path, models):
    learnt = tuned(decoder(), 1) | {"abduction.loc.weight": np.eye(8, dtype=np.float32)}
    save(tmp_path / "a", learnt, LLAMA, TOKENS)
    refused(
        tmp_path,
        models,
        "a: what tether has learnt in it (1 tensors: abduction.loc.weight) has no place in base",
    )
    # Into a model of tether: its own head stays, and that the other's does not is said.
    save(tmp_path / "b", learnt, LLAMA, TOKENS)
    made = plan(tmp_path, **models, into="a")
    assert "tether's head of b is left out: that of a is kept" in made.notes
    save(tmp_path / "b", tuned(decoder(), 2), LLAMA, TOKENS)
    save(tmp_path / "a", tuned(decoder(), 1) | {"vision.weight": np.eye(8, dtype=np.float32)}, LLAMA, TOKENS)
    notes = plan(tmp_path, **models).notes
    assert any(
        "1 tensors of a outside its language tower are left out: vision.weight" in note for note in notes
    )
