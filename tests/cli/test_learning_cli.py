"""Options of `learn`, as a user meets them."""

import json
from pathlib import Path

import pytest

import tiny
from tether.cli.learnt import learnt_told
from tether.delta.delta import Delta
from tether.delta.outcome import NO_HELP
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


def test_learn_with_options_then_fuse(work, tether):
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
    assert "largest latent drift at a training context" in out
    assert Delta.load("words.delta").gate is None

    code, out, err = tether("fuse", "base", "digits.delta", "words.delta", "--no-gate", "--out", "fused")
    assert code == 0, err
    code, out, err = tether("generate", "fused", "1.2 3.4", "--new-tokens", 3)
    assert (code, out[:7]) == (0, "1.2 3.4")


def test_learn_says_in_sentences_what_came_out_and_what_to_type_next(work, tether):
    code, out, err = tether(*LEARN, "--text", "digits.jsonl", "--out", "digits.delta")
    assert code == 0, err
    record, sample = Delta.load("digits.delta").record, Delta.load("digits.delta").sample
    kept, base = record["held_out"], record["base_text"]
    lines = out.splitlines()
    assert lines[0] == f"digits.delta was learnt from {record['tokens']:,} tokens. {kept['note']}"
    assert f"{kept['nll_before']:.3f} before and {kept['nll_after']:.3f} after, a change of" in lines[1]
    assert f"(standard error over {kept['documents']} documents)" in lines[1]
    assert f"{base['nll_before']:.3f} before and {base['nll_after']:.3f} after" in lines[2]
    assert f"KL divergence from the base there is {base['softmax_kl']:.2g} in the mean" in lines[2]
    assert lines[3].startswith(f"{record['budget_used']:.0%} of the budget is used: the mean KL divergence")
    assert lines[3].endswith(record["budget_why"])
    assert f"a sample of what was kept aside: {len(sample)} pieces" in lines[4]
    assert "--no-sample" in lines[4]
    assert "Warning" not in out
    assert lines[-1] == "To use it, type: tether fuse base digits.delta --out digits-fused"
    code, _, err = tether(*lines[-1].partition("tether ")[2].split())
    assert code == 0, err
    assert (work / "digits-fused" / "config.json").is_file()


def test_learn_keeps_private_text_out_of_the_file_and_json_keeps_everything(work, tether):
    code, out, err = tether(
        *LEARN,
        "--text",
        "digits.jsonl",
        "--out",
        "a.delta",
        "--no-sample",
        "--no-gate",
        "--held-out",
        0.3,
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["sample"] == []
    assert found["strengths"] == [1.0]
    assert {
        "factor",
        "factor_budget",
        "held_out",
        "base_text",
        "budget_used",
        "budget_why",
        "warnings",
    } <= set(found)
    assert found["held_out"]["tokens"] > 0.3 * found["tokens"]
    assert b"sample" in (work / "a.delta").read_bytes()
    assert not any(
        document[:30].encode() in (work / "a.delta").read_bytes()
        for document in tiny.documents("digits", 24, 1)
    )
    code, out, err = tether(
        *LEARN, "--text", "digits.jsonl", "--out", "b.delta", "--no-gate", "--held-out", 0
    )
    assert code == 0, err
    assert "No documents were kept aside, as was asked for." in out
    assert "The loss on what was kept aside" not in out
    assert "It carries no sample" in out


def test_learn_prints_a_warning_where_a_domain_was_not_learnt():
    kept = {
        "tokens": 300,
        "documents": 3,
        "kind": "documents",
        "note": "3 documents (300 tokens) were kept aside.",
    }
    record = {
        "tokens": 2000, "warnings": [NO_HELP], "budget": 0.05, "metric": "softmax", "drift_base": 0.001,
        "budget_used": 0.02, "budget_why": "Because.",
        "held_out": kept | {"nll_before": 2.0, "nll_after": 2.1, "change": 0.1, "standard_error": None},
        "base_text": {"tokens": 9, "nll_before": None, "nll_after": None, "softmax_kl": 0.001},
    }  # fmt: skip
    told = learnt_told(record, (), model="a base", out=Path("some/law.delta"), asked=False)
    assert f"Warning: {NO_HELP}" in told
    assert "2.000 before and 2.100 after, a change of +0.100. Losses" in told
    assert "It carries no sample of the domain's text, as was asked for." in told
    assert told.endswith("tether fuse 'a base' some/law.delta --out some/law-fused")
    packed = learnt_told(record | {"quantised": {"bits": 8}}, (), model="b", out=Path("a.lora"))
    assert packed.endswith("tether fuse b a.lora --out a-fused --quantise 8bit")
    small = {"nll_before": 2.0, "nll_after": 1.99, "change": -0.01, "standard_error": 0.02}
    unsure = learnt_told(record | {"held_out": kept | small}, (), model="b", out=Path("a.delta"))
    assert "give or take 0.020 (standard error over 3 documents), which is too little to be sure of" in unsure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*LEARN, "--text", "digits.jsonl", "--out", "a.delta", "--held-out", 0.7), "[0, 0.5]"),
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
    ],
)
def test_unusable_requests_give_one_message_and_exit_2(work, tether, arguments, message):
    code, _, err = tether(*arguments)
    assert code == 2
    assert message in err.replace("\n", " ")
