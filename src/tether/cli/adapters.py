"""What `learn` and `fuse` do with LoRA adapters in place of deltas."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether.cli.output import emit, tell
from tether.cli.placing import load, refuse_spread
from tether.cli.progress import reporter
from tether.cli.texts import hashes_of, open_texts
from tether.errors import ConfigError

__all__ = ["fuse_adapters", "learn_adapter"]


def learn_adapter(
    kind: str,
    model: str,
    text: str,
    base_text: str,
    out: Path,
    *,
    budget: float,
    metric: str,
    quantile: float | None,
    gate: bool,
    tokens: int | None,
    cache: Path | None,
    disk: float,
    held_out: float | None = None,
    sample: bool = True,
    window: int = 256,
    fit: Mapping[str, Any],
    as_json: bool,
    **unused: Any,
) -> None:
    """Learn a domain as an adapter and write its folder.

    Args:
        kind: only `lora`.
        model: the base.
        text: the domain's text.
        base_text: general text on which the drift is held.
        out: the folder to write.
        budget: mean drift allowed on base text, nats per token.
        metric: what the budget is in.
        quantile: of the drift that the budget limits, or None for its mean.
        gate: fit a one-class gate too.
        tokens: domain tokens to use, in whole windows.
        cache: where hidden states of the base are kept.
        disk: bytes of hidden states that may be kept of each text.
        held_out: share of the text to keep aside, or None for the default.
        sample: whether the adapter carries a few of the documents that were kept aside.
        window: tokens a context.
        fit: fields of `AdapterFit` that were given.
        as_json: print JSON.
        unused: options of `learn` that only a delta has: their value must be what they are left out.

    Raises:
        ConfigError: another kind, or an option that only a delta has.
    """
    from tether.cli.learnt import learnt_told
    from tether.delta import adapter_learning
    from tether.delta.adapter import lora_config
    from tether.delta.adapter_training import AdapterFit
    from tether.delta.budget import Budget
    from tether.delta.held_out import HELD_OUT
    from tether.delta.unfinished import Unfinished, beside
    from tether.store.place import check_free

    if kind != "lora":
        raise ConfigError(f"adapter={kind!r}: expected lora")
    if given := [name for name, value in unused.items() if value]:
        raise ConfigError(
            f"--adapter with {', '.join('--' + name.replace('_', '-') for name in given)}: that is for deltas; "
            "leave it out"
        )
    chosen = AdapterFit(
        budget=Budget(value=budget, metric=metric, quantile=quantile),
        gate=gate,
        held_out=HELD_OUT if held_out is None else held_out,
        **fit,
    )
    refuse_spread("an adapter")
    lora_config(chosen.rank, chosen.alpha)
    own, general = open_texts([text, base_text])
    check_free(out)
    base, tokenizer = load(model)
    unfinished = Unfinished(beside(out) if cache is None else cache)
    try:
        with reporter() as steps:
            adapter = adapter_learning.learn_adapter(
                base, tokenizer, own, base_texts=general, name=out.stem, window=window, tokens=tokens,
                cache_folder=cache, disk=disk, sample=sample, on_step=steps(f"learning {out.stem}"), fit=chosen,
                unfinished=unfinished,
            )  # fmt: skip
        adapter.save(out, inputs=hashes_of({"domain": own, "base": general}))
    except BaseException:
        if step := unfinished.step():
            again = shlex.join(["tether", *sys.argv[1:]])
            tell(
                f"{unfinished.path}: the fit is kept up to step {step}; to go on from there, type: {again}",
                "yellow",
            )
        raise
    unfinished.remove()
    told = learnt_told(adapter.record, adapter.sample, model=model, out=out, asked=sample, kind=own.kind)
    record = {key: value for key, value in adapter.record.items() if key != "curve"}
    emit({"path": str(out), "name": adapter.name, **record, "sample": list(adapter.sample)}, as_json, told)


def fuse_adapters(
    model: str,
    paths: Mapping[str, float],
    out: Path,
    *,
    chart: str | None,
    gate: bool,
    by: str | None = None,
    prior: float | None = None,
    leash: float | None = None,
    leash_metric: str = "softmax",
    as_json: bool = False,
) -> None:
    """Write adapters, how they are fused, and their gates as one folder that AutoModelForCausalLM loads.

    Args:
        model: the base.
        paths: folders of adapters with their weights.
        out: the folder to write.
        chart: of a sum, in which their moves are added, or None.
        gate: whether each acts only on its own domain.
        by: evidence or sum, see `tether.delta.adapter_serving.serve`.
        prior: of evidence, weight of the base at the start of a text, or None for the default.
        leash: largest drift of any context, nats, or None.
        leash_metric: what it is in.
        as_json: print JSON.

    Raises:
        ConfigError: adapters together with deltas.
    """
    from tether.causal.evidence import Rule
    from tether.causal.loading import ALIASES
    from tether.delta.adapter import Adapter, is_adapter
    from tether.delta.adapter_serving import BASE, save_adapted, serve
    from tether.store.place import check_free

    deltas = [path for path in paths if not is_adapter(path)]
    if deltas:
        raise ConfigError(
            f"{', '.join(deltas)} beside adapters: expected one kind; learn the domain in the same form"
        )
    check_free(out)
    refuse_spread("an adapter")
    adapters = {Adapter.load(path): weight for path, weight in paths.items()}
    base, tokenizer = load(model)
    rule = None if prior is None else Rule(prior=prior)
    served = serve(
        base, adapters, by=by, rule=rule, chart=chart, gated=gate, leash=leash, leash_metric=leash_metric
    )
    save_adapted(served, adapters, tokenizer, out, base=model)
    parts = " + ".join(f"{weight:g} {adapter.name}" for adapter, weight in adapters.items())
    described = served.config.fusion
    # What is no place on this machine is not followed from the folder: `tether.delta.adapter_serving.find_base`.
    asked = "" if Path(model).exists() or model in ALIASES else f"; to serve it, set {BASE}={model}"
    how = "by evidence" if described.get("by") == "evidence" else f"chart {described['chart']}"
    emit(
        {"path": str(out), **described},
        as_json,
        f"{out}: adapters {parts}, {how}, {'gated' if described['gated'] else 'ungated'}; the base stays in "
        f"{model}{asked}",
    )
