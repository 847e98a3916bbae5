"""What an adapter does to texts: its drift on base text at any strength, and the change of the served law."""

import math
from typing import Any

import torch
from torch import Tensor

from tether.delta.adapter_drift import adapter_drift
from tether.delta.attached import Attached
from tether.delta.cache import hidden_states, text_inputs
from tether.delta.dealt import deal, put_together
from tether.delta.output_head import output_head
from tether.delta.source import reference, spread
from tether.delta.strength import Change, served_change
from tether.delta.windows import Windows

__all__ = ["BaseText", "adapter_change", "some_windows", "thinned"]

ROWS = 8
"""Windows of a pass."""


def some_windows(windows: Windows, rows: Tensor, tokens: int) -> Tensor:
    """Take windows that are spread evenly over the given ones, of about so many tokens in all.

    Args:
        windows: a text.
        rows: numbers of windows to take from, shape (W,).
        tokens: how many.

    Returns:
        Their numbers, at least one.
    """
    held = int(windows.starts.diff()[rows].sum())
    return rows[spread(len(rows), max(1, math.ceil(tokens * len(rows) / held)))]


def thinned(windows: Windows, tokens: int) -> Windows:
    """Take as much of a text as is needed, in windows spread evenly over it.

    Args:
        windows: a text.
        tokens: how many, about.

    Returns:
        The text itself where it is no longer.
    """
    if int(windows.starts[-1]) <= tokens:
        return windows
    return windows.some(some_windows(windows, torch.arange(len(windows.starts) - 1), tokens))


class BaseText:
    """Base text with the base's states at hand, on which adapters are measured; processes take a share of it each.

    Args:
        model: the base.
        windows: the text; its windows are taken evenly, so that many documents take part.
        tokens: measured on, about.

    Attributes:
        rows: the windows that are measured on.
        tokens: that they have.
    """

    @torch.no_grad()
    def __init__(self, model: Any, windows: Windows, tokens: int) -> None:
        self.model, self.windows = model, windows
        self.rows = some_windows(windows, torch.arange(len(windows.starts) - 1), tokens)
        self.tokens = int(windows.starts.diff()[self.rows].sum())
        own = deal(windows, self.rows)
        self._batches = [windows.batch(some) for some in own.split(ROWS) if len(some)]
        # Afresh from the backbone: what is cached is rounded to float16.
        self._before = [hidden_states(model, batch)[batch.mask] for batch in self._batches]

    @torch.no_grad()
    def drifts(
        self,
        attached: Attached,
        name: str,
        factor: float,
        metric: str = "softmax",
        fisher: Tensor | None = None,
    ) -> Tensor:
        """Measure an adapter at a factor.

        Cost: a pass of the backbone over the tokens, and for `softmax` two products with the output head.

        Args:
            attached: holds the adapter, which is left at that factor.
            name: of the adapter.
            factor: of its strength, >= 0.
            metric: one of `tether.delta.head.METRICS`.
            fisher: output Fisher, shape (C, C), for `fisher`.

        Returns:
            Drift of each token, nats, shape (tokens,).
        """
        attached.rescale(name, factor)
        drifts = []
        for base, batch in zip(self._before, self._batches, strict=True):
            states = attached.states(name, **text_inputs(self.model, batch)).last_hidden_state.float()
            drifts.append(adapter_drift(metric, self.model, base, states[batch.mask], fisher))
        return put_together([torch.cat(drifts)] if drifts else None)[0]

    @property
    def states(self) -> Tensor:
        """The base's states at the tokens that are measured on, shape (tokens, H), float32."""
        return put_together([torch.cat(self._before)] if self._before else None)[0]


@torch.no_grad()
def adapter_change(
    model: Any, attached: Attached, name: str, windows: Windows, rows: Tensor
) -> tuple[Change, Tensor]:
    """Measure what an adapter does to the served softmax in some windows of a text; processes take a share each.

    Args:
        model: the base.
        attached: holds the adapter, at whatever strength it has been given.
        name: of the adapter.
        windows: the text.
        rows: numbers of windows, shape (W,).

    Returns:
        Drift and losses of each token, and the number of its document.
    """
    output = output_head(model)
    found, documents = [], []
    for some in filter(len, deal(windows, rows).split(ROWS)):
        batch = windows.batch(some)
        moved = attached.states(name, **text_inputs(model, batch)).last_hidden_state.float()
        states = hidden_states(model, batch)[batch.mask], moved[batch.mask]
        before, after = (reference(model, each).loc for each in states)
        at = windows.positions(batch)
        law = output.log_prob(before)
        found.append(served_change(law, after, windows.targets[at].to(after.device), output))
        documents.append(windows.documents[at])
    own = (
        [*(torch.cat(values) for values in zip(*found, strict=True)), torch.cat(documents)] if found else None
    )
    *change, numbers = put_together(own)
    return Change(*change), numbers
