"""Adapters through the commands: learnt, fused, certified, verified, writing text."""

import json

import pytest

import tiny
from tether.store.documents import write_documents


@pytest.fixture
def work(tmp_path, monkeypatch):
    tiny.backbone().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for name, kind, seed in (("digits", "digits", 1), ("general", "words", 3)):
        write_documents(tmp_path / f"{name}.jsonl", tiny.documents(kind, 24, seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


LEARN = ["learn", "base", "--text", "digits.jsonl", "--base-text", "general.jsonl", "--adapter", "lora"]


def test_the_commands_in_a_row(work, tether):
    code, out, err = tether(*LEARN, "--out", "digits.lora", "--budget", 0.2, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["adapter"] == "lora"
    assert 0 < record["drift_base"] <= 0.2
    assert record["held_out"]["nll_after"] < record["held_out"]["nll_before"]
    assert len(record["sample"]) == record["held_out"]["documents"]
    assert record["strengths"] == [1.0]
    assert sorted(path.name for path in (work / "digits.lora").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "gate.safetensors", "tether.json",
    ]  # fmt: skip
    code, _, err = tether("fuse", "base", "digits.lora=0.8", "--out", "weighted")
    assert code == 2
    assert "by evidence an adapter takes part whole" in err
    code, out, err = tether("fuse", "base", "digits.lora=0.8", "--by", "sum", "--out", "weighted")
    assert code == 0, err
    assert out.startswith("weighted: adapters 0.8 digits, chart symmetric, gated; the base stays in base")
    code, out, err = tether("fuse", "base", "digits.lora", "--prior", 0.8, "--out", "served")
    assert code == 0, err
    assert out.startswith("served: adapters 1 digits, by evidence, gated; the base stays in base")
    code, out, err = tether("certify", "base", "served", "--text", "digits.jsonl", "--out", "cert.json")
    assert code == 0, err
    certificate = json.loads((work / "cert.json").read_text())
    assert certificate["fusion"]["kind"] == "adapters"
    assert (certificate["fusion"]["by"], certificate["fusion"]["prior"]) == ("evidence", 0.8)
    assert certificate["figures"]["digits"]["softmax_kl"]["mean"] > 0
    code, out, _ = tether("verify", "cert.json", "--json")
    said = json.loads(out)
    assert (code, said["holds"], said["differences"]) == (0, True, [])
    code, out, err = tether("generate", "served", "1.2 3.4", "--new-tokens", 5)
    assert code == 0, err
    assert out.startswith("1.2 3.4")
    code, _, err = tether("fuse", "base", "digits.lora", "--out", "leashed", "--no-gate", "--leash", 0.1)
    assert code == 0, err
    code, _, err = tether(
        "certify", "base", "leashed", "--text", "digits.jsonl", "--out", "leashed.json", "--continuations", 0
    )
    assert code == 0, err
    held = json.loads((work / "leashed.json").read_text())
    assert held["fusion"]["leash"] == {"nats": 0.1, "metric": "softmax"}
    assert 0.09 < held["figures"]["digits"]["softmax_kl"]["max"] <= 0.1 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*LEARN[:-1], "adalora"], "expected lora"),
        ([*LEARN, "--chart", "linear"], "--chart"),
        ([*LEARN, "--penalty", "0.1"], "--penalty"),
        ([*LEARN, "--features", "multi"], "--features"),
        ([*LEARN, "--hard"], "--hard"),
        ([*LEARN, "--budget", "0"], "> 0"),
        (["learn", "base", "--text", "absent.jsonl", *LEARN[4:]], "no such text file"),
    ],
)
def test_bad_input_is_one_message_with_exit_2_and_nothing_written(work, tether, arguments, message):
    before = sorted(work.iterdir())
    code, out, err = tether(*arguments, "--out", "result")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("tether:") == 1
    assert sorted(work.iterdir()) == before


def test_a_ledger_accounts_for_adapters(work, tether):
    for name, text in (("digits", "digits.jsonl"), ("words", "general.jsonl")):
        code, _, err = tether(
            "learn", "base", "--text", text, "--base-text", "general.jsonl", "--adapter", "lora",
            "--out", f"{name}.lora", "--budget", 0.2,
        )  # fmt: skip
        assert code == 0, err
    code, _, err = tether(
        "fuse", "base", "digits.lora", "words.lora=0.5", "--by", "sum", "--out", "both", "--no-gate"
    )
    assert code == 0, err
    code, out, err = tether("ledger", "both", "--text", "general.jsonl", "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert list(figures["domains"]) == ["digits", "words"]
    shares = sum(row["share"] for row in figures["domains"].values())
    assert shares == pytest.approx(figures["total"]["measured"], rel=1e-4)
    assert 0 < figures["total"]["measured"] <= figures["total"]["allowed"]
    # What the removal of one leaves is what the other does alone.
    one, other = figures["domains"]["digits"], figures["domains"]["words"]
    assert figures["total"]["measured"] - one["removal"] == pytest.approx(other["alone"], rel=1e-6)
    code, out, err = tether("fuse", "base", "words.lora=0.5", "--by", "sum", "--out", "single", "--no-gate")
    code, out, err = tether("ledger", "single", "--text", "general.jsonl", "--json")
    assert json.loads(out)["total"]["measured"] == pytest.approx(other["alone"], rel=1e-5)
    code, _, err = tether(
        "fuse", "base", "words.lora", "--gate", "softmax", "--remove", "digits", "--out", "refused"
    )
    assert code == 2
    assert "--remove, --gate softmax with adapters: expected deltas" in err
    assert not (work / "refused").exists()


def test_served_adapters_are_not_trained(work, tether):
    assert tether(*LEARN, "--out", "digits.lora", "--budget", 0.2)[0] == 0
    assert tether("fuse", "base", "digits.lora", "--out", "served")[0] == 0
    code, _, err = tether("train", "served", "--text", "digits.jsonl", "--out", "trained", "--steps", 1)
    assert code == 2
    assert "fused deltas" in err
    assert not (work / "trained").exists()
