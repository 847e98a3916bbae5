"""`tether serve` says what is wrong before it listens, and before it loads what may take minutes."""

import shutil
import socket

import pytest

import tiny
from tether.cli import serve
from tether.server.app import is_loopback
from tether.server.models import names_of


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.backbone().save_pretrained(folder / "plain")
    tiny.tokenizer().save_pretrained(folder / "plain")
    return folder


def refused(tether, *arguments):
    code, out, err = tether("serve", *arguments, "--port", 0)
    assert (code, out) == (2, ""), err
    assert err.count("tether:") == 1
    return err


def test_a_folder_without_a_model(tether, work, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "listen", None)
    assert "absent" in refused(tether, "absent")
    assert "absent" in refused(tether, work / "plain", "absent")
    shutil.copytree(work / "plain", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "damaged" in refused(tether, "damaged")


def test_two_models_of_one_name(tether, work, tmp_path):
    shutil.copytree(work / "plain", tmp_path / "plain")
    assert "both named 'plain'" in refused(tether, work / "plain", tmp_path / "plain")
    assert names_of([f"{work}/plain/", "some/id"]) == {"plain": f"{work}/plain/", "some/id": "some/id"}


def test_a_port_that_is_taken(tether):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = tether("serve", "never-loaded", "--port", port)
    assert code == 2
    assert f"127.0.0.1, port {port}: " in err
    assert "name another with --host or --port" in err
    assert "192.0.2.1, port 0" in refused(tether, "never-loaded", "--host", "192.0.2.1")


@pytest.mark.parametrize("key", ["", "  ", "k\xe9y", "a\nb"])
def test_a_key_that_no_client_could_send(tether, key):
    assert "--api-key: expected printable ASCII" in refused(tether, "never-loaded", "--api-key", key)


def test_an_open_door_is_warned_of(tether, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for more, warned in (((), True), (("--api-key", "secret"), False)):
        code, _, err = tether("serve", "absent", "--host", "0.0.0.0", "--port", 0, *more)
        assert code == 2
        assert ("no key is asked for" in err) == warned
        assert "secret" not in err
    assert [is_loopback(each) for each in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.com")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_a_package_that_is_missing(tether, monkeypatch):
    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "no_such_package"))
    assert "serving needs no_such_package; install" in refused(tether, "never-loaded")
