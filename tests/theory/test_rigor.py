"""Ball arithmetic against mpmath; enclosures that hold; proofs that fail where the claim is false."""

import json
import subprocess
import sys
from itertools import product

import mpmath as mp
import pytest

import oracles
from tether.errors import CheckpointError, ConfigError
from tether.theory import any_number, balls, two_deltas
from tether.theory.balls import Box, ball, flint, jet, root_slopes, split_at
from tether.theory.cover import cover
from tether.theory.rigor import (
    enclose_equal,
    enclose_many,
    enclose_ratio,
    enclose_split,
    enclose_threshold,
    outside_holds,
)
from tether.theory.witness import EXAMPLES


def contains(one, value):
    """Whether a ball contains an mpf, known to more digits than the ball is wide."""
    middle, radius = (
        mp.mpf(int(m)) * mp.mpf(2) ** int(e) for m, e in (part.man_exp() for part in (one.mid(), one.rad()))
    )
    return abs(middle - value) <= radius


def g_of(s, y):
    return mp.sqrt(oracles.drift(-s, y))


@pytest.mark.parametrize(("s", "y"), list(product(("0.125", "1.5", "6"), ("0.0625", "1", "40"))))
def test_jets_agree_with_mpmath(s, y):
    at = jet(flint().arb(s), flint().arb(y))

    def textbook(a, b):  # at whatever precision a derivative of mpmath works with
        return mp.log(((1 + mp.exp(-a)) ** 2 + b**2) / (4 * mp.exp(-a)))

    with mp.workdps(40):
        s, y = mp.mpf(s), mp.mpf(y)
        for value, order in zip(at, ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)), strict=True):
            assert contains(value, mp.diff(textbook, (s, y), order) if any(order) else textbook(s, y))
        parts = oracles.drift(s, 0) + oracles.drift(0, y)
        assert contains(split_at(flint().arb(float(s)), flint().arb(float(y))), parts)


@pytest.mark.parametrize(
    "box",
    [Box(0.0, 0.25, 0.0, 0.25), Box(0.0, 1.0, 0.5, 2.0), Box(0.5, 1.0, 0.0, 4.0), Box(1.0, 1.5, 1.0, 1.125)],
)
def test_slopes_are_enclosed_over_boxes(box):
    by_s, by_y = root_slopes(box)
    with mp.workdps(30):
        for a, b in product((0.01, 0.3, 0.5, 0.8, 0.99), repeat=2):
            s, y = (mp.mpf(lo + t * (hi - lo)) for lo, hi, t in ((box.s0, box.s1, a), (box.y0, box.y1, b)))
            assert contains(by_s, mp.diff(g_of, (s, y), (1, 0)))
            assert contains(by_y, mp.diff(g_of, (s, y), (0, 1)))


@pytest.mark.parametrize(
    ("count", "want"), [(2, "1.10767457462741750418"), (3, "1.16428205088749"), (10, "1.27495826442183")]
)
def test_equal_constants_are_enclosed(count, want):
    found = enclose_equal(count)
    assert found.holds
    assert found.low <= float(want) <= found.high or abs(found.low - float(want)) < 1e-13
    assert found.high - found.low < 1e-14


def test_k_inf_is_enclosed():
    found = enclose_many(any_number.AROUND_K)
    assert found.holds
    assert 0 < found.high - found.low < 1e-14
    assert found.low <= 1.33853340207435476 <= found.high


def test_other_constants_are_enclosed():
    split, edge = enclose_split(), enclose_threshold()
    assert split.holds
    assert edge.holds
    assert split.low < 1.51180136 < split.high < 1.5118014
    assert 2.911571 < edge.low < 2.91157133619 < edge.high < 2.91157134


@pytest.mark.parametrize("name", EXAMPLES)
def test_counterexamples_are_enclosed(name):
    low, high = enclose_ratio(EXAMPLES[name])
    assert 1 < low <= EXAMPLES[name].ratio() * (1 + 1e-14)
    assert high - low < 1e-14


@pytest.fixture(scope="module")
def proved():
    """Run a proof as a user does: the checks of types that tests switch on would slow it down tenfold."""

    def run(*arguments):
        command = [sys.executable, "-m", "tether.cli.app", "theory", "enclose", *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert record["holds"]
        assert record["outside"]
        assert all(part["failures"] == 0 for part in record["parts"].values())
        return record["parts"]["sums"]["proofs"]

    return run


def test_theorem_1_is_proved(proved):
    assert set(proved("any")) == {"split", "sector", "minorant"}


def test_theorem_2_is_proved_around_its_maximum(proved):
    assert set(proved("two", "--fast")) == {"pairs", "convex", "mean value"}


@pytest.mark.slow
@pytest.mark.long
def test_theorem_2_is_proved(proved):
    proofs = proved("two")
    assert proofs["mean value"] > 100_000
    assert proofs["convex"] > 1000
    assert proofs["split"] > 100


def test_a_false_minorant_is_refused():
    arb = flint().arb
    assert any_number.minorant_holds(arb("0.35"), arb("0.34"), 1.0, 1.0)
    assert not any_number.minorant_holds(arb("0.4"), arb("0.35"), 1.0, 1.0)  # longer than 1/2
    assert not any_number.minorant_holds(arb("0.01"), arb("0.49"), 0.5, 6.0)  # above g at the far edge


def test_a_constant_that_is_too_small_is_not_proved(monkeypatch):
    arb = flint().arb
    box = Box(0.97, 0.98, 1.04, 1.05)
    top = balls.drift_at(arb(box.s1), arb(box.y1))
    assert not any_number.minorant_covers(box, top, arb("1.33"))
    assert any_number.minorant_covers(box, top, arb("1.42"))
    assert not outside_holds(arb("1.3"), any_number.REGION)
    # Without convexity, which is about the constant itself, two equal deltas at the maximum are beyond proof.
    monkeypatch.setattr(two_deltas, "_contains", lambda box: False)
    cell = (0.67, 0.68, 0.69, 0.70, 0.4, 0.5, 0.4, 0.6)
    pairs = cover([cell], lambda c: two_deltas._prove_pairs(c, arb("1.1")), limit=300)
    assert not pairs.holds
    assert cover([cell], lambda c: two_deltas._prove_pairs(c, arb("1.15")), limit=300).holds


def test_covers_resume_and_refuse_foreign_states(tmp_path):
    state = tmp_path / "state.json"
    seen = []

    def prove(cell):
        seen.append(cell)
        if len(seen) == 1900:
            raise KeyboardInterrupt
        return "small" if cell[1] - cell[0] < 0.3 else 0

    starts = [(float(k), float(k + 1)) for k in range(300)]
    with pytest.raises(KeyboardInterrupt):
        cover(starts, prove, state=state, key="a line")
    assert json.loads(state.read_text())["done"] == 200
    whole = cover(starts, prove, state=state, key="a line")
    assert whole == cover(starts, prove, key="a line")
    assert whole.proofs == {"small": 1200}
    assert whole.cells == 2100
    before = len(seen)
    assert cover(starts, prove, state=state, key="a line") == whole  # nothing left to do
    assert len(seen) == before
    with pytest.raises(CheckpointError, match="a state of"):
        cover(starts, prove, state=state, key="another line")
    state.write_text("{}")
    with pytest.raises(CheckpointError, match="not a state"):
        cover(starts, prove, state=state, key="a line")


def test_a_cell_that_resists_is_a_failure():
    assert cover([(0.0, 1.0)], lambda cell: 0, limit=50).failures == 1
    assert not cover([(0.0, 1.0)], lambda cell: 0).holds


def test_without_python_flint_the_way_out_is_named(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(balls, "import_module", absent)
    with pytest.raises(ConfigError, match="python-flint"):
        ball(0.0, 1.0)
