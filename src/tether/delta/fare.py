"""How each domain fares in a fusion, against its delta alone and the base, on documents that no fit saw."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tether.causal.mixture import Mixture
from tether.delta.account import account
from tether.delta.adapter_probe import thinned
from tether.delta.delta import Delta
from tether.delta.figures import served_variant
from tether.delta.fusion import fuse, unfuse
from tether.delta.measure import Variant, measure
from tether.delta.regret import shares
from tether.delta.windows import reader, window_text
from tether.store.marked import Controlled

__all__ = ["HARM", "Fare", "fare"]

HARM = 0.02
"""Nats a token by which a domain may be worse than the base, or than its delta alone, before `fuse` warns."""

CHECKED = 8_192
"""Tokens of a domain that are measured, spread over its documents."""


class Fare(NamedTuple):
    """One domain in a fusion; mean loss in nats a token.

    Attributes:
        tokens: that were predicted.
        base: loss of the base.
        alone: loss with the domain's delta alone, always on.
        fused: loss of the fusion.
        share: weight of the domain in a fusion by evidence, mean over the tokens; None in a sum.
    """

    tokens: int
    base: float
    alone: float
    fused: float
    share: float | None

    @property
    def harmed(self) -> bool:
        """Whether the fusion is worse on this domain than the base, or clearly worse than the delta alone."""
        return self.fused > self.base + HARM or self.fused > max(self.alone, self.base) + HARM


def fare(
    fused: Any,
    tokenizer: Any,
    given: Mapping[str, Sequence[str]] | None = None,
    *,
    samples: Mapping[str, Delta] | None = None,
    window: int = 256,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Fare]:
    """Measure each domain of a fusion on documents of its own.

    Cost: one backbone pass over at most `CHECKED` tokens of a domain, and a few products with the output head.

    Args:
        fused: a fusion of deltas.
        tokenizer: of its base.
        given: documents by domain; they go before the samples.
        samples: the deltas as they were loaded, by domain, for the held-out documents they carry; None or a delta
            without a sample leaves its domain out.
        window: tokens a context.
        on_step: called with `done` and `total` tokens of a domain.

    Returns:
        By domain, those left out that have no documents.
    """
    base, deltas = unfuse(fused)
    found = {}
    for delta in deltas:
        documents: Sequence[str] = (given or {}).get(delta.name, ())
        if not documents and samples is not None and delta.name in samples:
            # What it carries of a conversation was written by a chat template, whose control tokens count.
            documents = list(map(Controlled, samples[delta.name].sample))
        if not documents:
            continue
        windows = window_text(
            documents, reader(fused, tokenizer), length=window, name=f"documents of {delta.name}", short=True
        )
        windows = thinned(windows, CHECKED)
        single = fuse(base, {delta: 1.0}, by="sum", gated=False)
        alone = measure(base, single.fusion, windows, [Variant((1.0,), "symmetric", False)], on_step=on_step)
        share = None
        if isinstance(fused.fusion, Mixture):
            (own,) = account([fused], windows, on_step=on_step)
            nll, share = own.nll, shares(fused.fusion, own)[delta.name]
        else:
            nll = measure(base, fused.fusion, windows, [served_variant(fused)], on_step=on_step).nll[0]
        before, single_nll, after = (float(v.double().mean()) for v in (alone.base_nll, alone.nll[0], nll))
        found[delta.name] = Fare(len(alone.base_nll), before, single_nll, after, share)
    return found
