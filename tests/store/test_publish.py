import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from disk import nearly_full
from tether.errors import CheckpointError, ConfigError
from tether.store.publish import clean_stale, publish_file, publish_folder, write_json


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def publish(final, write, replace=False):
    with publish_folder(final, replace=replace) as temporary:
        write(temporary)


def stop(path, error):
    path.write_bytes(b"1")
    raise error


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_folder_appears_with_all_its_content(tmp_path):
    final = tmp_path / "deep" / "model"
    with publish_folder(final) as temporary:
        assert temporary.parent == final.parent
        assert temporary.name.startswith(f".model.tmp-{os.getpid()}-")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_bytes(b"1")
        (temporary / "b").write_bytes(b"2")
        assert not final.exists()
    assert tree(final) == {"sub/a": b"1", "b": b"2"}
    assert names(final.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("replace", [False, True])
def test_exception_leaves_everything_as_it_was(tmp_path, error, replace):
    final = tmp_path / "model"
    if replace:
        final.mkdir()
        (final / "old").write_bytes(b"old")
    with pytest.raises(type(error)):
        publish(final, lambda temporary: stop(temporary / "a", error), replace=replace)
    assert names(tmp_path) == (["model"] if replace else [])
    assert not replace or tree(final) == {"old": b"old"}


def test_occupied_folder_is_refused_before_any_work(tmp_path):
    final = tmp_path / "model"
    final.mkdir()
    with publish_folder(final) as temporary:
        (temporary / "a").write_bytes(b"1")
    entered = False
    with (
        pytest.raises(ConfigError, match=r"not empty.*Choose another name, or remove it"),
        publish_folder(final),
    ):
        entered = True
    assert not entered
    assert tree(final) == {"a": b"1"}


def test_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    final = tmp_path / "model"

    def appear(_):
        final.mkdir()
        (final / "theirs").write_bytes(b"2")

    with pytest.raises(ConfigError, match="not empty"):
        publish(final, appear)
    assert tree(tmp_path) == {"model/theirs": b"2"}


def test_folder_that_appears_at_the_last_moment_is_not_overwritten(tmp_path, monkeypatch):
    final = tmp_path / "model"
    rename = Path.rename

    def late(self, target):
        final.mkdir()
        (final / "theirs").write_bytes(b"2")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(ConfigError, match="not empty"):
        publish(final, lambda temporary: None)
    assert tree(tmp_path) == {"model/theirs": b"2"}


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_not_a_folder_is_refused(tmp_path, replace):
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "link"):
        with (
            pytest.raises(ConfigError, match="is not a folder"),
            publish_folder(tmp_path / name, replace=replace),
        ):
            pytest.fail("entered")
    with (
        pytest.raises(ConfigError, match="cannot be made"),
        publish_folder(tmp_path / "file" / "x", replace=replace),
    ):
        pytest.fail("entered")
    with pytest.raises(ConfigError, match="is a folder"), publish_file(tmp_path / "real"):
        pytest.fail("entered")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_place_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written to"), publish_file(tmp_path / "a"):
        pytest.fail("entered")


def test_replace_swaps_the_folder(tmp_path):
    final = tmp_path / "model"
    for content in (b"1", b"2"):
        with publish_folder(final, replace=True) as temporary:
            (temporary / content.decode()).write_bytes(content)
    assert tree(tmp_path) == {"model/2": b"2"}


def test_failing_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    final = tmp_path / "model"
    with publish_folder(final) as temporary:
        (temporary / "old").write_bytes(b"old")
    rename = Path.rename

    def failing(self, target):
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken disk"), publish_folder(final, replace=True) as temporary:
        (temporary / "new").write_bytes(b"new")
    assert tree(tmp_path) == {"model/old": b"old"}


def test_file_appears_whole_and_replaces(tmp_path):
    final = tmp_path / "a.txt"
    for text in ("one", "two"):
        with publish_file(final) as temporary:
            temporary.write_text(text)
            assert not final.exists() or final.read_text() == "one"
        assert final.read_text() == text
    with pytest.raises(ZeroDivisionError), publish_file(final) as temporary:
        temporary.write_bytes(bytes(1 // 0))
    with pytest.raises(CheckpointError, match="no file was written"), publish_file(final):
        pass
    assert tree(tmp_path) == {"a.txt": b"two"}


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    write_json(tmp_path / "published", {})
    with publish_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "published").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="finds the path of a descriptor in /proc")
@pytest.mark.parametrize("replace", [False, True])
def test_everything_is_flushed_before_the_name_and_the_parent_after(tmp_path, monkeypatch, replace):
    events = []
    fsync, rename, rmdir = os.fsync, os.rename, os.rmdir

    def flushing(descriptor):
        events.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def renaming(source, target, **kwargs):
        events.append(("rename", Path(target)))
        rename(source, target, **kwargs)

    def removing(path, **kwargs):
        events.append(("remove", path))
        rmdir(path, **kwargs)

    final = tmp_path / "model"
    if replace:
        final.mkdir()
    monkeypatch.setattr(os, "rmdir", removing)
    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "rename", renaming)
    with publish_folder(final, replace=replace) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_bytes(b"1")
    named = events.index(("rename", final))
    assert {("flush", path) for path in (temporary, temporary / "sub", temporary / "sub" / "a")} <= set(
        events[:named]
    )
    assert ("flush", tmp_path) in events[named:]
    if replace:
        removed = next(number for number, (what, _) in enumerate(events) if what == "remove")
        assert ("flush", tmp_path) in events[named:removed]


def test_json_is_written_whole_or_refused(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None, "é"], "a": True})
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5, None, "é"], "a": True}
    for bad in ({"x": float("nan")}, {"x": object()}, {(1, 2): 3}):
        with pytest.raises(ConfigError, match=r"a\.json cannot be JSON.*Expected.*Convert"):
            write_json(path, bad)
    assert json.loads(path.read_text(encoding="utf-8"))["a"] is True
    assert names(tmp_path) == ["a.json"]


def test_stale_temporaries_go_and_live_ones_stay(tmp_path, dead_pid):
    for name in (f".model.tmp-{dead_pid}-0123abcd", f".model.tmp-{os.getpid()}-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"x")
    (tmp_path / f".a.json.tmp-{dead_pid}-0123abcd").write_bytes(b"x")
    (tmp_path / f".a.tmp-{10**30}-0123abcd").write_bytes(b"x")
    keep = [
        f".model.tmp-{os.getpid()}-0123abcd",
        ".x.tmp-1-0123abcd",
        ".hidden",
        f"y.tmp-{dead_pid}-0123abcd",
    ]
    for name in keep[1:]:
        (tmp_path / name).write_bytes(b"keep")
    assert len(clean_stale(tmp_path)) == 3
    assert names(tmp_path) == sorted(keep)
    assert clean_stale(tmp_path / "nothing") == ()


def test_writer_clears_up_after_killed_writers_of_its_name_only(tmp_path, dead_pid):
    for name in ("model", "other"):
        (tmp_path / f".{name}.tmp-{dead_pid}-0123abcd").mkdir()
    with publish_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == [f".other.tmp-{dead_pid}-0123abcd", "model"]


@pytest.mark.parametrize("published", [False, True])
def test_old_folder_comes_back_unless_the_new_one_is_there(tmp_path, dead_pid, published):
    old = tmp_path / f".model.old-{dead_pid}-0123abcd"
    old.mkdir()
    (old / "a").write_bytes(b"old")
    if published:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "a").write_bytes(b"new")
    assert clean_stale(tmp_path) == (old,)
    assert tree(tmp_path) == {"model/a": b"new" if published else b"old"}


def test_writers_of_one_name_do_not_disturb_each_other(tmp_path):
    final, errors = tmp_path / "model", []

    def write(number):
        try:
            with publish_folder(final) as temporary:
                for part in range(20):
                    (temporary / str(part)).write_text(str(number))
        except ConfigError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(tree(final).values())) == 1
    assert len(tree(final)) == 20
    assert len(errors) == 3
    assert names(tmp_path) == ["model"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_full_disk_in_a_folder(tmp_path):
    final = tmp_path / "model"

    def fill(temporary):
        (temporary / "a").write_bytes(bytes(1000))
        Path("/dev/full").write_bytes(b"x")

    with (
        pytest.raises(
            CheckpointError,
            match=r"model could not be written: No space left on device after 1000 bytes.*"
            r"not known.*Nothing was changed.*Free some space",
        ),
        publish_folder(final) as temporary,
    ):
        fill(temporary)
    assert names(tmp_path) == []


def test_kernel_refuses_to_write_on(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    message = r"a\.json could not be written: File too large after 100000 bytes; \d{6} bytes were needed"
    with pytest.raises(CheckpointError, match=message), nearly_full(100_000):
        write_json(tmp_path / "a.json", {"new": "x" * 200_000})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_full_disk_inside_names_the_folder_that_was_asked_for(tmp_path):
    with (
        pytest.raises(CheckpointError) as caught,
        nearly_full(100_000),
        publish_folder(tmp_path / "model", needed=200_002) as temporary,
    ):
        write_json(temporary / "a.json", "x" * 200_000)
    assert str(caught.value).startswith(f"{tmp_path / 'model'} could not be written")
    assert "200002 bytes were needed" in str(caught.value)
    assert names(tmp_path) == []


def test_too_little_space_is_refused_before_any_work(tmp_path):
    for publishing in (publish_file, publish_folder):
        with (
            pytest.raises(CheckpointError, match=r"a needs 1000000000000000000 bytes.*Nothing was changed"),
            publishing(tmp_path / "a", needed=10**18),
        ):
            pytest.fail("entered")
    assert names(tmp_path) == []


ON_A_TINY_DISK = """
import sys
from pathlib import Path
from tether.errors import CheckpointError
from tether.store.publish import publish_file, publish_folder
disk = Path(sys.argv[1])
with publish_folder(disk / "model") as temporary:
    (temporary / "a").write_bytes(bytes(100_000))
for publish, needed, message in [
    (publish_folder, None, "No space left on device"), (publish_folder, 10**7, "needs 10000000 bytes"),
    (publish_file, None, "No space left on device"),
]:
    options = {} if publish is publish_file else {"replace": True}
    final = disk / ("file" if publish is publish_file else "model")
    try:
        with publish(final, needed=needed, **options) as temporary:
            (temporary if publish is publish_file else temporary / "a").write_bytes(bytes(10**7))
    except CheckpointError as error:
        assert message in str(error), error
    else:
        raise AssertionError("the disk took it")
    assert [path.name for path in disk.iterdir()] == ["model"]
    assert (disk / "model" / "a").read_bytes() == bytes(100_000)
"""


def test_disk_that_is_really_full(tmp_path):
    # A mount in a name space of its own: it goes with the process.
    options = ["-m"] if os.geteuid() == 0 else ["-Urm"]
    mount = [
        "unshare",
        *options,
        "sh",
        "-c",
        'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; shift; exec "$@"',
        "-",
    ]
    try:
        done = subprocess.run(
            [*mount, str(tmp_path), sys.executable, "-c", ON_A_TINY_DISK, str(tmp_path)],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this system")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no right to mount a file system")
    assert done.returncode == 0, done.stderr


# Each fork kills itself in the middle of publishing, at the n-th call that changes or flushes the disk.
DYING_AT_EVERY_CALL = """
import os, signal, sys
from pathlib import Path
from tether.store.publish import publish_file, publish_folder
parent, replace = Path(sys.argv[1]), sys.argv[2] == "replace"
final = parent / "model"
calls, fatal = 0, 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def publish(text, replace):
    with publish_folder(final, replace=replace) as temporary:
        (temporary / "sub").mkdir()
        for name in ("a", "b", "sub/c"):
            (temporary / name).write_text(text)

def content():
    return {str(path.relative_to(final)): path.read_text() for path in final.rglob("*") if path.is_file()}

def whole(text):
    return {name: text for name in ("a", "b", "sub/c")}

outcomes = set()
while True:
    fatal += 1
    if replace:
        publish("old", True)
    child = os.fork()
    if child == 0:
        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        publish("new", replace)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0, status
    found = content()
    if found:
        assert found in (whole("old"), whole("new")), (fatal, found)
    outcomes.add(found.get("a"))
    hidden = [path.name for path in parent.iterdir() if path != final]
    if not found and replace:
        # Between the two renames: the old folder is aside, whole, and the next writer brings it back.
        from tether.store.publish import clean_stale
        clean_stale(parent)
        assert content() == whole("old"), (fatal, content())
    if replace or not found:
        publish("next", replace)
        assert content() == whole("next")
    else:
        from tether.store.publish import clean_stale
        clean_stale(parent)
    assert [path.name for path in parent.iterdir()] == ["model"], (fatal, list(parent.iterdir()))
    if not killed:
        break
    if not replace:
        for path in sorted(final.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        final.rmdir()
print(fatal, sorted(map(str, outcomes)))
"""


@pytest.mark.parametrize("mode", ["new", "replace"])
def test_killed_at_every_single_call(tmp_path, mode):
    done = subprocess.run(
        [sys.executable, "-c", DYING_AT_EVERY_CALL, str(tmp_path), mode], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    moments, outcomes = done.stdout.split(maxsplit=1)
    assert int(moments) >= (15 if mode == "replace" else 8)
    assert outcomes.strip() == ("['None', 'new', 'old']" if mode == "replace" else "['None', 'new']")


WRITING_SLOWLY = """
import sys
from pathlib import Path
from tether.store.publish import publish_file, publish_folder
parent = Path(sys.argv[1])
with publish_folder(parent / "model", replace=True) as temporary, publish_file(parent / "file") as part:
    with part.open("wb", buffering=0) as file:
        for number in range(400):
            (temporary / str(number)).write_bytes(bytes(20_000))
            file.write(bytes(20_000))
            print(number, flush=True)
"""


def test_killed_at_random_moments(tmp_path):
    with publish_folder(tmp_path / "model") as temporary:
        (temporary / "old").write_bytes(b"old")
    (tmp_path / "file").write_bytes(b"old")
    earlier = tree(tmp_path)
    choose = random.Random(2)
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITING_SLOWLY, str(tmp_path)], stdout=subprocess.PIPE
        ) as child:
            for _ in range(choose.randrange(1, 300)):
                child.stdout.readline()
            time.sleep(choose.random() * 0.002)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert {name: data for name, data in tree(tmp_path).items() if not name.startswith(".")} == earlier
        assert len(names(tmp_path)) > 2
    subprocess.run(
        [sys.executable, "-c", WRITING_SLOWLY, str(tmp_path)], stdout=subprocess.DEVNULL, check=True
    )
    assert names(tmp_path) == ["file", "model"]
    assert (tmp_path / "file").stat().st_size == 400 * 20_000
    assert len(tree(tmp_path / "model")) == 400


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_get_the_permissions_of_new_ones_whoever_wrote_them(tmp_path, umask):
    def write(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent)  # as libraries do: only the owner may read it
        os.close(descriptor)
        Path(name).replace(path)

    before = os.umask(umask)
    try:
        with publish_folder(tmp_path / "model") as folder:
            (folder / "deep").mkdir()
            write(folder / "deep" / "weights")
            write(folder / "weights")
        with publish_file(tmp_path / "file") as temporary:
            write(temporary)
        (tmp_path / "new").write_bytes(b"")
    finally:
        os.umask(before)
    wanted = (tmp_path / "new").stat().st_mode
    assert wanted & 0o777 == 0o666 & ~umask
    for name in ("model/deep/weights", "model/weights", "file"):
        assert (tmp_path / name).stat().st_mode == wanted
    assert names(tmp_path) == ["file", "model", "new"]


def test_safetensors_that_transformers_wrote_can_be_read_by_others(tmp_path):
    with publish_folder(tmp_path / "model") as folder:
        save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    (tmp_path / "new").write_bytes(b"")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("where", ["flush", "_remove"])
def test_a_request_to_end_within_a_swap_leaves_nothing_beside(tmp_path, monkeypatch, where):
    final = tmp_path / "model"
    final.mkdir()
    (final / "old").write_text("old")
    module = sys.modules["tether.store.publish"]
    plain, asked = getattr(module, where), []

    def interrupted(path):
        # Of the swap alone: the first time that its parent is flushed, or that the folder put aside is removed.
        if not asked and (path == tmp_path or ".old-" in path.name):
            asked.append(path)
            raise KeyboardInterrupt
        plain(path)

    monkeypatch.setattr(module, where, interrupted)
    with pytest.raises(KeyboardInterrupt), publish_folder(final, replace=True) as temporary:
        (temporary / "new").write_text("new")
    assert asked
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in final.iterdir()] == ["new"]
