"""The demo on real weights, in its small version: whole, killed five times, and verified."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from tether.delta.delta import Delta

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "tether.cli.app"]


def start(folder):
    return subprocess.Popen(
        [*COMMAND, "demo", "--fast", "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo that was killed at five moments and then left to finish."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    moments = random.Random(0)
    for _ in range(5):
        process = start(folder)
        # Between the imports and somewhere in the stages; every start gets further.
        time.sleep(moments.uniform(8, 20))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in folder.rglob("*.delta"):
            Delta.load(path)
        for path in folder.glob("stages/*.json"):
            json.loads(path.read_text())
    process = start(folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return folder, out


def test_the_next_start_finishes_and_leaves_nothing_half_done(demo):
    folder, out = demo
    assert leftovers(folder) == []
    for name in ("certificate.json", "report.html", "table.json", "overview.png", "fused/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert "report.html" in out
    process = start(folder)
    began = time.monotonic()
    again, _ = process.communicate()
    assert again == out
    assert time.monotonic() - began < 30


def test_the_small_version_already_shows_what_the_demo_claims(demo):
    results = json.loads((demo[0] / "table.json").read_text())
    budget = results["budget"]["value"]
    for name, record in results["deltas"].items():
        assert results["cells"][name][name]["nll"] < results["cells"][name]["base"]["nll"]
        assert record["drift_base"] <= budget
    for text, cells in results["cells"].items():
        if results["texts"][text]["kind"] == "base":
            assert cells["evidence"]["softmax_kl"]["mean"] <= 0.001
        for column in results["columns"][1:]:
            if column != "evidence":
                assert cells[column]["bound"]["violations"] == 0
        served = cells["evidence"]
        assert [served[name]["violations"] for name in ("parts", "worst_token")] == [0, 0]
        assert all(party["violations"] == 0 for party in served["regret"].values())
    assert results["bounds"]["contexts"] > 10_000


def test_verify_holds_then_fails_after_one_byte(demo):
    certificate = demo[0] / "certificate.json"
    good = subprocess.run([*COMMAND, "verify", str(certificate)], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout + good.stderr
    text = demo[0] / "texts" / "news.jsonl"
    content = text.read_bytes()
    try:
        text.write_bytes(content[:-2] + b" " + content[-1:])
        bad = subprocess.run(
            [*COMMAND, "verify", str(certificate)], capture_output=True, text=True, check=False
        )
    finally:
        text.write_bytes(content)
    assert bad.returncode == 1


def test_other_options_in_the_same_folder_are_refused(demo):
    run = subprocess.run(
        [*COMMAND, "demo", "--out", str(demo[0])], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "train_tokens" in run.stderr
    assert (demo[0] / "report.html").exists()
