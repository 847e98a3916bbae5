"""The experiment on overfitting: mixtures side by side are mixtures alone, and its verdicts follow its rule."""

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.fars_overfitting import ARMS, Changes, verdicts
from benchmarks.fars_tasks import DIGITS, REGRESSION, Cell, train

WIDTHS, SIZES, SEEDS = (6, 96), (256, 2304), 20
ROOT = Path(__file__).parents[2]
LABELS = {
    "Switch 0.01": "Switch", "Switch 0.1": "Switch 0.1", "the document's sum, tax 1": "paper",
    "the document's code, 0.1": "paper's code", "its control, g=0, 0.1": "its control, g=0",
    "direction 1, tax 0.01": "direction 1", "direction 2, tax 0.01": "direction 2",
    "**balance by direction 2, 0.01**": "balance", "balance by direction 2, 0.1": "balance 0.1",
}  # fmt: skip
CHANGED = (
    "change of the gap, mean of cells", "change of the test loss, mean of cells", "change of the gap, widest experts",
    "change of the gap, widest less narrowest",
)  # fmt: skip


@pytest.mark.parametrize("name", ["balance", "paper's code", "Switch 0.1"])
@pytest.mark.parametrize("task", [REGRESSION, DIGITS])
def test_a_mixture_trains_in_a_cohort_as_it_does_alone(task, name):
    # At most a batch of samples, so that batches are not drawn.
    cell = Cell(task, 4, 100)
    together = train(cell, ARMS[name], [3, 4, 5], 20)
    alone = [train(cell, ARMS[name], [seed], 20) for seed in (3, 4, 5)]
    for key, values in together.items():
        assert values == pytest.approx([one[key][0] for one in alone], rel=1e-4), key
    assert train(cell, ARMS["none"], [3, 4, 5], 20)["train"] != together["train"]


def changes(gap, test=lambda width: 0.0, noise=0.01, only=None):
    """Losses of all arms as of no shaping, but for `balance`: its gap changes by a share, its test loss by another."""
    generator = np.random.default_rng(0)
    found = {}
    for task in ("digits", "regression"):
        losses = {}
        for name in ARMS:
            acts = name == "balance" and only in {None, task}
            for width in WIDTHS:
                for size in SIZES:
                    ends = 1.0 + noise * generator.standard_normal((2, SEEDS))
                    tested = ends[0] * (1 + (test(width) if acts else 0.0))
                    # Without shaping the test loss is 1 and the train loss 0.5.
                    trained = tested - 0.5 * ends[1] * (1 + (gap(width) if acts else 0.0))
                    losses[name, width, size] = {"test": tested, "train": trained}
        found |= {(task, name): Changes(losses, name, WIDTHS, SIZES) for name in ARMS}
    return found


def held(found):
    return {row["case"].split("; baseline")[0].removeprefix("claim: ") for row in found if row["holds"]}


LESS = "balance: less overfitting (smaller gap, test loss not higher)"
WIDER = "balance: the more so the wider the experts"
THAN_SWITCH = "balance: smaller gap than Switch, all experts"


def test_a_claim_holds_where_the_rule_says_so():
    assert held(verdicts(changes(lambda width: 0.0))) == set()
    assert held(verdicts(changes(lambda width: -0.1))) == {LESS, THAN_SWITCH}
    assert held(verdicts(changes(lambda width: -0.001 * width))) == {LESS, WIDER, THAN_SWITCH}


def test_a_smaller_gap_by_a_worse_test_loss_is_no_less_overfitting():
    assert held(verdicts(changes(lambda width: -0.1, lambda width: 0.05))) == {THAN_SWITCH}


def test_one_of_two_tasks_is_not_enough():
    assert held(verdicts(changes(lambda width: -0.1, only="digits"))) == set()


def test_a_change_is_a_share_of_what_no_shaping_has_in_the_same_cell():
    found = changes(lambda width: -0.001 * width, lambda width: 0.2, noise=0.0)["digits", "balance"]
    assert found.gap.shape == found.test.shape == (2, 2, SEEDS)
    assert found.gap[:, 0, 0] == pytest.approx([-0.006, -0.096])
    assert found.test == pytest.approx(np.full_like(found.test, 0.2))
    assert found.widening == pytest.approx(np.full(SEEDS, -0.09))


def test_the_docs_have_the_measured_figures():
    found = json.loads((ROOT / "benchmarks" / "results" / "fars-overfitting.json").read_text())["rows"]
    rows = {(row["case"].split("; baseline")[0], row["metric"]): row for row in found}
    # The page says that no claim holds.
    claims = [row for row in found if row["case"].startswith("claim: ")]
    assert len(claims) == 2 * (len(ARMS) - 1) + 5
    assert not any(row["holds"] for row in claims)
    page = (ROOT / "docs" / "fars.md").read_text(encoding="utf-8")
    page = page.split("## Do over-parameterised experts overfit less?")[1].split("### Real weights")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.split("\n") if line[:1] == "|"
    ]
    both = [line for line in lines if line[0] in LABELS]
    tables = {"regression": both[: len(LABELS)], "digits": both[len(LABELS) :]}
    for task in (REGRESSION, DIGITS):
        assert [line[0] for line in tables[task.name]] == list(LABELS)
        for label, *cells, used in tables[task.name]:
            name = LABELS[label]
            for cell, metric in zip(cells, CHANGED, strict=True):
                row = rows[f"{task.name}: {name}", metric]
                assert cell == f"{100 * row['ours']:+.2f}±{100 * row['error']:.2f}", (
                    task.name,
                    label,
                    metric,
                )
            used_by = [
                rows[f"{task.name}, width {width}, {size} samples: {name}", "effective_experts"]["difference"]
                for width in task.widths
                for size in task.sizes
            ]
            assert used == f"{np.mean(used_by):+.2f}", (task.name, label)
    at = {line[0]: line[1:] for line in lines if line[0].isdigit()}
    for task in (REGRESSION, DIGITS):
        for width in task.widths:
            cells = [
                " / ".join(
                    f"{rows[f'{task.name}, width {width}, {size} samples: none', key]['ours']:.3f}"
                    for key in ("train", "test")
                )
                for size in task.sizes
            ]
            assert at[str(width)] == cells
