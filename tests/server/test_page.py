"""Every command of docs/serve.md, as it stands there, but for the port, which others may have taken."""

import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from server_tools import Running

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python)?\n(.*?)```", PAGE, re.DOTALL)
SERVERS = [text.strip() for kind, text in BLOCKS if not kind and "tether serve" in text]


def test_the_page_has_the_commands_that_are_run_here():
    kinds = ["server" if text.strip() in SERVERS else kind or "curl" for kind, text in BLOCKS]
    assert kinds == ["server", "curl", "python", "server", "curl", "curl"]


@pytest.fixture(scope="module")
def folder(work, tmp_path_factory):
    """`fused`, and `M` that reads numbers, as the page has them."""
    folder = tmp_path_factory.mktemp("page")
    for name, source in (("fused", "fused"), ("M", "numeric")):
        shutil.copytree(work / source, folder / name)
    return folder


def started(folder, command):
    """The command with a free port, found so that the page's own may be taken."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert command.count("8000") == 1
    words = shlex.split(command.replace("8000", str(port)))
    environment = [word.split("=", 1) for word in words[: words.index("tether")]]
    return Running(folder, *words[words.index("serve") + 1 :], environment=environment)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("number", range(len(SERVERS)))
def test_the_commands_of_the_page_run(folder, number):
    begins = [at for at, (_, text) in enumerate(BLOCKS) if text.strip() in SERVERS] + [len(BLOCKS)]
    server = started(folder, SERVERS[number])
    outputs = []
    try:
        for kind, text in BLOCKS[begins[number] + 1 : begins[number + 1]]:
            text = text.replace("localhost:8000", f"127.0.0.1:{server.port}")
            command = [sys.executable, "-c", text] if kind else ["bash", "-ec", text]
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder)
            assert run.returncode == 0, run.stderr
            outputs.append(run.stdout)
    finally:
        assert server.end() == 0, server.text()
    if number == 0:
        curls, python = outputs
        assert '"id":"fused"' in curls
        assert curls.count('"object":"text_completion"') == 1
        assert curls.rstrip().endswith("data: [DONE]")
        assert "error" not in curls
        assert "'domain1': 0." in python
        assert "<NUM>" not in python
    else:
        assert '"id":"fused"' in outputs[0]
        assert "tether_requests_total" in outputs[1]
        assert "no key is asked for" not in server.text()


def test_what_the_page_says_of_fields_is_what_is_there(running):
    from server_tools import KEY, metrics

    with OpenAI(base_url=running.url, api_key=KEY, max_retries=0) as client:
        answer = client.completions.create(
            model="fused", prompt="ab", max_tokens=2, extra_body={"tether": True}
        )
    told = re.findall(r"^\| `(\w+)` \| (?:weight|the weights|KL|by how|what that)", PAGE, re.MULTILINE)
    assert list(answer.tether) == told
    counters = {name for name, _ in metrics(running)}
    assert counters == set(re.findall(r"`(tether_\w+_total)`", PAGE))
