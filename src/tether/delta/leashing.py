"""Put an adapter that was made elsewhere on a budget: measured on base text, shrunk, and given what fusion needs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from tether.causal.quantising import recorded
from tether.delta.adapter import Adapter
from tether.delta.adapter_domain import domain_figures
from tether.delta.adapter_layers import Plain
from tether.delta.adapter_probe import BaseText, adapter_change, thinned
from tether.delta.adapter_source import Source, open_source, take
from tether.delta.attached import Attached
from tether.delta.background import write_background
from tether.delta.budget import Budget
from tether.delta.cache import backbone_print
from tether.delta.gate import Gate, check_windows, fit_gate
from tether.delta.held_out import HELD_OUT, hold_out, leave_out, sample_texts
from tether.delta.material import check_unfused, states_of
from tether.delta.objective import output_fisher
from tether.delta.outcome import budget_share
from tether.delta.output_head import output_head
from tether.delta.source import reference
from tether.delta.training import Step
from tether.delta.windows import Windows, reader, window_text
from tether.errors import ConfigError
from tether.names import check_name
from tether.processes import current, joined
from tether.scale import Met, meet_budget
from tether.store.documents import documents_of, text_hash
from tether.store.manifest import versions

__all__ = ["PROBE", "RANK", "carrying", "kl_figures", "leash_adapter", "leash_plain"]

PROBE = 4096
"""Tokens of base text that are measured on, unless told otherwise."""
LEAST = 0.5
"""Share of the budget that an adapter must use at least that had to be shrunk."""
OWN = 32_768
"""Tokens of the domain's text, spread over it, that gate, sample and loss are taken from: what a gate looks at."""
RANK = 32
"""Of the LoRA that is taken from a model that was fine-tuned whole, unless told otherwise."""


@joined()
def leash_adapter(
    model: Any,
    tokenizer: Any,
    adapter: str | Path | Source,
    *,
    base_texts: str | Path | Sequence[str],
    budget: float | Budget = 0.05,
    texts: str | Path | Sequence[str] | None = None,
    name: str | None = None,
    window: int = 256,
    tokens: int = PROBE,
    rank: int = RANK,
    gate: bool = True,
    sample: bool = True,
    cache_folder: str | Path | None = None,
    on_step: Step | None = None,
) -> Adapter:
    """Put an adapter or a fine-tuned model that was made elsewhere on a budget.

    It is made the LoRA that it amounts to (`tether.delta.foreign`), or of a model that was fine-tuned whole one is
    taken (`tether.delta.difference`). Its drift is measured on base text, and it is shrunk by the largest factor of at
    most 1 at which it is within the budget. With text of its domain it gets a gate and a sample, and the loss on it is
    measured. Processes that `torchrun` or `accelerate launch` started together all call this, and measure a share of
    the text each.

    Cost: a pass over the base text with the base, and one for each of about four factors; with text of the domain a
    pass over at most `OWN` tokens of it, and about 15 CPU seconds for what the base writes of itself.

    Args:
        model: the base that it was made on, from `tether.load`; it is not touched.
        tokenizer: its tokenizer.
        adapter: its folder, or what `open_source` made of it.
        base_texts: general text that the model shall keep treating as it does: a file or a list of documents.
        budget: mean drift allowed there, nats of softmax KL a token, or a budget with another metric or a quantile.
        texts: text of its domain, likewise; None leaves gate and sample out, or as they are in an adapter of tether.
        name: of the domain; None takes the folder's name.
        window: tokens a context.
        tokens: of base text to measure on, spread over it.
        rank: of the LoRA that is taken from a fine-tuned model.
        gate: fit a one-class gate to the domain's text.
        sample: let the adapter carry a few documents of that text; not for private text.
        cache_folder: where hidden states of that text are kept.
        on_step: called with progress.

    Returns:
        The adapter; `save` writes it.

    Raises:
        CheckpointError: an adapter of another base, of a kind that no LoRA stands for, or damaged.
        ConfigError: a text that is missing, empty or too short, a budget that is not positive or that no factor is
            found for, a model that is fused or quantised, or PEFT is not installed; or processes that differ in what
            they were given.
    """  # noqa: DOC502 - raised by what it calls
    source = adapter if isinstance(adapter, Source) else open_source(adapter)
    called = check_name(name or source.path.stem)
    limit = _limit(budget)
    check_unfused(model)
    text_reader = reader(model, tokenizer)
    general = documents_of(base_texts)
    base_windows = window_text(general, text_reader, length=window, name="the base text")
    own = None if texts is None else documents_of(texts)
    own_windows = None
    if own is not None:
        own_windows = window_text(own, text_reader, length=window, name="the domain text")
        own_windows = thinned(own_windows, OWN)
        if gate:
            check_windows(len(own_windows.starts) - 1)
    hashes = {"base": text_hash(general)} | ({} if own is None else {"domain": text_hash(own)})
    current().agree(
        work="leashing", base=backbone_print(model), texts=hashes, budget=limit, window=window, tokens=tokens,
        name=called, rank=rank, gate=gate, sample=sample,
    )  # fmt: skip
    taken = take(source, model, rank)
    made = leash_plain(
        model, taken.plain, called, base_windows, limit, tokens=tokens, on_step=on_step, about=taken.about,
        hashes=hashes,
    )  # fmt: skip
    if own is None or own_windows is None:
        if source.what != "adapter":
            return made
        held: Adapter = source.held
        return replace(made, gate=held.gate if gate else None, sample=held.sample if sample else ())
    return carrying(
        model, made, own_windows, own, text_reader, tuned=taken.tuned, gate=gate, sample=sample,
        cache_folder=cache_folder, on_step=on_step,
    )  # fmt: skip


def carrying(
    model: Any,
    adapter: Adapter,
    windows: Windows,
    documents: Sequence[str],
    tokenizer: Any,
    *,
    tuned: Any = None,
    gate: bool = True,
    sample: bool = True,
    cache_folder: str | Path | None = None,
    on_step: Step | None = None,
) -> Adapter:
    """Give an adapter what fusion takes from text of its domain: a gate and a sample, with the loss on it on record.

    Args:
        model: the base.
        adapter: the adapter; its record is added to.
        windows: of the text.
        documents: of the text, as its windows number them.
        tokenizer: what they were read with.
        tuned: the model that the adapter was taken from, of transformers, or None.
        gate: fit a one-class gate.
        sample: carry a few of the documents.
        cache_folder: where hidden states of the text are kept.
        on_step: called with progress.

    Returns:
        The adapter with both.
    """
    aside = hold_out(windows, HELD_OUT)
    adapter.record.update(domain_figures(model, adapter, aside, tuned))

    def to_text() -> Gate:
        (states,) = states_of(model, [windows], cache_folder, on_step=on_step)
        return fit_gate(leave_out(states, aside), background=write_background(model))

    fitted = current().once(to_text) if gate else None
    return replace(adapter, gate=fitted, sample=sample_texts(aside, documents, tokenizer) if sample else ())


def leash_plain(
    model: Any,
    plain: Plain,
    name: str,
    windows: Windows,
    budget: Budget,
    *,
    tokens: int = PROBE,
    on_step: Step | None = None,
    about: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Adapter:
    """Shrink a LoRA to a budget on base text, and write down what was measured.

    Args:
        model: the base.
        plain: the LoRA.
        name: of the domain.
        windows: base text.
        budget: the limit; its `stretch` is the largest factor.
        tokens: of it to measure on, spread over it.
        on_step: called with `done` and `total` measurements, about.
        about: what else the record shall say.
        hashes: of the texts.

    Returns:
        The adapter, without a gate and a sample.

    Raises:
        ConfigError: no factor was found at which it is within the budget.
        CheckpointError: its weights do not fit the base.
    """  # noqa: DOC502 - raised by Attached.of
    started = time.process_time()
    base = backbone_print(model)
    attached = Attached.of(
        model, {name: Adapter(name=name, config=plain.config, tensors=plain.tensors, gate=None, base=base)}
    )
    text = BaseText(model, windows, tokens)
    fisher = None
    if budget.metric == "fisher":
        fisher = output_fisher(output_head(model), reference(model, text.states[:1024]).loc)
    seen: dict[float, Tensor] = {}

    def measured(factor: float) -> float:
        seen[factor] = text.drifts(attached, name, factor, budget.metric, fisher)
        if on_step:
            on_step({"done": len(seen), "total": max(len(seen), 4)})
        return float(budget.statistic(seen[factor]))

    value = budget.value or 0.0
    met = meet_budget(measured, value, ceiling=budget.stretch)
    # Far below a budget that is far below what the number format tells apart, nothing would be left of the adapter.
    if met.scale == 0 or (met.scale < 1 and met.drift < LEAST * value):
        raise ConfigError(_unreachable(budget, met))
    softmax = {
        factor: seen[factor] if budget.metric == "softmax" else text.drifts(attached, name, factor)
        for factor in dict.fromkeys((1.0, met.scale))
    }
    attached.fold(name, met.scale)
    change, _ = adapter_change(model, attached, name, text.windows, text.rows)
    used = budget_share(budget, met.drift)
    record = {
        "adapter": "lora",
        "rank": plain.config.r,
        "alpha": plain.config.lora_alpha,
        "made_of": plain.kind,
        "budget": budget.value,
        "metric": budget.metric,
        "quantile": budget.quantile,
        "factor": met.scale,
        "factor_budget": met.scale,
        "drift_base": met.drift,
        "drift_tokens": text.tokens,
        "base_text": change.figures(),
        "softmax_kl": {"before": kl_figures(softmax[1.0]), "after": kl_figures(softmax[met.scale])},
        "budget_used": used,
        "budget_why": _why(met, used, budget.stretch),
        "strengths": [1.0],
        "warnings": [],
        "texts": dict(hashes or {}),
        "versions": versions() | {"peft": version("peft")},
        **(about or {}),
    }
    if (packing := recorded(model)) is not None:
        record["quantised"] = packing
    record["cpu_seconds"] = sum(current().gather(time.process_time() - started))
    tensors = {key: values.detach().clone() for key, values in attached.weights(name).items()}
    return Adapter(name=name, config=plain.config, tensors=tensors, gate=None, base=base, record=record)


def kl_figures(kl: Tensor) -> dict[str, float]:
    """Condense the drift of tokens.

    Args:
        kl: nats, shape (n,).

    Returns:
        `mean`, `p99` (the order statistic from above) and `max`.
    """
    return {
        "mean": float(kl.double().mean()),
        "p99": float(Budget(quantile=0.99).statistic(kl)),
        "max": float(kl.max()),
    }


def _limit(budget: float | Budget) -> Budget:
    if isinstance(budget, Budget):
        if budget.value is None or budget.hard:
            raise ConfigError(
                "a penalty or a hard budget is of learning: expected a budget for the mean or a quantile of the drift"
            )
        return budget
    return Budget(value=budget, stretch=1.0)


def _unreachable(budget: Budget, met: Met) -> str:
    over = [tried for tried in met.tried if not tried[1] <= (budget.value or 0.0)]
    factor, drift = min(over)
    limit = f"{budget.value:g} nats ({budget.metric})"
    return (
        f"no factor was found at which the adapter is just within its budget of {limit}: at the smallest one that is "
        f"beyond it, {factor:.3g}, the drift is {drift:.3g}; give a larger budget, or leave the adapter out"
    )


def _why(met: Met, used: float | None, stretch: float) -> str:
    if met.scale == 1:
        return "It is within its budget as it is."
    if met.scale >= stretch:
        return f"It was made {met.scale:.4g} times as strong as it was, which is the most, and is within its budget."
    if used is not None and used < 0.95:
        return "No factor was found that comes closer to the budget without exceeding it."
    return f"It was made {met.scale:.4g} times as strong as it was, which uses the budget up."
