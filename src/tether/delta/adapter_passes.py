"""Passes of the backbone with adapters: those that are awake, on the texts they are awake in, in one mixed batch."""

from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.delta.adapter_memory import AdapterMemory, Seat
from tether.delta.attached import Attached
from tether.errors import ConfigError

__all__ = ["Passes", "Text", "grouped"]

SPARE = 32
"""Tokens that are rather computed again than left to a pass of their own: weights are read once a pass, whatever the
number of tokens."""
TOKENS = 16384
"""Most tokens of a pass; memory grows with them."""

FEW = range(2, 5)
"""Rows for which a product on CPUs is done with columns on the right: the weight is read once, with rows on the left
once for each (docs/leash.md)."""


class Change(NamedTuple):
    """What an adapter makes of a linear layer: g * (W x + s (B A x + c)), and the base's own bias as it is.

    Attributes:
        a: A, shape (r, in).
        b: B, shape (out, r).
        scaling: s.
        bias: c, shape (out,), or None.
        gain: g, by which DoRA scales the rows of W + s B A, shape (out,); None for 1.
    """

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None
    gain: Tensor | None = None


class Text(NamedTuple):
    """All that was read of some texts, P positions.

    Attributes:
        ids: token ids, shape (B, P); -1 where only an embedding is known.
        mask: which positions carry a token, shape (B, P), bool.
        values: the number at each `<NUM>`, shape (B, P), or None.
        embeds: embeddings where ids are -1, shape (B, P, H), or None.
        positions: as the backbone was told, shape (B, P), or None where it was not.
        attention_mask: as the backbone was given, where nothing is remembered; else None.
    """

    ids: Tensor
    mask: Tensor
    values: Tensor | None = None
    embeds: Tensor | None = None
    positions: Tensor | None = None
    attention_mask: Any = None


def grouped(
    read: dict[Seat, int], end: int, spare: int = SPARE, most: int = TOKENS
) -> list[tuple[list[Seat], int]]:
    """Divide seats into batches that begin at one position each.

    Args:
        read: how far each seat has read.
        end: where all are to end.
        spare: most tokens of a batch that are computed again for its sake.
        most: most tokens of a batch.

    Returns:
        Seats, by adapter and text, and the position at which they begin.

    Example:
        >>> grouped({(0, 0): 9, (1, 0): 8, (2, 0): 0}, 10, spare=4)
        [([(0, 0), (1, 0)], 8), ([(2, 0)], 0)]
    """
    groups: list[tuple[list[Seat], int]] = []
    for seat in sorted(read, key=lambda seat: (-read[seat], seat)):
        start = read[seat]
        if groups:
            seats, _ = groups[-1]
            again = sum(read[other] - start for other in seats)
            if again <= spare and (len(seats) + 1) * (end - start) <= most:
                groups[-1] = ([*seats, seat], start)
                continue
        groups.append(([seat], start))
    return [(sorted(seats), start) for seats, start in groups]


class Passes:
    """The adapters of a fusion by evidence, as passes over texts.

    A pass computes what PEFT's batches with an adapter a row (`adapter_names`) compute. These are for PEFT's models
    around a backbone, and pick rows by lists in every layer, which costs as much as the backbone does for one token;
    here rows of one adapter are neighbours.

    Args:
        attached: twin of the backbone that holds the adapters; from now on it runs them by passes alone.
        names: of the adapters, in the order of the fusion.
        numeric: the model's embedding of numbers.

    Raises:
        ConfigError: adapters that do more to a linear layer than `Change` says.
    """

    def __init__(self, attached: Attached, names: list[str], numeric: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        self.attached, self.names, self.numeric = attached, names, numeric
        self.config: Any = attached.backbone.config
        self.spans: list[tuple[str, slice]] = []
        for name, layer in attached.peft.named_modules():
            if isinstance(layer, LoraLayer):
                dora = set(layer.lora_magnitude_vector)
                if set(layer.lora_variant) - dora or not layer.lora_A:
                    raise ConfigError(
                        f"{name}: by evidence only LoRA and DoRA on linear layers are served; use by='sum'"
                    )
                changes = {slot: _change_of(layer, slot) for slot in layer.lora_A}
                layer.forward = partial(self._moved, layer.base_layer, changes)  # the twin's own

    @torch.no_grad()
    def fill(self, into: Tensor, text: Text, awake: Tensor, first: int, memory: AdapterMemory | None) -> None:
        """Compute z' of the adapters that are awake anywhere in each text.

        An adapter reads on from where it stopped, to the last position in which any is awake; without a memory it
        begins at the beginning. Cost: one pass for all that stand at about the same position.

        Args:
            into: where to, shape (B, T, N, H); what belongs to an adapter that sleeps throughout a text stays.
            text: up to and with these T positions.
            awake: which adapters are awake in each, shape (B, T, N), bool.
            first: position of the first of the T.
            memory: how far the adapters have read; they are put back having read on.
        """
        seats = [(adapter, row) for row, adapter in awake.any(1).nonzero().tolist()]
        if not seats:
            return
        last = int(awake.any(-1).any(0).nonzero().max())
        end = first + last + 1
        known = {} if memory is None else memory.lengths()
        read = {seat: min(known.get(seat, 0), first) for seat in seats}
        for some, start in grouped(read, end):
            cache = None if memory is None else memory.take(some, start, self.config)
            adapters, rows = (torch.tensor(part, device=into.device) for part in zip(*some, strict=True))
            given = self._given(text, rows, start, end, remembered=cache is not None)
            states = self._run([self.names[adapter] for adapter, _ in some], given, cache)
            if memory is not None and cache is not None:
                memory.put(some, cache)
            into[rows, : last + 1, adapters] = states[:, first - start :].to(into.dtype)

    # Keyword arguments of the backbone for some texts from one position to another.
    def _given(self, text: Text, rows: Tensor, start: int, end: int, *, remembered: bool) -> dict[str, Any]:
        part = slice(start, end)
        ids = text.ids[rows, part]
        given: dict[str, Any] = {"input_ids": ids}
        if text.embeds is not None or (text.values is not None and bool(text.values[rows, part].any())):
            embedding: Any = self.attached.backbone
            embeds = embedding.get_input_embeddings()(ids.clamp(min=0))
            if text.values is not None:
                embeds = self.numeric(embeds, text.values[rows, part])
            if text.embeds is not None:
                embeds = torch.where((ids < 0).unsqueeze(-1), text.embeds[rows, part].to(embeds), embeds)
            given = {"inputs_embeds": embeds}
        mask = text.mask[rows, :end]
        given["attention_mask"] = None if bool(mask.all()) else mask.long()
        if not remembered:
            given["attention_mask"] = _masked(text.attention_mask, rows, end)
        given["position_ids"] = None if text.positions is None else text.positions[rows, part]
        return given

    def _run(self, names: list[str], given: dict[str, Any], cache: Any) -> Tensor:
        for name, some in groupby(enumerate(names), key=lambda pair: pair[1]):
            rows = [row for row, _ in some]
            self.spans.append((self.attached.slot(name), slice(rows[0], rows[-1] + 1)))
        try:
            output = self.attached.backbone(**given, past_key_values=cache, use_cache=cache is not None)
        finally:
            self.spans = []
        states: Tensor = output.last_hidden_state
        return states

    # A linear layer with the adapter of each row.
    def _moved(self, base: nn.Module, changes: dict[str, Change], rows: Tensor) -> Tensor:
        found = _product(base, rows)
        for slot, span in self.spans:
            if slot in changes:
                change = changes[slot]
                inner = nn.functional.linear(rows[span].to(change.a.dtype), change.a)
                added, scaling = nn.functional.linear(inner, change.b, change.bias), change.scaling
                if change.gain is not None:
                    gain, bias = change.gain.to(added), getattr(base, "bias", None)
                    own = found[span] if bias is None else found[span] - bias
                    added, scaling = scaling * gain * added + (gain - 1) * own.to(added), 1.0
                found[span].add_(added.to(found.dtype), alpha=scaling)
        return found


@torch.no_grad()
def _change_of(layer: Any, slot: str) -> Change:
    a, b, scaling = layer.lora_A[slot].weight, layer.lora_B[slot], layer.scaling[slot]
    if slot not in layer.lora_magnitude_vector:
        return Change(a, b.weight, scaling, b.bias)
    # PEFT computes these lengths anew in each call.
    base = layer.get_base_layer().weight.float()
    whole = (base.T if layer.fan_in_fan_out else base) + scaling * (b.weight.float() @ a.float())
    gain = layer.lora_magnitude_vector[slot].weight.float() / torch.linalg.norm(whole, dim=1)
    return Change(a, b.weight, scaling, b.bias, gain)


# What the layer does, for few rows in the other order.
def _product(layer: nn.Module, rows: Tensor) -> Tensor:
    count = rows.numel() // rows.shape[-1]
    few = count in FEW and rows.device.type == "cpu" and rows.dtype == torch.float32
    if not few or type(layer) is not nn.Linear:
        whole: Tensor = layer(rows)
        return whole
    found = (layer.weight @ rows.reshape(count, -1).T).T.reshape(*rows.shape[:-1], -1).contiguous()
    return found if layer.bias is None else found + layer.bias


def _masked(mask: Any, rows: Tensor, end: int) -> Any:
    if isinstance(mask, dict):
        return {kind: _masked(each, rows, end) for kind, each in mask.items()}
    if not isinstance(mask, Tensor):
        return None
    some = mask[rows] if len(mask) > 1 else mask
    return some[:, :end] if mask.dim() == 2 else some[..., :end, :end]
