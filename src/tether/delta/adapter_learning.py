"""Learn a domain as a LoRA adapter under a drift budget: a constrained fit, then one factor on the adapter."""

import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.delta.adapter import Adapter, Attached, lora_config
from tether.delta.adapter_drift import adapter_drift
from tether.delta.adapter_training import AdapterFit, AdapterTraining
from tether.delta.anchor import check_base
from tether.delta.background import write_background
from tether.delta.budget import Budget, meet_budget
from tether.delta.cache import StateCache, hidden_states, text_inputs
from tether.delta.gate import fit_gate
from tether.delta.material import gather, states_of
from tether.delta.training import Step
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
) -> Adapter:
    """Fit a LoRA adapter on every linear layer of the backbone; the model itself is not touched.

    Minimises domain NLL + multiplier x drift on base text, with dual ascent on the multiplier; then one factor
    on the adapter (on B, so that the file is within its budget whoever loads it) is bisected so that the drift
    *measured* on held-out base text is within 5 % below the budget. It fails closed: where no factor is found
    that holds, it is 0. The base's side of the drift comes from cached states, so a step costs one forward and
    backward pass over the domain batch and the base batch.

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

    Returns:
        The adapter with its record.

    Raises:
        CheckpointError: states of another backbone than the model's, or of middle layers too.
    """  # noqa: DOC502 - raised by check_base
    for cache in (domain, base, held_out):
        check_base(model, cache, ())
    started = time.process_time()
    generator = torch.Generator().manual_seed(fit.seed)
    attached = Attached(model, name, lora_config(fit.rank, fit.alpha), generator)
    loop = AdapterTraining(model, attached, name, domain, base, fit, generator)
    loop.run(on_step)
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
        "tokens": int((domain.windows.targets >= 0).sum()) * fit.epochs,
        "factor": 1.0,
        "versions": versions() | {"peft": version("peft")},
    }
    if fit.budget is not None:
        record |= meet_adapter(
            model, attached, name, held_out, fit.budget, probe=fit.probe, fisher=loop.fisher
        )
    gate = fit_gate(domain, background=background) if fit.gate else None
    record["cpu_seconds"] = time.process_time() - started
    scaled = {
        key: values.detach().clone() * (record["factor"] if "lora_B" in key else 1.0)
        for key, values in attached.weights(name).items()
    }
    config = attached.peft.peft_config[attached.slot(name)]
    config.base_model_name_or_path = model.config.get_text_config(decoder=True).name_or_path or None
    config.inference_mode = True
    return Adapter(name=name, config=config, tensors=scaled, gate=gate, base=domain.base, record=record)


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
    """Find the factor at which an adapter's measured drift on base text is within 5 % below a budget.

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
    windows = held_out.windows
    count = len(windows.starts) - 1
    wanted = max(1, min(count, math.ceil(probe * count / len(windows.input_ids))))
    batches = [windows.batch(rows) for rows in torch.linspace(0, count - 1, wanted).long().split(8)]
    # Afresh from the backbone: what is cached is rounded to float16.
    before = [hidden_states(model, batch)[batch.mask] for batch in batches]

    def measured(factor: float) -> float:
        attached.rescale(name, factor)
        drifts = []
        for base, batch in zip(before, batches, strict=True):
            states = attached.states(name, **text_inputs(model, batch)).last_hidden_state.float().cpu()
            drifts.append(adapter_drift(budget.metric, model, base, states[batch.mask], fisher))
        return float(budget.statistic(torch.cat(drifts)))

    value = 0.0 if budget.value is None else budget.value
    met = meet_budget(measured, value, ceiling=budget.stretch)
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    return {"factor": met.scale, "drift_base": met.drift, "drift_tokens": tokens}


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
    on_step: Step | None = None,
    fit: AdapterFit | None = None,
) -> Adapter:
    """Learn a domain from text as an adapter.

    Args:
        model: the base, from `tether.load`.
        tokenizer: its tokenizer.
        texts: the domain's text: a file (JSON lines with `text`, or plain) or a list of documents.
        base_texts: general text that the model shall keep treating as it does, likewise.
        name: the domain; None takes the file's name.
        window: tokens a context.
        tokens: domain tokens to use at most; as many base tokens are used.
        cache_folder: where hidden states of the base are kept for the next fit.
        on_step: called with progress.
        fit: options; None takes the defaults.

    Returns:
        The adapter; `save` writes it.

    Raises:
        ConfigError: a text missing, empty or shorter than one context, or PEFT is not installed.
    """  # noqa: DOC502 - raised by what it calls
    chosen = fit or AdapterFit()
    material = gather(
        model, tokenizer, texts, base_texts, name=name, window=window, tokens=tokens, gate=chosen.gate
    )
    with states_of(model, material.windows, cache_folder, on_step=on_step) as states:
        domain, base, held_out = states
        written = write_background(model) if chosen.gate else None
        adapter = fit_adapter(
            model, domain, base, held_out, material.name, chosen, on_step, background=written
        )
    adapter.record["texts"] = material.hashes
    return adapter
