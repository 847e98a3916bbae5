"""`tether train` and `tether evaluate` as a user meets them."""

import json
import os

import pytest

import tiny
from processes import run_command
from said import complaints
from tether.store.documents import write_documents


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.backbone().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    write_documents(folder / "digits.jsonl", tiny.documents("digits", 8, 1))
    write_documents(folder / "held.jsonl", tiny.documents("digits", 3, 2))
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} plus 1 is ", "completion": str(n + 1)}) + "\n" for n in range(8))
    )
    (folder / "empty.jsonl").write_text("")
    (folder / "quick.yaml").write_text("batch: 4\nlr: 3e-3\nwindow: 48\nsave_every: 2\n")
    (folder / "misspelt.yaml").write_text("batches: 4\n")
    (folder / "wrong.yaml").write_text("batch: many\n")
    (folder / "list.yaml").write_text("- batch\n")
    (folder / "broken.yaml").write_text("batch: [\n")
    (folder / "odd.yaml").write_text("accumulate: 3\n")
    (folder / "full").mkdir()
    (folder / "full" / "precious").write_text("keep")
    return folder


TRAIN = ["train", "base", "--text", "digits.jsonl", "--options", "quick.yaml", "--steps", "6"]


def test_train_evaluate_and_train_again(work, tether, monkeypatch):
    monkeypatch.chdir(work)
    more = ["--held-out", "held.jsonl", "--mode", "deterministic", "--part", "all", "--out", "run", "--json"]
    code, out, err = tether(*TRAIN, *more)
    assert code == 0, err
    record = json.loads(out)
    assert record["steps"] == 6
    assert record["curve"][-1] < record["curve"][0]
    assert record["after"]["ovr_loss"] < record["before"]["ovr_loss"]
    code, out, _ = tether("evaluate", record["path"], "--text", "held.jsonl", "--json")
    assert (code, json.loads(out)) == (0, record["after"])
    code, out, _ = tether(*TRAIN, *more)
    assert (code, json.loads(out)) == (0, record)
    code, _, err = tether(*TRAIN, *more, "--steps", "7")
    assert code == 2
    assert "options.steps (given 7, there 6)" in err


def test_numbers_and_completions(work, tether, monkeypatch):
    monkeypatch.chdir(work)
    train = [
        "train",
        "base",
        "--text",
        "pairs.jsonl",
        "--options",
        "quick.yaml",
        "--numbers",
        "--out",
        "numeric",
    ]
    code, out, err = tether(*train, "--held-out", "pairs.jsonl")
    assert code == 0, err
    # Of each of 8 completions the number and the end.
    assert "numeric/model: 2 steps, 16 tokens" in out
    code, out, _ = tether("evaluate", "numeric/model", "--text", "pairs.jsonl")
    assert code == 0
    figures = dict(line.split() for line in out.splitlines())
    assert figures["value_count"] == "8"
    assert float(figures["value_median_error"]) >= 0


BAD = {
    "missing text": (["--text", "absent.jsonl"], "no such text file"),
    "empty text": (["--text", "empty.jsonl"], "holds no text"),
    "two texts": (["--text", "digits.jsonl", "--text", "held.jsonl"], "--text given twice"),
    "missing held-out": (["--held-out", "absent.jsonl"], "no such text file"),
    "unknown option": (["--options", "misspelt.yaml"], "batches"),
    "wrong type": (["--options", "wrong.yaml"], "batch"),
    "no mapping": (["--options", "list.yaml"], "name: value"),
    "broken YAML": (["--options", "broken.yaml"], "YAML"),
    "no options file": (["--options", "absent.yaml"], "absent.yaml"),
    "uneven batch": (["--options", "odd.yaml"], "multiple of 3"),
    "unknown part": (["--part", "tail"], "part"),
    "unknown mode": (["--mode", "causal"], "mode"),
    "no steps": (["--steps", "0"], "steps=0"),
    "full folder": (["--out", "full"], "not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_before_the_model_is_loaded(work, tether, monkeypatch, case):
    monkeypatch.chdir(work)
    monkeypatch.setattr("tether.causal.loading.load", lambda *_, **__: pytest.fail("loaded"))
    before = sorted(work.rglob("*"))
    arguments, message = BAD[case]
    given = [*TRAIN[:2], *TRAIN[4:]] if "--text" in arguments else TRAIN
    code, out, err = tether(*given, "--out", "result", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert complaints(err) == 1
    assert "Traceback" not in err
    assert sorted(work.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_batch_that_processes_cannot_share_is_refused(work, monkeypatch):
    monkeypatch.chdir(work)
    said = run_command(*TRAIN, "--out", "result", count=3)
    assert [code for code, _, _ in said] == [2, 2, 2]
    assert "".join(err for _, _, err in said).count("batch=4 over 3 processes") == 1


def test_evaluate_refuses_what_it_cannot_read(work, tether, monkeypatch):
    monkeypatch.chdir(work)
    assert tether("evaluate", "base", "--text", "absent.jsonl")[0] == 2
    code, _, err = tether("evaluate", "absent/base", "--text", "held.jsonl")
    assert code == 2
    assert "absent/base" in err
