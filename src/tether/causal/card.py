"""The model card of a checkpoint, a delta or an adapter: what it is, what was measured of it, how it is loaded.

A card is made of what is on record alone, so nothing in it was typed by hand; `tether verify` computes the figures of
a certificate again.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from tether.causal.evidence import Rule, regret_allowed
from tether.causal.quantising import told

__all__ = ["CARD", "CERTIFICATE", "MARK", "fused_card", "learnt_card"]

CARD = "README.md"
"""Name of a card in its folder; it is no part of what a certificate describes."""
CERTIFICATE = "certificate.json"
"""Name of the certificate beside it."""
MARK = "<!-- Written by tether from what is on record. Without this line the card is yours, and stays as it is. -->"
"""In a card that is made anew when more is on record."""
LENGTHS = (1_000, 10**9)
"""Tokens of the text that a promise is worked out for: where it grows with them, and where one restart rate is 0."""


def fused_card(
    name: str,
    fusion: Mapping[str, Any] | None,
    *,
    base: str | None = None,
    figures: Mapping[str, Any] | None = None,
    sample: int = 0,
    apart: bool = False,
    packed: bool = False,
) -> str:
    """Describe a checkpoint.

    Args:
        name: what to call it.
        fusion: `CausalQwenConfig.fusion`, None for a model without domains.
        base: name of the base, where others can follow it.
        figures: of a certificate, that lies beside the card.
        sample: how many pieces of its domains' texts it carries.
        apart: whether the base is not in it, as in a fusion of adapters.
        packed: whether that base is packed in few bits.

    Returns:
        Markdown with a header of metadata.
    """
    lines = [f"# {name}", ""]
    if fusion is None:
        lines += [f"A causal language model{_on(base)}, converted by the Python package tether.", ""]
    else:
        lines += [*_promise(fusion, base), "", "| domain | weight | budget on base text |", "|---|---:|---|"]
        budgets = fusion.get("budgets") or [{}] * len(fusion["domains"])
        for domain, weight, budget in zip(fusion["domains"], fusion["weights"], budgets, strict=True):
            lines.append(f"| {domain} | {weight:g} | {_budget(budget)} |")
        if sample:
            lines += ["", f"It carries {sample} pieces of its domains' texts, which whoever has it can read."]
        lines += ["", "## How far it moved", "", *_measured(figures), ""]
    lines += ["## Load it", "", "```python", *_loading(name, base, apart, packed), "```", ""]
    return _header(base, ["fusion"] if fusion else []) + "\n".join(lines)


def learnt_card(
    kind: str,
    name: str,
    record: Mapping[str, Any],
    *,
    file: str,
    sample: Sequence[str] = (),
    base: str | None = None,
) -> str:
    """Describe a delta or an adapter.

    Args:
        kind: `delta` or `adapter`.
        name: what to call it.
        record: of its fit.
        file: name of the file or folder.
        sample: what it carries of the domain's text.
        base: name of the base, where others can follow it.

    Returns:
        Markdown with a header of metadata.
    """
    packing = record.get("quantised")
    packed = f" in {told(packing)}" if packing else ""
    option = f" --quantise {packing['bits']}bit" if packing else ""
    lines = [
        f"# {name}", "",
        f"A domain for a language model{_on(base)}{packed}, learnt as {'an' if kind == 'adapter' else 'a'} {kind} by "
        "the Python package tether, within a budget on how far general text may drift.", "",
        "| | before | after |", "|---|---:|---:|",
    ]  # fmt: skip
    for where, part in (("documents of the domain kept aside", "held_out"), ("base text", "base_text")):
        figures = record.get(part) or {}
        if figures.get("nll_before") is not None:
            lines.append(
                f"| loss on {where}, nats a token | {figures['nll_before']:.3f} | {figures['nll_after']:.3f} |"
            )
    drift = (record.get("base_text") or {}).get("softmax_kl")
    if drift is not None:
        lines.append(f"| KL divergence from the base on base text, nats a token | 0 | {drift:.2g} |")
    lines += ["", f"Budget on base text: {_budget(record)}. {record.get('budget_why', '')}".rstrip(), ""]
    lines += [f"Warning: {warning}" for warning in record.get("warnings", [])]
    if sample:
        lines += [f"It carries {len(sample)} pieces of the domain's text, which whoever has it can read.", ""]
    lines += ["## Use it", "", "```", f"tether fuse {base or 'BASE'} {file} --out fused{option}", "```", ""]
    return _header(base, [kind]) + "\n".join(lines)


def _header(base: str | None, tags: Sequence[str]) -> str:
    data = ModelCardData(
        base_model=base, library_name="tether", pipeline_tag="text-generation", tags=["tether", *tags],
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n{MARK}\n"


def _on(base: str | None) -> str:
    return f" on `{base}`" if base else ""


def _promise(fusion: Mapping[str, Any], base: str | None) -> list[str]:
    count = len(fusion["domains"])
    domains = f"{count} domains" if count != 1 else "One domain"
    if fusion.get("by") != "evidence":
        return [f"{domains}{_on(base)}, whose changes are added up, made by the Python package tether."]
    rule = Rule.of(fusion)
    bounded = 0.0 in rule.restarts
    allowed = regret_allowed(rule, rule.prior, LENGTHS[bounded])
    text = "all of it" if bounded else f"{LENGTHS[0]:,} tokens of it"
    return [
        f"{domains}{_on(base)}, combined by evidence with the Python package tether: the base and each domain alone "
        "predict the next token, and whoever predicted the text so far best has the most weight. Whatever a text is, "
        f"{text}, read from its beginning, costs together at most {math.ceil(100 * allowed) / 100:g} nats more than "
        "under the base."
    ]


def _budget(budget: Mapping[str, Any]) -> str:
    if budget.get("budget") is None:
        return "none"
    quantile = budget.get("quantile")
    of = "in the mean" if quantile is None else f"at the {quantile:g} quantile"
    return f"{budget['budget']:g} nats a token {of} ({budget.get('metric') or 'softmax'})"


def _measured(figures: Mapping[str, Any] | None) -> list[str]:
    if not figures:
        return [
            "No certificate lies beside this model. `tether certify BASE FOLDER --text general.jsonl --out "
            f"FOLDER/{CERTIFICATE}` makes one."
        ]
    lines = [
        "| text | tokens | loss, base | loss, fused | KL from the base, mean | 99 % quantile |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in figures.items():
        kl = row["softmax_kl"]
        cells = (
            _cell(name), f"{row['tokens']:,}", f"{row['nll_base']:.3f}", f"{row['nll']:.3f}", f"{kl['mean']:.2g}",
            f"{kl['p99']:.2g}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines, "",
        f"Losses and divergences are nats a token. `{CERTIFICATE}` has all figures, with the hashes of what they rest "
        f"on; `tether verify {CERTIFICATE} --base BASE` computes them again where the texts are at hand.",
    ]  # fmt: skip


# Names of texts are anybody's.
def _cell(text: str) -> str:
    return "".join(each if each.isalnum() or each in " ._-," else "_" for each in text)[:80]


def _loading(name: str, base: str | None, apart: bool, packed: bool) -> list[str]:
    where = [
        "import os", "",
        f'os.environ["TETHER_BASE"] = "{base or "BASE"}"  # the base, which is not in here: a folder or a hub id', "",
    ]  # fmt: skip
    return [
        f"# pip install 'tether[{'quantised' if packed else 'adapters'}]'" if apart else "# pip install tether",
        *(where if apart else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
    ]  # fmt: skip
