"""Checkpoints to serve, and a server in a process of its own."""

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.fingerprint import fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse

KEY = "a key for tests"
CHAT = (
    "{% for turn in messages %}<eos>{{ turn.role }}:{{ turn.content }}{% endfor %}"
    "{% if add_generation_prompt %}<eos>assistant:{% endif %}"
)
SECONDS = 120
"""That a server has to start on a busy machine."""


def delta(model, seed):
    generator = torch.Generator().manual_seed(seed)
    size = tiny.SIZES["hidden_size"]
    first, second = (0.3 * torch.randn(size, size, generator=generator) for _ in range(2))
    return Delta(
        name=f"domain{seed}",
        chart="symmetric",
        first=first,
        second=second,
        gate=None,
        base=fingerprint(model),
    )


def make(folder):
    """`fused` by evidence with a chat template, `numeric` that writes numbers, `causal` of that mode, `plain`."""
    for name in ("fused", "numeric", "causal", "plain"):
        model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.1)
        tokenizer = tiny.tokenizer()
        if name == "fused":
            model = fuse(model, {delta(model, 1): 1.0, delta(model, 2): 1.0})
            tokenizer.chat_template = CHAT
        if name == "numeric":
            tokenizer.chat_template = CHAT
            tokenizer = model.add_numbers(tokenizer)
            with torch.no_grad():
                # A number now and then, and no end.
                model.action.bias[258], model.action.bias[256] = 4.5, -100.0
        model.config.mode = "causal" if name == "causal" else "softmax"
        save_checkpoint(model, tokenizer, folder / name)
    return folder


class Running:
    """A server that runs, with its address, and with what it said so far."""

    def __init__(self, work, *arguments, environment=()):
        self.said = work / f"said-{time.monotonic_ns()}"
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tether.cli.app", "serve", *map(str, arguments)],
                cwd=work, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(work / "no-hub")} | dict(environment),
            )  # fmt: skip
        until = time.monotonic() + SECONDS
        while "serving" not in self.text() and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert "serving" in self.text(), self.text()
        self.url = self.text().split(" at ")[-1].split(";")[0]
        self.port = int(self.url.removesuffix("/v1").rsplit(":", 1)[-1])

    def text(self):
        return Path(self.said).read_text()

    def end(self, number=signal.SIGINT):
        """Ask it to end; gives its exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            self.process.wait()


def send(running, method, path, body=None, key=KEY, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    try:
        given = {"Content-Type": "application/json"} | headers
        given |= {} if key is None else {"Authorization": f"Bearer {key}"}
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def metrics(running):
    status, text = send(running, "GET", "/metrics")
    assert status == 200
    found = re.findall(r"^(tether_\w+_total)\{(.*)\} (\S+)$", text.decode(), re.MULTILINE)
    return {(name, labels): float(value) for name, labels, value in found}
