"""Learn a domain as a LoRA adapter under a drift budget: a constrained fit, then one factor on the adapter."""

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.causal.offloading import refuse_offloaded
from tether.causal.quantising import recorded
from tether.delta.adapter import Adapter, lora_config
from tether.delta.adapter_probe import BaseText, adapter_change, some_windows
from tether.delta.adapter_training import AdapterFit, AdapterTraining
from tether.delta.anchor import check_base
from tether.delta.attached import Attached
from tether.delta.background import write_background
from tether.delta.budget import Budget
from tether.delta.cache import StateCache, backbone_print, hidden_states, text_inputs
from tether.delta.gate import fit_gate
from tether.delta.held_out import HeldOut, hold_out, leave_out, sample_texts
from tether.delta.material import DISK, gather, states_of
from tether.delta.outcome import NO_HELP, budget_share, why_no_more
from tether.delta.ray import MEASURED
from tether.delta.recomputing import check_recomputing
from tether.delta.source import reference
from tether.delta.strength import change_figures
from tether.delta.training import Step
from tether.delta.unfinished import Unfinished, fit_settings
from tether.delta.values import next_values, value_figures, value_head
from tether.delta.windows import Windows, reader
from tether.processes import current, joined
from tether.scale import meet_budget
from tether.store.manifest import versions

__all__ = ["fit_adapter", "learn_adapter", "meet_adapter"]


def fit_adapter(
    model: Any,
    domain: StateCache,
    base: StateCache,
    held_out: StateCache,
    name: str,
    fit: AdapterFit,
    on_step: Step | None = None,
    *,
    background: Tensor | None = None,
    unfinished: Unfinished | None = None,
) -> Adapter:
    """Fit a LoRA adapter on every linear layer of the backbone; the model itself is not touched.

    A part of the domain's text is kept aside, on which losses before and after are measured. The rest is learnt:
    it minimises domain NLL + multiplier x drift on base text, with dual ascent on the multiplier; then one factor
    on the adapter (on B, so that the file is within its budget whoever loads it) is bisected so that the drift
    *measured* on held-out base text is below the budget, within 5 % where it can be. It fails closed: where no
    factor is found that holds, it is 0. The base's side of the drift comes from cached states, so a step costs one
    forward and backward pass over the domain batch and the base batch.

    There is no a-priori bound: how far an adapter moves a context is known only by running it.

    Args:
        model: the base.
        domain: states of the domain's text; the gate is fitted to them.
        base: states of base text for the constraint.
        held_out: states of other base text on which the budget is met.
        name: the domain.
        fit: options.
        on_step: called with step, steps, nll, drift and multiplier.
        background: what the base writes of itself, for the gate; see `tether.delta.background`.
        unfinished: where the fit is kept while it goes on, and from where it goes on if it was stopped there.

    Returns:
        The adapter with its record.

    Raises:
        CheckpointError: states of another backbone than the model's, or of middle layers too.
    """  # noqa: DOC502 - raised by check_base
    for cache in (domain, base, held_out):
        check_base(model, cache, ())
    started = time.process_time()
    if fit.gradient_checkpointing:
        check_recomputing(model.backbone)
    generator = torch.Generator().manual_seed(fit.seed)
    aside = hold_out(domain.windows, fit.held_out)
    own = leave_out(domain, aside)
    attached = Attached(model, name, lora_config(fit.rank, fit.alpha), generator)
    loop = AdapterTraining(model, attached, name, own, base, fit, generator)
    group, kept = current(), unfinished
    state = None
    if kept is not None:
        state = group.once(lambda: kept.begin(name, fit_settings(model, own, base, fit)))
    if state is not None:
        started -= state.cpu_seconds
    loop.run(on_step, state=state, unfinished=unfinished)
    record: dict[str, Any] = {
        "adapter": "lora",
        "rank": fit.rank,
        "alpha": fit.alpha,
        "budget": None if fit.budget is None else fit.budget.value,
        "metric": None if fit.budget is None else fit.budget.metric,
        "quantile": None if fit.budget is None else fit.budget.quantile,
        "replay": fit.replay,
        "multiplier": loop.multiplier,
        "curve": loop.curve,
        "tokens": int((own.windows.targets >= 0).sum()),
        "factor": 1.0,
        "fit": {field.name: getattr(fit, field.name) for field in fields(fit) if field.name != "budget"},
        "versions": versions() | {"peft": version("peft")},
    }
    if (packing := recorded(model)) is not None:
        record["quantised"] = packing
    if fit.budget is not None:
        record |= meet_adapter(
            model, attached, name, held_out, fit.budget, probe=fit.probe, fisher=loop.fisher
        )
    record |= _measured(model, attached, name, held_out, aside, fit, record)
    gate = group.once(lambda: fit_gate(own, background=background)) if fit.gate else None
    record["cpu_seconds"] = sum(group.gather(time.process_time() - started))
    scaled = {
        key: values.detach().clone() * (record["factor"] if "lora_B" in key else 1.0)
        for key, values in attached.weights(name).items()
    }
    config = attached.peft.peft_config[attached.slot(name)]
    config.base_model_name_or_path = model.config.get_text_config(decoder=True).name_or_path or None
    config.inference_mode = True
    # Of several processes each has it: what it depends on was added up or gathered, and is the same in all of them.
    return Adapter(name=name, config=config, tensors=scaled, gate=gate, base=domain.base, record=record)


# What a record says of the learnt adapter: losses of both texts before and after, and how much of its budget it uses.
def _measured(
    model: Any,
    attached: Attached,
    name: str,
    held_out: StateCache,
    aside: HeldOut,
    fit: AdapterFit,
    record: dict[str, Any],
) -> dict[str, Any]:
    factor = record["factor"]
    attached.rescale(name, factor)
    kept: dict[str, Any] = {"kind": aside.kind, "note": aside.note, "documents": 0, "tokens": 0}
    helps, values = True, _value_record(model, attached, name, aside.windows, torch.arange(0))
    if len(aside.away):
        of_window = aside.windows.documents[aside.windows.starts[:-1]]
        rows = torch.isin(of_window, aside.away).nonzero().squeeze(-1)
        windows, rows = aside.windows, some_windows(aside.windows, rows, MEASURED)
        change, documents = adapter_change(model, attached, name, windows, rows)
        values = _value_record(model, attached, name, windows, rows)
        scored = ~change.before.isnan().cpu()
        kept |= change_figures(change.before[scored], change.after[scored], documents[scored])
        helps = kept["change"] < 0
    every = torch.arange(len(held_out.windows.starts) - 1)
    rows = some_windows(held_out.windows, every, fit.probe)
    base_text = adapter_change(model, attached, name, held_out.windows, rows)[0].figures()
    used = budget_share(fit.budget, record.get("drift_base"))
    return {
        "factor_budget": factor,
        "strengths": [1.0],
        "held_out": kept,
        "base_text": base_text,
        "budget_used": used,
        "budget_why": why_no_more(fit.budget, used, factor_budget=factor, helps=helps),
        "warnings": [] if helps else [NO_HELP],
        **values,
    }


# What an adapter does to the numbers in some windows; nothing for a model without numbers.
@torch.no_grad()
def _value_record(
    model: Any, attached: Attached, name: str, windows: Windows, rows: Tensor
) -> dict[str, Any]:
    head, values = value_head(model), next_values(model, windows)
    if head is None:
        return {}
    laws: list[list[Tensor]] = [[torch.zeros(0)] for _ in range(5)]
    for some in rows.split(8) if len(rows) else ():
        batch = windows.batch(some)
        true = values[windows.positions(batch)]
        here = ~true.isnan()
        moved = attached.states(name, **text_inputs(model, batch)).last_hidden_state.float()
        for at, states in enumerate((hidden_states(model, batch)[batch.mask], moved[batch.mask])):
            found = reference(model, states[here])
            for part, law in zip(laws[2 * at : 2 * at + 2], head.law(found.loc, found.scale), strict=True):
                part.append(law.cpu())
        laws[4].append(true[here])
    before_loc, before_scale, after_loc, after_scale, true = map(torch.cat, laws)
    before, after = (before_loc, before_scale), (after_loc, after_scale)
    return {"values": value_figures(before, after, true, model.action.number)}


@torch.no_grad()
def meet_adapter(
    model: Any,
    attached: Attached,
    name: str,
    held_out: StateCache,
    budget: Budget,
    *,
    probe: int = 2048,
    fisher: Tensor | None = None,
) -> dict[str, Any]:
    """Find the factor at which an adapter's measured drift on base text is just within a budget.

    Args:
        model: the base.
        attached: holds the adapter, which is left at its last factor tried.
        name: of the adapter.
        held_out: base text; its windows are taken evenly, so that many documents take part.
        budget: the limit; its `stretch` is the largest factor.
        probe: tokens measured on, about.
        fisher: output Fisher, shape (C, C), for a budget in `fisher`.

    Returns:
        `factor`, 0 where none was found that holds; `drift_base` there; `drift_tokens`.
    """
    text = BaseText(model, held_out.windows, probe)

    def measured(factor: float) -> float:
        return float(budget.statistic(text.drifts(attached, name, factor, budget.metric, fisher)))

    value = 0.0 if budget.value is None else budget.value
    met = meet_budget(measured, value, ceiling=budget.stretch)
    return {"factor": met.scale, "drift_base": met.drift, "drift_tokens": text.tokens}


@joined()
def learn_adapter(
    model: Any,
    tokenizer: Any,
    texts: str | Path | Sequence[str],
    *,
    base_texts: str | Path | Sequence[str],
    name: str | None = None,
    window: int = 256,
    tokens: int | None = None,
    cache_folder: str | Path | None = None,
    disk: float = DISK,
    sample: bool = True,
    on_step: Step | None = None,
    fit: AdapterFit | None = None,
    unfinished: Unfinished | None = None,
) -> Adapter:
    """Learn a domain from text as an adapter.

    Processes that `torchrun` or `accelerate launch` started together all call this: each takes its share of the texts
    and of every step's windows, and all get the same adapter, that of one process up to rounding.

    Args:
        model: the base, from `tether.load`.
        tokenizer: its tokenizer.
        texts: the domain's text: a file (JSON lines with `text`, or plain) or a list of documents.
        base_texts: general text that the model shall keep treating as it does, likewise.
        name: the domain; None takes the file's name.
        window: tokens a context.
        tokens: domain tokens to use at most; as many base tokens are used.
        cache_folder: where hidden states of the base are kept for the next fit.
        disk: bytes of hidden states that may be kept of each text; of a longer one, windows spread over it are used.
        sample: let the adapter carry a few of the documents that were kept aside; not for private text.
        on_step: called with progress.
        fit: options; None takes the defaults.
        unfinished: where the fit is kept while it goes on. One that was stopped, however, goes on from there with the
            same call, to the same adapter; who gives it takes it away once the adapter is saved. None keeps the fit in
            `cache_folder`, if there is one, until it is learnt.

    Returns:
        The adapter; `save` writes it.

    Raises:
        ConfigError: a text missing, empty or shorter than one context, or PEFT is not installed; or processes that
            differ in what they were given, or do not see one folder for states.
    """  # noqa: DOC502 - raised by what it calls
    chosen = fit or AdapterFit()
    if chosen.gradient_checkpointing:
        check_recomputing(model.backbone)
    refuse_offloaded(model, "an adapter")
    kept = Unfinished(cache_folder) if unfinished is None and cache_folder else unfinished
    material = gather(
        model,
        tokenizer,
        texts,
        base_texts,
        name=name,
        window=window,
        tokens=tokens,
        gate=chosen.gate,
        disk=disk,
    )
    group = current()
    group.agree(
        work="learning an adapter", base=backbone_print(model), texts=material.hashes, options=chosen, window=window,
        tokens=tokens, name=material.name, sample=sample,
    )  # fmt: skip
    domain, base, held_out = states_of(model, material.windows, cache_folder, on_step=on_step)
    written = write_background(model) if chosen.gate and group.main else None
    adapter = fit_adapter(
        model, domain, base, held_out, material.name, chosen, on_step, background=written, unfinished=kept
    )
    adapter.record["texts"] = material.hashes
    if kept is not None and unfinished is None:
        kept.remove()
    if not sample:
        return adapter
    aside = hold_out(material.windows[0], chosen.held_out)
    return replace(adapter, sample=sample_texts(aside, material.documents, reader(model, tokenizer)))
