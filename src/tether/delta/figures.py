"""The figures of one text in a certificate: windows, measurement, continuations and budgets."""

from collections.abc import Sequence
from typing import Any

from tether.causal.mixture import Mixture
from tether.delta.account import account
from tether.delta.continuations import (
    PROMPT,
    Written,
    continue_texts,
    generated_account,
    generated_part,
    prompts,
    text_windows,
)
from tether.delta.declared import alone_figures
from tether.delta.measure import Variant, measure
from tether.delta.planned import budget_figures
from tether.delta.record import Settings
from tether.delta.regret import account_figures
from tether.delta.summary import summarise
from tether.delta.values import served_values
from tether.delta.windows import Windows, window_text
from tether.processes import current

__all__ = ["budgeted", "prepare", "served_variant", "text_figures"]


def prepare(
    documents: Sequence[str], tokenizer: Any, chosen: Settings, name: str, *, whole: bool = False
) -> tuple[Windows, Written | None]:
    """Cut a text into windows, and take the beginnings of documents that the model shall go on from.

    Args:
        documents: of the text.
        tokenizer: from `tether.delta.windows.reader`.
        chosen: how the text is measured.
        name: of the text, for messages.
        whole: measure the document that reaches the limit of tokens whole, as old certificates have it.

    Returns:
        The windows, and the beginnings or None where nothing is continued.
    """
    called = f"text {name}"
    windows = window_text(
        documents, tokenizer, length=chosen.window, tokens=chosen.tokens, per_document=chosen.per_document,
        name=called, whole=whole,
    )  # fmt: skip
    if not chosen.continuations:
        return windows, None
    return windows, prompts(documents, tokenizer, chosen.continuations, name=called)


def text_figures(
    fused: Any,
    windows: Windows,
    begun: Written | None,
    chosen: Settings,
    *,
    documents: str,
    on_step: Any = None,
    written: Written | None = None,
) -> dict[str, Any]:
    """Measure a fused model on a text.

    Args:
        fused: the model.
        windows: of the text.
        begun: beginnings to go on from, or None.
        chosen: how.
        documents: hash of the text's documents, by which budgets that were declared on it are known.
        on_step: called with `done` and `total` tokens.
        written: what the model wrote, or None to let it write.

    Returns:
        What `summarise` gives (`account_figures` for a fusion by evidence), `continuations` where asked for, what the
        `budgets` allow (of a sum), `alone`, the drifts that deltas are held to (`tether.delta.declared`), and `values`,
        what happened to numbers (`tether.delta.values`).
    """
    found = _figures(fused, windows, begun, chosen, on_step, written)
    alone = alone_figures(fused, windows, documents, chosen.confidence)
    found |= {"alone": alone, "values": served_values(fused, windows)}
    return budgeted(fused, found)


def budgeted(fused: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Put what budgets allow beside a text's figures.

    Args:
        fused: the model.
        row: its figures.

    Returns:
        The figures with `budgets`, of a sum, and with `alone`, which is empty where nothing was measured.
    """
    row = {"alone": {}} | row
    if isinstance(fused.fusion, Mixture):
        return row
    return row | {"budgets": budget_figures(fused.config.fusion, row["latent_drift"]["mean"])}


def _figures(
    fused: Any,
    windows: Windows,
    begun: Written | None,
    chosen: Settings,
    on_step: Any,
    written: Written | None,
) -> dict[str, Any]:
    shares = {"quantile": chosen.quantile, "confidence": chosen.confidence}
    if isinstance(fused.fusion, Mixture):
        return _by_evidence(fused, windows, begun, chosen, on_step, written, shares)
    figures = summarise(
        measure(fused, fused.fusion, windows, [served_variant(fused)], on_step=on_step), 0, **shares
    )
    if begun is None:
        return figures
    if written is None:
        written = _continued(fused, begun, chosen)
    result = measure(fused, fused.fusion, text_windows(written), [served_variant(fused)], on_step=on_step)
    own = summarise(generated_part(result, chosen.continuation_tokens), 0, **shares)
    return figures | {"continuations": own | _texts(written)}


# One process writes: a token follows from those before it.
def _continued(fused: Any, begun: Written, chosen: Settings) -> Written:
    return current().once(lambda: continue_texts(fused, begun, chosen.continuation_tokens, chosen.seed))


def _texts(written: Written) -> dict[str, Any]:
    texts = {"prompt": PROMPT, "ids": written.ids.tolist()}
    return texts if written.values is None else texts | {"values": written.values.tolist()}


def _by_evidence(
    fused: Any,
    windows: Windows,
    begun: Written | None,
    chosen: Settings,
    on_step: Any,
    written: Any,
    shares: Any,
) -> dict[str, Any]:
    mixture, numbers = fused.fusion, None
    if fused.config.num_token_id is not None:
        numbers = windows.targets[windows.targets >= 0] == fused.config.num_token_id
    (found,) = account([fused], windows, on_step=on_step)
    figures = account_figures(mixture, found, numbers=numbers, **shares)
    if begun is None:
        return figures
    if written is None:
        written = _continued(fused, begun, chosen)
    (found,) = account([fused], text_windows(written), written=PROMPT, on_step=on_step)
    own = account_figures(mixture, generated_account(found, chosen.continuation_tokens), **shares)
    # What is promised of regret is promised of text that is given.
    own.pop("regret")
    return figures | {"continuations": own | _texts(written)}


def served_variant(fused: Any) -> Variant:
    """Say how a sum adds its deltas when it is served.

    Args:
        fused: a fusion by sum.

    Returns:
        The variant to measure.
    """
    fusion = fused.fusion
    leash = fusion.leash or (None, "softmax")
    return Variant(tuple(fused.config.fusion["weights"]), fusion.chart, fusion.gated, *leash)
