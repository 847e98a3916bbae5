"""A system without fcntl, resource and calls that read at a place, as Windows is: the same commands, the same bytes."""

import hashlib
import os
import subprocess
import sys
import threading

import pytest

import tiny
from checkpoints import LLAMA, decoder, save, tuned, write_recipe
from tether.errors import ConfigError
from tether.store import system
from tether.store.documents import write_documents
from tether.store.system import alone_with, is_running, open_binary, read_at, write_at

WITHOUT = """
import os, sys
import psutil  # it knows its systems by their names
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("pread", "preadv", "pwrite", "pwritev", "posix_fallocate", "posix_fadvise", "fork", "getuid", "kill"):
    if hasattr(os, name):
        delattr(os, name)
from tether.cli.app import main
main()
"""
MISSING = ("preadv", "pwrite")
COMMANDS = {
    "learn": [
        "learn", "base", "--text", "digits.jsonl", "--base-text", "words.jsonl", "--cache", "cache", "--out",
        "digits.delta",
    ],
    "fuse": ["fuse", "base", "digits.delta", "--out", "fused"],
    "train": ["train", "base", "--text", "digits.jsonl", "--options", "quick.yaml", "--out", "run"],
    "merge": ["merge", "recipe.yaml", "--out", "merged"],
}  # fmt: skip
MADE = ("fused", "run/model", "merged")


def prepared(folder):
    folder.mkdir()
    tiny.backbone().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    write_documents(folder / "digits.jsonl", tiny.documents("digits", 40, 1))
    write_documents(folder / "words.jsonl", tiny.documents("words", 40, 2))
    (folder / "quick.yaml").write_text("batch: 4\nlr: 3e-3\nwindow: 48\nsave_every: 2\n", encoding="utf-8")
    parent = decoder()
    save(folder / "c", parent, LLAMA)
    for seed, name in enumerate("ab", start=1):
        save(folder / name, tuned(parent, seed), LLAMA)
    write_recipe(
        folder / "recipe.yaml", operator="dare_ties", base={"path": "c"},
        models={name: {"path": name, "weight": 0.5, "density": 0.4} for name in "ab"}, shard_bytes=3_000,
        towers="merge",
    )  # fmt: skip
    return folder


def bytes_of(path):
    # Hashes of the files of deltas, which hold the seconds of their fits, are in one of them.
    files = sorted(each for each in path.rglob("*") if each.is_file() and each.name != "tether.json")
    return {str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def test_commands_make_the_same_bytes_without_what_other_systems_lack(tmp_path):
    made = []
    for name, start in (("here", ["-m", "tether.cli.app"]), ("there", ["-c", WITHOUT])):
        folder = prepared(tmp_path / name)
        for command in COMMANDS.values():
            done = subprocess.run(
                [sys.executable, *start, *command], cwd=folder, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        made.append({path: bytes_of(folder / path) for path in MADE})
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert made[0] == made[1]


@pytest.mark.parametrize("positioned", [True, False])
def test_threads_read_and_write_at_their_own_places(tmp_path, monkeypatch, positioned):
    if not positioned:
        for name in MISSING:
            monkeypatch.delattr(os, name, raising=False)
    path = tmp_path / "file"
    descriptor = open_binary(path, os.O_RDWR | os.O_CREAT)
    parts = [bytes([65 + number]) * 1000 for number in range(8)]
    wrong = []

    def work(number):
        buffer = memoryview(bytearray(1000))
        for _ in range(200):
            write_at(descriptor, parts[number], 1000 * number)
            if read_at(descriptor, buffer, 1000 * number) != 1000 or bytes(buffer) != parts[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert read_at(descriptor, memoryview(bytearray(10)), 8000) == 0
    os.close(descriptor)
    assert path.read_bytes() == b"".join(parts)


def test_a_lock_is_one_process_or_one_part_of_it(tmp_path):
    with (
        alone_with(tmp_path / "lock", "taken"),
        pytest.raises(ConfigError, match="taken"),
        alone_with(tmp_path / "lock", "taken"),
    ):
        pass
    with alone_with(tmp_path / "lock", "taken"):
        pass


def test_a_process_runs_until_it_has_ended():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert is_running(child.pid)
        child.communicate(b"\n")
    assert not is_running(child.pid)
    assert is_running(os.getpid())
    assert not is_running(10**30)


def test_folders_are_not_flushed_where_the_system_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(system.os, "name", "nt")
    monkeypatch.setattr(system.os, "fsync", lambda _: pytest.fail("flushed"))
    system.flush(tmp_path)
