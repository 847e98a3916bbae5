"""Bytes: the same for any thread count, hash seed and interruption; whole or absent; rounded once."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from math import sqrt

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import tiny
from checkpoints import LLAMA, decoder, plan, save, tuned, write_recipe
from disk import nearly_full
from tether.errors import CheckpointError, ConfigError
from tether.merge.inputs import BLOCK
from tether.merge.journal import Journal, Written
from tether.merge.run import merge
from tether.store.manifest import read_manifest
from tether.store.reader import CheckpointReader


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fields(tmp_path):
    """A parent and two fine-tunes in which some tensors span several blocks."""
    draw = np.random.default_rng(0)
    parent = decoder() | {
        "model.layers.0.mlp.wide.weight": draw.standard_normal(2 * BLOCK + 7).astype(np.float32)
    }
    parent |= {f"model.extra.{n}": draw.standard_normal((n + 1, 50)).astype(np.float32) for n in range(30)}
    save(tmp_path / "c", parent, LLAMA)
    for seed, name in enumerate("ab", start=1):
        save(tmp_path / name, tuned(parent, seed), LLAMA)
    return {
        "operator": "dare_ties",
        "base": {"path": str(tmp_path / "c")},
        "models": {name: {"path": str(tmp_path / name), "weight": 0.5, "density": 0.4} for name in "ab"},
        "shard_bytes": 300_000,
        "towers": "merge",
    }


@pytest.mark.parametrize("operator", ["dare_ties", "ties/mergekit"])
def test_threads_change_no_byte(tmp_path, fields, operator):
    fields["operator"] = operator
    trees = []
    for threads in (1, 2, 4):
        merge(plan(tmp_path, **fields), tmp_path / f"out{threads}", threads=threads)
        trees.append(tree(tmp_path / f"out{threads}"))
    assert trees[0] == trees[1] == trees[2]


COMMAND = [sys.executable, "-m", "tether.cli.app", "merge"]


@pytest.mark.slow
def test_hash_seeds_change_no_byte(tmp_path, fields):
    recipe = write_recipe(tmp_path / "recipe.yaml", **fields)
    trees = []
    for seed in range(5):
        out = tmp_path / f"out{seed}"
        subprocess.run(
            [*COMMAND, recipe, "--out", out],
            check=True,
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
        )
        trees.append(tree(out))
    assert all(each == trees[0] for each in trees)


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path, fields):
    recipe = write_recipe(tmp_path / "recipe.yaml", **fields)
    subprocess.run([*COMMAND, recipe, "--out", tmp_path / "whole"], check=True, capture_output=True)
    expected = tree(tmp_path / "whole")
    out, hidden = tmp_path / "out", tmp_path / ".out.merge"
    draw = random.Random(0)
    # A slow disk, so that there is a middle to be killed in; the work is otherwise that of the command.
    script = (
        "import os, sys, time; write = os.pwrite\n"
        "def slow(*given):\n    time.sleep(0.02)\n    return write(*given)\n"
        "os.pwrite = slow\n"
        "sys.argv = ['tether', 'merge', *sys.argv[1:]]\n"
        "from tether.cli.app import main; main()"
    )
    killed = within = 0
    while killed < 20:
        process = subprocess.Popen(
            [sys.executable, "-c", script, recipe, "--out", out, "--threads", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (hidden / "journal.jsonl").exists() and not out.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        if out.exists():
            assert tree(out) == expected
            for path in (out, hidden):
                subprocess.run(["rm", "-rf", path], check=True)
        else:
            within += 1
    assert within >= 10
    subprocess.run([*COMMAND, recipe, "--out", out], check=True, capture_output=True)
    assert tree(out) == expected
    assert not hidden.exists()


def stopped_after(monkeypatch, count):
    """The process ends after so many tensors, as a killed one would: nothing is cleaned up."""
    append, seen = Journal.append, []

    def counting(self, entry):
        append(self, entry)
        seen.append(entry.name)
        if len(seen) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", counting)
    return seen


def test_what_is_finished_is_not_made_again(tmp_path, fields, monkeypatch):
    made = plan(tmp_path, **fields)
    merge(made, tmp_path / "whole", threads=1)
    with monkeypatch.context() as patch:
        before = stopped_after(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            merge(made, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    after, append = [], Journal.append
    monkeypatch.setattr(
        Journal, "append", lambda self, entry: after.append(entry.name) or append(self, entry)
    )
    merge(made, tmp_path / "out", threads=1)
    assert not set(before[:20]) & set(after)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / ".out.merge").exists()


def test_a_journal_that_lies_is_not_believed(tmp_path, fields, monkeypatch):
    made = plan(tmp_path, **fields)
    merge(made, tmp_path / "whole", threads=1)
    with monkeypatch.context() as patch:
        before = stopped_after(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            merge(made, tmp_path / "out", threads=1)
    hidden = tmp_path / ".out.merge"
    place = made.places[before[3]]
    with (hidden / "model" / made.shards[place.shard].name).open("r+b") as file:
        file.seek(place.start)
        file.write(b"\xff\xff\xff\xff")
    with (hidden / "journal.jsonl").open("ab") as file:
        file.write(b'["model.norm.weight", "ab')  # torn
    merge(made, tmp_path / "out", threads=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_merge_to_the_same_name_starts_anew(tmp_path, fields, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_after(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    other = plan(tmp_path, **fields, seed=5)
    merge(other, tmp_path / "out", threads=1)
    merge(other, tmp_path / "whole", threads=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_input_that_changes_is_another_merge(tmp_path, fields):
    merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    before = tree(tmp_path / "out")
    again = merge(plan(tmp_path, **fields), tmp_path / "out", threads=2)
    assert again == json.loads(before["merge.json"])
    save(tmp_path / "a", load_file(tmp_path / "b" / "model.safetensors"))
    with pytest.raises(ConfigError, match="not empty"):
        merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    assert tree(tmp_path / "out") == before


def test_a_folder_with_other_content_is_refused_before_any_work(tmp_path, fields, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"precious")
    monkeypatch.setattr(CheckpointReader, "fingerprint", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match="not empty"):
        merge(plan(tmp_path, **fields), tmp_path / "out")
    assert (tmp_path / "out" / "model-00001-of-00002.safetensors").read_bytes() == b"precious"
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is not a folder"):
        merge(plan(tmp_path, **fields), tmp_path / "file")


def test_two_processes_cannot_work_on_one_name(tmp_path, fields):
    made = plan(tmp_path, **fields)

    def second(name):
        with pytest.raises(ConfigError, match="another process is merging"):
            merge(made, tmp_path / "out", threads=1)
        return lambda entry: None

    merge(made, tmp_path / "out", threads=1, steps=second)
    assert (tmp_path / "out").is_dir()


def test_a_full_disk_leaves_what_was_done(tmp_path, fields):
    made = plan(tmp_path, **fields)
    with (
        nearly_full(made.shards[0].bytes - 1),
        pytest.raises(CheckpointError, match="start the same merge again"),
    ):
        merge(made, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.merge" / "survey.json").exists()
    merge(made, tmp_path / "out", threads=1)
    assert (tmp_path / "out").is_dir()


def test_an_input_cut_short_meanwhile_is_said(tmp_path, fields):
    made = plan(tmp_path, **fields)

    def cut(name):
        if name == "merging":
            os.truncate(tmp_path / "a" / "model.safetensors", 5000)
        return lambda entry: None

    with pytest.raises(CheckpointError, match=r"cannot be read any more \(it ends \d+ bytes early"):
        merge(made, tmp_path / "out", threads=2, steps=cut)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_rounding_and_its_loss(tmp_path, dtype):
    parent = {"w": np.random.default_rng(0).standard_normal(BLOCK + 99).astype(np.float32)}
    save(tmp_path / "c", parent)
    for seed, name in enumerate("ab", start=1):
        save(tmp_path / name, tuned(parent, seed, 0.003))
    fields = {
        "operator": "task_arithmetic",
        "base": {"path": str(tmp_path / "c")},
        "models": {name: {"path": str(tmp_path / name), "weight": 0.5} for name in "ab"},
    }
    merge(plan(tmp_path, **fields), tmp_path / "exact", threads=1)
    report = merge(plan(tmp_path, **fields, dtype=dtype), tmp_path / "out", threads=1)
    exact = torch.from_numpy(load_file(tmp_path / "exact" / "model.safetensors")["w"])
    found = load_torch(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.equal(found, exact.to(getattr(torch, dtype)))
    lost = (found.double() - exact.double()).norm() / (
        exact.double() - torch.from_numpy(parent["w"]).double()
    ).norm()
    assert report["rounding"]["share_of_change"] == pytest.approx(float(lost), rel=1e-5)
    assert report["rounding"]["worst"]["tensor"] == "w"


def test_types_stay_as_they_are_unless_asked(tmp_path):
    parent = {"half": torch.randn(5, 5).bfloat16(), "single": torch.randn(5), "short": torch.randn(5).half()}
    for name in "ab":
        (tmp_path / name).mkdir()
        save_torch(parent, tmp_path / name / "model.safetensors")
    fields = {"operator": "linear", "models": {name: {"path": str(tmp_path / name)} for name in "ab"}}
    report = merge(plan(tmp_path, **fields), tmp_path / "out")
    found = load_torch(tmp_path / "out" / "model.safetensors")
    for name, values in parent.items():
        assert torch.equal(found[name], values)
    assert report["rounding"] == {"share_of_change": 0.0, "worst": None}


def test_what_leaves_the_range_of_a_type_is_refused(tmp_path):
    save(tmp_path / "a", {"w": np.full(10, 6e4, np.float32)})
    fields = {
        "operator": "linear",
        "models": {"a": {"path": str(tmp_path / "a"), "weight": 2}},
        "options": {"normalize": False},
        "dtype": "float16",
    }
    with pytest.raises(CheckpointError, match="w leaves the range of F16"):
        merge(plan(tmp_path, **fields), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_the_result_is_a_checkpoint_with_everything_beside_it(tmp_path):
    for seed, name in enumerate("cab"):
        model = tiny.backbone("qwen2", seed=0)
        if seed:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(seed)
                    )
        model.generation_config.max_new_tokens = 7
        model.save_pretrained(tmp_path / name)
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = "{{ messages }} of " + name
        tokenizer.save_pretrained(tmp_path / name)
    fields = {
        "operator": "task_arithmetic",
        "base": {"path": str(tmp_path / "c")},
        "models": {name: {"path": str(tmp_path / name), "weight": 0.5} for name in "ab"},
        "shard_bytes": 50_000,
        "tokenizer": "b",
        "dtype": "bfloat16",
    }
    report = merge(plan(tmp_path, **fields), tmp_path / "out")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert len(list(out.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(out).chat_template.endswith("of b")
    parts = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in "ab"
    ]
    for name, values in model.state_dict().items():
        torch.testing.assert_close(
            values, (0.5 * (parts[0][name] + parts[1][name])).bfloat16(), rtol=2**-7, atol=1e-6
        )
    manifest = read_manifest(out)
    roles = [entry.role for entry in manifest.inputs]
    assert roles[:3] == ["base", "a", "b"]
    assert roles[3:6] == ["config"] * 3
    assert set(roles[6:]) == {"companion"}
    assert manifest.inputs[1].sha256 == CheckpointReader(tmp_path / "a").fingerprint()
    reader = CheckpointReader(out)
    for name, digest in report["tensors"].items():
        raw = reader.tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(raw).hexdigest() == digest


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties/mergekit", "dare_ties"])
def test_memory_does_not_grow_with_a_tensor(tmp_path, operator):
    size = 4_000_000  # 16 MB a model
    for seed, name in enumerate("cab"):
        save(tmp_path / name, {"w": np.random.default_rng(seed).standard_normal(size, np.float32)})
    settings = {} if operator == "task_arithmetic" else {"density": 0.5}
    models = {name: {"path": str(tmp_path / name), **settings} for name in "ab"}
    made = plan(tmp_path, operator=operator, base={"path": str(tmp_path / "c")}, models=models)
    tracemalloc.start()
    try:
        merge(made, tmp_path / "out", threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The plan's estimate, and one chunk of the first reading.
    assert peak < made.memory(1) + 4 * 2**20 < 4 * size


def test_threads_must_be_positive(tmp_path, fields):
    with pytest.raises(ConfigError, match="threads=0"):
        merge(plan(tmp_path, **fields), tmp_path / "out", threads=0)


def test_the_journal_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append(Written("a", "1", 0.1, sqrt(2)))
    journal.close()
    with (tmp_path / "j").open("ab") as file:
        file.write(b'["b", "2"')
    journal = Journal(tmp_path / "j")
    journal.append(Written("c", "3", 0.0, 0.0))
    assert journal.entries() == {"a": Written("a", "1", 0.1, sqrt(2)), "c": Written("c", "3", 0.0, 0.0)}
    journal.close()
