"""Options of `learn`, and `weigh`, as a user meets them."""

import json

import pytest

import tiny
from tether.delta.delta import Delta
from tether.store.documents import write_documents


@pytest.fixture
def work(tmp_path, monkeypatch):
    tiny.backbone(layers=3).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for name, kind, count, seed in (
        ("digits", "digits", 24, 1),
        ("words", "words", 24, 2),
        ("general", "words", 60, 3),
    ):
        write_documents(tmp_path / f"{name}.jsonl", tiny.documents(kind, count, seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


LEARN = ("learn", "base", "--base-text", "general.jsonl", "--budget", 0.05, "--cache", "cache")


def test_learn_with_options_then_weigh_and_fuse(work, tether):
    code, out, err = tether(
        *LEARN, "--text", "digits.jsonl", "--out", "digits.delta", "--features", "multi", "--location-only",
        "--quantile", 0.9, "--json",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    assert record["quantile"] == 0.9
    assert record["drift_base"] <= 0.05
    delta = Delta.load("digits.delta")
    assert delta.first is None
    assert delta.layers == (1, 2)
    assert delta.gate is not None
    code, out, err = tether(
        *LEARN, "--text", "words.jsonl", "--out", "words.delta", "--no-gate", "--features", "multi", "--hard",
        "--metric", "latent",
    )  # fmt: skip
    assert code == 0, err
    assert "largest drift at a training context" in out
    assert Delta.load("words.delta").gate is None

    code, out, err = tether(
        "weigh", "base", "digits.delta=digits.jsonl", "words.delta=words.jsonl", "--base-text", "general.jsonl",
        "--budget", 0.02, "--cache", "cache", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["drift"] <= 0.02
    assert found["losses"]["optimised"]["digits"] < found["losses"]["base"]["digits"]
    code, out, err = tether(
        "weigh", "base", "digits.delta=digits.jsonl", "words.delta=words.jsonl", "--base-text", "general.jsonl",
        "--budget", 0.02, "--cache", "cache", "--chart", "linear",
    )  # fmt: skip
    assert code == 0, err
    # The command it prints fuses as was weighed.
    command = out.splitlines()[0].split()
    assert command[:3] == ["tether", "fuse", "base"]
    assert command[-2:] == ["--out", "FUSED"]
    code, out, err = tether(*command[1:])
    assert code == 0, err
    described = json.loads((work / "FUSED" / "config.json").read_text())["fusion"]
    assert (described["chart"], described["gated"]) == ("linear", False)
    code, out, err = tether("fuse", "base", "digits.delta", "words.delta", "--no-gate", "--out", "fused")
    assert code == 0, err
    code, out, err = tether("generate", "fused", "1.2 3.4", "--new-tokens", 3)
    assert (code, out[:7]) == (0, "1.2 3.4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*LEARN, "--text", "digits.jsonl", "--out", "a.delta", "--features", "all"), "last, multi"),
        ((*LEARN, "--text", "digits.jsonl", "--out", "a.delta", "--quantile", 2), r"(0, 1)"),
        (
            (*LEARN, "--text", "digits.jsonl", "--out", "a.delta", "--hard", "--quantile", 0.9),
            "every context",
        ),
        (
            (*LEARN, "--text", "digits.jsonl", "--out", "a.delta", "--penalty", 1, "--quantile", 0.9),
            "--penalty with --budget, --quantile",
        ),
        (
            (
                "learn",
                "base",
                "--text",
                "digits.jsonl",
                "--base-text",
                "general.jsonl",
                "--out",
                "digits.jsonl/a.delta",
            ),
            "digits.jsonl is not a folder",
        ),
        ((*LEARN, "--text", "digits.jsonl", "--out", "words.jsonl"), "exists already"),
        ((*LEARN, "--text", "digits.jsonl", "--text=words.jsonl", "--out", "a.delta"), "--text given twice"),
        (("fuse", "base", "--text", "general.jsonl", "--out", "f"), "--text general.jsonl without --budget"),
        (
            ("weigh", "base", "a=b.jsonl", "--base-text", "general.jsonl"),
            "b.jsonl: no such text file",
        ),
        (("weigh", "base", "a.delta", "--base-text", "general.jsonl"), "law.delta=law.jsonl"),
        (("weigh", "base", "a.delta=none.jsonl", "--base-text", "general.jsonl"), "no such text file"),
    ],
)
def test_unusable_requests_give_one_message_and_exit_2(work, tether, arguments, message):
    code, _, err = tether(*arguments)
    assert code == 2
    assert message in err.replace("\n", " ")
