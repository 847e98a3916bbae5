"""Commands that are killed, terminated and interrupted, then left to finish: the same results, and nothing left over.

Each command runs in a process of its own that is forked from this one, so that libraries are imported once.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace

import pytest
import torch

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.cli.app import main
from tether.cli.asked import listen
from tether.delta.adapter import Adapter
from tether.delta.delta import Delta
from tether.demo.pipeline import run_demo
from tether.demo.plan import Plan
from tether.store.documents import write_documents
from tether.store.reader import CheckpointReader

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
    pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning"),
]

KILLS = 6
TEXTS = ["--text", "../digits.jsonl", "--base-text", "../words.jsonl"]
COMMANDS = {
    "learn": ["learn", "../base", *TEXTS, "--cache", "cache", "--out", "digits.delta"],
    "learn without cache": ["learn", "../base", *TEXTS, "--tokens", "1500", "--out", "digits.delta"],
    "adapter": ["learn", "../base", *TEXTS, "--adapter", "lora", "--cache", "cache", "--out", "lora"],
    "fuse": ["fuse", "../base", "../digits.delta", "--no-gate", "--out", "fused"],
    "train": ["train", "../base", "--text", "../digits.jsonl", "--options", "../quick.yaml", "--out", "run"],
    "demo": None,
}  # fmt: skip
MADE = {
    "learn": "digits.delta",
    "learn without cache": "digits.delta",
    "adapter": "lora",
    "fuse": "fused",
    "train": "run",
    "demo": "run",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.backbone().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    write_documents(folder / "digits.jsonl", tiny.documents("digits", 40, 1))
    write_documents(folder / "words.jsonl", tiny.documents("words", 40, 2))
    (folder / "temporary").mkdir()
    (folder / "quick.yaml").write_text("batch: 4\nlr: 3e-3\nwindow: 48\nsave_every: 2\n")
    base = tiny.backbone()
    heads = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)) / 64
    print_of = CausalQwenForCausalLM.from_backbone(base).config.base_fingerprint
    Delta(
        name="digits", chart="symmetric", first=heads[0], second=heads[1], gate=None, base=print_of,
        record={"budget": 0.1, "metric": "softmax"},
    ).save(folder / "digits.delta")  # fmt: skip
    return folder


def start(name, folder, base):
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        tempfile.tempdir = str(folder.parent / "temporary")
        said = os.open(folder.parent / f"{folder.name}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if COMMANDS[name] is None:
            listen()
            plan = Plan(
                base=str(base), train_tokens=3000, test_tokens=600, base_documents=12, base_test_documents=3
            )
            run_demo("run", replace(plan, budget=0.1, new_tokens=4), lambda _: lambda _: None)
            code = 0
        else:
            sys.argv = ["tether", *COMMANDS[name]]
            main()
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hidden(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]


def content(name, folder):
    """What a command has made, without the seconds it took."""
    if name.startswith("learn"):
        delta = Delta.load(folder / "digits.delta")
        record = {key: value for key, value in delta.record.items() if key != "cpu_seconds"}
        return record, delta.sample, CheckpointReader(folder / "digits.delta")
    if name == "adapter":
        adapter = Adapter.load(folder / "lora")
        record = {key: value for key, value in adapter.record.items() if key != "cpu_seconds"}
        return record, adapter.sample, CheckpointReader(folder / "lora" / "adapter_model.safetensors")
    kept = {
        "fuse": ["fused"],
        "train": ["run/model"],
        "demo": ["run/texts", "run/states", "run/measurements"],
    }
    files = {}
    for part in kept[name]:
        for path in sorted((folder / part).rglob("*")):
            if path.is_file() and (name != "train" or path.suffix == ".safetensors"):
                files[str(path.relative_to(folder))] = path.read_bytes()
    assert files
    return files


def same(one, two):
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        assert [path for path in one if one[path] != two[path]] == []
        return
    assert one[:2] == two[:2]
    assert one[2].names == two[2].names
    for tensor in one[2].names:
        assert torch.equal(one[2].tensor(tensor), two[2].tensor(tensor))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_again_and_again_ends_as_if_it_had_not_been(name, work):
    moments, place = random.Random(name), name.replace(" ", "-")
    calm, disturbed = work / f"{place}-calm", work / f"{place}-disturbed"
    began = time.monotonic()
    assert end(start(name, calm, work / "base")) == 0, (work / f"{calm.name}.said").read_text()
    took, kills, tries, left = time.monotonic() - began, 0, 0, set()
    while kills < KILLS:
        tries += 1
        assert tries < 5 * KILLS
        child = start(name, disturbed, work / "base")
        time.sleep(moments.uniform(0.1, 0.9) * took)
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[kills % 3]
        os.kill(child, how)
        code = end(child)
        made = disturbed / MADE[name]
        if made.exists() and (code == 0 or name not in ("train", "demo")):
            # What was published before the signal came is whole; it is not written twice.
            same(content(name, disturbed), content(name, calm))
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        if code == 0:
            continue
        kills += 1
        said = (work / f"{disturbed.name}.said").read_text()
        assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130), said
        # What a kill has left stays until the name is written again; the other signals leave nothing.
        left, before = set(hidden(disturbed)), left
        assert how == signal.SIGKILL or left <= before, said
        assert list((work / "temporary").iterdir()) == []
    assert end(start(name, disturbed, work / "base")) == 0, (work / f"{disturbed.name}.said").read_text()
    assert hidden(disturbed) == []
    assert list((work / "temporary").iterdir()) == []
    same(content(name, disturbed), content(name, calm))


def test_after_a_signal_at_nine_tenths_of_a_caching_the_next_start_has_that(work):
    folder = work / "tenths"
    child = start("learn", folder, work / "base")
    first, of = None, 0
    while not of or len(list(first.glob("part-*"))) < 0.9 * of:
        time.sleep(0.001)
        if first is None:
            first = next(iter((folder / "cache").glob("states-*")), None)
        elif not of:
            of = next((int(path.stem.rpartition("-of-")[2]) for path in first.glob("part-*")), 0)
    os.kill(child, signal.SIGTERM)
    end(child)
    assert of >= 16
    there = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert all(path.name.startswith("part-") for path in there)
    assert len(there) / of >= 0.85
    assert end(start("learn", folder, work / "base")) == 0
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert len(list(first.iterdir())) == of
