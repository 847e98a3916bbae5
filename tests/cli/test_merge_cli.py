"""`tether merge` as a user meets it."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

import tiny
from checkpoints import write_recipe
from tether.store.documents import write_documents
from tether.store.manifest import read_manifest


@pytest.fixture
def tether(tether):
    return partial(tether, "merge")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    for seed, name in enumerate("cab"):
        model = tiny.backbone("llama", seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.03 if seed else 0) * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(seed)
                )
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    write_documents(folder / "words.jsonl", tiny.documents("words", 5, 1))
    write_documents(folder / "digits.jsonl", tiny.documents("digits", 5, 2))
    (folder / "short.txt").write_text("a few words")
    return folder


CHECK = {
    "text": {"words": "words.jsonl", "digits": "digits.jsonl"},
    "tokens": 256,
    "window": 64,
    "paths": 2,
    "path_length": 8,
}


@pytest.fixture
def recipe(work, monkeypatch):
    monkeypatch.chdir(work)

    def write(**changes):
        fields = {
            "operator": "task_arithmetic",
            "base": {"path": "c"},
            "models": {"a": {"path": "a", "weight": 0.5}, "b": {"path": "b", "weight": 0.5}},
        }
        return write_recipe(work / "recipe.yaml", **(fields | changes))

    return write


def test_a_dry_run_writes_nothing(work, recipe, tether):
    path = recipe(out="result")
    before = sorted(work.rglob("*"))
    code, out, err = tether(path, "--dry-run")
    assert (code, err) == (0, "")
    for line in (
        "operator   task_arithmetic",
        "into       base",
        "head tied to the embedding",
        "tensors    20 merged",
    ):
        assert line in out
    code, out, _ = tether(path, "--dry-run", "--json")
    assert json.loads(out)["merged"] == 20
    assert sorted(work.rglob("*")) == before


def test_a_dry_run_says_that_the_check_could_not_be_done(recipe, tether):
    path = recipe(out="result", check={"text": {"gone": "gone.jsonl"}})
    code, _, err = tether(path, "--dry-run")
    assert code == 2
    assert "gone.jsonl" in err


def test_a_dry_run_needs_neither_torch_nor_transformers(work, recipe):
    script = (
        "import sys; sys.argv = ['tether', 'merge', sys.argv[1], *sys.argv[2:]]\n"
        "from tether.cli.app import main; main()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for more in (["--dry-run"], ["--out", "light"]):
        subprocess.run(
            [sys.executable, "-c", script, recipe(), *more], check=True, capture_output=True, cwd=work
        )


def test_merge_and_merge_again(work, recipe, tether):
    path = recipe()
    code, out, err = tether(path, "--out", "merged", "--threads", "2")
    assert code == 0, err
    assert "merged: 20 tensors merged by task_arithmetic, 0 kept" in out
    assert read_manifest(work / "merged").kind == "merge"
    code, out, _ = tether(path, "--out", "merged", "--json")
    assert (code, json.loads(out)["plan"]["merged"]) == (0, 20)
    code, _, err = tether(recipe(seed=1), "--out", "merged")
    assert code == 2
    assert "not empty" in err


def test_a_damaged_result_is_not_said_to_be_done(work, recipe, tether):
    path = recipe()
    assert tether(path, "--out", "broken")[0] == 0
    file = work / "broken" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = tether(path, "--out", "broken")
    assert (code, out) == (2, "")
    assert (
        "holds the result of this merge, but is damaged: tensor model.norm.weight has other bytes"
        in " ".join(err.split())
    )


def test_the_check_is_in_the_report(work, recipe, tether):
    code, out, err = tether(recipe(check=CHECK), "--out", "checked", "--json")
    assert code == 0, err
    check = json.loads(out)["check"]
    assert list(check["references"]) == ["base", "a", "b"]
    assert list(check["references"]["a"]) == ["words", "words, sampled", "digits", "digits, sampled"]
    assert check["accepted"] is None
    figures = [row["kl"] for texts in check["references"].values() for row in texts.values()]
    assert all(0 < row["mean"] <= row["p99"] <= row["max"] for row in figures)
    assert check["worst_mean_kl"] == max(row["kl"]["mean"] for row in check["references"]["base"].values())
    assert json.loads((work / "checked" / "merge.json").read_text())["check"] == check


def test_over_the_budget_nothing_is_published(work, recipe, tether):
    before = sorted(work.iterdir())
    path = recipe(check=CHECK)
    code, out, err = tether(path, "--out", "over", "--accept", "0.0001")
    assert code == 1, err
    assert "budget of 0.0001 nats exceeded: nothing was published" in out
    assert "base on words: softmax KL" in out
    assert sorted(work.iterdir()) == before
    code, out, err = tether(path, "--out", "within", "--accept", "50")
    assert code == 0, err
    assert "budget of 50 nats kept" in out
    assert (work / "within" / "model.safetensors").exists()


def test_lambda_is_found_for_a_budget(work, recipe, tether):
    check = CHECK | {"accept": 0.02, "solve_lambda": True, "references": ["base"], "paths": 0}
    code, out, err = tether(recipe(check=check), "--out", "solved", "--json")
    assert code == 0, err
    found = json.loads(out)["check"]
    assert len(found["lambda"]["tried"]) <= 4
    assert 0.8 * 0.02 <= found["worst_mean_kl"] <= 0.02
    # What was published is what was measured.
    code, out, _ = tether(
        recipe(check=CHECK | {"paths": 0}, options={"lambda": found["lambda"]["value"]}),
        "--out",
        "fixed",
        "--json",
    )
    assert code == 0
    assert json.loads(out)["check"]["worst_mean_kl"] == pytest.approx(found["worst_mean_kl"], rel=1e-9)
    assert (work / "fixed" / "model.safetensors").read_bytes() == (
        work / "solved" / "model.safetensors"
    ).read_bytes()


def test_no_lambda_in_reach_publishes_nothing(work, recipe, tether):
    before = sorted(work.iterdir())
    # Rounding alone moves the model further than this.
    check = CHECK | {"accept": 1e-9, "solve_lambda": True, "references": ["base"], "paths": 0}
    code, out, err = tether(recipe(check=check, dtype="bfloat16"), "--out", "unmet")
    assert code == 1, err
    assert "after 4 evaluations" in out
    assert "exceeded: nothing was published" in out
    assert sorted(work.iterdir()) == before


BAD = {
    "no recipe": ({}, ["absent.yaml"], "absent.yaml does not exist"),
    "nowhere to write": ({}, [], "has no out; give --out FOLDER"),
    "a budget without a check": ({}, ["--out", "x", "--accept", "1"], "has no check to hold it against"),
    "a budget of nothing": ({"check": CHECK}, ["--out", "x", "--accept", "0"], "--accept 0.0"),
    "a budget without end": ({"check": CHECK}, ["--out", "x", "--accept", "inf"], "--accept inf"),
    "an operator without lambda": (
        {"operator": "linear", "check": CHECK | {"accept": 1, "solve_lambda": True}},
        ["--out", "x"],
        "linear has no lambda; expected one of task_arithmetic, ties/mergekit, dare_ties",
    ),
    "a lambda that the search does not reach": (
        {
            "check": CHECK | {"accept": 1, "solve_lambda": True},
            "overrides": [{"match": "*", "options": {"lambda": 1}}],
        },
        ["--out", "x"],
        "overrides.0 has a lambda of its own",
    ),
    "no budget to solve for": (
        {"check": CHECK | {"solve_lambda": True}},
        ["--out", "x"],
        "needs check.accept",
    ),
    "a missing text": (
        {"check": {"text": {"x": "absent.jsonl"}}},
        ["--out", "x"],
        "absent.jsonl: no such text file",
    ),
    "a text shorter than a window": (
        {"check": CHECK | {"text": {"words": "words.jsonl", "x": "short.txt"}}},
        ["--out", "x"],
        "check.text.x (short.txt) gives",
    ),
    "a misspelt key": ({"modles": {}}, ["--out", "x"], "did you mean 'models'?"),
    "a missing model": ({"base": {"path": "absent"}}, ["--out", "x"], "absent does not exist"),
    "a file that is no model": (
        {"check": CHECK, "models": {"a": {"path": "a/model.safetensors"}}},
        ["--out", "x"],
        "the check cannot be done: a has no config.json",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_before_the_long_part(work, recipe, tether, monkeypatch, case):
    fields, arguments, message = BAD[case]
    path = recipe(**fields)
    monkeypatch.setattr("tether.merge.run.survey", lambda *_: pytest.fail("read"))
    before = sorted(work.rglob("*"))
    code, out, err = tether(*([] if case == "no recipe" else [path]), *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert sorted(work.rglob("*")) == before


def test_align_and_merge_by_the_maps(work, recipe, tether):
    code, out, err = tether(
        "align", "c", "b", "--text", "words.jsonl", "--out", "maps.safetensors", "--tokens", "128", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"] >= 128
    assert set(found["unmatched"].values()) == {0}
    assert 0 < found["similarity"]["residual"] <= 1
    models = {"a": {"path": "a"}, "b": {"path": "b", "align": "maps.safetensors"}}
    code, out, err = tether(recipe(models=models), "--out", "by-maps")
    assert code == 0, err
    assert "20 tensors merged" in out


@pytest.mark.parametrize("text", ["absent.jsonl", "words.jsonl"])
def test_align_refuses_what_it_cannot_read(work, recipe, tether, text):
    code, _, err = tether("align", "c", "absent", "--text", text, "--out", "none.safetensors")
    assert code == 2
    assert "absent" in err
    assert not (work / "none.safetensors").exists()


def test_other_commands_of_the_group(work, recipe, tether):
    for name in ("run", "align", "study-length"):
        code, out, _ = tether(name, "--help")
        assert code == 0
        assert name in out
    code, out, _ = tether("--help")
    assert code == 0
    assert "RECIPE.yaml" in out
    assert tether("run", recipe(out="named"), "--dry-run")[0] == 0


def test_align_keeps_what_is_there(work, recipe, tether):
    before = (work / "words.jsonl").read_bytes()
    code, _, err = tether("align", "a", "b", "--text", "words.jsonl", "--out", "words.jsonl")
    assert code == 2
    assert "exists already" in err
    assert (work / "words.jsonl").read_bytes() == before
