"""What `learn` prints: what was learnt, what it cost elsewhere, and what to type next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["learnt_told"]

METRICS = {
    "softmax": "KL divergence from the base",
    "fisher": "KL divergence from the base, to second order,",
    "latent": "latent drift",
}


OF = {
    "text": "", "prompt": ", those of the completions",
    "messages": ", those of the assistant's turns in conversations",
}  # fmt: skip
"""Of which part of the rows of a text tokens are counted."""


def learnt_told(
    record: Mapping[str, Any],
    sample: Sequence[str],
    *,
    model: str,
    out: Path,
    asked: bool = True,
    kind: str = "text",
) -> str:
    """Put the record of a delta or an adapter into sentences.

    Args:
        record: of the fit.
        sample: what it carries of the documents that were kept aside.
        model: the base, as the user named it.
        out: where it was written.
        asked: whether a sample was asked for.
        kind: what the rows of the text are, one of `tether.store.marked.KINDS`.

    Returns:
        One line a fact: the text, the domain's loss, base text, the budget, the sample, the next command.
    """
    lines = [f"{out} was learnt from {record['tokens']:,} tokens{OF[kind]}. {record['held_out']['note']}"]
    lines += [*_domain(record), *_numbers(record), _base(record), _budget(record), _sample(sample, asked)]
    lines += [f"Warning: {warning}" for warning in record["warnings"]]
    fused = out.with_name(f"{out.stem}-fused")
    packing = record.get("quantised")
    packed = ["--quantise", f"{packing['bits']}bit"] if packing else []
    command = shlex.join(["tether", "fuse", model, str(out), "--out", str(fused), *packed])
    return "\n".join([*lines, f"To use it, type: {command}"])


def _domain(record: Mapping[str, Any]) -> list[str]:
    kept = record["held_out"]
    if not kept["tokens"]:
        return []
    doubt = ""
    if (error := kept["standard_error"]) is not None:
        doubt = f", give or take {error:.3f} (standard error over {kept['documents']} {kept['kind']})"
        if -2 * error < kept["change"] < 0:
            doubt += ", which is too little to be sure of"
    return [
        f"The loss on what was kept aside is {kept['nll_before']:.3f} before and {kept['nll_after']:.3f} after, a "
        f"change of {kept['change']:+.3f}{doubt}. Losses are mean cross-entropies a token, as in training."
    ]


def _numbers(record: Mapping[str, Any]) -> list[str]:
    values = record.get("values", {"numbers": 0})
    if not values["numbers"]:
        return []
    return [
        f"The median error of {values['numbers']:,} numbers in it is {values['median_error_before']:.4g} before and "
        f"{values['median_error_after']:.4g} after."
    ]


def _base(record: Mapping[str, Any]) -> str:
    base = record["base_text"]
    loss = ""
    if base["nll_before"] is not None:
        loss = f"The loss on base text is {base['nll_before']:.3f} before and {base['nll_after']:.3f} after. "
    return (
        f"{loss}The KL divergence from the base there is {base['softmax_kl']:.2g} in the mean, measured on "
        f"{base['tokens']:,} tokens that were not learnt from."
    )


def _budget(record: Mapping[str, Any]) -> str:
    if record["budget_used"] is None:
        return str(record["budget_why"])
    quantile = record.get("quantile")
    what, where = ("mean" if quantile is None else f"{quantile:g} quantile of the"), "on held-out base text"
    if record.get("hard"):
        what, where = "largest", "at a training context"
    return (
        f"{record['budget_used']:.0%} of the budget is used: the {what} {METRICS[record['metric']]} {where} is "
        f"{record['drift_base']:.4g} of {record['budget']:g}. {record['budget_why']}"
    )


def _sample(sample: Sequence[str], asked: bool) -> str:
    if not sample:
        return "It carries no sample of the domain's text" + ("." if asked else ", as was asked for.")
    return (
        f"It carries a sample of what was kept aside: {len(sample)} pieces with {sum(map(len, sample)):,} characters, "
        "which whoever has it can read. For private text, learn with --no-sample."
    )
