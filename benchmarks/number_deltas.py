"""What a delta and an adapter do to the numbers of a text: rows of the diabetes table as sentences, unseen rows tested.

The model that reads and writes numbers is made as is recommended: one pass teaches the head where numbers stand, then
the value head is fitted to all numbers of the rows. Then the rows are learnt with the defaults, and once more with
numbers left out of the loss. Losses and errors are those of what is served alone, without gates, on the 147 rows of the
test, and on the first 25 of them.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.numbers import NUMBERS
from benchmarks.tables import TABLES
from tether.causal.loading import load_backbone
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.training import train
from tether.delta.adapter_learning import learn_adapter
from tether.delta.adapter_serving import serve
from tether.delta.figures import served_variant
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.measure import measure
from tether.delta.values import served_values
from tether.delta.windows import Windows, reader, window_text
from tether.demo import corpora

__all__ = ["rows"]

Row = dict[str, Any]
BASE = "smollm2-135m"
SOME = 25


def rows(*, fast: bool) -> Iterator[Row]:
    """Learn rows of numbers, and see what becomes of numbers.

    Args:
        fast: deltas alone.

    Yields:
        Rows of case, metric, ours, baseline, ratio, runs; the baseline is the base.
    """
    torch.set_num_threads(1)
    learnt, tested = (_sentences(table) for table in TABLES[0]().split())
    backbone, tokenizer = load_backbone(BASE)
    model = CausalQwenForCausalLM.from_backbone(backbone)
    numeric = model.add_numbers(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        train(model, numeric, learnt, options=NUMBERS, folder=folder)
    base_texts = [text[:1200] for text in corpora.documents(corpora.news)[:150]]
    tests = {
        f"{count} rows": window_text(tested[:count], reader(model, tokenizer), per_document=1)
        for count in (SOME, len(tested))
    }
    for blind in (False, True):
        weight, model.config.value_loss_weight = model.config.value_loss_weight, 0.0 if blind else 1.0
        what = "numbers left out of the loss" if blind else "defaults"
        delta = learn_delta(model, tokenizer, learnt, base_texts=base_texts, name="diabetes")
        yield from _measured(f"delta, {what}", fuse(model, {delta: 1.0}, by="sum", gated=False), tests)
        if not fast:
            adapter = learn_adapter(model, tokenizer, learnt, base_texts=base_texts, name="diabetes")
            yield from _measured(
                f"adapter, {what}", serve(model, {adapter: 1.0}, by="sum", gated=False), tests
            )
        model.config.value_loss_weight = weight


def _sentences(table: Any) -> list[str]:
    return [pair.prompt + pair.completion for pair in table.pairs()]


def _measured(case: str, served: Any, tests: dict[str, Windows]) -> Iterator[Row]:
    for name, windows in tests.items():
        values = served_values(served, windows)
        for metric in ("median_error", "covered"):
            yield _row(f"{case}, {name}", metric, values[f"{metric}_after"], values[f"{metric}_before"])
        yield _row(f"{case}, {name}", "drift of the law of numbers, nats", values["drift"], None)
        found = measure(served, served.fusion, windows, [served_variant(served)])
        losses = (float(nll.double().mean()) for nll in (found.nll[0], found.base_nll))
        yield _row(f"{case}, {name}", "NLL of tokens", *losses)


def _row(case: str, metric: str, ours: float, baseline: float | None) -> Row:
    ratio = None if not baseline else ours / baseline
    return {"case": case, "metric": metric, "ours": ours, "baseline": baseline, "ratio": ratio, "runs": 1}
