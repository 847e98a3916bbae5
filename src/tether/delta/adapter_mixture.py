"""Adapters as the experts of a fusion by evidence: the base and each adapter alone, weighted by the text so far."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tether.causal.memory import Memory
from tether.causal.mixture import Mixture
from tether.causal.walk import Reading
from tether.delta.adapter_backbone import but_meta
from tether.delta.adapter_memory import AdapterMemory
from tether.delta.adapter_passes import Passes, Text
from tether.errors import ConfigError

__all__ = ["AdapterMixture"]


class AdapterMixture(Mixture):
    """A mixture whose experts are the base and each adapter whole.

    Its features are z, then z' of each adapter, shape (..., H (1 + N)). The backbone gives z; when it is known who is
    awake, z' of those is computed, and what sleeps costs no pass.

    Args:
        abduction: the base's, frozen.
        description: as of `Mixture`; each domain has the strength 1 alone.
        passes: of the adapters.

    Raises:
        ConfigError: another strength: how an adapter moves the law at half of it is not half of the move.
    """

    remembers: type[Memory] = AdapterMemory

    def __init__(self, abduction: nn.Module, description: dict[str, Any], passes: Passes) -> None:
        head: Any = abduction
        # The heads of deltas are not needed: on the meta device they take no memory.
        with torch.device("meta"):
            super().__init__(head.loc.in_features, head.loc.out_features, description)
        if any(each != (1.0,) for each in self.strengths):
            raise ConfigError(f"strengths {self.strengths} of adapters: expected 1 for each")
        # Not submodules: one is the model's, the other shares the backbone's weights.
        self.kept = (abduction, passes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterMixture":
        super()._apply(but_meta(fn), recurse)
        return self

    def moves(self, domain: int, features: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Give the law of U that an adapter's state has.

        Args:
            domain: number of the adapter.
            features: z and each z' at some contexts, shape (R, H (1 + N)).
            loc: base loc of U there, shape (R, C).
            log_scale: base log scale of U there, shape (R, C).

        Returns:
            loc and log scale of U under the adapter, shape (1, R, C) each.
        """
        abduction: Any = self.kept[0]
        width = self.hidden_size
        adapted = features[:, width * (1 + domain) : width * (2 + domain)]
        moved_loc, moved_log_scale = abduction(adapted.to(abduction.loc.weight.dtype))
        return moved_loc.to(loc).unsqueeze(0), moved_log_scale.to(log_scale).unsqueeze(0)

    def read(self, reading: Reading, awake: Tensor, memory: Memory | None) -> Reading:
        """Compute z' of the adapters that are awake.

        Args:
            reading: whose features are z, shape (B, T, H).
            awake: which adapters are awake, shape (B, T, N), bool.
            memory: of the positions before.

        Returns:
            The same with z' beside z, 0 where an adapter sleeps throughout the call.
        """
        features = self._widened(reading.features)
        memory = memory if isinstance(memory, AdapterMemory) else None
        past = 0 if memory is None else len(memory)
        if bool(awake.any()):
            self.kept[1].fill(self._adapted(features), self._text(reading, memory), awake, past, memory)
        return reading._replace(features=features)

    def read_last(self, features: Tensor, awake: Tensor, memory: Memory) -> Tensor:
        """Compute z' at the last position that is remembered, of whose law nobody had asked.

        Args:
            features: what is remembered of it, shape (B, H (1 + N)).
            awake: which adapters are awake there, shape (B, N), bool.
            memory: with that position at its end.

        Returns:
            The features with z'.
        """
        assert isinstance(memory, AdapterMemory)
        found = features.clone().unsqueeze(1)
        text = self._remembered(memory, {})
        self.kept[1].fill(self._adapted(found), text, awake.unsqueeze(1), len(memory) - 1, memory)
        completed: Tensor = found.squeeze(1)
        return completed

    def beside(self, reading: Reading, memory: Memory) -> dict[str, Tensor]:
        """Give what is remembered of a call for adapters that sleep now and wake later: its text.

        Args:
            reading: of the call.
            memory: of the positions before.

        Returns:
            Tensors of shape (B, T, ...) by name.
        """
        assert isinstance(memory, AdapterMemory)
        memory.placed = memory.placed or (reading.given or {}).get("position_ids") is not None
        spelled = _spelled(reading, len(memory))
        spelled.pop("mask")  # every mixture remembers it
        return spelled

    def _widened(self, states: Tensor) -> Tensor:
        width = self.hidden_size
        features = states.new_zeros(*states.shape[:2], width * (1 + len(self.domains)))
        features[..., :width] = states[..., :width]
        return features

    def _adapted(self, features: Tensor) -> Tensor:
        beside: Tensor = features[..., self.hidden_size :].unflatten(
            -1, (len(self.domains), self.hidden_size)
        )
        return beside

    # The text up to the end of a call.
    def _text(self, reading: Reading, memory: AdapterMemory | None) -> Text:
        told = dict(reading.given or {})
        if memory is not None:
            text = self._remembered(memory, _spelled(reading, len(memory)))
            placed = memory.placed or told.get("position_ids") is not None
            return text if placed else text._replace(positions=None)
        spelled = _spelled(reading, 0)
        if told.get("position_ids") is None:
            spelled.pop("positions")
        return Text(**spelled, attention_mask=told.get("attention_mask"))

    def _remembered(self, memory: AdapterMemory, new: dict[str, Tensor]) -> Text:
        whole = AdapterMemory()
        names = Text._fields[:-1]
        held = {name: memory.held[name] for name in names if name in memory.held}
        for part in (held, new):
            if part:
                whole.append(**part)
        text = Text(**whole.held)
        return text if memory.placed or new else text._replace(positions=None)


# The text of a call, in the names of `Text`.
def _spelled(reading: Reading, past: int) -> dict[str, Tensor]:
    told = reading.given or {}
    batch, length = reading.mask.shape
    device = reading.mask.device
    places, ids = told.get("position_ids"), reading.ids
    if places is None:
        places = torch.arange(past, past + length, device=device)
    elif places.dim() != 2:
        raise ConfigError(
            f"position_ids of shape {tuple(places.shape)} with adapters by evidence: expected one position a token"
        )
    spelled = {
        "ids": torch.full((batch, length), -1, device=device) if ids is None else ids,
        "mask": reading.mask,
        "positions": places.expand(batch, length),
    }
    if reading.values is not None:
        spelled["values"] = reading.values
    if ids is None:
        spelled["embeds"] = told["inputs_embeds"].detach()
    return spelled
