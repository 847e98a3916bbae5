"""What fusion by evidence costs when it writes and when it reads, in CPU seconds of one thread, the base beside it.

Heads, adapters and gates are random and of the usual sizes, since cost depends on sizes alone; thresholds that nothing
or everything is under put experts to sleep or wake them, so a gate is paid for in every case.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tether.causal.fingerprint import fingerprint
from tether.causal.gates import gate_stage
from tether.causal.loading import load
from tether.delta.adapter import Adapter, lora_config
from tether.delta.adapter_serving import serve
from tether.delta.attached import Attached
from tether.delta.cache import backbone_print
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import CLOSED, RANK, WINDOW, Gate

__all__ = ["random_delta", "rows"]

Row = dict[str, Any]
WRITTEN = 96
"""Tokens that are written after a prompt of `BEGUN`."""
BEGUN = 32
PROMPT = 1_000
"""Tokens of the prompt that is only read."""
MANY, FEW = 50, 2


def rows(*, fast: bool) -> Iterator[Row]:
    """Measure; arms take turns in every run, and a figure is the median over runs of the ratio to the baseline's.

    Args:
        fast: fewer runs.

    Yields:
        Rows of case, metric, ours (the ratio), baseline (what it is a ratio to), ratio, smallest, largest, runs.
    """
    torch.set_num_threads(1)
    model, tokenizer = load("smollm2-135m")
    runs = 3 if fast else 9
    ids = torch.randint(100, len(tokenizer), (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def deltas(awake: Sequence[bool]) -> Any:
        return fuse(model, {random_delta(model, number, yes): 1.0 for number, yes in enumerate(awake)})

    three, asleep = deltas([True] * 3), deltas([False] * 3)
    writing = {"three deltas awake": three, "three deltas asleep": asleep}
    yield from _compared("CPU seconds of writing", {"base": model, **writing}, lambda m: _write(m, ids), runs)
    yield from _compared(
        "CPU seconds of reading 1,000 tokens", {"base": model, **writing}, lambda m: _read(m, ids), runs
    )
    two, fifty = deltas([True] * FEW), deltas([at < FEW for at in range(MANY)])
    many = {"two domains, both awake": two, "fifty domains, two awake": fifty}
    yield from _compared("CPU seconds of writing", many, lambda m: _write(m, ids), runs)
    yield from _compared("CPU seconds of reading 1,000 tokens", many, lambda m: _read(m, ids), runs)
    adapted = {
        f"three adapters, {count} awake": serve(
            model, {_adapter(model, number, number < count): 1.0 for number in range(3)}
        )
        for count in (0, 1, 3)
    }
    yield from _compared("CPU seconds of writing", {"base": model, **adapted}, lambda m: _write(m, ids), runs)


def _compared(metric: str, arms: dict[str, Any], work: Callable[[Any], Any], runs: int) -> Iterator[Row]:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for run in range(runs + 1):
        for name, arm in arms.items():
            started = time.process_time()
            work(arm)
            if run:  # the first warms up
                seconds[name].append(time.process_time() - started)
    first = next(iter(arms))
    for name in list(arms)[1:]:
        ratios = [ours / base for ours, base in zip(seconds[name], seconds[first], strict=True)]
        ours, base = statistics.median(seconds[name]), statistics.median(seconds[first])
        yield {
            "case": f"{name}, against {first}", "metric": metric, "ours": ours, "baseline": base,
            "ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios), "runs": runs,
        }  # fmt: skip


@torch.no_grad()
def _write(model: Any, ids: Tensor) -> None:
    begun = ids[:, :BEGUN]
    model.generate(
        begun, attention_mask=torch.ones_like(begun), do_sample=False, max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def _read(model: Any, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=True, logits_to_keep=1, written_from=ids.shape[1])


def _gate(width: int, seed: int, awake: bool) -> Gate:
    generator = torch.Generator().manual_seed(seed)
    stages = int(gate_stage(torch.tensor([WINDOW - 1.0]), WINDOW + 1, 64)) + 2
    return Gate(
        torch.randn(stages, width, generator=generator),
        torch.randn(stages, RANK, width, generator=generator),
        torch.full((WINDOW,), float("inf") if awake else CLOSED),
        torch.ones(stages),
    )


def random_delta(model: Any, seed: int, awake: bool) -> Delta:
    """Make a delta of the usual size whose gate is always or never open.

    Args:
        model: its base.
        seed: of its weights, and its name.
        awake: whether the gate is open.

    Returns:
        The delta.
    """
    generator = torch.Generator().manual_seed(seed)
    width, latent = model.config.backbone_config.hidden_size, model.abduction.loc.weight.shape[0]
    first, second = (1e-3 * torch.randn(latent, width, generator=generator) for _ in range(2))
    return Delta(
        name=f"domain{seed}", chart="symmetric", first=first, second=second, gate=_gate(width, seed, awake),
        base=fingerprint(model),
    )  # fmt: skip


def _adapter(model: Any, seed: int, awake: bool) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    config, name = lora_config(8, 16), f"domain{seed}"
    tensors = {
        key: 0.01 * torch.randn(values.shape, generator=generator) if "lora_B" in key else values.clone()
        for key, values in Attached(model, name, config, generator).weights(name).items()
    }
    width = model.config.backbone_config.hidden_size
    return Adapter(
        name=name, config=config, tensors=tensors, gate=_gate(width, seed, awake), base=backbone_print(model),
        record={"metric": "softmax", "budget": 0.05},
    )  # fmt: skip
