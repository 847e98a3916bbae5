"""The command `leash`: an adapter or a fine-tuned model that was made elsewhere, on a drift budget."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.output import emit, quiet_libraries
from tether.cli.placing import load
from tether.cli.progress import reporter
from tether.cli.texts import TEXT, hashes_of, open_texts
from tether.errors import ConfigError
from tether.names import check_name

__all__ = ["leash", "refuse_raw"]


def leash(
    adapter: Annotated[
        Path,
        typer.Argument(help="Folder of the adapter (PEFT's or tether's), or of a model fine-tuned whole."),
    ],
    base: Annotated[
        str, typer.Option(help="The base it was made on: checkpoint folder, alias, path or hub id.")
    ],
    base_text: Annotated[
        str, typer.Option(help=f"General text on which the drift is measured and held: {TEXT}.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the leashed adapter; must be new or empty.")],
    budget: Annotated[float, typer.Option(help="Mean drift allowed on base text, nats per token.")] = 0.05,
    metric: Annotated[
        str, typer.Option(help="What the budget is in: softmax, fisher or latent.")
    ] = "softmax",
    quantile: Annotated[
        float | None, typer.Option(help="Limit this quantile of the drift instead of its mean.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text of its domain, likewise (32,768 tokens of it): for a gate, a sample, the loss before and after."
        ),
    ] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Fit no gate: in a fusion it then never sleeps.")
    ] = False,
    no_sample: Annotated[
        bool, typer.Option("--no-sample", help="Private text: let the folder carry none of it.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a model fine-tuned whole: rank of the LoRA taken from it.", show_default="32"
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of base text to measure on, spread over it.")
    ] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens a context.")] = 256,
    cache: Annotated[
        Path | None, typer.Option(help="Keep hidden states of the domain's text here for the next time.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Take in an adapter made elsewhere: measured on base text, shrunk to a budget, ready to fuse and to certify."""
    quiet_libraries()
    from tether.delta.adapter import lora_config
    from tether.delta.adapter_source import open_source
    from tether.delta.budget import Budget
    from tether.delta.leashing import RANK, leash_adapter
    from tether.store.place import check_free, check_place

    # All that can be wrong without the model is found before it is loaded.
    check_name(out.stem)
    lora_config(1, 1)
    limit = Budget(value=budget, metric=metric, quantile=quantile, stretch=1.0)
    if cache is not None:
        check_place(cache / "states")
    check_free(out)
    source = open_source(adapter, base)
    if rank is not None and source.what != "checkpoint":
        raise ConfigError(
            f"--rank {rank}: {adapter} is an adapter and keeps its own rank; leave it out, it is of models that were "
            "fine-tuned whole"
        )
    if text is None and (no_gate or no_sample) and source.what != "adapter":
        raise ConfigError(
            "--no-gate or --no-sample without --text: without text there is neither; leave it out"
        )
    opened = open_texts([base_text] if text is None else [base_text, text])
    general, own = opened[0], None if text is None else opened[1]
    model, tokenizer = load(base)
    with reporter() as steps:
        made = leash_adapter(
            model, tokenizer, source, base_texts=general, budget=limit, texts=own, name=out.stem, window=window,
            tokens=tokens, rank=rank or RANK, gate=not no_gate, sample=not no_sample, cache_folder=cache,
            on_step=steps(f"leashing {out.stem}"),
        )  # fmt: skip
    made.save(out, inputs=hashes_of({"base": general} | ({} if own is None else {"domain": own})))
    told = _told(made.record, made, base=base, out=out)
    emit({"path": str(out), "name": made.name, **made.record, "gated": made.gate is not None}, as_json, told)


def refuse_raw(paths: Mapping[str, float], base: str) -> None:
    """Refuse what `fuse` is given of adapters and models that `leash` has not taken in yet.

    Args:
        paths: what shall be fused.
        base: the base, as the user named it.

    Raises:
        ConfigError: one of them is such a folder; the message is the command to type.
    """
    from tether.delta.adapter import is_adapter
    from tether.delta.difference import is_checkpoint
    from tether.delta.foreign import is_foreign
    from tether.store.manifest import MANIFEST

    for path in paths:
        whole = is_checkpoint(path) and not (Path(path) / MANIFEST).is_file()
        if is_adapter(path) or not (is_foreign(path) or whole):
            continue
        kind = "an adapter that was made elsewhere" if is_foreign(path) else "a whole model"
        name = Path(path).resolve().name
        command = shlex.join(
            ["tether", "leash", path, "--base", base, "--base-text", "general.jsonl", "--out", f"{name}.lora"]
        )
        raise ConfigError(f"{path}: {kind}; expected one on a budget. Type first: {command}")


def _told(record: Mapping[str, Any], made: Any, *, base: str, out: Path) -> str:
    before, after = record["softmax_kl"]["before"], record["softmax_kl"]["after"]
    quantile = record["quantile"]
    what = "mean" if quantile is None else f"{quantile:g} quantile of the"
    made_on = f" It says that it was made on {record['made_on']}." if record.get("made_on") else ""
    lines = [
        f"{out} was made of {record['made_of']}.{made_on} As it came, the KL divergence from the base on "
        f"{record['drift_tokens']:,} tokens of base text is {_figures(before)}.",
        f"{record['budget_why']} There it is {_figures(after)}; the {what} drift ({record['metric']}) is "
        f"{record['drift_base']:.4g} of {record['budget']:g}.",
        *_difference(record.get("difference")),
        *_domain(record.get("held_out")),
        _carried(made),
        *(f"Warning: {warning}" for warning in record["warnings"]),
    ]
    fused = out.with_name(f"{out.stem}-fused")
    command = shlex.join(["tether", "fuse", base, str(out), "--out", str(fused)])
    return "\n".join([*lines, f"To use it, type: {command}"])


def _figures(kl: Mapping[str, float]) -> str:
    return f"{kl['mean']:.4g} in the mean, {kl['p99']:.3g} at the 99 % quantile, {kl['max']:.3g} at most"


def _difference(about: Mapping[str, Any] | None) -> list[str]:
    if not about:
        return []
    lines = [f"It holds {about['kept']:.0%} of the size of what the linear layers changed by."]
    if left := about["left_out"]:
        largest = max(left, key=lambda name: left[name])
        lines.append(
            f"Changes elsewhere are left out ({len(left)} tensors; the largest is {left[largest]:.2%}, {largest})."
        )
    if nll := about.get("nll"):
        lines.append(
            f"The loss on the domain's text is {nll['base']:.3f} under the base, {nll['tuned']:.3f} under the "
            f"fine-tuned model and {nll['taken']:.3f} under this LoRA before it was shrunk."
        )
    return lines


def _domain(kept: Mapping[str, Any] | None) -> list[str]:
    if not kept:
        return []
    doubt = "" if kept["standard_error"] is None else f", give or take {kept['standard_error']:.3f}"
    return [
        f"{kept['note']} It is {kept['nll_before']:.3f} before and {kept['nll_after']:.3f} after, a change of "
        f"{kept['change']:+.3f}{doubt}."
    ]


def _carried(made: Any) -> str:
    gate = "It has a gate"
    if made.gate is None:
        gate = "It has no gate (give --text for one), so in a fusion it never sleeps"
    if not made.sample:
        return f"{gate}; it carries no sample of the domain's text."
    return (
        f"{gate}; it carries a sample of {len(made.sample)} pieces of text, which whoever has it can read "
        "(--no-sample)."
    )
