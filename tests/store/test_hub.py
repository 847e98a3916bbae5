"""A hub id where there is no network, against servers on this machine."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from tether.causal.loading import load_backbone
from tether.causal.modeling import CausalQwenForCausalLM
from tether.errors import CheckpointError
from tether.merge.companions import locate
from tether.store.hub import hub_copy, unasked


@pytest.fixture
def online(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def silent():
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed(silent):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture(params=[200, 404, 502])
def answering(request):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", request.param
        server.shutdown()


@pytest.mark.parametrize("kind", ["silent", "closed"])
def test_without_a_network_a_hub_id_is_refused_within_five_seconds(online, monkeypatch, request, kind):
    monkeypatch.setattr(constants, "ENDPOINT", request.getfixturevalue(kind))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"no such folder.*gave no answer in 3 seconds"):
        load_backbone("owner/name")
    assert time.monotonic() - began < 5


def test_without_a_network_an_earlier_copy_is_taken(online, monkeypatch, closed):
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    folder = online / "models--owner--name"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert hub_copy("owner/name") == str(folder / "snapshots" / "abc")


def test_a_hub_that_answers_is_left_to_answer(online, monkeypatch, answering):
    endpoint, code = answering
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    if code < 500:
        assert hub_copy("owner/name") is None
    else:
        with pytest.raises(CheckpointError, match="gave no answer"):
            hub_copy("owner/name")


@pytest.mark.parametrize("name", ["owner/name", "./no/such/folder", "no such name"])
def test_what_is_neither_a_folder_nor_known_is_named_when_offline(monkeypatch, tmp_path, name):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        hub_copy(name)


def test_transformers_own_way_to_load_does_not_wait_for_the_network_either(online, monkeypatch, silent):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="gave no answer in 3 seconds"):
        CausalQwenForCausalLM.from_pretrained("owner/name")
    assert time.monotonic() - began < 5
    snapshot = online / "models--owner--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "tag").write_text("1")
    assert unasked("owner/name", {"revision": "tag"})["local_files_only"]


def test_a_merge_of_a_hub_id_does_not_wait_for_the_network_either(online, monkeypatch, silent):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="gave no answer in 3 seconds"):
        locate("owner/name")
    assert time.monotonic() - began < 5
    snapshot = online / "models--owner--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    assert locate("owner/name") == snapshot


def test_options_that_were_given_are_kept(tmp_path):
    assert unasked(str(tmp_path), {}) == {"trust_remote_code": False}
    asked = {"trust_remote_code": True, "revision": "a"}
    assert unasked(str(tmp_path), asked) == unasked(None, asked) == asked
