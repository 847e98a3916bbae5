"""An adapter made elsewhere through the commands: refused raw, leashed, fused, certified, verified, writing text."""

import json
import shlex

import pytest

import foreign_adapters
import tiny
from foreign_adapters import REFUSED, TAKEN, merged, write
from tether.store.documents import write_documents

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT itself


@pytest.fixture
def work(tmp_path, monkeypatch):
    for part in (foreign_adapters.plain(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "base")
    for name, kind, seed in (("digits", "digits", 1), ("general", "words", 3)):
        write_documents(tmp_path / f"{name}.jsonl", tiny.documents(kind, 16, seed))
    write(TAKEN["DoRA"], tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


LEASH = ["leash", "theirs", "--base", "base", "--base-text", "general.jsonl"]


def test_the_commands_in_a_row(work, tether):
    code, out, err = tether("fuse", "base", "theirs", "--out", "fused")
    assert (code, out) == (2, "")
    assert "an adapter that was made elsewhere" in err
    # What it says to type can be typed.
    said = shlex.split(err.strip().rpartition("Type first: ")[2])
    assert said[:2] == ["tether", "leash"]
    code, out, err = tether(*said[1:], "--text", "digits.jsonl", "--budget", 0.02, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["path"] == "theirs.lora"
    assert (record["made_of"], record["gated"]) == ("DoRA", True)
    assert 0.95 * 0.02 <= record["drift_base"] <= 0.02
    assert record["softmax_kl"]["before"]["mean"] > record["softmax_kl"]["after"]["mean"]
    assert sorted(path.name for path in (work / "theirs.lora").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "gate.safetensors", "tether.json",
    ]  # fmt: skip
    for more in ([], ["--by", "sum", "--no-gate"]):
        name = "sum" if more else "evidence"
        code, _, err = tether("fuse", "base", "theirs.lora", "--out", name, *more)
        assert code == 0, err
        code, _, err = tether(
            "certify", "base", name, "--text", "general.jsonl", "--out", f"{name}.json", "--continuations", 0
        )
        assert code == 0, err
        code, out, _ = tether("verify", f"{name}.json", "--base", "base")
        assert (code, out.splitlines()[0]) == (0, f"{name}.json: holds")
    code, out, err = tether("generate", "evidence", "1.2 3.4", "--new-tokens", 5)
    assert code == 0, err
    assert out.startswith("1.2 3.4")


def test_what_it_prints(work, tether):
    code, out, err = tether(*LEASH, "--out", "law.lora", "--budget", 0.02, "--text", "digits.jsonl")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(
        "law.lora was made of DoRA. As it came, the KL divergence from the base on 2,057 tokens"
    )
    assert "which uses the budget up. There it is 0.01" in lines[1]
    assert lines[-1] == "To use it, type: tether fuse base law.lora --out law-fused"
    assert "which whoever has it can read (--no-sample)" in out
    code, out, err = tether(*LEASH, "--out", "bare.lora", "--budget", 1000)
    assert "It is within its budget as it is." in out
    assert "It has no gate (give --text for one)" in out
    write(TAKEN["rsLoRA"], work / "other")
    for part in (merged(work / "other"), tiny.tokenizer()):
        part.save_pretrained(work / "tuned")
    code, out, err = tether(
        "leash", "tuned", "--base", "base", "--base-text", "general.jsonl", "--text", "digits.jsonl", "--out",
        "tuned.lora", "--rank", 2,
    )  # fmt: skip
    assert code == 0, err
    assert "tuned.lora was made of a fine-tuned model, in rank 2." in out
    assert "of the size of what the linear layers changed by" in out
    code, _, err = tether("fuse", "base", "tuned", "--out", "fused")
    assert code == 2
    assert "tuned: a whole model; expected one on a budget. Type first: tether leash tuned --base base" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*LEASH, "--budget", "0"], "> 0"),
        ([*LEASH, "--budget", "1e-30"], "no factor was found"),
        ([*LEASH, "--metric", "cosine"], "metric='cosine'"),
        ([*LEASH, "--rank", "4"], "keeps its own rank"),
        ([*LEASH, "--no-sample"], "--no-gate or --no-sample without --text"),
        ([*LEASH, "--text", "absent.jsonl"], "no such text file"),
        (["leash", "absent", *LEASH[2:]], "no such folder"),
        (["leash", "base", *LEASH[2:]], "there is nothing to leash"),
        (["leash", "refused", *LEASH[2:]], "merge it into its model"),
    ],
)
def test_bad_input_is_one_message_with_exit_2_and_nothing_written(work, tether, arguments, message):
    write(REFUSED["IA3"][0], work / "refused")
    before = sorted(work.iterdir())
    code, out, err = tether(*arguments, "--out", "result")
    assert (code, out) == (2, "")
    assert message in err
    # What was found in the texts is told on the way.
    told = [line for line in err.splitlines() if line.startswith("tether:") and " documents in " not in line]
    assert len(told) <= 1
    assert sorted(work.iterdir()) == before


def test_a_place_that_is_taken_is_refused_before_the_model_is_loaded(work, tether, monkeypatch):
    monkeypatch.setattr("tether.cli.leash.load", None)
    code, _, err = tether(*LEASH, "--out", "theirs")
    assert code == 2
    assert "theirs" in err
