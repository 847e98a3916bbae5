"""How much memory learning takes by the length of a text, at the width of SmolLM2-135M and with one layer.

A text of ten million tokens through all thirty layers would take days here, and the layers change nothing of what is
held beside the weights: the model is one layer of random weights with the width, the vocabulary and the tokenizer of
SmolLM2-135M, and a narrow MLP. `TETHER_TOKENS="100000 1000000"` chooses other lengths.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load, load_backbone
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.learning import learn_delta
from tether.demo.corpora import BASE_TEXTS, documents

__all__ = ["rows"]

TOKENS = (100_000, 1_000_000, 10_000_000)
BASE_DOCUMENTS = 200
OPTIONS: dict[str, Any] = {"epochs": 1, "batch": 4096, "candidates": 64, "sampled": 16}
"""Less arithmetic than by default, so that ten million tokens take hours and not days. A step of 4,096 tokens holds
more than one of 256 with all candidates; nothing else of what is held depends on these."""


def rows(*, fast: bool) -> Iterator[dict[str, Any]]:
    """Learn from texts of several lengths, each in a process of its own.

    Args:
        fast: two short texts.

    Yields:
        A row for each length: peak resident memory, mapped files included, beside that of the shortest text.
    """
    counts = (20_000, 200_000) if fast else TOKENS
    counts = tuple(map(int, os.environ.get("TETHER_TOKENS", "").split())) or counts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = _base(folder / "base")
        least: float | None = None
        for count in counts:
            found = _learn(folder, tokenizer, count)
            least = found["mebibytes"] if least is None else least
            yield {
                "case": f"learn, {found['tokens']:,} tokens, H 576, one layer, one pass",
                "metric": "peak resident memory, MiB; baseline: the shortest text",
                "ours": found["mebibytes"],
                "baseline": least,
                "ratio": found["mebibytes"] / least,
                "runs": 1,
                **{key: found[key] for key in ("cpu_seconds", "seconds", "text_bytes")},
            }


def _base(folder: Path) -> Any:
    backbone, tokenizer = load_backbone("smollm2-135m")
    config = AutoConfig.for_model(
        **{**backbone.config.to_dict(), "num_hidden_layers": 1, "layer_types": None}
    )
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        small = AutoModelForCausalLM.from_config(config)
    save_checkpoint(CausalQwenForCausalLM.from_backbone(small.eval()), tokenizer, folder)
    texts = documents(BASE_TEXTS["news"])[:BASE_DOCUMENTS]
    (folder.parent / "base.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tokenizer


# Articles again and again, each time under another number.
def _write(path: Path, tokenizer: Any, count: int) -> int:
    articles = documents(BASE_TEXTS["wiki"])
    sizes = [len(ids) for ids in tokenizer(articles)["input_ids"]]
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        for number, (article, size) in enumerate(cycle(zip(articles, sizes, strict=True))):
            stream.write(json.dumps({"text": f"{number} {article}"}) + "\n")
            written += size
            if written >= count:
                return written
    return written


def _learn(folder: Path, tokenizer: Any, count: int) -> dict[str, Any]:
    text = folder / f"text-{count}.jsonl"
    _write(text, tokenizer, count)
    begun = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.long_text", str(folder), str(text)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"seconds": time.perf_counter() - begun, "text_bytes": text.stat().st_size}


def _child(folder: Path, text: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, tokenizer = load(str(folder / "base"))
    delta = learn_delta(model, tokenizer, text, base_texts=folder / "base.jsonl", name="long", **OPTIONS)
    delta.save(folder / "long.delta")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    # The system's own mark of the most that a process has held, pages of mapped files included.
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    record = delta.record
    return {
        "mebibytes": peak / 1024,
        "tokens": record["tokens"] + record["held_out"]["tokens"],
        "cpu_seconds": time.process_time(),
    }


if __name__ == "__main__":
    print(json.dumps(_child(*map(Path, sys.argv[1:]))))
