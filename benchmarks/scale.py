"""What a domain costs by the size of the model: arithmetic and CPU seconds on three sizes, predicted for a fourth.

Weights are random, since cost depends on shapes alone; the vocabulary and the tokenizer are SmolLM2-135M's. For each
kind of work the arithmetic for a token is a sum of a count of weights each: of the layers (P), of the output head
(V H), of a square of the width (H H). These counts are found from three sizes, and seconds for an operation with them;
the fourth size is predicted before it is measured.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tether.causal.loading import load_backbone
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.adapter_learning import learn_adapter
from tether.delta.adapter_training import AdapterFit
from tether.delta.cache import compute_states
from tether.delta.learning import learn_delta
from tether.delta.windows import window_text
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents

__all__ = ["rows"]

Row = dict[str, Any]


class Size(NamedTuple):
    """A shape of model."""

    width: int
    layers: int
    inner: int
    heads: int


LEARNT = (Size(256, 8, 768, 4), Size(384, 16, 1024, 6), Size(576, 30, 1536, 9))
PREDICTED = Size(768, 24, 2048, 12)
TOKENS = 6_000
"""Of the domain, and of base text."""
WRITTEN, PROMPT = 64, 32


class Cost(NamedTuple):
    """Of a kind of work for one token of the domain."""

    operations: float
    """Multiplications and additions, as torch counts them."""
    seconds: float


def rows(*, fast: bool) -> Iterator[Row]:
    """Measure three sizes, predict a fourth, and measure that.

    Args:
        fast: a sixth of the text, two sizes to learn from, and the third to predict.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs; for the fourth size the baseline is the prediction.
    """
    torch.set_num_threads(1)
    tokens = TOKENS // 6 if fast else TOKENS
    sizes = (*LEARNT, PREDICTED)[: 3 if fast else 4]
    _, tokenizer = load_backbone("smollm2-135m")
    costs, shapes = [], []
    for size in sizes:
        model = _model(size, len(tokenizer))
        shapes.append(_shape(model))
        costs.append(_costs(model, tokenizer, tokens))
        for kind, cost in costs[-1].items():
            yield _row(f"{_name(size)}, {kind}", "million operations a token", cost.operations / 1e6, None)
            yield _row(f"{_name(size)}, {kind}", "CPU milliseconds a token", 1e3 * cost.seconds, None)
    for kind in costs[0]:
        counts = _counts(kind, shapes[:-1], [cost[kind].operations for cost in costs[:-1]])
        for name, count in counts.items():
            yield _row(f"{kind}: operations a token", f"for each weight of {name}", count, None)
        each = [cost[kind].seconds / cost[kind].operations for cost in costs[:-1]]
        rate = float(np.exp(np.mean(np.log(each))))
        yield _row(kind, "CPU seconds a billion operations", 1e9 * rate, None)
        predicted = sum(count * shapes[-1][name] for name, count in counts.items())
        found = costs[-1][kind]
        case = f"{_name(sizes[-1])}, {kind}; baseline: predicted"
        yield _row(case, "million operations a token", found.operations / 1e6, predicted / 1e6)
        yield _row(case, "CPU milliseconds a token", 1e3 * found.seconds, 1e3 * predicted * rate)


def _model(size: Size, vocabulary: int) -> CausalQwenForCausalLM:
    config = LlamaConfig(
        hidden_size=size.width, num_hidden_layers=size.layers, intermediate_size=size.inner,
        num_attention_heads=size.heads, num_key_value_heads=max(1, size.heads // 3), vocab_size=vocabulary,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return CausalQwenForCausalLM.from_backbone(LlamaForCausalLM(config).eval())


def _shape(model: Any) -> dict[str, int]:
    layers = sum(weights.numel() for weights in model.backbone.layers.parameters())
    vocabulary, width = model.action.weight.shape
    return {
        "the layers": layers,
        "the output head": vocabulary * width,
        "a square of the width": width * width,
    }


def _costs(model: Any, tokenizer: Any, tokens: int) -> dict[str, Cost]:
    domain, base = documents(DOMAINS["bible"]), documents(BASE_TEXTS["news"])
    counted = window_text(domain, tokenizer, tokens=tokens)
    held = len(counted.input_ids)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options: dict[str, Any] = {
            "base_texts": base, "name": "a", "tokens": tokens, "cache_folder": folder, "sample": False,
        }  # fmt: skip
        found = {"reading": _cost(lambda: compute_states(model, counted), held)}
        # The first fit reads what is not cached yet; the second is what is asked for.
        learn_delta(model, tokenizer, domain, gate=False, **options)
        found["fit of a delta"] = _cost(
            lambda: learn_delta(model, tokenizer, domain, gate=False, **options), held
        )
        lora = AdapterFit(gate=False)
        found["fit of an adapter"] = _cost(
            lambda: learn_adapter(model, tokenizer, domain, fit=lora, **options), held
        )
    ids = counted.input_ids[None, :PROMPT].long()
    model.generate(ids, max_new_tokens=2, do_sample=False)
    found["writing"] = _cost(
        lambda: model.generate(ids, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False), WRITTEN
    )
    return found


# Counted in a run of its own: the counter looks at every operation, which takes time.
def _cost(work: Callable[[], Any], tokens: int) -> Cost:
    with FlopCounterMode(display=False) as counter:
        work()
    begun = time.process_time()
    work()
    return Cost(counter.get_total_flops() / tokens, (time.process_time() - begun) / tokens)


def _counts(kind: str, shapes: list[dict[str, int]], operations: list[float]) -> dict[str, float]:
    names = {"reading": 1, "writing": 2, "fit of an adapter": 2, "fit of a delta": 3}[kind]
    known = list(shapes[0])[:names] if kind != "fit of a delta" else list(shapes[0])[1:]
    matrix = np.array([[shape[name] for name in known] for shape in shapes], dtype=float)
    # Relative errors: a small model counts as much as a large one.
    weights = 1 / np.array(operations)
    solved = np.linalg.lstsq(matrix * weights[:, None], np.array(operations) * weights, rcond=None)[0]
    return dict(zip(known, solved.tolist(), strict=True))


def _name(size: Size) -> str:
    return f"width {size.width}, {size.layers} layers"


def _row(case: str, metric: str, ours: float, baseline: float | None) -> Row:
    ratio = ours / baseline if baseline else None
    return {"case": case, "metric": metric, "ours": ours, "baseline": baseline, "ratio": ratio, "runs": 1}
