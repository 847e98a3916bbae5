"""Cost of the one-vs-rest loss against dense cross-entropy and dense one-vs-rest on the same tensors."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.profiler import ProfilerActivity, profile

from tether.causal.losses import ovr_loss

__all__ = ["peak_memory", "run"]

Row = dict[str, Any]

_SAMPLES = 2048


class _Bench:
    """The tensors of a head, the losses on them, and the gradients they hand over."""

    def __init__(self, tokens: int, classes: int, latent: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.loc = self._normal(tokens, latent).requires_grad_()
        self.scale = (0.02 * self._normal(tokens, latent).exp()).requires_grad_()
        self.weight = (0.05 * self._normal(classes, latent)).requires_grad_()
        # Nearly all different, where the tokens of a text repeat: the worst case of the sampled form.
        self.targets = torch.randint(classes, (tokens,), generator=self.generator)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def leaves(self) -> tuple[Tensor, ...]:
        return self.loc, self.scale, self.weight

    def softmax(self) -> None:
        self.clear()
        cross_entropy(linear(self.loc, self.weight), self.targets).backward()

    def ovr(self, impl: str, *, shared: bool = False) -> None:
        self.clear()
        scale = self.scale.detach()[:1] if shared else self.scale
        ovr_loss(
            self.loc,
            scale,
            self.weight,
            self.targets,
            threshold=4.0,
            class_noise=0.3,
            impl=impl,
            samples=_SAMPLES,
            generator=self.generator,
        ).backward()

    @torch.no_grad()
    def step(self) -> None:
        self.weight -= 1e-6 * self.weight.grad

    def received(self) -> int:
        return sum(leaf.grad.nbytes for leaf in self.leaves() if leaf.grad is not None)

    def clear(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None


def run(fast: bool) -> list[Row]:
    """Measure; figures are medians of interleaved runs, with the smallest and largest beside them.

    Args:
        fast: a fraction of the tokens and classes.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    tokens, classes, latent, repeats = (256, 8192, 192, 3) if fast else (1024, 49152, 576, 5)
    bench = _Bench(tokens, classes, latent)
    return _times(bench, tokens, repeats) + _memory(bench)


def _times(bench: _Bench, tokens: int, repeats: int) -> list[Row]:
    works: dict[str, Callable[[], None]] = {
        "softmax": bench.softmax,
        "softmax, step": lambda: (bench.softmax(), bench.step())[-1],
        "chunked": lambda: bench.ovr("chunked"),
        "chunked, shared": lambda: bench.ovr("chunked", shared=True),
        "sampled": lambda: bench.ovr("sampled"),
        "sampled, shared": lambda: bench.ovr("sampled", shared=True),
        "sampled, step": lambda: (bench.ovr("sampled"), bench.step())[-1],
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for measured in range(repeats + 1):  # the first run warms up
        for name, work in works.items():
            started = time.process_time()
            work()
            if measured:
                seconds[name].append(time.process_time() - started)
    speed = {name: [tokens / value for value in values] for name, values in seconds.items()}
    classes, latent = bench.weight.shape
    head = f"{tokens} tokens, {classes} classes, width {latent}, forward and backward, one thread"
    base = "baseline: dense cross-entropy"
    shared = "one scale for all tokens, frozen"
    per_second = "tokens per CPU second"
    return [
        _row(f"chunked OvR, {head}; {base}", "CPU seconds", seconds["chunked"], seconds["softmax"]),
        _row(
            f"chunked OvR, {shared}, {head}; {base}",
            "CPU seconds",
            seconds["chunked, shared"],
            seconds["softmax"],
        ),
        _row(f"sampled OvR, K={_SAMPLES}, {head}; {base}", per_second, speed["sampled"], speed["softmax"]),
        _row(
            f"sampled OvR, K={_SAMPLES}, {shared}, {head}; {base}",
            per_second,
            speed["sampled, shared"],
            speed["softmax"],
        ),
        _row(
            f"sampled OvR, K={_SAMPLES}, {head}, and a dense step on the weight; {base} and the same step",
            per_second,
            speed["sampled, step"],
            speed["softmax, step"],
        ),
    ]


def _memory(bench: _Bench) -> list[Row]:
    extra, strict = {}, {}
    for impl in ("dense", "chunked", "sampled"):
        bench.clear()
        peak = peak_memory(lambda impl=impl: bench.ovr(impl))
        strict[impl], extra[impl] = [float(peak)], [float(peak - bench.received())]
    base = "baseline: dense OvR"
    rows = []
    for impl in ("chunked", "sampled"):
        rows += [
            _row(
                f"{impl} OvR; {base}; gradients handed to the caller not counted",
                "peak extra memory, bytes",
                extra[impl],
                extra["dense"],
            ),
            _row(
                f"{impl} OvR; {base}; gradients counted", "peak memory, bytes", strict[impl], strict["dense"]
            ),
        ]
    return rows


def peak_memory(work: Callable[[], None]) -> int:
    """Measure the most memory that torch's CPU allocator held above its level at the start.

    Every allocation and release is an event of the profiler, temporaries inside operations and the
    backward pass included; buffers of the matrix library are not.

    Args:
        work: what to measure; it should free nothing that was there before, since that counts as negative.

    Returns:
        Bytes.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    held = peak = 0
    results = record.profiler.kineto_results
    memory = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    for _, change in memory:
        held += change
        peak = max(peak, held)
    return peak


def _row(case: str, metric: str, ours: list[float], baseline: list[float]) -> Row:
    mine, other = statistics.median(ours), statistics.median(baseline)
    return {
        "case": case,
        "metric": metric,
        "ours": mine,
        "baseline": other,
        "ratio": mine / other,
        "runs": len(ours),
        "spread": {"ours": [min(ours), max(ours)], "baseline": [min(baseline), max(baseline)]},
    }
