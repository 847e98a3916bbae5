"""What `make conformance` makes of outcomes and its table, and that the page says what the table says."""

import tomllib
from pathlib import Path

import pytest
from benchmarks.conformance import TABLE, explain
from benchmarks.conformance_cases import cases

KNOWN = {"tests": ["test_known", "test_wide_*"], "outcome": "failed", "reason": "not built"}
PLAIN = ("llama-softmax-plain", "test_known")


@pytest.mark.parametrize(
    ("outcome", "entries", "said"),
    [
        ("passed", [], None),
        ("failed", [KNOWN], None),
        ("failed", [], "failed, expected passed"),
        ("skipped", [], "skipped, expected passed"),
        ("skipped", [KNOWN], "skipped, expected failed"),
        ("passed", [KNOWN], "passed, expected failed"),
        ("failed", [KNOWN | {"cases": ["*-evidence"]}], "failed, expected passed"),
        ("failed", [KNOWN | {"cases": ["llama-*"]}], None),
        ("failed", [KNOWN, KNOWN], "2 entries"),
    ],
)
def test_whatever_the_table_does_not_say_is_reported(outcome, entries, said):
    odd = explain({PLAIN: (outcome, "Traceback\n  why")}, entries, whole=False)
    assert len(odd) == (said is not None)
    assert said is None or said in odd[0]


def test_an_entry_that_fits_no_test_is_reported_when_all_are_run():
    outcomes = {PLAIN: ("passed", "")}
    other = KNOWN | {"tests": ["test_gone"]}
    assert explain(outcomes, [other], whole=False) == []
    assert "test_gone: in the table" in explain(outcomes, [other], whole=True)[0]


def test_every_entry_has_a_reason_and_stands_on_the_page():
    page = (Path(__file__).parents[1] / "docs" / "conformance.md").read_text(encoding="utf-8")
    for entry in tomllib.loads(TABLE.read_text(encoding="utf-8"))["expected"]:
        assert set(entry) <= {"tests", "cases", "outcome", "checkout", "reason"}
        assert entry["outcome"] in ("failed", "skipped")
        tests = ", ".join(f"`{each.removeprefix('test_')}`" for each in entry["tests"])
        fits = ", ".join(f"`{each}`" for each in entry.get("cases", [])) or "all"
        assert f"| {tests} | {fits} | {entry['outcome']} | {entry['reason']} |" in page


def test_cases_are_all_backbones_modes_and_fusions():
    made = ["-".join(case) for case in cases()]
    assert len(set(made)) == len(made) == 4 * 2 * 2
    assert made[0] == "qwen2-softmax-plain"
