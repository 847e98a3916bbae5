"""What is published carries the hashes of the bytes that were merged, whatever happens to the inputs meanwhile."""

import os
import random

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import tiny
from checkpoints import LLAMA, decoder, plan, save, tuned
from tether.errors import CheckpointError
from tether.merge.files import BLOCK, Files
from tether.merge.journal import Journal
from tether.merge.maps import read_maps
from tether.merge.operator import Extra
from tether.merge.run import merge
from tether.merge.survey import survey
from tether.store.documents import write_documents
from tether.store.hashing import sha256_file
from tether.store.manifest import read_manifest
from tether.store.reader import CheckpointReader

SETTINGS = {"ties/mergekit": {"density": 0.5}, "dare_ties": {"density": 0.5}}
OPTIONS = {"slerp": {"t": 0.3}}
READ = {"linear": "ab", "slerp": "ab", "task_arithmetic": "cab", "ties/mergekit": "cab", "dare_ties": "cab"}


def family(folder, operator="task_arithmetic", dtype=torch.float32):
    """A parent and two fine-tunes with tensors of one block, of several, and of counts."""
    draw = np.random.default_rng(0)
    parent = decoder() | {"wide": draw.standard_normal(2 * BLOCK + 7).astype(np.float32)}
    for seed, name in enumerate("cab"):
        tensors = {key: torch.from_numpy(value).to(dtype) for key, value in tuned(parent, seed).items()}
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_torch(tensors | {"steps": torch.arange(3)}, folder / name / "model.safetensors")
    base = {} if operator in {"linear", "slerp"} else {"base": {"path": str(folder / "c")}}
    models = {name: {"path": str(folder / name), **SETTINGS.get(operator, {})} for name in "ab"}
    return base | {
        "operator": operator,
        "models": models,
        "options": OPTIONS.get(operator, {}),
        "towers": "merge",
    }


def replace_in_place(folder, draw):
    """Change one bit of one weight; length, time of change, and finiteness stay."""
    file, reader = folder / "model.safetensors", CheckpointReader(folder)
    name = draw.choice([name for name in reader.names if name != "steps"])
    _, start, stop = reader.span(name)
    place = start + 2 * draw.randrange(
        (stop - start) // 2
    )  # a low byte of the fraction, of 16 and of 32 bits
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << draw.randrange(3)]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return name


def at(moment, action):
    """Steps that do something once when a part of the work begins."""

    def steps(name):
        if name == moment:
            action()
        return lambda entry: None

    return steps


@pytest.mark.parametrize("trial", range(20))
def test_an_input_replaced_between_survey_and_merge_is_found(tmp_path, trial):
    draw = random.Random(trial)
    operator = draw.choice(sorted(READ))
    dtype = draw.choice([torch.float32, torch.bfloat16])
    fields = family(tmp_path, operator, dtype)
    victim = draw.choice(READ[operator])
    made = plan(tmp_path, **fields)
    steps = at("merging", lambda: replace_in_place(tmp_path / victim, draw))
    with pytest.raises(
        CheckpointError, match=rf"{victim}/model.safetensors was changed during the merge: bytes"
    ):
        merge(made, tmp_path / "out", threads=2, steps=steps)
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
    merge(plan(tmp_path, **fields), tmp_path / "out", threads=2)
    named = {each.role: each.sha256 for each in read_manifest(tmp_path / "out").inputs}
    role = {"c": "base"}.get(victim, victim)
    assert named[role] == CheckpointReader(tmp_path / victim).fingerprint()


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties/mergekit"])
def test_in_the_middle_of_a_merge_it_is_found_or_too_late(tmp_path, operator):
    fields = family(tmp_path, operator)
    made = plan(tmp_path, **fields)
    merge(made, tmp_path / "whole", threads=1)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    content = (tmp_path / "a" / "model.safetensors").read_bytes()
    found = 0
    for trial in range(8):
        left = [3 * trial]

        def steps(name, left=left, draw=random.Random(trial)):
            def step(entry):
                left[0] -= name == "merging"
                if left[0] == 0:
                    replace_in_place(tmp_path / "a", draw)

            return step

        out = tmp_path / f"out{trial}"
        try:
            merge(made, out, threads=1, steps=steps)
        except CheckpointError as error:
            assert "was changed during the merge" in str(error)  # noqa: PT017 - either outcome is right
            found += 1
        else:
            assert (out / "model.safetensors").read_bytes() == whole
            assert read_manifest(out).inputs == read_manifest(tmp_path / "whole").inputs
        (tmp_path / "a" / "model.safetensors").write_bytes(content)
    assert 0 < found < 8


def test_one_replaced_after_the_plan_is_merged_as_it_is_then_or_refused(tmp_path):
    fields = family(tmp_path)
    made = plan(tmp_path, **fields)
    replace_in_place(tmp_path / "a", random.Random(0))
    merge(made, tmp_path / "out", threads=1)
    merge(plan(tmp_path, **fields), tmp_path / "again", threads=1)
    assert read_manifest(tmp_path / "out").inputs == read_manifest(tmp_path / "again").inputs
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    # With a longer header the same places hold other tensors.
    save_file(tuned(decoder(), 1), tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match="was changed since the merge was planned: its tensors are others"
    ):
        merge(made, tmp_path / "later", threads=1)


def stopped(monkeypatch, made, out, count):
    append, seen = Journal.append, []

    def counting(self, entry):
        if len(seen) == count:
            raise KeyboardInterrupt
        append(self, entry)
        seen.append(entry.name)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", counting)
        with pytest.raises(KeyboardInterrupt):
            merge(made, out, threads=1)


@pytest.mark.parametrize("survey_there", [True, False])
def test_one_replaced_before_a_resumed_merge(tmp_path, monkeypatch, survey_there):
    fields = family(tmp_path)
    made = plan(tmp_path, **fields)
    stopped(monkeypatch, made, tmp_path / "out", 9)
    for seed in range(40):
        replace_in_place(tmp_path / "a", random.Random(seed))
    assert plan(tmp_path, **fields).digest == made.digest
    if survey_there:
        with pytest.raises(CheckpointError, match="was changed during the merge"):
            merge(made, tmp_path / "out", threads=1)
    else:
        (tmp_path / ".out.merge" / "survey.json").unlink()
    merge(made, tmp_path / "out", threads=1)
    merge(made, tmp_path / "whole", threads=1)
    for name in ("model.safetensors", "tether.json", "merge.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_models_of_one_file_that_changes_between_their_readings(tmp_path):
    save(tmp_path / "a", decoder())
    models = {name: {"path": str(tmp_path / "a")} for name in "xy"}
    made = plan(tmp_path, operator="linear", models=models)
    found = survey(made.opened, [], None, 1)
    found.seen(made.opened)
    replace_in_place(tmp_path / "a", random.Random(0))
    later = survey(made.opened, [], None, 1)
    found.blocks["y"] = later.blocks["y"]
    with pytest.raises(CheckpointError, match="was changed while the inputs were read"):
        found.seen(made.opened)


def test_a_gram_matrix_replaced_meanwhile_is_found(tmp_path):
    file = tmp_path / "gram.safetensors"
    gram = np.eye(3, dtype=np.float32)
    save_file({"q": gram, "other": gram}, file)
    save(tmp_path / "a", decoder())
    made = plan(tmp_path, operator="linear", models={"a": {"path": str(tmp_path / "a")}})
    found = survey(made.opened, [Extra(str(file), "q", (3, 3))] * 2, None, 1)
    assert found.files == {str(file): sha256_file(file)}
    files = Files(found.seen(made.opened))
    assert (files.extra(str(file), "q") == gram).all()
    save_file({"q": gram * 2, "other": gram}, file)
    with pytest.raises(CheckpointError, match="was changed during the merge: tensor q"):
        files.extra(str(file), "q")
    file.unlink()
    with pytest.raises(CheckpointError, match="q cannot be read any more"):
        files.extra(str(file), "q")


def test_maps_carry_the_hash_of_what_was_read(tmp_path):
    maps = tmp_path / "maps.safetensors"
    for name in "ab":
        save(tmp_path / name, decoder(), LLAMA)
    save_file({"layers.0.mlp": np.arange(12)[::-1].copy()}, maps)
    models = {"a": {"path": str(tmp_path / "a")}, "b": {"path": str(tmp_path / "b"), "align": str(maps)}}
    made = plan(tmp_path, operator="linear", models=models, into="a")
    read, before = read_maps(maps)
    assert read["layers.0.mlp"].tolist() == list(range(12))[::-1]
    save_file({"layers.0.mlp": np.arange(12)}, maps)
    merge(made, tmp_path / "out", threads=1)
    named = {each.role: each.sha256 for each in read_manifest(tmp_path / "out").inputs}
    assert named["maps"] == before != sha256_file(maps)


@pytest.mark.parametrize("part", ["weights", "config"])
def test_a_reference_replaced_before_the_check_is_found(tmp_path, part):
    for seed, name in enumerate("ab"):
        tiny.backbone("llama", seed=seed, layers=1).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 5, 1))
    check = {"text": {"words": str(tmp_path / "words.jsonl")}, "tokens": 256, "window": 64, "paths": 0}
    models = {name: {"path": str(tmp_path / name)} for name in "ab"}
    made = plan(tmp_path, operator="linear", models=models, check=check | {"references": ["b"]})
    before = made.opened["b"].folder.config_sha256
    assert before == sha256_file(tmp_path / "b" / "config.json")

    def change():
        if part == "weights":
            replace_in_place(tmp_path / "b", random.Random(0))
        else:
            file = tmp_path / "b" / "config.json"
            file.write_text(file.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))

    with pytest.raises(CheckpointError, match="b was changed while the result was compared with it"):
        merge(made, tmp_path / "out", threads=1, steps=at("checking b", change))
    assert not (tmp_path / "out").exists()
