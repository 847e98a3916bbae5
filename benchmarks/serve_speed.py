"""Tokens per CPU second of `tether serve`, against `transformers serve` on the plain base, on the same prompts.

Deltas and gates are random and of the usual sizes, as in `benchmarks.evidence_speed`, since cost depends on sizes
alone; gates that are never or always open put all domains to sleep or wake them.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil

from benchmarks.evidence_speed import random_delta
from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load, resolve
from tether.delta.fusion import fuse
from tether.demo import corpora

__all__ = ["rows"]

Row = dict[str, Any]
LETTERS = 500
"""Of a prompt: about 110 tokens, beyond those at whose beginning nobody sleeps."""
PROMPTS, WRITTEN = 4, 48
STARTS = 240.0
"""Seconds that a server has to start."""


def rows(*, fast: bool) -> Iterator[Row]:
    """Measure; servers take turns in every run, and a figure is the median over runs of the ratio to the baseline's.

    Args:
        fast: fewer runs.

    Yields:
        Rows of case, metric, ours, baseline, ratio, smallest, largest, runs.
    """
    runs = 2 if fast else 5
    prompts = [text[:LETTERS] for text in corpora.documents(corpora.news) if len(text) > LETTERS][:PROMPTS]
    model, tokenizer = load("smollm2-135m")
    with tempfile.TemporaryDirectory() as place:
        cases = {"three deltas asleep": False, "three deltas awake": True}
        for name, awake in cases.items():
            fused = fuse(model, {random_delta(model, seed, awake): 1.0 for seed in range(3)})
            save_checkpoint(fused, tokenizer, Path(place, name))
        base = resolve("smollm2-135m")
        theirs = [str(Path(sys.executable).with_name("transformers")), "serve", base, "--device", "cpu"]
        ours = {
            name: [sys.executable, "-m", "tether.cli.app", "serve", name, "--device", "cpu"] for name in cases
        }
        yield from _compared({"transformers serve": theirs} | ours, base, Path(place), prompts, runs)


def _compared(
    arms: dict[str, list[str]], base: str, place: Path, prompts: Sequence[str], runs: int
) -> Iterator[Row]:
    rates: dict[str, list[float]] = {name: [] for name in arms}
    with (
        _started(arms["transformers serve"], place) as first,
        _started(arms["three deltas asleep"], place) as second,
        _started(arms["three deltas awake"], place) as third,
    ):
        servers = dict(zip(arms, (first, second, third), strict=True))
        for run in range(runs + 1):
            for name, server in servers.items():
                rate = _rate(server, base if server is first else name, prompts)
                if run:  # the first warms up
                    rates[name].append(rate)
    theirs = rates.pop("transformers serve")
    for name, own in rates.items():
        ratios = [ours / base for ours, base in zip(own, theirs, strict=True)]
        yield {
            "case": f"{name}, against transformers serve on the base", "metric": "tokens per CPU second of the server",
            "ours": statistics.median(own), "baseline": statistics.median(theirs),
            "ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios), "runs": runs,
        }  # fmt: skip


class _Server:
    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process = psutil.Process(process.pid)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600)

    def seconds(self) -> float:
        """CPU seconds that the server has used so far."""
        used = self.process.cpu_times()
        return float(used.user + used.system)


def _rate(server: _Server, model: str, prompts: Sequence[str]) -> float:
    before, tokens = server.seconds(), 0
    for prompt in prompts:
        *_, last = server.client.completions.create(
            model=model, prompt=prompt, max_tokens=WRITTEN, temperature=0, stream=True
        )
        assert last.usage is not None
        tokens += last.usage.completion_tokens
    return tokens / (server.seconds() - before)


@contextmanager
def _started(command: Sequence[str], place: Path) -> Iterator[_Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + STARTS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{' '.join(command)}: did not start; run it by hand to see why")
            time.sleep(0.5)
        yield _Server(process, port)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx2.TransportError:
        return False
