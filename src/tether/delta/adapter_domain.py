"""What an adapter does to text of its domain, beside the fine-tuned model that it may have been taken from."""

from typing import Any

import torch
from torch import Tensor

from tether.delta.adapter import Adapter
from tether.delta.adapter_probe import adapter_change, some_windows
from tether.delta.attached import Attached
from tether.delta.held_out import HeldOut
from tether.delta.ray import MEASURED
from tether.delta.strength import change_figures
from tether.delta.windows import Windows

__all__ = ["domain_figures"]

FEWER = (
    "On the text that was given the loss is not below the base's: that text is of another kind than what the adapter "
    "was learnt from, or a fusion is better off without it."
)
SMALL = 0.5
"""Share of a fine-tuned model's gain below which a LoRA taken from it is warned of."""


@torch.no_grad()
def domain_figures(model: Any, adapter: Adapter, aside: HeldOut, tuned: Any = None) -> dict[str, Any]:
    """Measure losses on a part of a domain's text.

    Args:
        model: the base.
        adapter: with its record.
        aside: the text, and which documents of it are measured on; all where none are kept aside.
        tuned: the model that the adapter was taken from, of transformers, or None.

    Returns:
        `held_out` and `warnings` for the record; of an adapter that was taken from a fine-tuned model `difference` with
        the losses under base, fine-tuned model and LoRA before it was shrunk, and the share of the gain that the LoRA
        has.
    """
    windows = aside.windows
    every = torch.arange(len(windows.starts) - 1)
    rows = every
    if len(aside.away):
        rows = torch.isin(windows.documents[windows.starts[:-1]], aside.away).nonzero().squeeze(-1)
    rows = some_windows(windows, rows, MEASURED)
    attached = Attached.of(model, {adapter.name: adapter})
    change, documents = adapter_change(model, attached, adapter.name, windows, rows)
    scored = ~change.before.isnan().cpu()
    note = (
        f"The loss is measured on {len(documents[scored].unique())} documents of the text that was given. Whether the "
        "adapter was learnt from them is not known here."
    )
    kept: dict[str, Any] = {"kind": aside.kind, "note": note}
    kept |= change_figures(change.before.cpu()[scored], change.after.cpu()[scored], documents[scored])
    warnings = [] if kept["change"] < 0 else [FEWER]
    about = dict(adapter.record.get("difference", {}))
    if tuned is not None and windows.numeric_values is None:
        whole = _loss(tuned, windows, rows)
        attached.rescale(adapter.name, 1 / adapter.record["factor"])
        taken, _ = adapter_change(model, attached, adapter.name, windows, rows)
        nll: dict[str, float] = {
            "base": kept["nll_before"],
            "tuned": whole,
            "taken": float(taken.after.cpu()[scored].double().mean()),
        }
        about["nll"] = nll
        gain = nll["base"] - nll["tuned"]
        share = (nll["base"] - nll["taken"]) / gain if gain > 0 else None
        about["gain_kept"] = share
        if share is not None and share < SMALL:
            warnings.append(
                f"The LoRA that was taken from the fine-tuned model has {share:.0%} of its gain on this text, before "
                "it was shrunk: a larger rank keeps more."
            )
    found: dict[str, Any] = {"held_out": kept, "warnings": [*adapter.record["warnings"], *warnings]}
    return found | ({"difference": about} if about else {})


# Mean loss of a plain model in some windows, nats a token.
def _loss(tuned: Any, windows: Windows, rows: Tensor) -> float:
    total, count = 0.0, 0
    for row in rows.split(1):
        batch = windows.batch(row)
        targets = windows.targets[windows.positions(batch)]
        logits = (
            tuned(input_ids=batch.input_ids.to(tuned.device), use_cache=False)
            .logits[batch.mask]
            .float()
            .cpu()
        )
        here = targets >= 0
        total += float(torch.nn.functional.cross_entropy(logits[here], targets[here], reduction="sum"))
        count += int(here.sum())
    return total / max(count, 1)
