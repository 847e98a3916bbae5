import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from disk import nearly_full
from tether.errors import CheckpointError, ConfigError
from tether.runs import Run, Usage, read_run
from tether.runs.record import hash_json
from tether.store.publish import publish_folder

CONFIG = {"seed": 0, "train": {"lr": 0.1, "texts": ["a", "b"]}}


class Work:
    """A stage that writes a file and a folder, and counts how often it was done."""

    def __init__(self, run, content="x"):
        self.run, self.content, self.calls = run, content, 0

    def __call__(self):
        self.calls += 1
        (self.run.folder / "law.txt").write_text(self.content)
        (self.run.folder / "model").mkdir(exist_ok=True)
        (self.run.folder / "model" / "weights").write_text(self.content * 2)
        return [self.run.folder / "law.txt", self.run.folder / "model"], {"nll": 2.5, "n": 3}


def test_stage_is_done_once(tmp_path):
    folder = tmp_path / "new" / "run"
    for attempt in range(3):
        with Run(folder, CONFIG) as run:
            work = Work(run)
            assert run.done("learn-law") == (attempt > 0)
            assert run.stage("learn-law", work) == {"nll": 2.5, "n": 3}
            assert run.stage("learn-law", work) == {"nll": 2.5, "n": 3}
            assert work.calls == (1 if attempt == 0 else 0)
            assert run.done("learn-law")
            assert not run.done("learn-code")


def test_record_says_what_was_written_and_what_it_cost(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        run.stage("learn", Work(run), inputs=[])
        record = run.record("learn")
    assert record["outputs"] == {
        "law.txt": {"size": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"},
        "model/weights": {
            "size": 2,
            "sha256": "5dde896887f6754c9b15bfe3a441ae4806df2fde94001311e08bf110622e0bbe",
        },
    }
    assert record["figures"] == {"nll": 2.5, "n": 3}
    assert record["wall_seconds"] > 0
    assert record["cpu_seconds"] >= 0
    assert record["peak_rss_bytes"] > 10_000_000


@pytest.mark.parametrize("damage", ["missing", "size", "byte", "folder"])
def test_stage_is_done_again_when_an_output_changed(tmp_path, damage):
    with Run(tmp_path / "run", CONFIG) as run:
        work = Work(run)
        run.stage("learn", work)
        if damage == "missing":
            (run.folder / "model" / "weights").unlink()
        elif damage == "size":
            (run.folder / "law.txt").write_text("xx")
        elif damage == "byte":
            (run.folder / "law.txt").write_text("y")
        else:
            (run.folder / "law.txt").unlink()
            (run.folder / "law.txt").mkdir()
            (run.folder / "law.txt").rmdir()
        assert not run.done("learn")
        run.stage("learn", work)
        assert work.calls == 2
        assert run.done("learn")


def test_stage_is_done_again_when_an_input_changed(tmp_path):
    outside = tmp_path / "texts"
    outside.mkdir()
    (outside / "a").write_text("1")
    with Run(tmp_path / "run", CONFIG) as run:
        first, second = Work(run), Work(run)
        run.stage("first", first, inputs=[outside])
        run.stage("second", second, inputs=[run.folder / "law.txt"])
        assert run.record("second")["inputs"].keys() == {"law.txt"}
        (outside / "a").write_text("2")
        assert not run.done("first")
        assert run.done("second")
        first.content = "y"
        run.stage("first", first, inputs=[outside])
        assert not run.done("second")
        run.stage("second", second, inputs=[run.folder / "law.txt"])
        assert (first.calls, second.calls) == (2, 2)
        (outside / "a").rename(outside / "b")
        assert not run.done("first")
        run.stage("second", second, inputs=[])
        assert second.calls == 3
        (outside / "b").unlink()
        outside.rmdir()
        assert not run.done("first")
        with pytest.raises(CheckpointError, match=r"missing: .*texts, .*nowhere"):
            run.stage("first", first, inputs=[outside, tmp_path / "nowhere"])


def test_run_can_be_moved(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        run.stage("first", Work(run))
        run.stage("second", Work(run), inputs=[run.folder / "model"])
    (tmp_path / "run").rename(tmp_path / "moved")
    with Run(tmp_path / "moved", CONFIG) as run:
        assert run.done("first")
        assert run.done("second")


def test_failed_stage_has_no_record_and_the_old_one_is_gone(tmp_path):
    def fail():
        raise ZeroDivisionError

    with Run(tmp_path / "run", CONFIG) as run:
        work = Work(run)
        run.stage("learn", work)
        (run.folder / "law.txt").write_text("")
        with pytest.raises(ZeroDivisionError):
            run.stage("learn", fail)
        # The same size again: only a record could vouch for it, and there is none.
        (run.folder / "law.txt").write_text("x")
        assert not run.done("learn")
        run.stage("learn", work)
        assert work.calls == 2


def test_outputs_that_are_not_there_are_all_named(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        (run.folder / "empty").mkdir()
        missing = [run.folder / "empty", run.folder / "ghost", run.folder / "run.json"]
        with pytest.raises(CheckpointError, match=r"learn did not write.*: \S*/empty, \S*/ghost\. Expected"):
            run.stage("learn", lambda: (missing, {}))
        assert not run.done("learn")


def test_figures_are_the_same_now_and_later(tmp_path):
    figures = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": (1, 2),
        "d": math.inf,
        "e": {"f": None, "g": True},
    }
    with Run(tmp_path / "run", CONFIG) as run:
        now = run.stage("learn", lambda: ([], figures))
        assert now == run.stage("learn", lambda: ([], {}))
        assert type(now["b"]) is int
        assert now == {"a": 0.5, "b": 3, "c": [1, 2], "d": math.inf, "e": {"f": None, "g": True}}
        assert math.isnan(run.stage("nan", lambda: ([], {"x": math.nan}))["x"])
        with pytest.raises(ConfigError, match=r"object is not JSON.*Convert the rest"):
            run.stage("other", lambda: ([], {"x": object()}))


FIELDS = {"schema_version": 1, "config_hash": hash_json(CONFIG), "inputs": {}, "outputs": {}, "figures": {}}
WRONG = [
    {"outputs": []},
    {"outputs": {"law.txt": 3}},
    {"outputs": {"law.txt": {"size": 1}}},
    {"figures": [1]},
]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema_version": 99}',
        "[" * 100_000,
        *[json.dumps(FIELDS | each) for each in WRONG],
    ],
)
def test_record_that_cannot_be_read_is_no_record(tmp_path, content):
    with Run(tmp_path / "run", CONFIG) as run:
        work = Work(run)
        run.stage("learn", work)
        (run.folder / "stages" / "learn.json").write_text(content)
        assert not run.done("learn")
        assert "learn" not in read_run(run.folder).stages
        run.stage("learn", work)
        assert work.calls == 2


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_names_that_are_no_files(tmp_path, name):
    with Run(tmp_path / "run", CONFIG) as run:
        with pytest.raises(ConfigError, match="a stage was named"):
            run.stage(name, lambda: ([], {}))
        with pytest.raises(ConfigError, match="a stage was named"):
            run.done(name)


def test_other_configuration_is_refused_with_the_keys(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        run.stage("learn", Work(run))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    other = {"seed": 0, "train": {"lr": 0.2, "texts": ["a", "b"], "steps": 5}}
    with pytest.raises(ConfigError) as caught, Run(run.folder, other):
        pytest.fail("entered")
    message = str(caught.value)
    assert "train.lr (given 0.2, there 0.1)" in message
    assert "train.steps (given 5, there (absent))" in message
    assert "seed" not in message
    assert "texts" not in message
    assert "Choose another folder, or pass the same options" in message
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    with Run(run.folder, CONFIG) as run:  # the refused attempt holds no lock
        assert run.done("learn")


@pytest.mark.parametrize(
    ("there", "given"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": 1}, {"a": 1.0}),
        ({"a.b": 1}, {"a": {"b": 1}}),
        ({}, {"a": {}}),
        ({"a": None}, {}),
    ],
)
def test_similar_configurations_differ(tmp_path, there, given):
    with Run(tmp_path / "run", there):
        pass
    with (
        pytest.raises(ConfigError, match=r"options: a(\.b)? \(given .*, there .*\)"),
        Run(tmp_path / "run", given),
    ):
        pytest.fail("entered")


def test_records_of_another_configuration_do_not_count(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        run.stage("learn", lambda: ([], {"seed": 0}))
    with Run(tmp_path / "other", {"seed": 1}) as other:
        shutil.copytree(run.folder / "stages", other.folder / "stages")
        assert not other.done("learn")
        assert other.stage("learn", lambda: ([], {"seed": 1})) == {"seed": 1}


def test_order_of_keys_and_tuples_do_not_matter(tmp_path):
    with Run(tmp_path / "run", {"a": 1, "b": (1, 2)}) as run:
        assert run.config == {"a": 1, "b": [1, 2]}
    with Run(tmp_path / "run", {"b": [1, 2], "a": 1}):
        pass


def test_configuration_must_be_json(tmp_path):
    for bad in ({"a": object()}, {"a": math.nan}, {"a": Path()}):
        with pytest.raises(ConfigError, match=r"configuration of run .* cannot be JSON"):
            Run(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"not the folder of a run.*precious\.txt.*Choose another"):
        Run(tmp_path, CONFIG).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(ConfigError, match="cannot be made"):
        Run(tmp_path / "precious.txt", CONFIG).__enter__()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"schema_version": 1}', "damaged"),
        ('{"schema_version": 2, "config": {}, "config_hash": ""}', "schema version 2; expected 1"),
        ('{"schema_version": 1, "config": {}, "config_hash": ""}', "changed by hand"),
    ],
)
def test_damaged_run_is_refused(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Run(tmp_path, CONFIG).__enter__()
    with pytest.raises(CheckpointError, match=message):
        read_run(tmp_path)


def test_reopening_removes_what_killed_writers_left(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        run.stage("learn", Work(run))
    # Whoever left these is gone, for the lock was free; so the number does not matter.
    leftovers = [
        run.folder / f".model.tmp-{os.getpid()}-0123abcd",
        run.folder / "stages" / ".a.json.tmp-1-0123abcd",
    ]
    leftovers[0].mkdir()
    (leftovers[0] / ".part.tmp-5-0123abcd").write_text("x")
    leftovers[1].write_text("x")
    (run.folder / ".keep").write_text("x")
    with Run(run.folder, CONFIG) as run:
        assert not [path for path in leftovers if path.exists()]
        assert (run.folder / ".keep").exists()
        assert run.done("learn")


def test_metrics_are_read_back(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        run.log({"step": 1, "loss": np.float32(0.5)})
        run.log({"step": 2, "loss": math.inf, "text": "a\nb é"})
    with Run(tmp_path / "run", CONFIG) as run:
        run.log({"step": 3})
        expected = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.inf, "text": "a\nb é"}, {"step": 3}]
        assert run.metrics() == expected
        assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 3
        with pytest.raises(ConfigError, match="stage"):
            run.log({"stage": 1})
        with pytest.raises(ConfigError, match="cannot be JSON"):
            run.log({"x": object()})
        assert run.metrics() == expected


@pytest.mark.parametrize("torn", [1, 5, 11])
def test_torn_last_line_is_dropped_and_not_continued(tmp_path, torn):
    with Run(tmp_path / "run", CONFIG) as run:
        run.log({"step": 1})
        run.log({"step": 2})
    path = run.folder / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - torn)
    assert run.metrics() == [{"step": 1}]
    with Run(tmp_path / "run", CONFIG) as run:
        run.log({"step": 3})
        assert run.metrics() == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("line", [b"{", b"3", b"\x00\xff", b"[" * 100_000])
def test_damaged_line_in_the_middle_is_an_error(tmp_path, line):
    with Run(tmp_path / "run", CONFIG) as run:
        (run.folder / "metrics.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
        with pytest.raises(CheckpointError, match=r"line 2 of .*metrics\.jsonl is damaged"):
            run.metrics()


def test_lines_of_an_attempt_that_was_begun_again_do_not_count(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:

        def broken():
            run.log({"step": 1})
            run.log({"step": 1 // 0})

        def whole():
            run.log({"step": 1, "try": 2})
            return [], {}

        run.log({"before": 1})
        with pytest.raises(ZeroDivisionError):
            run.stage("learn", broken)
        assert run.metrics() == [{"before": 1}, {"stage": "learn", "step": 1}]
        run.log({"between": 1})
        run.stage("learn", whole)
        run.stage("learn", whole)
        run.log({"after": 1})
        expected = [{"before": 1}, {"between": 1}, {"stage": "learn", "step": 1, "try": 2}, {"after": 1}]
        assert run.metrics() == expected


def test_line_that_does_not_fit_on_the_disk_leaves_no_trace(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        run.log({"step": 1})
        message = r"metrics\.jsonl cannot be written \(File too large\)"
        with pytest.raises(CheckpointError, match=message), nearly_full(1000):
            run.log({"text": "x" * 2000})
        with pytest.raises(CheckpointError, match=r"learn\.json could not be written"), nearly_full(1000):
            run.stage("learn", lambda: ([], {"text": "x" * 2000}))
        run.log({"step": 2})
        assert run.metrics() == [{"step": 1}, {"step": 2}]
        assert not list((run.folder / "stages").iterdir())


def test_history_is_read_while_the_run_goes_on(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        run.stage("learn", Work(run))
        run.log({"step": 1})
        history = read_run(run.folder)
    assert history.config == CONFIG
    assert history.stages["learn"]["figures"] == {"nll": 2.5, "n": 3}
    assert history.metrics == [{"step": 1}]
    with pytest.raises(CheckpointError, match=r"has no run\.json"):
        read_run(tmp_path)


def test_run_that_is_not_entered(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    for call in (lambda: run.log({"a": 1}), lambda: run.stage("a", lambda: ([], {}))):
        with pytest.raises(ConfigError, match="is not open"):
            call()
    with run:
        pass
    with pytest.raises(ConfigError, match="is not open"):
        run.log({"a": 1})


def test_one_process_at_a_time(tmp_path):
    with (
        Run(tmp_path / "run", CONFIG),
        pytest.raises(ConfigError, match="in use by another process"),
    ):
        Run(tmp_path / "run", CONFIG).__enter__()
    with Run(tmp_path / "run", CONFIG):
        pass


THREE_STAGES = """
import sys, time
from pathlib import Path
from tether.runs import Run
from tether.store.publish import publish_folder
with Run(sys.argv[1], {"seed": 0}) as run:
    for number in range(3):
        def work():
            print(number, flush=True)
            with publish_folder(run.folder / f"out-{number}", replace=True) as temporary:
                for part in range(30):
                    (temporary / str(part)).write_text(str(number))
                    run.log({"part": part})
                    time.sleep(float(sys.argv[2]))
            return [run.folder / f"out-{number}"], {"number": number}
        assert run.stage(f"stage-{number}", work) == {"number": number}
"""


def test_killed_run_releases_its_lock_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    started = []
    for lines in (1, 1, 2):
        command = [sys.executable, "-c", THREE_STAGES, str(folder), "0.004"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            started += [int(child.stdout.readline()) for _ in range(lines)]
            with pytest.raises(ConfigError, match="in use by another process"):
                Run(folder, {"seed": 0}).__enter__()
            time.sleep(0.05)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert [path for path in folder.iterdir() if ".tmp-" in path.name]
    assert started == [0, 0, 0, 1]
    done = subprocess.run(
        [sys.executable, "-c", THREE_STAGES, str(folder), "0"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "2"]
    history = read_run(folder)
    assert [history.stages[f"stage-{number}"]["figures"]["number"] for number in range(3)] == [0, 1, 2]
    assert not list(folder.rglob(".*"))
    parts = [{"stage": f"stage-{number}", "part": part} for number in range(3) for part in range(30)]
    assert history.metrics == parts


def test_killed_between_output_and_record(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:

        def work():
            with publish_folder(run.folder / "model", replace=True) as temporary:
                (temporary / "a").write_text("x")
            return [run.folder / "model"], {}

        run.stage("learn", work)
        (run.folder / "stages" / "learn.json").unlink()
        run.stage("learn", work)
        assert run.done("learn")


def test_usage_counts_this_process_and_its_children():
    with Usage() as own:
        deadline = time.process_time() + 0.1
        while time.process_time() < deadline:
            pass
    assert 0.08 < own.cpu_seconds < 1
    assert own.wall_seconds >= 0.09
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    with Usage() as child:
        subprocess.run([sys.executable, "-S", "-c", burn], check=True)
    assert child.cpu_seconds > 0.25
    with Usage() as idle:
        time.sleep(0.1)
    assert idle.cpu_seconds < 0.09
    assert idle.wall_seconds >= 0.1


def test_peak_memory_is_seen():
    with Usage() as before:
        pass
    size = before.peak_rss_bytes + 50_000_000
    with Usage() as usage:
        held = np.ones(size // 8)
    assert usage.peak_rss_bytes >= held.nbytes
    assert usage.peak_rss_bytes < size * 3


def test_run_file_holds_config_and_hash(tmp_path):
    with Run(tmp_path / "run", CONFIG) as run:
        content = json.loads((run.folder / "run.json").read_text())
    assert content["config"] == CONFIG
    assert len(content["config_hash"]) == 64
