"""The theory lab as a user meets it: results on stdout, exit codes, one message for bad input."""

import json
import sys

import pytest
import torch

from tether.cli.app import main
from tether.theory.catalogue import STATEMENTS


@pytest.fixture
def theory(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tether", "theory", *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_statements(theory):
    code, out, _ = theory("statements", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [one["name"] for one in listed] == list(STATEMENTS)
    text = theory("statements")[1]
    assert all(name in text for name in STATEMENTS)


def test_falsify_main(theory):
    code, out, _ = theory("falsify", "main", "--n", 2, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ratio"] >= 1.1076
    assert found["precise_ratio"].startswith("1.10767457462741750418")
    assert len(found["deltas"]) == 2
    assert found["witness"]["holds"] is True
    assert found["effort"]["evaluations"] > 1000
    text = theory("falsify", "main", "--n", 2)[1]
    assert "FAILS" in text
    assert "41/16" in text


def test_falsify_weighted_with_a_weight(theory):
    found = json.loads(theory("falsify", "weighted", "--weights=-1", "--json")[1])
    assert found["ratio"] == pytest.approx(3.341584, abs=1e-6)
    assert found["weights"] == [-1.0]
    assert found["witness"]["deltas"][0]["weight"] == "-1"


def test_falsify_a_true_statement_states_its_effort(theory):
    code, out, _ = theory("falsify", "symmetric", "--points", 200_000, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["violated"] is False
    assert found["sweep"]["points"] >= 200_000
    assert found["sweep"]["violations"] == 0
    text = theory("falsify", "k-inf", "--n", 3, "--points", 2000)[1]
    assert "no violation found" in text
    assert "0 violations in" in text


def test_constants(theory):
    code, out, _ = theory("constants", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["C"]["2"] == pytest.approx(1.10767457, abs=5e-9)
    assert found["C"]["3"] == pytest.approx(1.16428205, abs=5e-9)
    assert found["C"]["10"] == pytest.approx(1.27495826, abs=5e-9)
    assert found["K_inf"] == pytest.approx(1.33853340, abs=5e-9)
    assert len(found["C"]) == 99
    assert found["B_over_drift"]["weights"]["-1"] == pytest.approx(
        [1.01558, 1.17295, 1.69498, 3.27399, 3.08630, 3.00863], rel=5e-6
    )
    assert found["B_over_drift"]["weights"]["2"] == pytest.approx(
        [4.03041, 4.26187, 4.41377, 3.24848, 2.16739, 2.01674], rel=5e-6
    )
    assert "1.3385334021" in theory("constants", "--n", 3)[1]


def test_experiments_and_figures(theory, tmp_path):
    code, out, _ = theory("experiments", "--samples", 2000, "--figures", tmp_path, "--json")
    found = json.loads(out)
    assert code == 0
    assert all(row["held_document"] == 1 for row in found["rows"])
    assert found["exact"]["holds"] is True
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["drift-constants.png", "drift-shrinking.png", "drift-violations.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    text = theory("experiments", "--samples", 1000)[1]
    assert "41/16" in text
    assert "100% of 100" in text


def test_enclosures(theory):
    code, out, _ = theory("enclose", "counterexamples", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["holds"] is True
    assert all(one["low"] > 1 for one in found["counterexamples"])
    code, out, _ = theory("enclose", "polygons")
    assert code == 2


def test_plan(theory):
    command = ("plan", "--budgets", "0.1,0.2,0.1", "--weights", "1,0.5,1", "--chart", "symmetric")
    code, out, _ = theory(*command, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["bound"] == pytest.approx(0.7475, abs=5e-5)
    assert [domain["fit"] for domain in found["domains"]] == [3, 4, 3]
    assert "0.7475 nats" in theory(*command)[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("falsify", "mean"), "unknown statement 'mean'"),
        (("falsify", "weighted", "--weights", "one"), "expected numbers"),
        (("falsify", "main", "--weights", "2,2"), "weights 1"),
        (("plan", "--budgets", "0.1,x"), "expected numbers"),
        (("plan", "--budgets", "0.1", "--chart", "flat"), "unknown chart 'flat'"),
        (("plan", "--budgets=-0.1"), "negative"),
        (("enclose", "polygons"), "unknown enclosure 'polygons'"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(theory, arguments, said):
    code, out, err = theory(*arguments)
    assert code == 2
    assert out == ""
    assert said in " ".join(err.split())
