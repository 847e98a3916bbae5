"""Cost of acting: the one-vs-rest loss, and generation in each mode against the base's own greedy loop."""

import itertools
import statistics
import time
from typing import Any

import torch

from benchmarks import ovr
from tether.causal.loading import load, load_backbone
from tether.causal.noise import Noise

__all__ = ["rows"]

Row = dict[str, Any]

PROMPT = "The committee met on Monday to discuss the plans for the new railway line, and"


def rows(*, fast: bool) -> list[Row]:
    """Measure.

    Args:
        fast: fewer tokens and repeats.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    # One thread: CPU seconds then count work, not the waiting of threads for each other on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*ovr.run(fast), *_generation(*((24, 2) if fast else (64, 8)))]
    finally:
        torch.set_num_threads(threads)


def _generation(new: int, repeats: int) -> list[Row]:
    base, tokenizer = load_backbone("smollm2-135m")
    model, _ = load("smollm2-135m")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 2}
    noise = Noise.draw(1, model.abduction.loc.out_features, seed=0)
    writers = {
        "base": lambda: base.generate(**prompt, **options),
        "softmax": lambda: model.generate(**prompt, **options),
        "deterministic": lambda: model.generate(**prompt, **options, mode="deterministic"),
        "causal": lambda: model.generate(**prompt, **options, mode="causal", noise=noise),
    }
    for write in writers.values():
        write()
    spent: dict[str, list[float]] = {name: [] for name in writers}
    # Interleaved in turning order, so that a busy neighbour slows all alike.
    orders = itertools.cycle(itertools.permutations(writers))
    for order in itertools.islice(orders, 0, 7 * repeats, 7):
        for name in order:
            started = time.process_time()
            writers[name]()
            spent[name].append(new / (time.process_time() - started))
    reference = statistics.median(spent["base"])
    return [
        {
            "case": f"generate {new} tokens with cache, mode {name}, one thread; baseline: the base's greedy loop",
            "metric": "tokens per CPU second",
            "ours": statistics.median(values),
            "baseline": reference,
            "ratio": statistics.median(a / b for a, b in zip(values, spent["base"], strict=True)),
            "runs": values,
        }
        for name, values in spent.items()
        if name != "base"
    ]
